"""From a metric's numbers to intervals and differences that may be tested, by what the catalogue says of the metric.

Score files hold what was measured; what tables print and tests use is made from it here: intervals inside the metric's
range, exact ones of shares, and Frechet distances whose bias is taken out. Imports no torch.
"""

from typing import NamedTuple

from tcbench.metrics.catalogue import SHARE, Metric, find_extractor
from tcbench.stats import Interval, Replicates, share_difference, share_error, share_interval, welch

USABLE = 2
"""Samples per feature that a Frechet distance needs to be tested. Below, what is left of its bias after correction is
as large as the differences of interest, and its sign can be wrong (docs/statistics.md)."""


class Sampled(NamedTuple):
    """How many samples a row has, in how many groups, and the extractor of their features."""

    samples: int
    groups: int
    extractor: str | None


def samples_needed(metric: Metric, of: Sampled) -> int:
    """How many samples a metric needs before it may be tested, if there are fewer; else 0.

    Of videos, samples count and not frames, which depend on each other.
    """
    extractor = metric.extractor(of.extractor)
    if metric.moments is None or extractor is None:
        return 0
    needed = USABLE * getattr(find_extractor(extractor), metric.moments)
    return needed if of.samples < needed else 0


def value_interval(metric: Metric, value: float, se: float, of: Sampled, dof: float) -> Interval:
    """A metric of a row with its 95 % interval, inside the metric's range; `dof` are the standard error's."""
    if metric.bounds == SHARE:
        return share_interval(value, se, dof, of.samples)
    low, high = metric.bounds
    if metric.name == "is" and of.extractor:
        high = find_extractor(of.extractor).classes
    return Interval.student(value, se, dof).within(low, high)


def paired_difference(metric: Metric, difference: Replicates) -> Interval:
    """The difference of two rows over the same groups: of shares exact, of Frechet distances corrected for bias."""
    interval = difference.interval(corrected=metric.moments is not None)
    if metric.share:
        return share_difference(interval, difference.group_sums, int(difference.sizes.sum()))
    return interval


def independent_difference(metric: Metric, ours: Interval, theirs: Interval, samples: tuple[int, int]) -> Interval:
    """The difference of two rows that share nothing, from each one's value and standard error."""
    errors = [side.se for side in (ours, theirs)]
    if metric.share:
        errors = [share_error(side.value, side.se, n) for side, n in zip((ours, theirs), samples, strict=True)]
    return welch(ours.value, errors[0], theirs.value, errors[1], min(ours.dof, theirs.dof))
