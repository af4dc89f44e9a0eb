"""Frechet distances: FID on pooled features, sFID on spatial ones, and the floor that real images reach.

sFID here is *spatial* FID (Nash et al., "Generating images with sparse representations", ICML 2021), the same
distance on the first 7 channels of an intermediate feature map, as in ADM's evaluation. FID is Heusel et al.'s (NeurIPS
2017), always in float64. The numbers are torch-fidelity's to rounding (a test compares); its arithmetic is not, because
the jackknife asks for a distance as often as there are batches: here the sums of all samples serve every subset, and
the trace of a square root takes the eigenvalues of a symmetric matrix: of as many rows as there are samples where
those are fewer than the dimensions, else of 2048 in a tenth of the time. It runs where the features are.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from tcbench.errors import UserError
from tcbench.metrics.extractors import Features
from tcbench.stats import Indices


@dataclass(frozen=True)
class Gaussian:
    """Mean [d] and covariance [d, d] of features, float64; published ones (ADM's .npz) fit in directly.

    Attributes:
        few: where they are fewer than d, what it was fitted to, centred and scaled: its Gram matrix is the covariance.
    """

    mu: Tensor
    sigma: Tensor
    few: Tensor | None = None

    @classmethod
    def fit(cls, features_ND: Tensor) -> "Gaussian":
        """Moments of features [n, d], or of the frames of videos [n, t, d]; the covariance is the unbiased one."""
        return Subsets(features_ND).gaussian(np.arange(len(features_ND)))

    def to(self, device: torch.device | str) -> "Gaussian":
        """The same on a device."""
        few = None if self.few is None else self.few.to(device)
        return Gaussian(self.mu.to(device), self.sigma.to(device), few)

    @cached_property
    def root(self) -> Tensor:
        """A square root of the covariance, R' R = S: `few` [n, d], or the symmetric one [d, d]."""
        if self.few is not None:
            return self.few
        values, vectors = torch.linalg.eigh(self.sigma)
        return (vectors * values.clamp(min=0).sqrt()) @ vectors.T

    def distance(self, other: "Gaussian") -> float:
        """|mu - mu'|^2 + tr(S + S' - 2 (S S')^(1/2)).

        S S' has the eigenvalues, but for zeros, of R S' R', which is symmetric: R is the root of S, or of the other
        covariance, which is kept there for further distances.
        """
        between = self.mu - other.mu
        rooted, whole = (other, self) if self.few is None else (self, other)
        values = torch.linalg.eigvalsh(rooted.root @ whole.sigma @ rooted.root.T)
        shared = values.clamp(min=0).sqrt().sum()
        return float(between @ between + self.sigma.trace() + other.sigma.trace() - 2 * shared)


class Subsets:
    """The moments of any subset of samples, from sums that are made once: those of the samples left out are taken away.

    Args:
        features_ND: features [n, d], or of the frames of videos [n, t, d].
    """

    def __init__(self, features_ND: Tensor) -> None:
        values_NTD = features_ND.double().reshape(len(features_ND), -1, features_ND.shape[-1])
        self.frames, self.mean_D = values_NTD.shape[1], values_NTD.mean((0, 1))
        self.centred_NTD = values_NTD - self.mean_D  # so that differences of sums lose no digits
        self.sum_D, self.squares_DD = _sums(self.centred_NTD)

    def gaussian(self, indices: Indices) -> Gaussian:
        """Of the samples at these places, each once."""
        left_out = np.setdiff1d(np.arange(len(self.centred_NTD)), indices)
        if 2 * len(left_out) < len(self.centred_NTD):
            sum_D, squares_DD = _sums(self.centred_NTD[left_out])
            sum_D, squares_DD = self.sum_D - sum_D, self.squares_DD - squares_DD
        else:
            sum_D, squares_DD = _sums(self.centred_NTD[indices])
        count = len(indices) * self.frames
        mean_D = sum_D / count
        sigma = (squares_DD - count * mean_D.outer(mean_D)) / (count - 1)
        few = None
        if count < len(mean_D):
            few = (self.centred_NTD[indices].reshape(count, -1) - mean_D) / math.sqrt(count - 1)
        return Gaussian(self.mean_D + mean_D, sigma, few)


def _sums(values_NTD: Tensor) -> tuple[Tensor, Tensor]:
    rows = values_NTD.reshape(-1, values_NTD.shape[-1])
    return rows.sum(0), rows.T @ rows


def frechet_distance(generated_ND: Tensor, real: Gaussian) -> float:
    """Between the Gaussian of features [n, d] and the real images'."""
    return Gaussian.fit(generated_ND).distance(real)


def real_floor(
    real: Features, num_samples: int, draws: int, seed: int, labels: Sequence[int] | None = None
) -> dict[str, dict[str, float]]:
    """FID and sFID of random real subsets against all real images: what a perfect generator still scores.

    Subsets are drawn without replacement from the reference set itself, so with N real images the floor is
    smaller, by about the factor 1 - num_samples / N, than it would be for that many fresh real images.

    Args:
        labels: the real images' classes, for rows whose samples show classes in turn: so do the subsets then, because
            classes by chance are farther from all images than classes in turn.

    Returns:
        {"fid" | "sfid": {"n", "mean", "std", "draws"}}; "std" is the standard deviation over draws.

    Raises:
        UserError: `num_samples` is not smaller than the number of real images, a class has too few of them, or fewer
            than 2 draws.
    """
    total = len(real.pooled)
    if not 1 < num_samples < total or draws < 2:
        raise UserError(
            f"real_floor: cannot draw {num_samples} of {total} real images {draws} times; draw fewer, or twice"
        )
    rng = np.random.default_rng(seed)
    pools = (
        [np.arange(total)] if labels is None else [np.flatnonzero(np.equal(labels, each)) for each in np.unique(labels)]
    )
    sizes = np.bincount(np.arange(num_samples) % len(pools), minlength=len(pools))
    if any(len(pool) < size for pool, size in zip(pools, sizes, strict=True)):
        raise UserError(f"real_floor: a class has fewer than {sizes.max()} of {total} real images; draw fewer samples")
    subsets = [
        torch.from_numpy(
            np.concatenate([rng.choice(pool, size, replace=False) for pool, size in zip(pools, sizes, strict=True)])
        )
        for _ in range(draws)
    ]
    floor = {}
    for name, features in {"fid": real.pooled, "sfid": real.spatial}.items():
        whole = Gaussian.fit(features)
        bar = tqdm(subsets, desc=f"{name} floor", delay=2, leave=False, disable=None)
        distances = [frechet_distance(features[subset], whole) for subset in bar]
        floor[name] = {
            "n": num_samples,
            "mean": float(np.mean(distances)),
            "std": float(np.std(distances, ddof=1)),
            "draws": draws,
        }
    return floor
