"""The committed results, made again from the committed scores: tables and verdicts to the byte, figures to the pixel's
size and look, without torch, a GPU or the samples."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tcbench.config import Suite
from tcbench.files import read_json
from tcbench.report.names import figure_names
from tcbench.stages import render

REFERENCE = Path(__file__).parent.parent / "results" / "reference"
SUITES = sorted(path.parent.name for path in REFERENCE.glob("*/scores"))


def suite_of(folder: Path) -> Suite:
    """The suite as it was when the results were made."""
    return Suite.model_validate(read_json(folder / "provenance.json")["suite"])


@pytest.fixture(scope="module", params=SUITES)
def remade(request, tmp_path_factory):
    """(the committed folder, a copy without what is rendered, where everything was rendered again)."""
    committed = REFERENCE / request.param
    copy = tmp_path_factory.mktemp(request.param) / request.param
    rendered = shutil.ignore_patterns("tables", "figures", "report.html", "nfe[0-9][0-9].png")
    shutil.copytree(committed, copy, ignore=rendered)
    suite = suite_of(committed)
    render.render_tables(suite, copy)
    render.render_diagnostics(suite, copy)
    render.render_ablations(suite, copy)
    render.render_verdicts(suite, copy)
    render.render_grids(suite, copy)
    render.render_figures(suite, copy)
    render.render_report(suite, copy)
    return committed, copy


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.is_file()}


def test_tables_and_verdicts_are_the_committed_ones(remade):
    committed, copy = remade
    assert names(committed / "tables") == names(copy / "tables")
    assert (committed / "tables" / "verdicts.md").exists()
    for path in (committed / "tables").iterdir():
        assert path.read_bytes() == (copy / "tables" / path.name).read_bytes(), path.name


def test_figures_and_grids_look_like_the_committed_ones(remade):
    committed, copy = remade
    assert names(committed / "figures") == names(copy / "figures")
    for path in [*(committed / "figures").glob("*.png"), *(committed / "grids").glob("*.png")]:
        ours, theirs = (np.asarray(Image.open(p), dtype=float) for p in (path, copy / path.relative_to(committed)))
        assert ours.shape == theirs.shape, path.name
        assert np.abs(ours - theirs).mean() < 2, path.name  # of 255: room for another version of the fonts


def test_the_report_needs_nothing_but_itself(remade):
    committed, copy = remade
    page = (copy / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"""(src|href)=["'](?!data:|#)""", page)
    assert not re.search(r"https?://(?!www\.w3\.org)", page), "an address in the page"
    assert "@import" not in page and "<link" not in page
    assert 'lang="en"' in page and 'name="viewport"' in page and "color-scheme: light dark" in page
    for image in re.findall(r"<img[^>]*>", page):
        assert re.search(r'alt="[^"]{10,}"', image), image[:80]
    suite = suite_of(committed)
    drawn = [name for name in figure_names(suite) if (copy / "figures" / f"{name}.svg").exists()]
    assert all(f'<figure id="{name}">' in page for name in figure_names(suite))
    assert page.count("data:image/svg+xml") == len(drawn)
    verdicts = (copy / "tables" / "verdicts.csv").read_text(encoding="utf-8")
    assert page.count('class="finding"') == len(verdicts.strip().splitlines()) - 1
    for row in suite.rows:
        assert f"<code>{row}</code>" in page


def test_rendering_imports_no_torch():
    code = "import sys, tcbench.stages.render; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
