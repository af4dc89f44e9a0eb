"""Looking early: a part of a suite says what it is, lies apart from the whole, and nothing of it is sampled twice."""

from pathlib import Path

import pytest
import yaml

from tcbench.cli import main
from tcbench.config.load import load_suite
from tcbench.config.preview import Asked
from tcbench.errors import UserError
from tcbench.record.files import write_json
from tcbench.stages.render import gathered
from tcbench.stages.sample import row_fingerprint

SMOKE = (Path(__file__).parent / "smoke.yaml").read_text(encoding="utf-8")
BATCH = "batch_size: 4\n  traced"
CONFIG = SMOKE.replace("count: 8", "count: 40").replace(BATCH, BATCH.replace("\n", "\n  shard_batches: 2\n"))
CONFIG = CONFIG.replace("options: {interval: 2}}", "options: {num_full_steps: 2}, target: nfe4-tokencache}")
ROWS = ("nfe4-uncached", "nfe4-fora")


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "mine.yaml"
    path.write_text(CONFIG)
    return path


def test_fewer_samples_are_a_suite_of_their_own_folder_whose_samples_are_the_suites(config: Path) -> None:
    whole, part = load_suite(config), load_suite(config, Asked(samples=16))
    assert part.samples.count == 16 and part.samples.traced == 4 and [*part.rows] == [*whole.rows]
    entry, other = part["nfe4-fora"], whole["nfe4-fora"]
    assert entry.shard(1) == other.shard(1) and entry.trained == other.trained
    assert entry.manifest == Path("results/smoke/previews/16-samples/samples/nfe4-fora/row.json")
    assert entry.scores == Path("results/smoke/previews/16-samples/scores/nfe4-fora.json")
    assert row_fingerprint(entry) == row_fingerprint(other)
    assert part.preview and part.preview.says == "PREVIEW: 16 of 40 samples, 8 of 8 rows"
    ours, others = (suite.ablation_suites["cache_ratio"] for suite in (part, whole))
    name = ours.own[-1]
    assert ours.samples.count == 16 and ours[name].shard(0) == others[name].shard(0)
    assert ours[name].scores == Path(f"results/smoke/previews/16-samples/ablations/cache_ratio/scores/{name}.json")
    assert whole.preview is None and load_suite(config, Asked(samples=40)).preview is None


def test_rows_without_the_rivals_reference_have_no_rivals() -> None:
    """`digits` has rivals at 50 steps; rows of 20 are looked at without."""
    digits = Path(__file__).parent.parent / "config" / "digits.yaml"
    assert load_suite(digits, Asked(rows=("nfe20-fora",))).rivals is None
    assert load_suite(digits, Asked(rows=("nfe50-fora",))).rivals


def test_few_shards_leave_out_fewer_batches_each(config: Path) -> None:
    """Whole batches, and as many groups as the whole suite has if there are so many."""
    assert load_suite(config).jackknife_size == 8
    assert load_suite(config, Asked(samples=8)).jackknife_size == 4
    assert load_suite(config, Asked(samples=24)).jackknife_size == 8


def test_some_rows_bring_those_they_are_compared_with_and_sample_with_the_training_of(config: Path) -> None:
    part = load_suite(config, Asked(rows=("nfe4-random",)))
    assert [*part.rows] == ["nfe4-uncached", "nfe4-tokencache", "nfe4-random"]
    assert part.folder == Path("results/smoke") and part.shown_in == Path("results/smoke/partial")
    assert part.preview and part.preview.says == "PARTIAL: 40 of 40 samples, 3 of 8 rows"
    assert part.show.tables["table6"].rows == ("nfe4-uncached", "nfe4-random", "nfe4-tokencache")
    other = load_suite(config, Asked(samples=16, rows=("nfe3-none",)))
    assert "table6" not in other.show.tables and other.show.figure.nfe == 3
    assert other.shown_in == Path("results/smoke/previews/16-samples/partial")


def test_what_was_searched_is_shown_beside_a_part(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Searches lie with the whole suite, those of ablations too."""
    monkeypatch.chdir(config.parent)
    whole = yaml.safe_load(CONFIG)
    whole["rows"]["nfe4-fora"] |= {"searched": True}
    whole["ablations"]["lists"] = {
        "title": "Lists", "question": "Which?", "base": "nfe4-fora", "rows": {"best": {"searched": True}}
    }  # fmt: skip
    config.write_text(yaml.safe_dump(whole))
    for name in ("nfe4-fora", "lists-best"):
        write_json(Path(f"results/smoke/searched/{name}.json"), {"row": name})
    folder = gathered(load_suite(config, Asked(samples=16)))
    assert folder == Path("results/smoke/previews/16-samples")
    assert {path.stem for path in (folder / "searched").iterdir()} == {"nfe4-fora", "lists-best"}
    Path("results/smoke/searched/nfe4-fora.json").unlink()
    gathered(load_suite(config, Asked(samples=16)))
    assert {path.stem for path in (folder / "searched").iterdir()} == {"lists-best"}


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        (Asked(samples=12), "samples=12: suite smoke has 40 a row, in shards of 8; give a multiple of 8, 8 or more"),
        (Asked(samples=48), "samples=48: suite smoke has 40 a row"),
        (Asked(rows=("nfe4-for",)), "rows: suite smoke has no row 'nfe4-for'; did you mean 'nfe4-fora'?"),
    ],
)
def test_what_cannot_be_a_part_is_refused(config: Path, asked: Asked, says: str) -> None:
    with pytest.raises(UserError) as caught:
        load_suite(config, asked)
    assert str(caught.value).startswith(says)


def test_nothing_scored_is_nothing_to_show(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(config.parent)
    with pytest.raises(UserError, match="results/smoke: no row is scored yet beside its reference row"):
        load_suite(config, Asked(scored=True))


def test_looking_early_and_going_on(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Samples of a preview are there for the whole; its tables and those of some rows say what they are of."""
    monkeypatch.chdir(config.parent)
    suite, early = str(config), ("--samples", "16")
    for command in ("sample", "score"):
        assert main([command, suite, "--rows", *ROWS, *early]) == 0
    shards = {path: path.stat().st_mtime_ns for path in Path("results").rglob("shard-*")}
    assert len(shards) == 4 and all("previews" not in path.parts for path in shards)
    for command in ("tables", "report"):
        assert main([command, suite, *early, "--rows", "nfe4-fora"]) == 0
        assert main([command, suite, *early, "--partial"]) == 0
    folder = Path("results/smoke/previews/16-samples/partial")
    says = "PARTIAL, what is scored so far: 16 of 40 samples, 2 of 8 rows"
    for face in ("md", "tex", "html"):
        text = (folder / "tables" / f"table2.{face}").read_text(encoding="utf-8")
        assert text.count(says) >= 2, "in title and caption"
    assert f"{says}: nfe4-uncached, nfe4-fora." in (folder / "tables" / "table2.md").read_text(encoding="utf-8")
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert f"<strong>{says}</strong>: nfe4-uncached, nfe4-fora." in page

    assert main(["sample", suite, "--rows", *ROWS]) == 0
    now = {path: path.stat().st_mtime_ns for path in Path("results").rglob("shard-*")}
    assert len(now) == 10 and all(now[path] == changed for path, changed in shards.items()), "none is sampled again"
    assert not Path("results/smoke/scores").exists() and not Path("results/smoke/tables").exists()
    capsys.readouterr()
    assert main(["tables", suite, "--results", "results/smoke", "--partial"]) == 2
    assert "--results: a folder is shown as it is" in capsys.readouterr().err
