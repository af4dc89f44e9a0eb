"""The scoring of a row: numbers, and the replicates that intervals and differences are made of."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType

import numpy as np
import torch
from tqdm import tqdm

from tcbench.errors import UserError
from tcbench.metrics.catalogue import Metric, find_metric
from tcbench.metrics.images import blocks
from tcbench.metrics.samples import PairScorer, Real, Reference, Samples, given, image_pair, mean_of
from tcbench.record.score import Quality
from tcbench.stats import Indices, Statistic, replicate


def prepare(metric: Metric, samples: Samples, reference: Reference) -> Statistic:
    """A metric of a row as a function of sample indices; raises UserError if an input it needs is missing."""
    if metric.per_sample and metric.distance:
        scorer = given(reference.scorers.get(metric.name), f"a scorer for {metric.name!r}")
        return mean_of(torch.cat([scorer(*pair) for pair in blocks(*image_pair(samples, reference))]))
    if metric.per_sample:
        return mean_of(given(samples.readings.get(metric.name), f"the reading {metric.name!r}"))
    return metric.function()(samples, reference)


def compute(name: str, samples: Samples, reference: Reference) -> float:
    """A metric on all samples; raises UserError as `prepare`, or if there is no such metric."""
    return prepare(find_metric(name), samples, reference)(np.arange(len(samples)))


def score_row(
    samples: Samples,
    uncached: Samples | None,
    real: Real,
    groups: Sequence[Indices],
    metrics: Sequence[str],
    scorers: Mapping[str, PairScorer] = MappingProxyType({}),
) -> dict[str, Quality]:
    """Score one row: every metric with its delete-one-group jackknife replicates (`tcbench.stats`).

    Args:
        samples: the row's samples.
        uncached: the reference row's samples at the same noise and labels; None where the row *is* the
            reference, and then metrics that compare with it are left out.
        real: the real images.
        groups: sample indices of each batch; together all samples.
        metrics: names in `catalogue.METRICS`.
        scorers: as `Reference` has them.

    Returns:
        Quality by metric, without those that could not be run (`samples.not_run`).

    Raises:
        UserError: unknown metric, missing input, groups that are no partition, or runs that are not paired.
    """
    chosen = [find_metric(name) for name in metrics]
    if not np.array_equal(np.sort(np.concatenate(groups)), np.arange(len(samples))):
        raise UserError(
            f"score: the groups do not hold each of {len(samples)} samples once; pass the batches as sampled"
        )
    if uncached is not None:
        _check_paired(samples, uncached)
    reference = Reference(real, uncached, scorers)
    quality: dict[str, Quality] = {}
    for metric in tqdm(chosen, desc="metrics", delay=2, leave=False, disable=None):
        if metric.name in samples.not_run or (uncached is None and metric.distance):
            continue
        quality[metric.name] = quality_of(prepare(metric, samples, reference), groups)
    return quality


def quality_of(statistic: Statistic, groups: Sequence[Indices]) -> Quality:
    """A metric with its standard error and the replicates behind it."""
    replicates = replicate(statistic, groups)
    return {
        "value": replicates.value,
        "se": replicates.interval().se,
        "deleted": replicates.deleted.tolist(),
    }


def _check_paired(samples: Samples, uncached: Samples) -> None:
    if len(samples) != len(uncached):
        raise UserError(
            f"score: {len(samples)} samples, {len(uncached)} of the reference row; sample both with one seed"
        )
    ours, theirs = samples.labels, uncached.labels
    if ours is not theirs and (ours is None or theirs is None or not torch.equal(ours, theirs)):
        raise UserError("score: labels differ from the reference row's; sample both with one seed")
