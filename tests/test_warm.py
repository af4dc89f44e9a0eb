"""Programs that start warm end as others do, and with whoever started them."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tcbench.errors import UserError
from tcbench.outside.warm import warm_programs

MODULE = """
import os, sys, time
from pathlib import Path

def main():
    print(sys.argv[1:], os.getcwd(), os.environ["OWN"], "json" in sys.modules)
    print("said", file=sys.stderr)
    if sys.argv[1] == "wait":
        Path("pid").write_text(str(os.getpid()))
        time.sleep(60)
    if sys.argv[1] == "exit":
        sys.exit(3)
    return int(sys.argv[1])
"""


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("warm")
    (folder / "module.py").write_text(MODULE, encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    with warm_programs(sys.executable, {folder / "program": "module:main"}, environment, ["json"]):
        yield folder / "program"


@pytest.mark.parametrize(("argument", "status"), [("0", 0), ("2", 2), ("exit", 3)])
def test_it_runs_as_the_program_would(program: Path, tmp_path: Path, argument: str, status: int) -> None:
    environment = {**os.environ, "OWN": "value"}
    ran = subprocess.run([program, argument], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (ran.returncode, ran.stderr) == (status, "said\n")
    assert ran.stdout == f"['{argument}'] {tmp_path} value True\n"


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_its_job_ends_with_it(program: Path, tmp_path: Path, number: signal.Signals) -> None:
    environment = {**os.environ, "OWN": "value"}
    with subprocess.Popen(
        [program, "wait"], cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as started:
        while not (pid := tmp_path / "pid").exists() or not pid.read_text():
            time.sleep(0.01)
        started.send_signal(number)
        started.wait()
    job = int(pid.read_text())
    for _ in range(500):
        if not Path(f"/proc/{job}").exists():
            return
        time.sleep(0.02)
    raise AssertionError(f"{job} runs on")


def test_what_it_cannot_import_is_said(capfd: pytest.CaptureFixture[str]) -> None:
    refused = pytest.raises(UserError, match="did not start")
    with refused, warm_programs(sys.executable, {}, os.environ, ["no_such_module"]):
        pass
    assert "No module named 'no_such_module'" in capfd.readouterr().err
