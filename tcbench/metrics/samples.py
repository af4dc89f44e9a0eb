"""What metrics look at: generated samples, the real images they are compared with, and the uncached run."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor

from tcbench.errors import UserError
from tcbench.metrics import deviation, precision_recall
from tcbench.metrics.extractors import Features
from tcbench.metrics.frechet import Gaussian
from tcbench.metrics.images import Images, Rows, blocks
from tcbench.stats import Statistic

T = TypeVar("T")


@dataclass(frozen=True)
class Samples:
    """Generated samples of one row, in sampling order.

    Attributes:
        features: of the n images.
        imagenet: their features by a network of ImageNet, if a metric looks at them.
        labels: int64 [n] that the samples were conditioned on, in the classifier's numbering, or None.
        images: float [n, C, H, W] in [-1, 1] before rounding to 8 bits, or uint8 where they were decoded from latents;
            videos [n, C, T, H, W]; None if no metric looks at them. To be looked at block by block
            (`tcbench.metrics.images.blocks`).
        readings: what scorers (`tcbench.metrics.readings`) and VBench said of every sample, by metric, float [n, ...].
        not_run: why a metric of that kind has no reading, by metric: "needs ...".

    Raises:
        UserError: lengths differ, or a value is NaN or infinite.
    """

    features: Features
    labels: Tensor | None = None
    images: Rows | None = None
    readings: Mapping[str, Tensor] = field(default_factory=dict)
    not_run: Mapping[str, str] = field(default_factory=dict)
    imagenet: Features | None = None

    def __post_init__(self) -> None:
        tensors = {**vars(self.features), "labels": self.labels, "images": self.images, **self.readings}
        if self.imagenet:
            tensors |= {f"ImageNet {name}": values for name, values in vars(self.imagenet).items()}
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

    @property
    def device(self) -> torch.device:
        """Where its features are, and its images are compared block by block."""
        return self.features.pooled.device

    def taken(self, index: Tensor) -> "Samples":
        """Some of them, in another order, without readings."""
        imagenet = self.imagenet and self.imagenet.taken(index)
        labels = None if self.labels is None else self.labels[index]
        images = None if self.images is None else Images.of(self.images).taken(index)
        return Samples(self.features.taken(index), labels, images, not_run=self.not_run, imagenet=imagenet)


def odd_images(images: Rows, uncached: Rows | None) -> list[str]:
    """What is suspicious about a row's images [n, ...], beside those of the uncached row if this one computed less."""
    found, first = [], images[:1].flatten(1)

    def all_are(odd: Callable[[Tensor], Tensor]) -> bool:
        return all(bool(odd(block.flatten(1)).all()) for (block,) in blocks(images))

    if all_are(lambda block: block == block[:, :1]):
        found.append("every sample is of one colour")
    elif len(images) > 1 and all_are(lambda block: block == first):
        found.append("all samples are the same image")
    if uncached is not None and all(torch.equal(*pair) for pair in blocks(images, uncached)):
        found.append("its samples are the uncached row's to the bit, though it computed less")
    return found


@dataclass(frozen=True)
class Real:
    """The real images' side of the distribution metrics; moments and radii are computed once.

    Attributes:
        features: of the real images, or of the reference batch that goes with published moments.
        moments: (pooled, spatial) Gaussians where they are published; by default fitted to `features`.
        imagenet: the same images by a network of ImageNet, if a metric looks at them.
        kid_kernel: whether KID's kernel was published for these features (`tcbench.metrics.kid`).
    """

    features: Features
    moments: tuple[Gaussian, Gaussian] | None = None
    imagenet: "Real | None" = None
    kid_kernel: bool = True
    _computed: dict[Callable[[Features], Any], Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    def once(self, compute: Callable[[Features], T]) -> T:
        """What a metric computes of the real images alone, computed when it is first asked for."""
        if compute not in self._computed:
            self._computed[compute] = compute(self.features)
        return self._computed[compute]

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


PairScorer = Callable[[Tensor, Tensor], Tensor]
"""(images [n, C, H, W] or videos [n, C, T, H, W], the uncached ones) -> float32 [n] on the CPU."""


@dataclass(frozen=True)
class Reference:
    """What samples are compared with, and by which networks.

    Attributes:
        real: the real images.
        uncached: the uncached run at equal noise, for distances to it.
        scorers: of pairs of images, by metric.
    """

    real: Real
    uncached: Samples | None = None
    scorers: Mapping[str, PairScorer] = field(default_factory=dict)


def mean_of(values_N: Tensor) -> Statistic:
    """The metric that is the mean of a number per sample."""
    values = values_N.double().cpu().numpy()
    return lambda indices: float(values[indices].mean())


def given(value: T | None, what: str) -> T:
    """An input that a metric needs; raises UserError if it is missing."""
    if value is None:
        raise UserError(f"metrics: a metric of this row needs {what}; provide them or take the metric out of the list")
    return value


def uncached_of(reference: Reference) -> Samples:
    """The uncached samples; raises UserError if there are none."""
    return given(reference.uncached, "uncached samples")


def seen_by_imagenet(samples: Samples, reference: Reference) -> tuple[Samples, Reference]:
    """The same by an ImageNet network's features; raises UserError if there are none."""
    what = "features of an ImageNet network"
    seen = replace(samples, features=given(samples.imagenet, what))
    return seen, replace(reference, real=given(reference.real.imagenet, what))


def image_pair(samples: Samples, reference: Reference) -> tuple[Rows, Rows]:
    """(images, the uncached ones); raises UserError if either are missing."""
    uncached = uncached_of(reference)
    return given(samples.images, "images"), given(uncached.images, "images of the uncached samples")
