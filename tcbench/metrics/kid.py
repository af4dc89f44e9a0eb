"""Kernel inception distance (Binkowski et al., ICLR 2018): squared MMD between features, with torch-fidelity's kernel.

The Frechet distance is biased upwards at finite n, by more than small suites' differences; this estimate is unbiased at
any n, and may be below 0. torch-fidelity averages it over random subsets; here it is the U-statistic over all pairs,
which draws nothing at random and of which leaving out a batch is a sum less.

The kernel, (x.y / d + 1)^3, is not free of scale: it is meant for Inception's features, whose x.y / d is below 1. For
other networks d gives way to the real images' mean square |x|^2, so that KID is the same whatever their features are
multiplied with.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from tcbench.errors import UserError
from tcbench.metrics.extractors import Features
from tcbench.metrics.samples import Reference, Samples
from tcbench.stats import Indices, Statistic

SCALE = 1000
"""KID is small, and tables print it times this."""
_ENTRIES = 2**23  # of the kernel's matrix at a time, 64 MB


def kid(samples: Samples, reference: Reference) -> Statistic:
    """1000 times the unbiased squared MMD of the pooled features to the real images'.

    Raises:
        UserError: of videos, or with fewer than two images on a side.
    """
    size, among_real = reference.real.once(_as_published if reference.real.kid_kernel else _fitted)
    generated, real = _pooled(samples.features) / size, _pooled(reference.real.features) / size
    across_N = _kernel_sums(generated, real) / len(real)
    pairs_N = _pair_sums(generated)

    def statistic(indices: Indices) -> float:
        left_out, kept = np.setdiff1d(np.arange(len(generated)), indices), len(indices)
        if kept < 2:
            raise UserError(f"kid: {kept} sample makes no pair; use more samples")
        # pairs within those kept: all, less those with one left out, which counts pairs of two left out twice
        among = pairs_N.sum() - 2 * pairs_N[left_out].sum() + _pair_sums(generated[left_out]).sum()
        return SCALE * float(among / (kept * (kept - 1)) + among_real - 2 * across_N[indices].mean())

    return statistic


def _pooled(features: Features) -> Tensor:
    if features.pooled.ndim > 2:
        raise UserError("metrics: kid is of images; take it out of a video suite's list")
    return features.pooled.double()


def _as_published(features: Features) -> tuple[float, float]:
    """(what features are divided by, mean of the kernel over pairs of different images)."""
    return 1.0, _mean_of_pairs(_pooled(features))


def _fitted(features: Features) -> tuple[float, float]:
    """The same with features as large as the kernel takes them to be: of a mean square of 1 a number."""
    real = _pooled(features)
    size = float(real.square().mean().sqrt()) or 1.0
    return size, _mean_of_pairs(real / size)


def _mean_of_pairs(real: Tensor) -> float:
    if len(real) < 2:
        raise UserError(f"kid: {len(real)} real image makes no pair; give more")
    return float(_pair_sums(real).sum() / (len(real) * (len(real) - 1)))


def _pair_sums(x_ND: Tensor) -> Tensor:
    """Of each row, the sum of the kernel with the others, [n]."""
    return torch.cat([kernel.sum(1) - kernel.diagonal(first) for first, kernel in _kernel(x_ND, x_ND)])


def _kernel_sums(x_ND: Tensor, y_MD: Tensor) -> Tensor:
    """Of each row, the sum of the kernel with all of `y_MD`, [n]."""
    return torch.cat([kernel.sum(1) for _, kernel in _kernel(x_ND, y_MD)])


def _kernel(x_ND: Tensor, y_MD: Tensor) -> Iterator[tuple[int, Tensor]]:
    """The kernel's matrix [n, m], in blocks of rows with the number of their first."""
    size = max(1, _ENTRIES // max(1, len(y_MD)))
    for number, rows in enumerate(x_ND.split(size)):
        yield number * size, (rows @ y_MD.T / x_ND.shape[1] + 1) ** 3
