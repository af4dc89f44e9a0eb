"""The registry of metrics, and the scoring of a row: numbers with intervals, differences paired."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import cached_property
from typing import Literal, TypeVar

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from tcbench.errors import UserError
from tcbench.metrics import deviation, precision_recall, vbench
from tcbench.metrics.accuracy import correct
from tcbench.metrics.extractors import Features
from tcbench.metrics.frechet import Gaussian, frechet_distance
from tcbench.metrics.inception_score import inception_score
from tcbench.score import Measured, Paired, Quality
from tcbench.stats import Indices, Replicates, Statistic, replicate

T = TypeVar("T")


@dataclass(frozen=True)
class Samples:
    """Generated samples of one row, in sampling order.

    Attributes:
        features: of the n images.
        labels: int64 [n] that the samples were conditioned on, in the classifier's numbering, or None.
        images: float [n, C, H, W] in [-1, 1] before rounding to 8 bits, or uint8 where they were decoded from latents;
            videos [n, C, T, H, W]; None if no metric looks at them.
        readings: what scorers (`tcbench.metrics.readings`) and VBench said of every sample, by metric, float [n, ...].
        not_run: why a metric of that kind has no reading, by metric: "needs ...".

    Raises:
        UserError: lengths differ, or a value is NaN or infinite.
    """

    features: Features
    labels: Tensor | None = None
    images: Tensor | None = None
    readings: Mapping[str, Tensor] = field(default_factory=dict)
    not_run: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        tensors = {**vars(self.features), "labels": self.labels, "images": self.images, **self.readings}
        for name, values in tensors.items():
            if values is None:
                continue
            if len(values) != len(self):
                raise UserError(
                    f"samples: {len(values)} {name} for {len(self)} samples; score one row's files together"
                )
            if values.is_floating_point() and name not in self.readings:  # NaN there: not asked of this sample
                deviation.require_finite(f"samples: {name}", values)

    def __len__(self) -> int:
        return len(self.features.pooled)


@dataclass(frozen=True)
class Real:
    """The real images' side of the distribution metrics; moments and radii are computed once.

    Attributes:
        features: of the real images, or of the reference batch that goes with published moments.
        moments: (pooled, spatial) Gaussians where they are published; by default fitted to `features`.
    """

    features: Features
    moments: tuple[Gaussian, Gaussian] | None = None

    @cached_property
    def pooled(self) -> Gaussian:
        """Moments of the pooled features, for FID."""
        return self.moments[0] if self.moments else Gaussian.fit(self.features.pooled)

    @cached_property
    def spatial(self) -> Gaussian:
        """Moments of the spatial features, for sFID."""
        return self.moments[1] if self.moments else Gaussian.fit(self.features.spatial)

    @cached_property
    def manifold(self) -> Tensor:
        """Pooled features [m, d] that precision and recall use, m <= 10 000; raises UserError for videos."""
        if self.features.pooled.ndim > 2:
            raise UserError("metrics: precision and recall are of images; take them out of a video suite's list")
        return precision_recall.thin(self.features.pooled)

    @cached_property
    def radii(self) -> Tensor:
        """Distance [m] of each of `manifold` to its third neighbour."""
        return precision_recall.radii(self.manifold)


@dataclass(frozen=True)
class Reference:
    """What samples are compared with: real images, and for paired metrics the uncached run at equal noise."""

    real: Real
    uncached: Samples | None = None


@dataclass(frozen=True)
class Metric:
    """One number about a row.

    Attributes:
        name: key in configs and score files.
        label: heading in tables.
        better: which direction is an improvement.
        version: raised whenever the value may change, so that scores are computed again.
        prepare: computes whatever subsets share (distances, per-sample values) and returns the metric as a
            function of sample indices; nothing is passed through a network again. Raises UserError if an
            input it needs is missing.
        needs: inputs beyond features and real images; a "reading" may be missing for a reason that the row records.
    """

    name: str
    label: str
    better: Literal["lower", "higher", "none"]
    version: int
    prepare: Callable[[Samples, Reference], Statistic]
    needs: frozenset[Literal["labels", "images", "uncached", "reading"]] = frozenset()

    def compute(self, samples: Samples, reference: Reference) -> float:
        """The metric on all samples; raises UserError if an input it needs is missing."""
        return self.prepare(samples, reference)(np.arange(len(samples)))


def _mean(values_N: Tensor) -> Statistic:
    values = values_N.double().numpy()
    return lambda indices: float(values[indices].mean())


def _fid(samples: Samples, reference: Reference) -> Statistic:
    features = samples.features.pooled.double()
    return lambda indices: frechet_distance(features[indices], reference.real.pooled)


def _sfid(samples: Samples, reference: Reference) -> Statistic:
    features = samples.features.spatial.double()
    return lambda indices: frechet_distance(features[indices], reference.real.spatial)


def _is(samples: Samples, reference: Reference) -> Statistic:
    return lambda indices: inception_score(samples.features.logits[indices].flatten(0, -2))


def _precision(samples: Samples, reference: Reference) -> Statistic:
    real = reference.real
    return _mean(precision_recall.inside_real(samples.features.pooled, real.manifold, real.radii))


def _recall(samples: Samples, reference: Reference) -> Statistic:
    return precision_recall.recall(samples.features.pooled, reference.real.manifold)


def _accuracy(samples: Samples, reference: Reference) -> Statistic:
    return _mean(correct(samples.features.logits, _given(samples.labels, "labels")))


def _mae(samples: Samples, reference: Reference) -> Statistic:
    return _mean(deviation.final_mae(*_image_pair(samples, reference)))


def _psnr(samples: Samples, reference: Reference) -> Statistic:
    return _mean(deviation.psnr(*_image_pair(samples, reference)))


def _feature_mse(samples: Samples, reference: Reference) -> Statistic:
    uncached = _given(reference.uncached, "uncached samples")
    return _mean(deviation.feature_mse(samples.features.pooled, uncached.features.pooled))


def _reading(name: str) -> Callable[[Samples, Reference], Statistic]:
    return lambda samples, reference: _mean(_given(samples.readings.get(name), f"the reading {name!r}"))


def _vbench(samples: Samples, reference: Reference) -> Statistic:
    scores_ND = _given(samples.readings.get("vbench"), "VBench's results").double().numpy()
    return lambda indices: 100 * vbench.total(np.nanmean(scores_ND[indices], axis=0))["total"]


def _image_pair(samples: Samples, reference: Reference) -> tuple[Tensor, Tensor]:
    uncached = _given(reference.uncached, "uncached samples")
    return _given(samples.images, "images"), _given(uncached.images, "images of the uncached samples")


def _given(value: T | None, what: str) -> T:
    if value is None:
        raise UserError(f"metrics: a metric of this row needs {what}; provide them or take the metric out of the list")
    return value


METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric("fid", "FID", "lower", 1, _fid),
        Metric("sfid", "sFID", "lower", 1, _sfid),
        Metric("is", "IS", "higher", 1, _is),
        Metric("precision", "Precision", "higher", 1, _precision),
        Metric("recall", "Recall", "higher", 1, _recall),
        Metric("accuracy", "Accuracy", "higher", 1, _accuracy, frozenset({"labels"})),
        Metric("mae", "MAE to uncached", "lower", 1, _mae, frozenset({"images", "uncached"})),
        Metric("psnr", "PSNR to uncached (dB)", "higher", 1, _psnr, frozenset({"images", "uncached"})),
        Metric("feature_mse", "Feature MSE to uncached", "lower", 1, _feature_mse, frozenset({"uncached"})),
        *(
            Metric(name, label, "higher", 1, _vbench if name == "vbench" else _reading(name), frozenset({"reading"}))
            for name, label in (
                ("clip_score", "CLIP score"),
                ("image_reward", "ImageReward"),
                ("vbench", "VBench total (%)"),
                ("digits_clip_score", "CLIP score (digits CLIP)"),
                ("alignment", "Alignment (digit reader)"),
                ("temporal_flickering", "Temporal flickering (VBench's formula)"),
            )
        ),
    )
}


def score_row(
    samples: Samples, uncached: Samples | None, real: Real, groups: Sequence[Indices], metrics: Sequence[str]
) -> Measured:
    """Score one row with 95 % delete-one-group jackknife intervals (`tcbench.stats`).

    Args:
        samples: the row's samples.
        uncached: the reference row's samples at the same noise and labels; None where the row *is* the
            reference, and then metrics that compare with it are left out and nothing is paired.
        real: the real images.
        groups: sample indices of each batch; together all samples.
        metrics: names in `METRICS`.

    Returns:
        Quality and paired differences by metric.
        "paired" is this row less the reference with the same groups left out of both; metrics that already
        compare with the reference are only in "quality"; one that could not be run (`samples.not_run`) is in neither.

    Raises:
        UserError: unknown metric, missing input, groups that are no partition, or runs that are not paired.
    """
    _check_names(metrics)
    if not np.array_equal(np.sort(np.concatenate(groups)), np.arange(len(samples))):
        raise UserError(
            f"score: the groups do not hold each of {len(samples)} samples once; pass the batches as sampled"
        )
    if uncached is not None:
        _check_paired(samples, uncached)
    reference = Reference(real, uncached)
    quality: dict[str, Quality] = {}
    paired: dict[str, Paired] = {}
    for metric in tqdm([METRICS[name] for name in metrics], desc="metrics", delay=2, leave=False, disable=None):
        if metric.name in samples.not_run or (uncached is None and "uncached" in metric.needs):
            continue
        replicates = replicate(metric.prepare(samples, reference), groups)
        interval = replicates.interval()
        quality[metric.name] = {
            "value": interval.value,
            "low": interval.low,
            "high": interval.high,
            "se": interval.se,
            "deleted": replicates.deleted.tolist(),
        }
        if uncached is not None and "uncached" not in metric.needs and metric.name not in uncached.not_run:
            paired[metric.name] = _difference(replicates, replicate(metric.prepare(uncached, reference), groups))
    return {"quality": quality, "paired": paired}


def _difference(row: Replicates, reference: Replicates) -> Paired:
    interval = (row - reference).interval()
    return {
        "difference": interval.value,
        "low": interval.low,
        "high": interval.high,
        "se": interval.se,
        "distinguishable": interval.distinguishable,
    }


def _check_names(names: Sequence[str]) -> None:
    for name in names:
        if name not in METRICS:
            close = get_close_matches(name, METRICS, 1)
            hint = f"did you mean {close[0]!r}?" if close else f"use one of {', '.join(METRICS)}"
            raise UserError(f"metric {name!r}: unknown; {hint}")


def _check_paired(samples: Samples, uncached: Samples) -> None:
    if len(samples) != len(uncached):
        raise UserError(
            f"score: {len(samples)} samples, {len(uncached)} of the reference row; sample both with one seed"
        )
    ours, theirs = samples.labels, uncached.labels
    if ours is not theirs and (ours is None or theirs is None or not torch.equal(ours, theirs)):
        raise UserError("score: labels differ from the reference row's; sample both with one seed")
