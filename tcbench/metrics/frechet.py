"""Frechet distances: FID on pooled features, sFID on spatial ones, and the floor that real images reach.

sFID here is *spatial* FID (Nash et al., "Generating images with sparse representations", ICML 2021), the same
distance on the first 7 channels of an intermediate feature map, as in ADM's evaluation. The arithmetic is
torch-fidelity's (Heusel et al., NeurIPS 2017), always in float64.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_features_to_statistics, fid_statistics_to_metric
from tqdm import tqdm

from tcbench.errors import UserError
from tcbench.metrics.extractors import Features


@dataclass(frozen=True)
class Gaussian:
    """Mean [d] and covariance [d, d] of features, float64; published ones (ADM's .npz) fit in directly."""

    mu: NDArray[np.float64]
    sigma: NDArray[np.float64]

    @classmethod
    def fit(cls, features_ND: Tensor) -> "Gaussian":
        """Moments of features [n, d], or of the frames of videos [n, t, d]; the covariance is the unbiased one."""
        return cls(**fid_features_to_statistics(features_ND.double().flatten(0, -2)))


def frechet_distance(generated_ND: Tensor, real: Gaussian) -> float:
    """|mu - mu_r|^2 + tr(S + S_r - 2 (S S_r)^(1/2)) between features [n, d] and the real images' Gaussian."""
    generated = Gaussian.fit(generated_ND)
    return fid_statistics_to_metric(vars(generated), vars(real), verbose=False)[KEY_METRIC_FID]


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
