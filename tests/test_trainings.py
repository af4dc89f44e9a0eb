"""Rows of several training seeds: one row, whose intervals and comparisons cover the trainings."""

import copy

import numpy as np
import pytest

from tcbench.report.compare import UNDECIDED, compare
from tcbench.report.main_table import main_table
from tcbench.report.rows import interval_of
from tcbench.report.trainings import over_rows

from .test_report import make_rows


def rows_of(values: list[float], noise: np.ndarray) -> list[dict]:
    """An uncached row and one row for each training, of IS 4 and `values`, in eight batches."""
    rows = [copy.deepcopy(row) for row in make_rows() if row["row"] in ("nfe20-uncached", "nfe20-tokencache")]
    uncached, ours = rows
    found = [uncached, *(copy.deepcopy(ours) for _ in values)]
    for row, value in zip(found, [4.0, *values], strict=True):
        row["group_sizes"], row["groups"] = [64] * 8, 8
        row["quality"] = {"is": {"value": value, "deleted": list(value + noise), "se": 0.1}}
    return found


def test_a_row_of_several_trainings_is_their_mean() -> None:
    uncached, *ours = rows_of([4.2, 4.6, 5.2], 0.01 * np.arange(8))
    row = over_rows(ours[0], ours[1:])
    quality, interval = row["quality"]["is"], interval_of(row, "is")
    assert quality["value"] == pytest.approx(14 / 3) and quality["trainings"] == [4.2, 4.6, 5.2]
    between = np.std([4.2, 4.6, 5.2], ddof=1) / 3**0.5
    assert quality["se"] > between
    assert interval is not None and 2 < interval.dof < 7 and (interval.low, interval.high) != (1, 10)
    assert ours[0]["quality"]["is"]["value"] == 4.2  # untouched
    assert interval_of(uncached, "is").dof == 7


def test_comparisons_cover_the_trainings() -> None:
    uncached, *ours = rows_of([4.2, 4.6, 5.2], 0.01 * np.arange(8))
    row = over_rows(ours[0], ours[1:])
    alone, together = compare(ours[0], uncached, "is"), compare(row, uncached, "is")
    assert alone is not None and together is not None
    assert together.interval.dof == pytest.approx(2) and together.outcome == UNDECIDED
    better = copy.deepcopy(row)
    better["row"] = "other"
    better["quality"]["is"] |= {"value": row["quality"]["is"]["value"] + 1, "trainings": [5.2, 5.6, 6.2]}
    found = compare(better, row, "is")  # shares what was trained, so the trainings cancel
    assert found is not None and found.paired and found.interval.value == pytest.approx(1)


def test_tables_say_how_often_rows_were_trained() -> None:
    rows = make_rows()
    place = next(index for index, row in enumerate(rows) if row["row"] == "nfe20-tokencache")
    assert "rained" not in main_table(rows, None, None, differs="", guidance_scale=1.5).caption
    rows[place]["trainings"] = 3
    assert (
        "Trained 3 times at 20 steps: TokenCache. "
        in main_table(rows, None, None, differs="", guidance_scale=1.5).caption
    )
