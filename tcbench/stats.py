"""Intervals from groups of samples: the delete-a-group jackknife, alone and for paired differences.

**Why groups.** Methods that share a decision inside a batch make its samples dependent, so the batch, not the
sample, is the unit that is left out. Any statistic of a set of samples is served by the one routine: a mean
over samples, a Frechet distance, a share of nearest neighbours.

**Why not the bootstrap.** Resampling with replacement duplicates images: that adds the upward finite-sample
bias of the Frechet distance a second time, and it puts a neighbour at distance zero beside every duplicate,
which breaks the k-nearest-neighbour radii of precision and recall. The jackknife only leaves samples out.

**What an interval covers.** The spread of the statistic over other draws of noise (and labels, where those
are drawn) at the same number of samples, with the model and the real images held fixed. What a method trained
is held fixed too, unless it was trained several times (`over_trainings`): then the value is the mean over the
trainings, and the interval covers other draws of samples *and* other trainings. It does *not* cover the bias
of a statistic at finite n. A Frechet distance is too large by an amount that grows with the samples' own spread,
so a row of less variety has less of it, and the bias does *not* cancel in a difference: `Replicates.centre`
takes out its first order. Where labels are balanced over the whole run but not inside each batch, intervals come
out too wide.

**Shares** (an accuracy) are the same in every group where an event is rare, and then the jackknife's standard error
is 0. `share_interval` and `share_difference` never go below what that many samples can show.

`python -m tests.coverage` measures bias, coverage and power of all of this at the suites' own sizes.

Sources: B. Efron, *The Jackknife, the Bootstrap and Other Resampling Plans* (SIAM, 1982), chapters 2-3; P. S.
Kott, "The delete-a-group jackknife", J. Official Statistics 17 (2001); F. Busing, E. Meijer and R. van der
Leeden, "Delete-m jackknife for unequal m", Statistics and Computing 9 (1999), whose weights make a short last
batch count as what it is; E. L. Korn and B. I. Graubard, "Confidence intervals for proportions with small expected
number of positive counts estimated from survey data", Survey Methodology 24 (1998); D. G. Bonett and R. M. Price,
"Adjusted Wald confidence interval for a difference of binomial proportions based on paired data", J. Educational and
Behavioral Statistics 37 (2012); D. J. Schuirmann, "A comparison of the two one-sided tests procedure ...",
J. Pharmacokinetics and Biopharmaceutics 15 (1987).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import betaincinv, stdtr, stdtridf, stdtrit

from tcbench.errors import UserError

Indices = NDArray[np.integer]
Statistic = Callable[[Indices], float]
"""A number computed from the samples at the given (increasing) indices."""


@dataclass(frozen=True)
class Interval:
    """A value with its two-sided interval.

    Attributes:
        value: the statistic.
        low, high: ends of the interval, in the statistic's own unit.
        se: standard error.
        dof: degrees of freedom: the number of groups less one, or fewer where trainings vary.
    """

    value: float
    low: float
    high: float
    se: float
    dof: float

    @classmethod
    def student(cls, value: float, se: float, dof: float, confidence: float = 0.95) -> "Interval":
        """Student's t interval."""
        half = float(stdtrit(dof, (1 + confidence) / 2)) * se
        return cls(value, value - half, value + half, se, dof)

    def within(self, low: float, high: float) -> "Interval":
        """The part of the interval in a range that holds every true value; what it covers does not change."""
        return replace(self, low=max(self.low, low), high=min(self.high, high))

    @property
    def has_spread(self) -> bool:
        """Whether the standard error is more than rounding; one of 0 is no evidence of anything."""
        return self.se > 1e-9 * abs(self.value)

    @property
    def distinguishable(self) -> bool:
        """Whether the interval excludes 0; meant for differences. One without spread shows nothing."""
        return self.has_spread and not self.low <= 0 <= self.high

    @property
    def p_value(self) -> float:
        """Two-sided p of the hypothesis that the value is 0 (Student t); 1 without spread."""
        return 2 * float(stdtr(self.dof, -abs(self.value) / self.se)) if self.has_spread else 1.0

    def p_equivalent(self, margin: float) -> float:
        """p of the hypothesis that the true value is `margin` or more away from 0.

        Two one-sided t tests (Schuirmann 1987), the larger p doubled: at most .05 where the 95 % interval lies inside
        (-margin, margin). 1 without spread.
        """
        if not self.has_spread:
            return 1.0
        return min(1.0, 2 * float(stdtr(self.dof, (abs(self.value) - margin) / self.se)))

    def detectable(self, alpha: float = 0.05, power: float = 0.8) -> float:
        """Minimum detectable difference: the true one that a two-sided test at `alpha` finds with this power.

        (t_{1 - alpha / 2} + t_power) * se. Of m comparisons that are corrected together, `alpha` is the level over m.
        """
        return float(stdtrit(self.dof, 1 - alpha / 2) + stdtrit(self.dof, power)) * self.se


@dataclass(frozen=True)
class Replicates:
    """A statistic on all samples and with each group left out in turn.

    Two sets of replicates over the same groups can be subtracted. That is the paired comparison: the same
    noise and labels are missing from both sides, so what the two share cancels before any spread is
    estimated.

    Attributes:
        value: the statistic on all samples.
        deleted: float64 [G], the statistic without group g.
        sizes: int [G], samples in group g.
        trainings: float64 [T], the statistic of all samples for each training, whose mean `value` is; empty if what was
            trained is held fixed.
    """

    value: float
    deleted: NDArray[np.float64]
    sizes: NDArray[np.integer]
    trainings: NDArray[np.float64] = field(default_factory=lambda: np.empty(0))

    def __sub__(self, other: "Replicates") -> "Replicates":
        if not np.array_equal(self.sizes, other.sizes):
            raise UserError("paired difference: the two sides have different groups; sample both with the same batches")
        ours, theirs = self.trainings, other.trainings
        if len(ours) and len(theirs) and len(ours) != len(theirs):
            raise UserError(f"paired difference: {len(ours)} and {len(theirs)} trainings; train both as often")
        trainings = (ours if len(ours) else self.value) - (theirs if len(theirs) else other.value)
        return Replicates(
            self.value - other.value,
            self.deleted - other.deleted,
            self.sizes,
            trainings if isinstance(trainings, np.ndarray) else np.empty(0),
        )

    @property
    def _shares(self) -> NDArray[np.float64]:
        return self.sizes / self.sizes.sum()  # m_g / n

    @property
    def centre(self) -> float:
        """The value less the jackknife's estimate of its bias, which takes out the first order in 1 / n.

        With G equal groups, G * value - (G - 1) * mean(deleted).
        """
        return float(len(self.sizes) * self.value - ((1 - self._shares) * self.deleted).sum())

    def interval(self, confidence: float = 0.95, *, corrected: bool = False) -> Interval:
        """Student t interval from the delete-m_j jackknife variance (Busing et al. 1999, Eq. 5).

        With equal groups that is the textbook (G - 1) / G * sum_g (deleted_g - mean(deleted))^2.

        Args:
            corrected: around `centre` instead of the value.
        """
        pseudo = (self.value - (1 - self._shares) * self.deleted) / self._shares
        se, dof = math.sqrt(np.mean((pseudo - self.centre) ** 2 / (1 / self._shares - 1))), float(len(self.sizes) - 1)
        if len(self.trainings):
            se, dof = _with_trainings(se, dof, self.trainings)
        return Interval.student(self.centre if corrected else self.value, se, dof, confidence)

    @property
    def group_sums(self) -> NDArray[np.float64]:
        """Of a statistic that is a mean over samples, the sum over each group, [G]."""
        total = self.sizes.sum()
        return total * self.value - (total - self.sizes) * self.deleted


def over_trainings(each: Sequence[Replicates]) -> Replicates:
    """A statistic's mean over rows that differ in their training alone, sampled from the same noise.

    Two such means can be subtracted: training t of one side is paired with training t of the other, with which it may
    share what was trained.

    Raises:
        UserError: there are fewer than two, or their groups differ.
    """
    first = each[0]
    if len(each) < 2 or not all(np.array_equal(one.sizes, first.sizes) for one in each):
        raise UserError("trainings: need two or more with the same groups; sample all of them with the same batches")
    values = np.array([one.value for one in each])
    return Replicates(float(values.mean()), np.mean([one.deleted for one in each], axis=0), first.sizes, values)


def _with_trainings(se: float, dof: float, values_T: NDArray[np.float64]) -> tuple[float, float]:
    """Standard error and degrees of freedom of a mean over trainings, as a random effect beside that of samples.

    The jackknife of the mean sees the samples, which all trainings share; the variance between trainings, over their
    number, sees the trainings. What varies with both is in both, which errs on wide. The 95 % interval adds the squares
    of the two effects' own half-widths, which covers at least 95 % whatever their sizes (S. Banerjee, "On confidence
    interval for two-means problem based on separate estimates of variances and tabulated values of t-table", Sankhya A
    23 (1961)); the degrees of freedom are those of which it is the t interval. Satterthwaite's cover too little where
    three trainings decide.
    """
    few, between = len(values_T) - 1, float(values_T.std(ddof=1)) / math.sqrt(len(values_T))
    total = math.hypot(se, between)
    if not se or not between:
        return total, few if between else dof

    half = math.hypot(float(stdtrit(dof, 0.975)) * se, float(stdtrit(few, 0.975)) * between)
    return total, float(stdtridf(0.975, half / total))


def share_interval(share: float, se: float, dof: float, samples: int, confidence: float = 0.95) -> Interval:
    """An interval of a share of samples, inside [0, 1] and never of zero width (Korn and Graubard 1998).

    Clopper and Pearson's exact interval at the effective number of samples: that of which a binomial share would have
    this standard error, and no more than there are.
    """
    tail, effective = (1 - confidence) / 2, float(samples)
    if se and 0 < share < 1:
        ratio = stdtrit(samples - 1, 1 - tail) / stdtrit(dof, 1 - tail)
        effective = min(effective, share * (1 - share) / se**2 * float(ratio) ** 2)
    hits = share * effective
    low = float(betaincinv(hits, effective - hits + 1, tail)) if share > 0 else 0.0
    high = float(betaincinv(hits + 1, effective - hits, 1 - tail)) if share < 1 else 1.0
    return Interval(share, low, high, se, dof)


def share_difference(difference: Interval, group_sums: ArrayLike, samples: int) -> Interval:
    """A paired difference of shares, whose standard error is never below what that many pairs can show.

    The standard error is the largest of three: the jackknife's; Bonett and Price's (2012), from the fewest pairs that
    can differ if the groups differ as they do; and that of which the 95 % interval is as wide as the exact bound on
    what none of the samples showed, 1 - .025^(1 / n).

    Args:
        difference: the jackknife's.
        group_sums: samples that count on this side, less those on the other, by group.
        samples: pairs.
    """
    sums = np.asarray(group_sums, dtype=float)
    more, less = ((side.clip(min=0).sum() + 1) / (samples + 2) for side in (sums, -sums))
    adjusted = math.sqrt((more + less - (more - less) ** 2) / (samples + 2))
    unseen = (1 - 0.025 ** (1 / samples)) / float(stdtrit(difference.dof, 0.975))
    return Interval.student(difference.value, max(difference.se, adjusted, unseen), difference.dof).within(-1, 1)


def share_error(share: float, se: float, samples: int) -> float:
    """The standard error of a share, at least Agresti and Coull's, which two successes and two failures more give."""
    shrunk = (share * samples + 2) / (samples + 4)
    return max(se, math.sqrt(shrunk * (1 - shrunk) / (samples + 4)))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment: all rejections at adjusted p <= alpha are right with probability 1 - alpha.

    S. Holm, "A simple sequentially rejective multiple test procedure", Scand. J. Statistics 6 (1979).
    """
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, p_values[index] * (len(p_values) - rank)))
        adjusted[index] = largest
    return adjusted


def welch(value: float, se: float, other: float, other_se: float, dof: float) -> Interval:
    """The difference of two independent numbers, with the smaller side's degrees of freedom, which errs on wide."""
    return Interval.student(value - other, math.hypot(se, other_se), dof)


def batches(num_samples: int, batch_size: int) -> list[Indices]:
    """Groups of consecutive samples, as the sampler batches them; the last may be short."""
    return np.split(np.arange(num_samples), range(batch_size, num_samples, batch_size))


def replicate(statistic: Statistic, groups: Sequence[Indices]) -> Replicates:
    """Evaluate `statistic` on all samples of `groups` and without each group: G + 1 calls.

    Raises:
        UserError: fewer than two groups, an empty or overlapping group, or a statistic that is not finite.
    """
    if len(groups) < 2:
        raise UserError(f"jackknife: {len(groups)} group of samples; use at least 2 batches (8 or more is sensible)")
    sizes = np.array([len(group) for group in groups])
    member = np.repeat(np.arange(len(groups)), sizes)
    order = np.argsort(np.concatenate(groups), kind="stable")
    samples, member = np.concatenate(groups)[order], member[order]
    if sizes.min() == 0 or (np.diff(samples) == 0).any():
        raise UserError("jackknife: a group is empty or two groups share a sample; groups must be disjoint batches")
    value = statistic(samples)
    deleted = np.array([statistic(samples[member != group]) for group in range(len(groups))])
    if not np.isfinite([value, *deleted]).all():
        raise UserError(
            f"jackknife: the statistic is {value}, and {deleted.tolist()} with one group left out; "
            "all must be finite, so use more samples per row"
        )
    return Replicates(float(value), deleted.astype(np.float64), sizes)


def jackknife(statistic: Statistic, groups: Sequence[Indices], confidence: float = 0.95) -> Interval:
    """Delete-a-group jackknife interval of `statistic`; see the module's text for what it covers.

    Args:
        statistic: takes increasing sample indices, returns a float.
        groups: disjoint index arrays, one per batch; their union is all samples.
        confidence: two-sided coverage.

    Raises:
        UserError: as `replicate`.
    """
    return replicate(statistic, groups).interval(confidence)
