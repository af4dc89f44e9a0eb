"""Reference batches of Dhariwal and Nichol 2021 (ADM), which class-conditional works on ImageNet are scored with.

VIRTUAL_imagenet*.npz holds moments of all of ImageNet, behind FID and sFID, and 10 000 images, behind precision and
recall.
"""

import zipfile
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tcbench.errors import UserError
from tcbench.metrics.frechet import Gaussian


def read_moments(path: Path) -> tuple[Gaussian, Gaussian]:
    """The published moments of pooled and of spatial features.

    Raises:
        UserError: the file is missing, damaged, or another archive, or its spatial moments are of another layer.
    """
    mu, sigma, mu_s, sigma_s = (moment.astype(np.float64) for moment in _read(path, "mu", "sigma", "mu_s", "sigma_s"))
    if mu_s.min() < 0:
        raise UserError(f"{path}: mu_s is negative, so it is not of ADM's spatial features, which come after a ReLU")
    return Gaussian(mu, sigma), Gaussian(mu_s, sigma_s)


def read_reference_images(path: Path) -> Tensor:
    """The images, uint8 [10000, 3, H, W]; raises UserError as `read_moments`."""
    return torch.from_numpy(_read(path, "arr_0")[0]).permute(0, 3, 1, 2)


def _read(path: Path, *names: str) -> list[NDArray]:
    try:
        with np.load(path) as file:
            return [file[name] for name in names]
    except FileNotFoundError as error:
        raise UserError(f"{path}: not found; `tcbench validate CONFIG --files` says how to get it") from error
    except (KeyError, ValueError, OSError, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: not a reference batch of ADM ({error}); download it again") from error
