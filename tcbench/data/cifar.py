"""CIFAR-10 (Krizhevsky 2009): 60 000 colour images of ten classes, read from torchvision's copy of its files."""

from pathlib import Path

import torch
from torchvision.datasets import CIFAR10

from tcbench.data import Dataset, Part
from tcbench.errors import UserError

FOLDER = Path("data")
"""Where torchvision's CIFAR10("data") puts the files, in a folder of their own."""


def load_cifar10(part: Part, folder: Path = FOLDER) -> Dataset:
    """One part of CIFAR-10: 50 000 images to train on or the 10 000 held out of training.

    Args:
        part: "train" or "test".
        folder: what torchvision's CIFAR10 was given as `root`; it checks the files before it reads them.

    Returns:
        images [n, 3, 32, 32] and classes.

    Raises:
        UserError: a file is missing or is not the data set's.
    """
    try:
        data = CIFAR10(folder, train=part == "train")
    except RuntimeError as error:  # torchvision has one for both, as it is told not to download
        raise UserError(
            f"{folder / CIFAR10.base_folder}: a file is missing or damaged; let torchvision download CIFAR10 into "
            f"{folder}/"
        ) from error
    return Dataset(torch.from_numpy(data.data).permute(0, 3, 1, 2) / 127.5 - 1, torch.tensor(data.targets))
