"""What results are shown in, made again from the committed scores, without torch, a GPU or the samples: tables and
verdicts to the byte, pictures to the pixel's size and look."""

import re
import shutil
import subprocess
import sys
from base64 import b64decode
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tcbench.config.speed import SpeedSuite
from tcbench.config.suite import TRAININGS, Suite
from tcbench.errors import UserError
from tcbench.models.specs import MODELS
from tcbench.record.files import PROVENANCE, read_json
from tcbench.record.records import SCORE
from tcbench.record.score import Score, score_files
from tcbench.report.names import figure_names, reported_names
from tcbench.report.page import PAPER, report_page
from tcbench.report.rows import replicates_of
from tcbench.report.speed import render_speed
from tcbench.report.verdicts import across_suites
from tcbench.stages import publish, render

from .conftest import not_laid_out

REFERENCE = Path(__file__).parent.parent / "results" / "reference"
SUITES = sorted(path.parent.name for path in REFERENCE.glob("*/scores"))
TIMED = sorted(path.parent.name for path in REFERENCE.glob("*/runs"))


def suite_of(folder: Path) -> Suite:
    """The suite as it was when the results were made."""
    return Suite.model_validate(read_json(folder / "provenance.json")["suite"])


def measured(committed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what was measured alone."""
    copy = tmp_path_factory.mktemp("reference") / committed.name
    rendered = shutil.ignore_patterns("tables", "figures", "report.html", "nfe[0-9].png", "nfe[0-9][0-9].png")
    shutil.copytree(committed, copy, ignore=rendered)
    return copy


@pytest.mark.parametrize("suite", SUITES)
def test_scores_are_whole_and_their_errors_those_of_the_stored_replicates(suite):
    """So that the standard error, which scoring stores, is the jackknife's own in every committed file."""
    folders = [REFERENCE / suite, *(REFERENCE / suite / "ablations").iterdir()]
    rows = [SCORE.read(path) for folder in folders for path in score_files(folder)]
    assert rows
    for row in rows:
        assert row.keys() <= Score.__required_keys__ | Score.__optional_keys__, row["row"]
        for metric, quality in row["quality"].items():
            assert quality.keys() == {"value", "se", "deleted"}, (row["row"], metric)
            assert replicates_of(row, metric).interval().se == quality["se"], (row["row"], metric)


@pytest.fixture(scope="module", params=SUITES)
def remade(request, tmp_path_factory):
    """(the committed folder, a copy without what is rendered, where everything was rendered again)."""
    committed = REFERENCE / request.param
    copy = measured(committed, tmp_path_factory)
    suite = suite_of(committed)
    render.render_tables(suite, copy)
    render.render_diagnostics(suite, copy)
    render.render_ablations(suite, copy)
    if (copy / "rivals").exists():
        render.render_rivals(suite, copy)
    render.render_verdicts(suite, copy)
    render.render_grids(suite, copy)
    with not_laid_out():  # 40 of them
        render.render_report(suite, copy)  # draws the figures, none of which is committed
    return committed, copy


def look_alike(one: Path, other: Path) -> bool:
    """Whether two pictures differ by no more than another version of the fonts does."""
    ours, theirs = (np.asarray(Image.open(path).convert("RGB"), dtype=float) for path in (one, other))
    return ours.shape == theirs.shape and np.abs(ours - theirs).mean() < 2  # of 255


def test_every_table_is_made_again_and_what_is_committed_to_the_byte(remade):
    committed, copy = remade
    tables = {path.stem for path in (committed / "tables").glob("*.md")}
    assert {"verdicts", *suite_of(committed).show.tables} <= tables
    made = {path.name for path in (copy / "tables").iterdir()}
    assert made == {f"{name}.{kind}" for name in tables for kind in ("md", "csv", "tex", "html", "json")}
    for path in [*(committed / "tables").glob("*.md"), committed / "tables" / "verdicts.csv"]:
        assert path.read_bytes() == (copy / "tables" / path.name).read_bytes(), path.name


def test_verdicts_come_last_and_folded_where_none_of_the_papers_models_is_stood_for():
    folder = REFERENCE / "digits"
    suite = suite_of(folder)
    alone = suite.model_copy(update={"about": suite.about.model_copy(update={"stands_for": None})})
    whole, folded = report_page(suite, folder), report_page(alone, folder)
    assert whole.index('<section id="verdicts">') < whole.index('<section id="tables">')
    assert folded.index('<section id="samples">') < folded.index('<section id="verdicts">')
    assert len(re.findall(r"<details>\n<summary>None of \d+ is tested", folded)) == 1
    assert "Findings on the paper" in whole and "Findings on the paper" not in folded


NEED = {"grids": {"fig5_samples", "fig11_steps"}, "diagnostics": {"fig3_updates", "fig8_predictor"}}
"""Figures by the folder that they are drawn from besides scores; runs that were cut short may lack it."""


def test_every_figure_and_grid_is_made_again(remade):
    committed, copy = remade
    suite = suite_of(committed)
    cut_short = "lacks" in read_json(committed / PROVENANCE)
    absent = [folder for folder in NEED if cut_short and not (committed / folder).exists()]
    for name in [name for name in figure_names(suite) if not any(name in NEED[folder] for folder in absent)]:
        with Image.open(copy / "figures" / f"{name}.png") as picture:
            assert min(picture.size) > 300 and len(picture.convert("RGB").getcolors(1 << 24)) > 50, name
        assert (copy / "figures" / f"{name}.svg").exists(), name
    grids = set() if "grids" in absent else {f"nfe{row.nfe}.png" for row in suite.rows.values()}
    assert {path.name for path in (copy / "grids").glob("*.png")} == grids
    for name in ("grids/nfe20.png",) if suite.suite == "digits" else ():
        assert look_alike(committed / name, copy / name), name


def test_a_job_reads_only_what_it_depends_on(tmp_path_factory):
    """While a workflow runs, the rest is half made: scores of an ablation lack, other files are still being written."""
    copy = measured(REFERENCE / "digits", tmp_path_factory)
    suite = suite_of(REFERENCE / "digits")
    asked = [name for name in suite.ablations if name != TRAININGS]  # rows are means over their trainings
    ablated = [next((copy / "ablations" / name / "scores").glob("*.json")) for name in asked]
    diagnosed = [copy / "diagnostics" / f"{row}.json" for row in suite.predictor_rows]
    timed = [copy / "latency.json", copy / "scores" / "floor.json"]
    stored = {path: path.read_bytes() for path in [*ablated, *diagnosed, *timed]}
    for render_job, inputs in (
        (render.render_tables, timed),
        (render.render_diagnostics, diagnosed),
        (render.render_ablations, ablated),
    ):
        for path, content in stored.items():
            path.write_bytes(content if path in inputs else b"{")
        render_job(suite, copy)
    with pytest.raises(UserError, match="not valid JSON"):
        render.render_verdicts(suite, copy)  # depends on everything


UNTIMED = " Not timed (`tcbench latency digits`): nfe20-mine."


def test_a_row_of_ones_own_changes_no_committed_mark_and_no_verdict(tmp_path_factory):
    """One at matched MACs that is far off in everything, and takes fewer steps than any other."""
    committed = REFERENCE / "digits"
    copy = measured(committed, tmp_path_factory)
    settings = read_json(committed / "provenance.json")["suite"]
    settings["rows"]["nfe20-mine"] = {"method": "fewer_steps", "nfe": 20, "options": {"steps": 3}, "label": "mine"}
    mine = read_json(copy / "scores" / "nfe20-steps12.json")
    mine |= {"row": "nfe20-mine", "label": "mine", "sampled_steps": 3, "target": None, "plans": None}
    for quality in mine["quality"].values():
        quality["deleted"] = [value * (0.8 + 0.001 * group) for group, value in enumerate(quality["deleted"])]
        quality["value"] *= 0.8
    SCORE.write(copy / "scores" / "nfe20-mine.json", mine)
    suite = Suite.model_validate(settings)
    render.render_tables(suite, copy)
    render.render_verdicts(suite, copy)
    for name in (*suite.tables, "verdicts"):
        ours, theirs = (
            [
                re.sub(" +", " ", line).replace(UNTIMED, "")
                for line in (folder / "tables" / f"{name}.md").read_text("utf-8").splitlines()
            ]
            for folder in (copy, committed)
        )
        added = [line for line in ours if line not in theirs and not line.startswith("|:")]
        assert len(added) == (name == "table2") and all("| mine |" in line for line in added), name


def test_what_is_committed_is_what_publish_keeps(remade):
    committed, copy = remade
    assert_kept(committed, suite_of(committed), copy)


def assert_kept(committed: Path, suite: Suite | SpeedSuite, copy: Path) -> None:
    """Another publication adds no file to the repository, and takes none away."""
    if not (REFERENCE.parent.parent / ".git").exists():
        pytest.skip("not a clone")
    command = ["git", "ls-files", "-z", "."]
    listed = subprocess.run(command, cwd=committed, capture_output=True, text=True, check=True).stdout
    kept = {str(path.relative_to(copy)) for path in publish.kept(suite, copy)} | {"provenance.json"}
    assert {name for name in listed.split("\0") if name} == kept


@pytest.mark.parametrize("suite", TIMED)
def test_timings_are_shown_again(suite, tmp_path_factory):
    committed = REFERENCE / suite
    copy = measured(committed, tmp_path_factory)
    suite = SpeedSuite.model_validate(read_json(committed / "provenance.json")["suite"])
    render_speed(suite, copy)
    for path in (committed / "tables").glob("*.md"):
        assert path.read_bytes() == (copy / "tables" / path.name).read_bytes(), path.name
    assert look_alike(committed / "figures" / "speed.png", copy / "figures" / "speed.png")
    assert_kept(committed, suite, copy)


def test_verdicts_side_by_side_are_the_committed_ones():
    assert across_suites(REFERENCE).markdown() == (REFERENCE / "verdicts.md").read_text(encoding="utf-8")


def test_the_report_needs_nothing_but_itself(remade):
    committed, copy = remade
    page = (copy / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"""src=["'](?!data:)""", page)
    assert set(re.findall(r"""href=["'](?!data:|#)([^"']*)""", page)) == {PAPER}, "what it links to, it does not need"
    assert not re.search(r"https?://(?!www\.w3\.org|arxiv\.org/abs/)", page), "an address in the page"
    assert "@import" not in page and "<link" not in page
    assert 'lang="en"' in page and 'name="viewport"' in page and "color-scheme: light dark" in page
    for image in re.findall(r"<img[^>]*>", page):
        assert re.search(r'alt="[^"]{10,}"', image), image[:80]
    suite = suite_of(committed)
    names = [*figure_names(suite), *reported_names(suite, copy)]
    drawn = [name for name in names if (copy / "figures" / f"{name}.svg").exists()]
    assert all(f'<figure id="{name}">' in page for name in names)
    assert page.count("data:image/svg+xml") == len(drawn)
    verdicts = (copy / "tables" / "verdicts.csv").read_text(encoding="utf-8")
    assert page.count('class="finding"') == len(verdicts.strip().splitlines()) - 1
    for row in suite.rows:
        assert f"<code>{row}</code>" in page and f'id="row-{row}"' in page
    claims = re.findall(r'<article class="claim" id="claim-(\d+)">', page)
    assert claims == [str(number) for number in range(1, len(claims) + 1)] and claims
    tables = {path.stem for path in (copy / "tables").glob("*.md")} - {"verdicts"}
    assert page.count(' download="') == len(tables) + (copy / "searched").exists()  # searches have a table there alone
    played = [Image.open(BytesIO(b64decode(clip))) for clip in re.findall(r"data:image/webp;base64,([^&]+)", page)]
    *_, frames = MODELS[suite.model.name].latent_shape[:-2]
    videos = len(MODELS[suite.model.name].latent_shape) == 4
    assert [clip.n_frames for clip in played] == ([frames] * len(suite.rows) if videos else [])


def test_rendering_imports_no_torch():
    code = "import sys, tcbench.stages.render; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
