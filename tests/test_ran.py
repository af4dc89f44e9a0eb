"""What was run of a suite whose run was cut short is a suite of its own, without anything that rests on what lacks."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from tcbench.config.load import load_suite
from tcbench.config.ran import as_run
from tcbench.config.suite import Suite
from tcbench.errors import UserError
from tcbench.stages.publish import measured

SMOKE = Path(__file__).parent / "smoke.yaml"
RIVALS = """rivals:
  nfe: 4
  ratios: [1.5]
  metrics: [fid]
  methods: {fewer_steps: {}, fora: {}, tokencache: {}, random_tokens: {}}
  without_refiners: [tokencache]
"""


def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, without: Sequence[str] = ()) -> Suite:
    """The smoke suite, trained twice and with rivals, where all is scored but the files of these names."""
    monkeypatch.chdir(tmp_path)
    text = SMOKE.read_text(encoding="utf-8").replace("jobs: nfe\n", "jobs: nfe\ntrainings: 2\n") + RIVALS
    Path("smoke.yaml").write_text(text, encoding="utf-8")
    suite = load_suite(Path("smoke.yaml"))
    assert suite.rivals
    entries = [*suite.entries, *(entry for part in suite.ablation_suites.values() for entry in part.entries)]
    files = [entry.scores for entry in entries]
    for path in [*files, *map(suite.rival_record, ["uncached", *suite.rivals.contenders])]:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.stem not in without and f"{path.parent.name}/{path.stem}" not in without:
            path.touch()
    return suite


def test_of_a_whole_run_nothing_lacks(tmp_path, monkeypatch):
    suite = run(tmp_path, monkeypatch)
    ran, lacks = as_run(suite)
    assert lacks == () and ran.model_dump() == suite.model_dump()


def test_what_rests_on_a_row_that_lacks_lacks_too(tmp_path, monkeypatch):
    ran, lacks = as_run(run(tmp_path, monkeypatch, ["nfe4-tokencache"]))
    assert not {"nfe4-tokencache", "nfe4-random"} & {*ran.rows} and "nfe4-l2c" in ran.rows
    assert {*ran.ablations} == {"guidance", "trainings"} and [*ran.ablations["guidance"].rows] == ["uncached"]
    assert ran.trainings == 2 and ran.trainings_of == ("nfe4-l2c",)
    assert [*ran.ablation_suites["trainings"].variants] == ["trainings-nfe4-l2c-1"]
    assert ran.rivals and [*ran.rivals.methods] == ["fewer_steps", "fora"]
    assert ran.show.tables["table6"].rows == ("nfe4-uncached",)
    at_scales = [f"guidance-tokencache-cfg{scale}" for scale in (1, 2)]
    options = [f"refiners-{key}" for key in ("predictor-lora", "predictor-p-steps", "predictor-plain")]
    options += ["refiners-uncached-lora", "refiners-retrained"]
    again = ["trainings-nfe4-tokencache-1", "trainings-nfe4-random-1"]
    rivals = ["rivals-tokencache", "rivals-tokencache-plain", "rivals-random_tokens"]
    ratios = ["cache_ratio-r0.9", "cache_ratio-r0.7"]
    assert lacks == ("nfe4-tokencache", "nfe4-random", *ratios, *at_scales, *options, *again, *rivals)
    assert ran.about.differs == f"a smoke test, numbers mean nothing; run in part, {len(lacks)} rows and variants lack"


@pytest.mark.parametrize(
    "without, lacks",
    [
        ("nfe4-fora", ("nfe4-fora", "rivals-fora")),
        ("cache_ratio-r0.9", ("cache_ratio-r0.9",)),
        ("cache_ratio-reference4", ("cache_ratio-r0.9", "cache_ratio-r0.7")),
        ("trainings-reference4", ("trainings-nfe4-l2c-1", "trainings-nfe4-tokencache-1", "trainings-nfe4-random-1")),
        ("guidance-tokencache-cfg2", ("guidance-tokencache-cfg1", "guidance-tokencache-cfg2")),
        ("trainings-nfe4-random-1", ("trainings-nfe4-tokencache-1", "trainings-nfe4-random-1")),
        ("rivals/fora", ("rivals-fora",)),
        ("rivals/tokencache-plain", ("rivals-tokencache-plain",)),
        ("rivals/tokencache", ("rivals-tokencache", "rivals-tokencache-plain")),
        *((f"rivals/{name}", tuple(
            f"rivals-{one}" for one in ("fewer_steps", "fora", "tokencache", "tokencache-plain", "random_tokens")
        )) for name in ("uncached", "fewer_steps")),
    ],
)  # fmt: skip
def test_what_lacks_beside_a_file(tmp_path, monkeypatch, without, lacks):
    """Half of a sweep over scales, or of the rows that share a training, is none."""
    assert as_run(run(tmp_path, monkeypatch, [without]))[1] == lacks


def test_matched_rows_stay_without_the_row_that_they_were_matched_to(tmp_path, monkeypatch):
    suite = run(tmp_path, monkeypatch, ["nfe4-fora"])
    rows = suite.rows | {"nfe4-steps2": suite.rows["nfe4-steps2"].model_copy(update={"target": "nfe4-fora"})}
    ran, _ = as_run(suite.model_copy(update={"rows": rows}))
    assert ran.rows["nfe4-steps2"].target is None


def test_without_a_row_there_is_no_part(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="no row is scored yet beside its reference row"):
        as_run(run(tmp_path, monkeypatch, ["nfe4-uncached", "nfe3-uncached"]))


def test_files_of_what_lacks_are_not_published(tmp_path):
    """Scores of a rival go with it; those of another whose name begins alike, and of a row called alike, stay."""
    scores = tmp_path / "ablations" / "rivals" / "scores"
    names = ["rivals-toca-x1.5", "rivals-toca_tokens-x1.5", "rivals-toca-plain-x2"]
    files = [tmp_path / "rivals" / "toca.json", tmp_path / "scores" / "toca-x2.json", tmp_path / "scores" / "toca.json"]
    for path in [*files, *(scores / f"{name}.json" for name in names)]:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    kept = {path.stem for path in measured(tmp_path, ["rivals-toca"])}
    assert kept == {"toca-x2", "toca", "rivals-toca_tokens-x1.5", "rivals-toca-plain-x2"}
    assert len(measured(tmp_path, ["toca"])) == 5, "a row is no rival"
