"""A real Slurm on this machine alone, for tests: Debian's packages `slurm-wlm` and `munge`, started by root.

Its GPUs are character devices that do nothing; it listens on the loopback address and leaves nothing behind.
"""

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

CONF = """
ClusterName=pretended
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
GresTypes=gpu
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
SlurmdParameters=config_overrides
ReturnToService=2
MinJobAge=300
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
NodeName={host} NodeAddr=127.0.0.1 CPUs=16 RealMemory=600000 Gres=gpu:{gpus} State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


CONFIGURED = Path("/etc/slurm")
"""Where jobs look: Snakemake's plugin takes Slurm's variables out of their environment, that of the file among them."""


def can_run() -> bool:
    """Whether this is root, with the packages installed, and no Slurm is set up here."""
    if (CONFIGURED / "slurm.conf").exists():
        return False
    return os.getuid() == 0 and all(shutil.which(name) for name in ("slurmctld", "slurmd", "munged", "sbatch"))


@contextmanager
def cluster(folder: Path, gpus: int) -> Iterator[dict[str, str]]:
    """Bring it up, with all its files but its configuration in `folder`; gives the environment of its commands."""
    folder.mkdir(parents=True)
    for name in ("state", "spool", "munge"):
        (folder / name).mkdir()
    with socket.socket() as one, socket.socket() as two:
        for free in (one, two):
            free.bind(("127.0.0.1", 0))
        ports = one.getsockname()[1], two.getsockname()[1]
    conf, resources = CONFIGURED / "slurm.conf", CONFIGURED / "gres.conf"
    conf.write_text(CONF.format(host=socket.gethostname(), folder=folder, gpus=gpus, ports=ports))
    for number in range(gpus):
        os.mknod(folder / f"nvidia{number}", 0o020666, os.makedev(1, 3))
    files = f"{folder}/nvidia[0-{gpus - 1}]" if gpus > 1 else f"{folder}/nvidia0"
    resources.write_text(f"AutoDetect=off\nName=gpu File={files}\n")
    environment = dict(os.environ)
    daemons: list[subprocess.Popen[bytes]] = []
    try:
        if not Path("/run/munge/munge.socket.2").exists():
            Path("/run/munge").mkdir(exist_ok=True)
            shutil.chown("/run/munge", "munge", "munge")
            daemons.append(subprocess.Popen(["munged", "--foreground"], user="munge", stderr=subprocess.DEVNULL))
        for name in ("slurmctld", "slurmd"):
            daemons.append(subprocess.Popen([name, "-D", "-f", conf], env=environment, stderr=subprocess.DEVNULL))
        deadline = time.monotonic() + 120
        while "idle" not in _nodes(environment):
            assert time.monotonic() < deadline, f"Slurm does not come up; see {folder}/*.log: {_nodes(environment)}"
            time.sleep(0.3)
        yield environment
    finally:
        subprocess.run(["scancel", "--user=root"], env=environment, capture_output=True, timeout=30)
        for daemon in reversed(daemons):
            daemon.terminate()
            daemon.wait(30)
        conf.unlink()
        resources.unlink()


def _nodes(environment: dict[str, str]) -> str:
    return subprocess.run(["sinfo", "-h", "-o", "%T"], env=environment, capture_output=True, text=True).stdout
