"""The seed-noise yardstick: how far apart two uncached runs of different noise are, in every distance to uncached.

A distance to the uncached run says how far caching moves a sample; this is what another seed would move it. No second
run is needed: the noise of sample i is a function of (seed, i), and of two indices it is as independent as of two
seeds. Samples i and j of one uncached run that show the same are therefore distributed as sample i of one run and of
another.

- A distance that is a mean over samples is of every sample and the next that shows the same, of the last and the first.
- A Frechet distance is of two halves, every second sample of those that show the same. They are half as large as the
  sets that a row is compared by, and its bias at finite n is about twice that of two whole runs.

Leaving out a batch leaves out all pairs with a sample in it. Where that leaves no two pairs, as it can of the first
few samples of a row, there is no yardstick for that metric.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tcbench.metrics.catalogue import Metric, find_metric
from tcbench.metrics.samples import PairScorer, Real, Reference, Samples
from tcbench.metrics.scoring import prepare, quality_of
from tcbench.record.score import Quality
from tcbench.stats import Indices, Statistic

LEAST = 8
"""Samples that must show the same as another."""

Pairs = NDArray[np.int64]
"""Indices of samples, [2, pairs]."""


@dataclass(frozen=True)
class Partners:
    """Which samples stand for each other's second run.

    Attributes:
        matched: whether partners show the same. Where nearly every sample shows something of its own, none do, and what
            is measured holds that difference too: an upper bound.
        rings: samples of which each is paired with the next, by what they show.
    """

    matched: bool
    rings: tuple[NDArray[np.int64], ...]

    @classmethod
    def among(cls, labels: Tensor | None, count: int) -> "Partners":
        """The partners among samples with these labels, int64 [n] or [n, words]; without labels all show the same."""
        if labels is None:
            return cls(True, (np.arange(count),))
        shown = torch.unique(labels, dim=0, return_inverse=True)[1].numpy()
        order = np.argsort(shown, kind="stable")
        alike = np.split(order, np.flatnonzero(np.diff(shown[order])) + 1)
        rings = tuple(ring for ring in alike if len(ring) > 1)
        if sum(map(len, rings)) < LEAST:
            return cls(False, (np.arange(count),))
        return cls(True, rings)

    @property
    def next(self) -> Pairs:
        """Every sample and the next of its ring."""
        return np.concatenate([np.stack([ring, np.roll(ring, -1)]) for ring in self.rings], axis=1)

    @property
    def halves(self) -> Pairs:
        """Every second sample of the rings beside the one after it; none is in two pairs."""
        return np.concatenate([ring[: len(ring) // 2 * 2].reshape(-1, 2).T for ring in self.rings], axis=1)


def seed_noise(
    uncached: Samples,
    real: Real,
    groups: Sequence[Indices],
    metrics: Sequence[str],
    scorers: Mapping[str, PairScorer],
) -> tuple[Partners, dict[str, Quality]]:
    """(the partners, the yardstick by metric) of an uncached row, for those of `metrics` that are distances to it.

    Args as `tcbench.metrics.scoring.score_row`, whose errors it raises.
    """
    partners = Partners.among(uncached.labels, len(uncached))
    distances = [find_metric(name) for name in metrics if find_metric(name).distance and name not in uncached.not_run]
    found = {}
    for metric in distances:
        pairs = partners.halves if metric.moments else partners.next
        if all((~np.isin(pairs, group).any(axis=0)).sum() >= 2 for group in groups):
            found[metric.name] = quality_of(_between(metric, uncached, pairs, real, scorers), groups)
    return partners, found


def _between(
    metric: Metric, uncached: Samples, pairs: Pairs, real: Real, scorers: Mapping[str, PairScorer]
) -> Statistic:
    """The metric between partners, of which both must be among the indices."""
    one, other = (uncached.taken(torch.from_numpy(side)) for side in pairs)
    statistic = prepare(metric, one, Reference(real, other, scorers))
    return lambda indices: statistic(np.flatnonzero(np.isin(pairs, indices).all(axis=0)))
