"""The GPUs of this machine, and leases on them: a job works on one that no other job has. Imports no torch.

A lease is a lock (`flock`) on a file that stands for the GPU, in a folder that all users of the machine share. The
kernel frees it when the last process that holds it ends, however it ends. It is advice: programs of others do not ask.

Small models leave a GPU idle most of the time. Where `SEATS` says that jobs share one, each locks the GPU's file with
others, and a file of its own for its seat. A GPU that others come to and leave is never free for a job that needs it
alone, so such a job locks a third file while it waits: it is next, and nobody else sits down there.
"""

import fcntl
import os
import random
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Collection, Sequence
from contextlib import suppress
from pathlib import Path

from tcbench.errors import UserError

VISIBLE = "CUDA_VISIBLE_DEVICES"
"""CUDA's own environment variable: which GPUs a process may use. Slurm sets it, and so does a lease."""

FOLDER = "TCBENCH_LEASES"
"""The environment variable of the folder of the locks, for containers that share GPUs but not /tmp."""

SEATS = "TCBENCH_JOBS_PER_GPU"
"""The environment variable of how many jobs share a GPU; 1 if it is not set. Timings have theirs alone in any case."""

PRETEND = "TCBENCH_PRETEND_GPUS"
"""The environment variable of a number of GPUs that are not there: suites of the CPU are then run in the parts and with
the leases of a machine that has so many, and compute on the CPU. For tests of all that needs no GPU."""

NVML_CHECK = "PYTORCH_NVML_BASED_CUDA_CHECK"
"""PyTorch's environment variable that lets `torch.cuda.is_available()` ask the driver's management library. Without it
that question starts CUDA, which looks at $CUDA_VISIBLE_DEVICES once and never again; diffusers asks when imported,
before any lease."""

WAIT_S = 0.2
"""Between two looks for a free GPU, on average."""

_leases: dict[str, list[int]] = {}
"""File descriptors of the locks that this process holds, by GPU; processes forked from it hold them too."""

_shared = False
"""Whether the last lease was of a seat."""


def uses_gpus(device: str) -> bool:
    """Whether suites of this `model.device` run on GPUs, or pretend to."""
    return device == "cuda" or bool(os.environ.get(PRETEND))


def visible_gpus() -> tuple[str, ...]:
    """The GPUs that this process may use, by the driver's unique names: all, or those of $CUDA_VISIBLE_DEVICES.

    That variable may count GPUs, in the driver's order; where a machine has different ones, set
    CUDA_DEVICE_ORDER=PCI_BUS_ID, as CUDA otherwise counts the fastest first.
    """
    present, asked = _present(), os.environ.get(VISIBLE)
    if asked is None:
        return present
    found: list[str] = []
    for word in filter(None, (part.strip() for part in asked.split(","))):
        matching = [present[int(word)]] if word.isdecimal() and int(word) < len(present) else []
        matching = matching or [name for name in present if name.startswith(word)]
        if len(matching) != 1 or matching[0] in found:
            break  # as CUDA, which sees none behind one that it does not know
        found += matching
    return tuple(found)


def _present() -> tuple[str, ...]:
    """Unique names of the machine's GPUs; of those that are split (MIG), of their parts."""
    if pretended := os.environ.get(PRETEND):
        if not pretended.isdecimal():
            raise UserError(f"{PRETEND}={pretended}: give a number of GPUs")
        return tuple(f"pretended-{number}" for number in range(int(pretended)))
    if not (program := shutil.which("nvidia-smi")):
        return ()
    listed = subprocess.run([program, "-L"], capture_output=True, text=True)
    return listed_gpus(listed.stdout) if listed.returncode == 0 else ()


def listed_gpus(listing: str) -> tuple[str, ...]:
    """The unique names in what `nvidia-smi -L` prints."""
    found: list[str] = []
    for name in re.findall(r"\(UUID: ((?:GPU|MIG)-[^)\s]+)\)", listing):
        if name.startswith("MIG-") and found and found[-1].startswith("GPU-"):
            found.pop()  # the GPU that this is the first part of
        found.append(name)
    return tuple(found)


def said_of_gpu(field: str) -> str:
    """What the driver says of the first GPU under a name that `nvidia-smi --help-query-gpu` lists; "" if it is silent.
    torch would take seconds to ask."""
    asked = ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader,nounits", "--id=0"]
    try:
        return subprocess.run(asked, capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


def jobs_per_gpu() -> int:
    """How many jobs share a GPU; raises UserError if `SEATS` is no such number."""
    asked = os.environ.get(SEATS) or "1"
    if not asked.isdecimal() or int(asked) < 1:
        raise UserError(f"{SEATS}={asked}: give a number of jobs, 1 or more")
    return int(asked)


def lease(count: int = 1, alone: bool = False) -> None:
    """Have so many GPUs for this process, until it ends or `release`s them; wait until as many are free.

    CUDA then sees these alone, so nothing may have used it before. A process that has them already keeps them.

    Args:
        alone: share with no other job, whatever `SEATS` says, as do jobs that need several.

    Raises:
        UserError: there are fewer, or the folder of locks cannot be used.
    """
    global _shared
    if len(_leases) >= count:
        return
    visible, seats = visible_gpus(), 1 if alone or count > 1 else jobs_per_gpu()
    if len(visible) < count:
        needed = f"needs {count} GPUs, and this process sees {len(visible)}" if count > 1 else "no usable GPU"
        raise UserError(f"{needed}; see nvidia-smi and ${VISIBLE}, or set device: cpu")
    said, next_on = False, dict[str, list[int]]()
    while not (taken := _take(visible, count, seats, next_on)):
        if not said:
            print(f"waiting for {count} of {len(visible)} GPUs: leased by other jobs ({_folder()})", file=sys.stderr)
            said = True
        if seats == 1 and not next_on:
            next_on = _reserve(visible, count)
        time.sleep(WAIT_S * random.uniform(0.5, 1.5))  # so that two that take each other's do not go on so
    for locks in next_on.values():
        _close(locks)
    release()
    _leases.update(taken)
    _shared = seats > 1
    os.environ[VISIBLE] = ",".join(taken)


def start_again_alone(arguments: Sequence[str]) -> None:
    """After a shared GPU's memory did not suffice, run `tcbench` with these arguments in this process's place, with the
    GPU to itself; what is finished is kept. Returns if this process shared none."""
    if not _shared:
        return
    print("out of GPU memory beside other jobs: starting again, alone on the GPU", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os.environ[SEATS] = "1"
    os.closerange(3, os.sysconf("SC_OPEN_MAX"))  # the locks, and the GPU's memory with the driver's files
    os.execv(sys.executable, [sys.executable, "-m", "tcbench", *arguments])


def release() -> None:
    """Give the GPUs back. CUDA goes on seeing them alone, so that a process that leases again gets the same."""
    while _leases:
        _close(_leases.popitem()[1])


def check_seen(seen: int) -> None:
    """Compare the number of GPUs that CUDA sees, once it has started, with the leases of this process.

    Raises:
        RuntimeError: CUDA was started before the lease, and would compute on other jobs' GPUs.
    """
    if seen != len(_leases):
        raise RuntimeError(f"{len(_leases)} GPUs are leased and CUDA sees {seen}: it was started before the lease")


def _take(names: tuple[str, ...], count: int, seats: int = 1, next_on: Collection[str] = ()) -> dict[str, list[int]]:
    """Locks on the first `count` GPUs that are free, or have one of so many seats free; on none, if they are fewer.

    Args:
        next_on: GPUs that this job reserved. Those that another reserved are not free.
    """
    taken: dict[str, list[int]] = {}
    for seat in range(seats):  # the first of every GPU before the second of any
        for name in names:
            turn = _locked((_reserving(name), fcntl.LOCK_SH))  # for this moment: nobody is next
            if turn or name in next_on:
                whole, part = (name, fcntl.LOCK_EX), ((name, fcntl.LOCK_SH), (f"{name}.{seat}", fcntl.LOCK_EX))
                if locks := _locked(whole) if seats == 1 else _locked(*part):
                    taken[name] = locks
            _close(turn)
            if len(taken) == count:
                return taken
    for locks in taken.values():
        _close(locks)
    return {}


def _reserve(names: tuple[str, ...], count: int) -> dict[str, list[int]]:
    """Locks that make this job the next on `count` of these GPUs; none if others are next on too many, so that no two
    jobs wait for each other."""
    reserved: dict[str, list[int]] = {}
    for name in names:
        if len(reserved) < count and (locks := _locked((_reserving(name), fcntl.LOCK_EX))):
            reserved[name] = locks
    if len(reserved) < count:
        for locks in reserved.values():
            _close(locks)
        return {}
    return reserved


def _reserving(name: str) -> str:
    return f"{name}.next"


def _locked(*ways: tuple[str, int]) -> list[int]:
    """Locks on files, each in its way (`flock`'s: shared or exclusive); none if another job's are in the way of one."""
    locks: list[int] = []
    for file, way in ways:
        locks.append(_lock_file(file))
        try:
            fcntl.flock(locks[-1], way | fcntl.LOCK_NB)
        except BlockingIOError:
            _close(locks)
            return []
    return locks


def _close(locks: list[int]) -> None:
    for descriptor in locks:
        os.close(descriptor)


def _folder() -> Path:
    return Path(os.environ.get(FOLDER) or "/tmp/tcbench-leases")  # not $TMPDIR, which differs between jobs


def _lock_file(name: str) -> int:
    """A descriptor of a GPU's lock file, which whoever comes first makes and everybody may read, so that nobody can
    write to another's; the sticky bit keeps cleaners of /tmp away from it."""
    folder = _folder()
    path = folder / f"{name}.lock"
    try:
        if not folder.exists():
            folder.mkdir(parents=True, exist_ok=True)
            with suppress(PermissionError):  # of one who came a moment earlier
                folder.chmod(0o1777)
        try:
            return os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
        except FileNotFoundError:
            descriptor = os.open(path, os.O_RDONLY | os.O_CREAT | os.O_NOFOLLOW, 0o644)
            with suppress(PermissionError):
                os.fchmod(descriptor, 0o1644)
            return descriptor
    except OSError as error:
        raise UserError(
            f"{path}: cannot be opened ({error.strerror}); make it writable for all or name another in ${FOLDER}"
        ) from error
