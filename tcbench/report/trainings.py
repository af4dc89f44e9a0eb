"""Rows of several training seeds as one row: the mean over trainings, with intervals that cover them."""

from collections.abc import Sequence
from typing import cast

from tcbench.record.score import Quality, Score
from tcbench.report.rows import replicates_of
from tcbench.stats import over_trainings


def over_rows(row: Score, repeats: Sequence[Score]) -> Score:
    """A row with the numbers of all its trainings; MACs, plan and trajectory stay those of the first.

    Args:
        repeats: the same row with other training seeds.

    Raises:
        UserError: as `tcbench.stats.over_trainings`.
    """
    quality: dict[str, Quality] = {}
    for metric in row["quality"]:
        each = [replicates_of(one, metric) for one in (row, *repeats)]
        found = over_trainings([replicates for replicates in each if replicates])
        interval = found.interval()
        quality[metric] = Quality(
            value=interval.value,
            se=interval.se,
            deleted=found.deleted.tolist(),
            trainings=found.trainings.tolist(),
        )
    return cast(Score, row | {"quality": quality, "trainings": 1 + len(repeats)})
