"""The record of what a run computed: it says the same in all its forms."""

import pytest

from tcbench.record.executed import ALL, Executed, PlanRecord

STEPS = [
    {},
    {"block 0": "all", "block 1": 13},
    {"block 0": "none", "block 1": "forecast 2"},
    {"block 0": 0, "block 1": "none", "block 2": "forecast 10"},
]
LINES = {"block 0": "all all none 0", "block 1": "all 13 forecast 2 none", "block 2": "all all all forecast 10"}


def test_a_record_survives_both_forms() -> None:
    record = PlanRecord.from_json(STEPS)
    assert record.to_json() == STEPS
    assert record.to_lines() == LINES
    alike = PlanRecord.from_json([{"block 0": "all", "block 1": "none", "block 2": "none", "block 3": "all"}] * 2)
    assert alike.to_lines() == {"block 0": "all all", "block 1, block 2": "none none", "block 3": "all all"}
    assert PlanRecord.from_lines(alike.to_lines()) == alike
    filled = PlanRecord.from_lines(LINES)  # which mentions every unit at every step
    assert filled.to_lines() == LINES and filled.units == record.units
    assert all(filled.at(step, unit) == record.at(step, unit) for step in range(len(STEPS)) for unit in LINES)


def test_what_a_record_says() -> None:
    record = PlanRecord.from_json(STEPS)
    assert record.units == ("block 0", "block 1", "block 2")
    assert record.at(0, "block 1") == ALL and record.at(2, "block 1") == Executed("none", order=2)
    assert record.i_steps == (0,)
    assert record.kept_shares(26).tolist() == [[1, 1, 1], [1, 0.5, 1], [0, 0, 1], [0, 0, 0]]
    assert not record.by_whole_units and PlanRecord.from_json(STEPS[2:3]).by_whole_units


def test_nothing_planned_is_everything_computed() -> None:
    record = PlanRecord.from_json([{}, {}])
    assert record.i_steps == (0, 1) and record.units == () and record.to_lines() == {}


def test_passes_that_differ_stand_beside_each_other() -> None:
    first, second = (PlanRecord.from_json([{"block 0": "all"}, {"block 0": who}]) for who in ("none", "all"))
    both = [{"block 0": "all"}, {"block 0": "none", "pass 2: block 0": "all"}]
    assert first.beside(second, "pass 2", unless=first).to_json() == both


@pytest.mark.parametrize("word", ["some", "forecast", "forecast x", "-"])
def test_other_words_are_refused(word: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        Executed.from_json(word)
