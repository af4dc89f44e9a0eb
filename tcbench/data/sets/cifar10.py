"""CIFAR-10 (Krizhevsky 2009): 60 000 colour images of ten classes, read from torchvision's copy of its files."""

from pathlib import Path

from tcbench.data import Dataset
from tcbench.data.source import DataSource
from tcbench.errors import UserError


class Cifar10(DataSource):
    """50 000 images to train on and 10 000 held out, [n, 3, 32, 32]."""

    name = "cifar10"
    conditioning = "class"
    recipes = {  # of Fashion-MNIST, on whose file no suite of these images depends; not tried on these
        "denoiser": {
            "iterations": 8400,
            "learning_rate": 1e-3,
            "ema": 0.9995,
            "affine": {},
            "bfloat16": True,
            "compile": True,
            "log_every": 1400,
        },
        "classifier": {
            "iterations": 2400,
            "batch_size": 512,
            "affine": {"rotation": 5, "scale": 0.05, "shift": 2},
            "log_every": 400,
        },
    }
    takes_folder = True  # what torchvision's CIFAR10 is given as `root`; it checks the files before it reads them
    usual_folders = (Path("data"),)
    holds = ("cifar-10-batches-py",)
    get = "let torchvision download CIFAR10 into that folder"

    def images(self, held_out: bool = False) -> Dataset:
        """A part of the files; raises UserError if one is missing or is not the data set's."""
        import torch
        from torchvision.datasets import CIFAR10

        assert self.folder  # the usual one at least
        try:
            data = CIFAR10(self.folder, train=not held_out)
        except RuntimeError as error:  # torchvision has one for both, as it is told not to download
            raise UserError(
                f"{self.folder / CIFAR10.base_folder}: a file is missing or damaged; let torchvision download CIFAR10 "
                f"into {self.folder}/"
            ) from error
        return Dataset(torch.from_numpy(data.data).permute(0, 3, 1, 2) / 127.5 - 1, torch.tensor(data.targets))
