"""Programs that start warm: forks of one process of an environment that has imported the dependencies, and no tcbench.

Importing torch and diffusers costs every job of a workflow seconds, on a machine with GPUs up to twenty. The package
itself is imported by each fork anew, as by any program, and CUDA is started by none before it is forked. Imports no
torch.
"""

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from tcbench.errors import UserError

SLOW = (
    "torch", "diffusers.models.transformers.transformer_2d", "diffusers.hooks", "torch_fidelity", "peft",
    "scipy.special", "pandas", "matplotlib.figure", "scipy.stats", "sklearn.datasets",
)  # fmt: skip
"""What the stages import of the dependencies, where it takes long."""

PROGRAMS = "TCBENCH_PROGRAMS"
"""The environment variable of a folder of programs that jobs of the workflow take before their Python's own."""

SERVER = """
import atexit, gc, json, os, select, signal, socket, sys
from importlib import import_module

signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the jobs

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
        hung_up = select.poll()
        hung_up.register(caller, 0)  # what is left is POLLHUP: the program was killed
        while not (ended := os.waitpid(job, os.WNOHANG))[0]:
            if hung_up.poll(50):
                os.kill(job, signal.SIGTERM)
                os._exit(0)
        caller.send(bytes([os.waitstatus_to_exitcode(ended[1]) & 255]))
        os._exit(0)
    signal.signal(signal.SIGINT, signal.default_int_handler)
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
def warm_jobs() -> Iterator[None]:
    """While this lasts, jobs of workflows that this process starts run as forks of one that imported what they need."""
    with TemporaryDirectory() as folder:
        program = Path(folder) / "tcbench"
        with warm_programs(sys.executable, {program: "tcbench.cli:main"}, os.environ):
            os.environ[PROGRAMS] = folder
            try:
                yield
            finally:
                del os.environ[PROGRAMS]


@contextmanager
def warm_programs(
    python: Path | str, programs: Mapping[Path, str], environment: Mapping[str, str], modules: Sequence[str] = SLOW
) -> Iterator[None]:
    """Write executable files that run as the environment's programs do, while this lasts.

    Args:
        python: of the environment.
        programs: an entry point, "module:function", by file.
        environment: variables of the process; a program's own are those of its caller.
        modules: what it imports before.

    Raises:
        UserError: it cannot import them, or not run.
    """
    with TemporaryDirectory() as folder:  # a socket's path must be short
        path = f"{folder}/socket"
        command = [python, "-P", "-c", SERVER, path, *modules]  # files beside a run are no modules of its programs
        with subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.PIPE) as server:
            assert server.stdout is not None
            if server.stdout.readline() != b"ready\n":
                raise UserError("the process that warm jobs are forks of did not start, for the reason above")
            try:
                for file, entry in programs.items():
                    file.write_text(PROGRAM.format(python=sys.executable, path=path, entry=entry.split(":")))
                    file.chmod(0o755)
                yield
            finally:
                server.terminate()
