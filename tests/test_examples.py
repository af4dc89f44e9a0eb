"""The scripts of examples/ and the blocks of docs/api.md run as they are."""

import re
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

from tcbench.models.specs import MODELS

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def as_started_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "path", [str(ROOT / "examples"), *sys.path])


@pytest.fixture(autouse=True)
def known_models() -> Any:
    """Those that an example adds are gone afterwards."""
    before = dict(MODELS)
    yield
    MODELS.clear()
    MODELS.update(before)


def test_a_method_on_a_pipeline(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path("examples/attach.py", run_name="__main__")
    printed = capsys.readouterr().out
    assert "20: 8 full, 12 held" in printed and "off again, bit for bit: True" in printed


def test_methods_compared_at_the_same_macs(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path("examples/compare.py", run_name="__main__")
    _, *rows = capsys.readouterr().out.splitlines()
    times_fewer = [float(re.search(r"([\d.]+)x", row)[1]) for row in rows]
    assert len(rows) == 4 and max(times_fewer) / min(times_fewer) < 1.05


def test_the_readmes_pipeline(capsys: pytest.CaptureFixture[str]) -> None:
    section = (ROOT / "README.md").read_text(encoding="utf-8").partition("## Use it on your own pipeline")[2]
    names = runpy.run_path("examples/tiny.py")
    exec(re.search(r"```python\n(.*?)```", section, re.DOTALL)[1], names | {"pipe": names["tiny_dit"]()})
    assert "20: 8 full, 12 held" in capsys.readouterr().out


def test_the_page_runs(capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, Any] = {}
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        exec(compile(block, "docs/api.md", "exec"), names)
    printed = capsys.readouterr().out
    assert "8 full, 12 held" in printed and "num_full_steps=" in printed
