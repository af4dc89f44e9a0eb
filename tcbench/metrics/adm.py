"""Reference batches of Dhariwal and Nichol 2021 (ADM), which class-conditional works on ImageNet are scored with.

VIRTUAL_imagenet*.npz holds moments of all of ImageNet, behind FID and sFID, and 10 000 images, behind precision and
recall.
"""

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tcbench.errors import UserError
from tcbench.metrics.frechet import Gaussian
from tcbench.outside.foreign import refuse_stand_in


def read_moments(path: Path, pooled: int | None = None, spatial: int | None = None) -> tuple[Gaussian, Gaussian]:
    """The published moments of pooled and of spatial features, which must be so many numbers an image.

    Raises:
        UserError: the file is missing, damaged, or another archive, or its moments are not finite, or of other
            features.
    """
    mu, sigma, mu_s, sigma_s = _read(path, "mu", "sigma", "mu_s", "sigma_s")
    moments = (
        _gaussian(path, "mu", mu, "sigma", sigma, pooled),
        _gaussian(path, "mu_s", mu_s, "sigma_s", sigma_s, spatial),
    )
    if moments[1].mu.min() < 0:
        raise UserError(f"{path}: mu_s is negative, so it is not of ADM's spatial features, which come after a ReLU")
    return moments


def read_reference_images(path: Path) -> Tensor:
    """The images, uint8 [10000, 3, H, W]; colours may be the last dimension, as ADM has them, or the second.

    Raises:
        UserError: as `read_moments`, or they are no bytes or not in colour.
    """
    (images,) = _read(path, "arr_0")
    if images.dtype != np.uint8:
        raise UserError(f"{path}: arr_0 holds {images.dtype}, not uint8; scale the images to 0..255 and save bytes")
    if images.ndim != 4 or not len(images) or 3 not in (images.shape[3], images.shape[1]):
        raise UserError(f"{path}: arr_0 has shape {list(images.shape)}, not [n, height, width, 3]; save RGB images so")
    pixels = torch.from_numpy(images)
    return pixels.permute(0, 3, 1, 2) if images.shape[3] == 3 else pixels


def _gaussian(path: Path, mean: str, mu: NDArray, covariance: str, sigma: NDArray, size: int | None) -> Gaussian:
    for name, values in ((mean, mu), (covariance, sigma)):
        if not np.issubdtype(values.dtype, np.floating) or not np.isfinite(values).all():
            raise UserError(f"{path}: {name} holds {values.dtype}, or NaN or infinity; download it again")
    if mu.ndim != 1 or not len(mu) or sigma.shape != mu.shape * 2:
        shapes = f"{list(mu.shape)} and {list(sigma.shape)}"
        raise UserError(f"{path}: {mean} and {covariance} have shapes {shapes}, not [d] and [d, d]; download it again")
    if size not in (None, len(mu)):
        raise UserError(
            f"{path}: {mean} is of {len(mu)} features, and the suite's extractor has {size}; give moments of the same"
        )
    return Gaussian(*(torch.from_numpy(values.astype(np.float64)) for values in (mu, sigma)))


def _read(path: Path, *names: str) -> list[NDArray]:
    if not path.exists():
        raise UserError(f"{path}: not found; `tcbench validate CONFIG --files` says how to get it")
    refuse_stand_in(path, "a reference batch of ADM")
    try:
        with np.load(path) as file:
            if lacking := [name for name in names if name not in file]:
                held = ", ".join(file) or "nothing"
                raise UserError(f"{path}: not a reference batch of ADM: lacks {lacking[0]} (holds {held}); get that")
            return [file[name] for name in names]
    except UserError:
        raise
    except Exception as error:  # what damaged archives make of the reader has no bounds
        reason = str(error).partition(" when ")[0]  # numpy goes on to name the option that runs pickles
        raise UserError(f"{path}: not a reference batch of ADM ({reason}); download it again") from error
