"""Differences between two rows, paired where they can be, and corrected where several decide together."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from tcbench.metrics.catalogue import METRICS
from tcbench.report.rows import Row, is_reference, paired_interval, quality_of
from tcbench.report.trainings import replicates
from tcbench.stats import Interval, holm, welch

LEVEL = 0.05
"""Of every test, after Holm's correction over the comparisons that it decides together."""


@dataclass(frozen=True)
class Comparison:
    """One row against another in one metric.

    Attributes:
        row, other: row ids.
        metric: a name in the catalogue.
        interval: this row less the other.
        paired: same noise, labels and batches on both sides, so that what they share cancelled.
        p: two-sided, adjusted if `decide_together` made it.
    """

    row: str
    other: str
    metric: str
    interval: Interval
    paired: bool
    p: float

    @property
    def outcome(self) -> str:
        """`better`, `worse` or, where the difference may be chance, `≈`."""
        if self.p > LEVEL:
            return "≈"
        return "better" if self.interval.value * METRICS[self.metric].sign > 0 else "worse"


def compare(row: Row, other: Row, metric: str) -> Comparison | None:
    """`row` less `other`; None if either lacks the metric.

    Paired by what scoring stored against the row's own reference, or by the jackknife's replicates where both rows hold
    them for the same batches; otherwise the two are taken as independent, which errs on wide.
    """
    to_reference = other["row"] == row["reference"] and not is_reference(row) and "trainings" not in row
    if to_reference and (interval := paired_interval(row, metric)):
        return Comparison(row["row"], other["row"], metric, interval, True, interval.p_value)
    ours, theirs = quality_of(row, metric), quality_of(other, metric)
    if ours is None or theirs is None:
        return None
    paired = "deleted" in ours and "deleted" in theirs and row["group_sizes"] == other["group_sizes"]
    if paired:
        interval = (replicates(row, metric) - replicates(other, metric)).interval()
    else:
        dof = min(row["groups"], other["groups"]) - 1
        interval = welch(ours["value"], ours["se"], theirs["value"], theirs["se"], dof)
    return Comparison(row["row"], other["row"], metric, interval, paired, interval.p_value)


def decide_together(comparisons: Sequence[Comparison | None]) -> list[Comparison]:
    """Those that exist, with p adjusted over all of them (Holm)."""
    found = [comparison for comparison in comparisons if comparison is not None]
    adjusted = holm([comparison.p for comparison in found])
    return [replace(comparison, p=p) for comparison, p in zip(found, adjusted, strict=True)]
