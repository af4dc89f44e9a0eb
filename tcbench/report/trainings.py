"""Rows of several training seeds as one row: the mean over trainings, with intervals that cover them."""

from collections.abc import Sequence
from typing import cast

import numpy as np

from tcbench.record.score import Paired, Quality, Score
from tcbench.stats import Replicates, over_trainings


def over_rows(row: Score, repeats: Sequence[Score], reference: Score) -> Score:
    """A row with the numbers of all its trainings; MACs, plan and trajectory stay those of the first.

    Args:
        repeats: the same row with other training seeds.
        reference: its uncached row, for the paired differences.

    Raises:
        UserError: as `tcbench.stats.over_trainings`.
    """
    quality, paired = dict(row["quality"]), dict(row["paired"])
    for metric in quality:
        found = over_trainings([replicates(one, metric) for one in (row, *repeats)])
        interval = found.interval()
        quality[metric] = Quality(
            value=interval.value,
            low=interval.low,
            high=interval.high,
            se=interval.se,
            deleted=found.deleted.tolist(),
            trainings=found.trainings.tolist(),
        )
        if metric in paired:
            less = (found - replicates(reference, metric)).interval()
            paired[metric] = Paired(
                difference=less.value, low=less.low, high=less.high, se=less.se, distinguishable=less.distinguishable
            )
    return cast(Score, row | {"quality": quality, "paired": paired, "trainings": 1 + len(repeats)})


def replicates(row: Score, metric: str) -> Replicates:
    """What scoring stored of a metric, for intervals and paired differences."""
    quality = row["quality"][metric]
    sizes, trainings = np.array(row["group_sizes"]), np.array(quality.get("trainings", ()), dtype=np.float64)
    return Replicates(quality["value"], np.array(quality["deleted"]), sizes, trainings)
