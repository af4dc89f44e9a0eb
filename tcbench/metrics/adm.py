"""Reference batches of Dhariwal and Nichol 2021 (ADM), which class-conditional works on ImageNet are scored with."""

import zipfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tcbench.errors import UserError
from tcbench.metrics.frechet import Gaussian


def read_reference_batch(path: Path) -> tuple[tuple[Gaussian, Gaussian], Tensor]:
    """((pooled, spatial) moments of all of ImageNet, 10 000 of its images) from VIRTUAL_imagenet*_labeled.npz.

    ADM takes FID and sFID from the moments, precision and recall from the images.

    Returns:
        The images are uint8 [n, 3, H, W].

    Raises:
        UserError: the file is missing, damaged, or another archive.
    """
    try:
        with np.load(path) as file:
            moments = [(file[f"mu{kind}"], file[f"sigma{kind}"]) for kind in ("", "_s")]
            images = torch.from_numpy(file["arr_0"]).permute(0, 3, 1, 2)
    except FileNotFoundError as error:
        raise UserError(f"{path}: not found; `tcbench validate CONFIG --files` says how to get it") from error
    except (KeyError, ValueError, OSError, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: not a reference batch of ADM ({error}); download it again") from error
    pooled, spatial = (Gaussian(mu.astype(np.float64), sigma.astype(np.float64)) for mu, sigma in moments)
    return (pooled, spatial), images
