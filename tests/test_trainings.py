"""Rows of several training seeds: one row, whose intervals and comparisons cover the trainings."""

import copy

import numpy as np
import pytest
from tcbench.report.tables import main_table

from tcbench.report.compare import compare
from tcbench.report.trainings import over_rows

from .test_report import make_rows


def rows_of(values: list[float], noise: np.ndarray) -> list[dict]:
    """An uncached row and one row for each training, of FID 4 and `values`, in eight batches."""
    rows = [copy.deepcopy(row) for row in make_rows() if row["row"] in ("nfe20-uncached", "nfe20-tokencache")]
    uncached, ours = rows
    found = [uncached, *(copy.deepcopy(ours) for _ in values)]
    for row, value in zip(found, [4.0, *values], strict=True):
        row["group_sizes"], row["groups"] = [64] * 8, 8
        row["quality"] = {"fid": {"value": value, "deleted": list(value + noise), "low": 0, "high": 0, "se": 0.1}}
        row["paired"] = {"fid": {"difference": value - 4, "low": 0, "high": 0, "se": 0.1, "distinguishable": True}}
    uncached["paired"] = {}
    return found


def test_a_row_of_several_trainings_is_their_mean() -> None:
    uncached, *ours = rows_of([4.2, 4.6, 5.2], 0.01 * np.arange(8))
    row = over_rows(ours[0], ours[1:], uncached)
    quality, paired = row["quality"]["fid"], row["paired"]["fid"]
    assert quality["value"] == pytest.approx(14 / 3) and quality["trainings"] == [4.2, 4.6, 5.2]
    assert paired["difference"] == pytest.approx(2 / 3)
    between = np.std([4.2, 4.6, 5.2], ddof=1) / 3**0.5
    assert paired["se"] == pytest.approx(between) and quality["se"] > between
    assert paired["low"] < 0 < paired["high"] and not paired["distinguishable"]  # t of two degrees of freedom
    assert ours[0]["quality"]["fid"]["value"] == 4.2  # untouched


def test_comparisons_cover_the_trainings() -> None:
    uncached, *ours = rows_of([4.2, 4.6, 5.2], 0.01 * np.arange(8))
    row = over_rows(ours[0], ours[1:], uncached)
    alone, together = compare(ours[0], uncached, "fid"), compare(row, uncached, "fid")
    assert alone is not None and together is not None
    assert together.interval.dof == pytest.approx(2) and together.outcome == "≈"
    better = copy.deepcopy(row)
    better["row"] = "other"
    better["quality"]["fid"] |= {"value": row["quality"]["fid"]["value"] - 1, "trainings": [3.2, 3.6, 4.2]}
    found = compare(better, row, "fid")  # shares what was trained, so the trainings cancel
    assert found is not None and found.paired and found.outcome == "better"


def test_tables_say_how_often_rows_were_trained() -> None:
    rows = make_rows()
    place = next(index for index, row in enumerate(rows) if row["row"] == "nfe20-tokencache")
    assert "trained" not in main_table(rows, None, None, differs="", guidance_scale=1.5).caption
    rows[place]["trainings"] = 3
    assert "trained 3 times" in main_table(rows, None, None, differs="", guidance_scale=1.5).caption
