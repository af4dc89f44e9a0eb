"""Leases: no two processes have one GPU, whatever is killed; and which GPUs a process sees."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tcbench.errors import UserError
from tcbench.outside import devices

ROOT = Path(__file__).parent.parent


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Four pretended GPUs with locks of their own."""
    monkeypatch.setenv(devices.FOLDER, str(tmp_path / "leases"))
    monkeypatch.setenv(devices.PRETEND, "4")
    monkeypatch.setenv(devices.VISIBLE, "0,1,2,3")
    yield tmp_path
    devices.release()


LISTING = """GPU 0: NVIDIA A100-SXM4-80GB (UUID: GPU-5d5ba0d6-d33d-2b2c-524d-9e3d8d2b8a77)
  MIG 3g.40gb     Device  0: (UUID: MIG-e86cb44c-6756-fd30-cd4a-1e6da3caf9b0)
  MIG 3g.40gb     Device  1: (UUID: MIG-5d7b1e00-aaaa-bbbb-cccc-1e6da3caf9b1)
GPU 1: NVIDIA A100-SXM4-80GB (UUID: GPU-0f0f0f0f-d33d-2b2c-524d-9e3d8d2b8a78)
"""


def test_a_listing_has_whole_gpus_and_the_parts_of_split_ones() -> None:
    names = devices.listed_gpus(LISTING)
    assert [name[:5] for name in names] == ["MIG-e", "MIG-5", "GPU-0"]
    assert devices.listed_gpus("No devices were found\n") == ()


@pytest.mark.parametrize(
    ("asked", "seen"),
    [
        (None, [0, 1, 2, 3]),
        ("", []),
        ("-1", []),
        ("2", [2]),
        ("3, 0", [3, 0]),
        ("pretended-1,pretended-2", [1, 2]),
        ("1,7,2", [1]),
        ("1,1", [1]),
        ("pretended", []),
    ],
)
def test_cuda_visible_devices_is_read_as_cuda_reads_it(
    machine: Path, monkeypatch: pytest.MonkeyPatch, asked: str | None, seen: list[int]
) -> None:
    monkeypatch.delenv(devices.VISIBLE)
    if asked is not None:
        monkeypatch.setenv(devices.VISIBLE, asked)
    assert devices.visible_gpus() == tuple(f"pretended-{number}" for number in seen)


def test_a_lease_hides_the_others_and_is_had_again(machine: Path) -> None:
    devices.lease()
    assert os.environ[devices.VISIBLE] == "pretended-0"
    devices.lease()
    devices.release()
    devices.lease()
    assert devices.visible_gpus() == ("pretended-0",)


def test_more_than_there_are_is_refused(machine: Path) -> None:
    with pytest.raises(UserError, match="needs 5 GPUs, and this process sees 4"):
        devices.lease(5)


def test_a_machine_without_gpus_says_so(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(devices.VISIBLE, "")
    with pytest.raises(UserError, match="no usable GPU; see nvidia-smi and \\$CUDA_VISIBLE_DEVICES, or set device"):
        devices.lease()


def test_a_folder_that_cannot_be_used_is_named(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (machine / "file").touch()
    monkeypatch.setenv(devices.FOLDER, str(machine / "file"))
    with pytest.raises(UserError, match=r"pretended-0.next.lock: cannot be opened \(Not a directory\)"):
        devices.lease()


def test_locks_are_for_every_user_whoever_made_them(machine: Path) -> None:
    before = os.umask(0o077)
    try:
        devices.lease()
    finally:
        os.umask(before)
    folder = machine / "leases"
    assert folder.stat().st_mode & 0o7777 == 0o1777
    assert (folder / "pretended-0.lock").stat().st_mode & 0o7777 == 0o1644


@pytest.mark.skipif(os.getuid() != 0, reason="only root can be another user")
def test_another_users_lock_counts(machine: Path) -> None:
    machine.chmod(0o755)
    for parent in machine.parents:  # pytest's folders are its user's alone
        if parent == Path(tempfile.gettempdir()):
            break
        parent.chmod(0o755)
    devices.lease(4)
    (job,) = jobs(machine, 1, "import os; os.setuid(65534)", "0")
    time.sleep(0.6)
    assert job.poll() is None and not holders(machine), "another user waits for it"
    devices.release()
    assert job.wait(10) == 0


WORKER = """
import os, sys, time
from pathlib import Path
sys.path.insert(0, {root!r})
from tcbench.outside import devices
{before}
devices.lease({count}, alone={alone})
folder = Path({folder!r}) / "used"
mine = []
for name in devices.visible_gpus():
    mine.append(os.open(folder / name, os.O_CREAT | os.O_EXCL | os.O_WRONLY))  # fails where another job has it
    os.write(mine[-1], str(os.getpid()).encode())
time.sleep({work})
for name in devices.visible_gpus():
    (folder / name).unlink()
"""


def jobs(
    folder: Path, number: int, before: str, work: str, count: int = 1, alone: bool = False
) -> list[subprocess.Popen[str]]:
    (folder / "used").mkdir(exist_ok=True)
    (folder / "used").chmod(0o1777)
    code = WORKER.format(root=str(ROOT), folder=str(folder), before=before, work=work, count=count, alone=alone)
    of_job = {"text": True, "stderr": subprocess.PIPE}
    return [subprocess.Popen([sys.executable, "-c", code], **of_job) for _ in range(number)]


def holders(folder: Path) -> dict[str, int]:
    """The job that says it works on a GPU, by GPU."""
    return {path.name: int(text) for path in (folder / "used").iterdir() if (text := path.read_text())}


def test_a_killed_jobs_gpu_is_free_at_once_and_no_gpu_is_used_twice(machine: Path) -> None:
    """Twelve jobs on four GPUs, some of them of two; those that have GPUs first are killed."""
    started = jobs(machine, 4, "", "60") + jobs(machine, 4, "", "0.05") + jobs(machine, 4, "", "0.05", count=2)
    killed = started[:4]
    deadline = time.monotonic() + 60
    while not all(job.poll() is not None for job in started):
        assert time.monotonic() < deadline, "a lease was lost with a job that was killed"
        for name, pid in holders(machine).items():
            if (job := next((job for job in killed if job.pid == pid), None)) and job.poll() is None:
                (machine / "used" / name).unlink()  # it will not clear up itself, and still has the lease
                job.send_signal(signal.SIGKILL)
        time.sleep(0.01)
    ended = [job.returncode for job in started]
    said = [job.communicate()[1] for job in started]
    assert ended == [-signal.SIGKILL] * 4 + [0] * 8, said
    assert not holders(machine)


def test_a_process_that_was_forked_from_a_job_keeps_its_lease(machine: Path) -> None:
    devices.lease(4)
    reading, writing = os.pipe()
    if not (child := os.fork()):
        os.read(reading, 1)
        os._exit(0)
    devices.release()
    (job,) = jobs(machine, 1, "", "0")
    time.sleep(0.6)
    assert job.poll() is None, "the child works there"
    os.write(writing, b"x")
    os.waitpid(child, 0)
    assert job.wait(10) == 0
    os.close(reading)
    os.close(writing)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("tr"), st.integers(1, 4)), max_size=12))
def test_of_any_takes_and_returns_no_gpu_is_had_twice(
    tmp_path_factory: pytest.TempPathFactory, moves: list[tuple[str, int]]
) -> None:
    """Against a plain count: `_take` gives as many as are asked for if so many are free, else none; none twice."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(devices.FOLDER, str(tmp_path_factory.mktemp("leases")))
        names, had = tuple("abcd"), []
        for move, number in moves:
            if move == "t":
                taken = devices._take(names, number)
                free = len(names) - sum(map(len, had))
                assert len(taken) == (number if number <= free else 0)
                assert not taken.keys() & {name for one in had for name in one}
                had.append(taken)
            elif had:
                give_back(had.pop(number % len(had)))
        for one in had:
            give_back(one)


def give_back(taken: dict[str, list[int]]) -> None:
    for locks in taken.values():
        devices._close(locks)


def test_jobs_that_share_fill_the_first_seats_first_and_keep_others_out(machine: Path) -> None:
    names = ("a", "b")
    shared = [devices._take(names, 1, 2) for _ in range(5)]
    assert [list(taken) for taken in shared] == [["a"], ["b"], ["a"], ["b"], []]
    assert devices._take(names, 1) == {}, "who wants one alone waits"
    for taken in (shared[0], shared[2]):
        give_back(taken)
    alone = devices._take(names, 1)
    assert list(alone) == ["a"]
    assert devices._take(names, 1, 3).keys() == {"b"}, "three seats, where another run has two"
    give_back(alone)
    assert devices._take(names, 1, 2).keys() == {"a"}


def test_timings_do_not_share(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(devices.SEATS, "2")
    devices.lease()
    beside = devices._take(("pretended-0",), 1, 2)
    assert beside, "another job may sit there"
    give_back(beside)
    devices.release()
    devices.lease(alone=True)
    assert devices._take(("pretended-0",), 1, 2) == {}
    for asked in ("0", "two"):
        monkeypatch.setenv(devices.SEATS, asked)
        with pytest.raises(UserError, match=f"TCBENCH_JOBS_PER_GPU={asked}: give a number of jobs, 1 or more"):
            devices.jobs_per_gpu()


def test_a_job_that_needs_a_gpu_alone_is_next_however_many_come_and_go(
    machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(devices.VISIBLE, "0")
    monkeypatch.setenv(devices.SEATS, "2")
    names = ("pretended-0",)
    sitting = devices._take(names, 1, 2)
    (job,) = jobs(machine, 1, "", "0", alone=True)
    deadline = time.monotonic() + 30
    while beside := devices._take(names, 1, 2):  # until the job waits
        give_back(beside)
        assert time.monotonic() < deadline, "newcomers sit down before a job that waits"
        time.sleep(0.01)
    assert job.poll() is None
    (second,) = jobs(machine, 1, "", "0", alone=True)
    give_back(sitting)
    assert job.wait(30) == second.wait(30) == 0
    assert devices._take(names, 1, 2), "nobody waits any more"


def test_jobs_that_wait_for_several_gpus_do_not_wait_for_each_other(machine: Path) -> None:
    names = tuple("abcd")
    assert (first := devices._reserve(names, 3)).keys() == set("abc")
    assert devices._reserve(names, 2) == {}, "one GPU is left, and is not kept from others"
    assert devices._take(names, 1).keys() == {"d"}
    assert devices._take(names, 3, next_on=first).keys() == set("abc")


SAMPLING = """
import sys
import torch
from tcbench import cli
from tcbench.outside import devices

def start():
    raise AssertionError("CUDA was started before the lease")

def leased(count=1, alone=False):
    print("leased")
    sys.exit()

devices.lease = leased
torch.cuda._is_compiled = lambda: True
torch.cuda._device_count_nvml = lambda: 1
torch._C._cuda_getDeviceCount = start
cli.main(["sample", "digits", "--rows", "nfe10-uncached"])
"""


@pytest.mark.parametrize(("given", "says"), [(None, "leased"), ("0", "CUDA was started before the lease")])
def test_cuda_is_not_started_before_the_lease(tmp_path: Path, given: str | None, says: str) -> None:
    # diffusers asks torch for CUDA when it is imported, which would let the process see every GPU for good
    environment = {**os.environ, devices.PRETEND: "1", "PYTHONPATH": str(ROOT)}
    environment.pop(devices.NVML_CHECK, None)
    environment |= {devices.NVML_CHECK: given} if given else {}
    ran = subprocess.run(
        [sys.executable, "-c", SAMPLING], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert says in ran.stdout + ran.stderr


def test_more_gpus_than_leased_are_an_error(machine: Path) -> None:
    devices.lease(2)
    devices.check_seen(2)
    with pytest.raises(RuntimeError, match="2 GPUs are leased and CUDA sees 4"):
        devices.check_seen(4)


LARGE = """
import os
import torch
from tcbench.method import Method
from tcbench.plan import ALL, Plan, every_unit


class Large(Method):
    name = "large"
    label = "large"

    def plan(self, look):
        if os.environ["TCBENCH_JOBS_PER_GPU"] != "1":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return every_unit(look.run.shape.sites, ALL)
"""


def test_a_job_without_memory_on_a_shared_gpu_starts_again_alone(tmp_path: Path) -> None:
    smoke = (ROOT / "tests" / "smoke.yaml").read_text(encoding="utf-8")
    row = "rows:\n  nfe4-large: {method: large, nfe: 4}\n"
    (tmp_path / "large.yaml").write_text(smoke.replace("rows:\n", row, 1), encoding="utf-8")
    (tmp_path / "methods").mkdir()
    (tmp_path / "methods" / "large.py").write_text(LARGE, encoding="utf-8")
    environment = {**os.environ, devices.PRETEND: "1", devices.SEATS: "2", "PYTHONPATH": str(ROOT)}
    environment[devices.FOLDER] = str(tmp_path / "leases")
    command = [sys.executable, "-m", "tcbench", "sample", "large.yaml", "--rows", "nfe4-large"]
    ran = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0 and "beside other jobs: starting again, alone on the GPU" in ran.stderr, ran.stderr
    assert (tmp_path / "results" / "smoke" / "samples" / "nfe4-large" / "row.json").exists()


def test_a_job_that_was_alone_has_nothing_left_to_try(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(devices.SEATS, "2")
    devices.lease(alone=True)
    devices.start_again_alone(["list"])  # or this process would be another
