"""Programs that start warm: forks of one process of an environment that has imported the dependencies, and no tcbench.

Importing torch and diffusers costs every job of a workflow seconds, and what is tested is not theirs. The package
itself is imported by each fork anew, as by any program.
"""

import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

SLOW = (
    "torch", "diffusers.models.transformers.transformer_2d", "diffusers.hooks", "torch_fidelity", "peft",
    "scipy.special", "pandas",
)  # fmt: skip
"""What the stages import of the dependencies, where it takes long."""

WORKFLOW = (*SLOW, "matplotlib.figure", "scipy.stats", "sklearn.datasets", "snakemake.cli")
"""And a workflow around them."""

SERVER = """
import atexit, gc, json, os, signal, socket, sys
from importlib import import_module

def reap(*_):  # so that their time counts as this process's
    while True:
        try:
            if not os.waitpid(-1, os.WNOHANG)[0]:
                return
        except ChildProcessError:
            return


path, *modules = sys.argv[1:]
for module in modules:
    import_module(module)
gc.freeze()  # a fork that collected what it has no part in would copy it all, for seconds, when it ends at the latest
listener = socket.socket(socket.AF_UNIX)
listener.bind(path)
listener.listen()
print("ready", flush=True)
signal.signal(signal.SIGCHLD, reap)
while True:
    caller, _ = listener.accept()
    if os.fork():
        caller.close()
        continue
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    listener.close()
    content, files, *_ = socket.recv_fds(caller, 1 << 20, 3)
    while more := caller.recv(1 << 20):
        content += more
    if job := os.fork():
        caller.send(bytes([os.waitstatus_to_exitcode(os.waitpid(job, 0)[1]) & 255]))
        os._exit(0)
    caller.close()
    (module, function), arguments, folder, environment = json.loads(content)
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = arguments
    try:
        status = getattr(import_module(module), function)() or 0
    except SystemExit as end:
        status = end.code or 0
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # as a program ends, but for taking apart all that was imported, which would copy it
"""

PROGRAM = """#!{python} -ISB
import json, os, socket, sys

with socket.socket(socket.AF_UNIX) as server:
    server.connect({path!r})
    request = json.dumps([{entry!r}, sys.argv, os.getcwd(), dict(os.environ)]).encode()
    sent = socket.send_fds(server, [request], [0, 1, 2])
    server.sendall(request[sent:])
    server.shutdown(socket.SHUT_WR)
    status = server.recv(1)
sys.exit(status[0] if status else "the program did not end by itself")
"""


@contextmanager
def warm_programs(
    python: Path | str, programs: Mapping[Path, str], environment: Mapping[str, str], modules: Sequence[str] = WORKFLOW
) -> Iterator[None]:
    """Write executable files that run as the environment's programs do, while this lasts.

    Args:
        python: of the environment.
        programs: an entry point, "module:function", by file.
        environment: variables of the process; a program's own are those of its caller.
        modules: what it imports before.
    """
    with TemporaryDirectory() as folder:  # a socket's path must be short
        path = f"{folder}/socket"
        command = [python, "-c", SERVER, path, *modules]
        with subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.PIPE) as server:
            assert server.stdout is not None and server.stdout.readline() == b"ready\n"
            try:
                for file, entry in programs.items():
                    file.write_text(PROGRAM.format(python=sys.executable, path=path, entry=entry.split(":")))
                    file.chmod(0o755)
                yield
            finally:
                server.terminate()
