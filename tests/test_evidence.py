"""The report's evidence: who chose an option, what a plan does, what was trained, and what proves a method."""

from dataclasses import replace
from pathlib import Path
from typing import cast

import pytest

from tcbench.config.load import load_suite
from tcbench.config.suite import Suite
from tcbench.record.files import read_json
from tcbench.record.records import Searched
from tcbench.registry import method_names
from tcbench.report.evidence import GOLDEN_CASES, RIVAL_CASES, chosen_by, evidence
from tcbench.report.gallery import Missing, draw
from tcbench.report.results import Results, read_results
from tcbench.report.searches_table import search_told, searches_table, so_far

from .conftest import GOLDEN
from .test_report import make_rows

CONFIG = Path(__file__).parent.parent / "config" / "digits.yaml"
REFERENCE = Path(__file__).parent.parent / "results" / "reference" / "digits"


def test_every_golden_case_proves_a_method() -> None:
    for listed, folder in ((GOLDEN_CASES, GOLDEN), (RIVAL_CASES, GOLDEN.with_name("golden-rivals"))):
        assert listed.keys() <= set(method_names())
        assert {case for cases in listed.values() for case in cases} == {path.stem for path in folder.glob("*.json")}


@pytest.mark.parametrize(
    ("row", "option", "value", "chooser"),
    [
        ("nfe50-fora23", "num_full_steps", 23, "solved for the MACs of nfe50-tokencache"),
        ("nfe20-toca", "interval", 2, "the row"),
        ("nfe20-tokencache", "num_full_steps", 9, "the paper, Table I"),
        ("nfe20-tokencache", "beta", -4000.0, "the paper, Table I"),
        ("nfe20-random10", "num_full_steps", 10, "solved for the MACs of nfe20-tokencache"),
        ("nfe20-tokencache", "cost_weight", "auto", "the suite"),
        ("nfe20-tokencache", "recursion", "propagated", "the method's default"),
    ],
)
def test_who_chose_an_option(row: str, option: str, value: object, chooser: str) -> None:
    suite = load_suite(CONFIG)
    assert suite[row].method.model_dump(mode="json")[option] == value
    assert chosen_by(suite[row], option, value) == chooser


@pytest.mark.parametrize(
    ("part", "row", "option", "chooser"),
    [
        (None, "nfe20-toca-matched", "fresh_ratio", "solved for the MACs of nfe20-tokencache"),
        (None, "nfe20-toca-matched", "interval", "searched on calibration noise"),
        ("full_steps", "full_steps-fora-best", "full_steps", "searched on calibration noise"),
        ("full_steps", "full_steps-fora-same", "full_steps", "the full steps of nfe20-tokencache"),
    ],
)
def test_who_chose_what_a_row_was_given_before_it_was_sampled(
    part: str | None, row: str, option: str, chooser: str
) -> None:
    suite = load_suite(CONFIG)
    assert chosen_by((suite.ablation_suites[part] if part else suite)[row], option, object()) == chooser


def searched(row: str, options: dict[str, object], *deviations: float) -> Searched:
    """A search whose trials deviated so much; the best one had these options."""
    trials = [{"options": {"num_full_steps": None, "trial": number}, "deviation": deviation}
              for number, deviation in enumerate(deviations)]  # fmt: skip
    search = {"samples": 12, "trials": 20}
    return cast(
        Searched,
        {"row": row, "options": options, "trials": trials, "ended": "all trials were used",
         "settings": {"search": search}, "artefacts": None},
    )  # fmt: skip


def test_what_was_searched() -> None:
    """Of rows of the suite and of its ablations, by NFE."""
    suite = load_suite(CONFIG)
    found = {
        "nfe20-toca-matched": searched("nfe20-toca-matched", {"interval": 2, "schedule": "constant"}, 0.03, 0.02, 0.04),
        "nfe10-toca-matched": searched("nfe10-toca-matched", {"interval": 3}, 0.05),
        "full_steps-fora-best": searched(
            "full_steps-fora-best", {"interval": None, "full_steps": [0, 2, 19]}, 0.015, 0.0126, 0.0126, 0.02
        ),
    }
    results = Results(suite, [], {}, {}, {}, None, None, searched=found)
    table = searches_table(results)
    assert table is not None and searches_table(replace(results, searched={})) is None
    assert table.groups == ["NFE 20", "NFE 20", "NFE 10"]
    lines = table.formatted[["Method", "Trials", "First distance", "Best distance", "Best at trial", "Chosen"]]
    assert lines.to_numpy().tolist() == [
        ["ToCa, matched", "3", "0.0300", "0.0200", "2", "interval 2, schedule constant"],
        ["FORA, best list", "4", "0.0150", "0.0126", "2", "full_steps [0, 2, 19]"],
        ["ToCa, matched", "1", "0.0500", "0.0500", "1", "interval 3"],
    ]
    assert "12 samples a trial, 20 trials at most" in table.caption
    assert search_told(found["full_steps-fora-best"]) == (
        "4 trials on calibration noise, distance 0.0150 at the first, 0.0126 at the best: full_steps [0, 2, 19]; "
        "all trials were used"
    )
    figure = draw(results, Path(), "searches")
    assert [panel.get_title() for panel in figure.axes] == ["NFE 20", "NFE 10"]
    drawn = {tuple(line.get_ydata()) for panel in figure.axes for line in panel.lines}
    assert drawn == {(0.03, 0.02, 0.02), (0.015, 0.0126, 0.0126, 0.0126), (0.05,)}
    with pytest.raises(Missing, match="rows that are searched"):
        draw(replace(results, searched={}), Path(), "searches")


def test_committed_searches_are_read() -> None:
    suite = Suite.model_validate(read_json(REFERENCE / "provenance.json")["suite"])
    found = read_results(suite, REFERENCE, ("searched",)).searched
    assert {path.stem for path in (REFERENCE / "searched").glob("*.json")} == found.keys()
    for search in found.values():
        assert so_far(search)[-1] == min(trial["deviation"] for trial in search["trials"])
    assert not read_results(suite, REFERENCE, ("floor",)).searched


def test_the_evidence_of_a_row() -> None:
    suite = load_suite(CONFIG)
    names = ("nfe20-uncached", "nfe20-steps", "nfe20-toca", "nfe20-tokencache")
    rows = [
        row | {"tokens": 64, "macs_spread": [1, 2], "cache_bytes": 10**6} for row in make_rows() if row["row"] in names
    ]
    uncached, steps, _, ours = rows
    steps["row"] = "nfe20-steps12"
    uncached["plan"], ours["plan"] = {}, {"block 0": "all 16", "block 1": "all forecast 2"}
    ours["refiners"] = False
    steps["macs"] = steps["macs"] | {"per_sample": ours["macs"]["per_sample"] + 1}
    refiners = {
        "kind": "TrainRefiners", "iterations": 80, "batch_size": 16, "wall_s": 20.2, "loss": "auto",
        "training_loss": [0.3],
        "reuse_error": [1.0, 2.0], "held_out_loss": [2.0, 1.5], "held_out_loss_without": 2.0,
        "held_out_loss_kept": 1.5, "ended": "stopped early", "marks": ["few steps decide"],
    }  # fmt: skip
    predictor = {"kind": "TrainScorer", "iterations": 160, "batch_size": 16, "wall_s": 44.1, "cache_loss": [2.0, 0.5]}
    training = {
        "nfe20-tokencache": {"stages": [predictor, refiners], "files": {"predictor": "", "refiners": ""}, "scores": {}}
    }
    search = searched("nfe20-tokencache", {"full_steps": [0, 4]}, 0.02, 0.01)
    found = evidence(Results(suite, rows, {}, training, {}, None, None, searched={"nfe20-tokencache": search}))
    assert [method["method"] for method in found] == ["uncached", "fewer_steps", "toca", "tokencache"]
    assert found[2]["goldens"] == ("toca_ddim20_r0.07_n4", "pixart_toca_dpm20_r0.30_n3")
    assert "Eq. 13" in found[3]["about"] and "Table I and Sec. IV-C" in found[3]["options"]
    (first,), (second,), (third,), (fourth,) = (method["rows"] for method in found)
    assert first["summary"] == "everything is computed at every step"
    assert first["fewer_steps"] == second["fewer_steps"] == ""
    assert third["trained"] == ["nothing"] and third["searched"] == ""
    assert fourth["searched"].startswith("2 trials on calibration noise")
    assert third["fewer_steps"] == "no row of fewer steps is within 5% of its MACs"
    assert fourth["summary"].startswith("1 of 2 steps in full; on the others 8.0 of 64 tokens are recomputed in each")
    assert fourth["fewer_steps"].startswith("this less fewer steps, 10 steps: FID -1.60 [")
    assert fourth["trained"] == [
        "TrainScorer: 160 iterations of 16, last cache loss 0.5, 44 s",
        "TrainRefiners: 80 iterations of 16, last training loss 0.3, last held out loss 1.5, "
        "2 without refiners, stopped early, 20 s, few steps decide",
        "LoRA refiners: left out",
    ]
