"""The README's example method works as it is printed, and its commands exist."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [
    path.relative_to(ROOT)
    for pattern in ("*.md", "docs/**/*.md", "results/reference/**/*.md")
    for path in sorted(ROOT.glob(pattern))
]


def tcbench(folder: Path, *arguments: str) -> str:
    environment = {**os.environ, "TCBENCH_METHODS": str(folder)}
    command = [sys.executable, "-m", "tcbench.cli", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout


def test_the_example_method_is_complete(tmp_path: Path) -> None:
    code = re.search(r"```python\n(.*?)```", README, re.DOTALL)[1]
    assert len(code.splitlines()) < 40
    (tmp_path / "rear_blocks.py").write_text(code, encoding="utf-8")
    assert "held = 2" in tcbench(tmp_path, "methods", "rear_blocks")
    command = ("macs", "--model", "dit-xl-2-256", "--method", "rear_blocks", "--nfe", "50", "--set", "held=14")
    totals = json.loads(tcbench(tmp_path, *command, "--json"))
    # 10 full steps, and 40 with half of the blocks: 0.6 of 11.862 TMACs, but for embedding and final layer
    assert abs(totals["per_sample"] / 11.862e12 - 0.6) < 1e-3


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_links_lead_to_files(page: Path) -> None:
    for link in re.findall(r"\]\((?!https?:)([^)#]+)", (ROOT / page).read_text(encoding="utf-8")):
        assert ((ROOT / page).parent / link).exists(), link


def test_methods_that_the_readme_names_exist() -> None:
    for name in re.findall(r"`(methods/)?(\w+)\.py`", README):
        if name[1] != "rear_blocks":
            assert (ROOT / "methods" / f"{name[1]}.py").exists(), name
