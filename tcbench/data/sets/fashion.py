"""Fashion-MNIST (Xiao et al. 2017): 70 000 grey images of clothes in ten classes, read from its files."""

import gzip
import hashlib
from pathlib import Path

import numpy as np

from tcbench.data import Dataset
from tcbench.data.source import DataSource
from tcbench.errors import UserError

SIDE = 32
"""Pixels of an image, both ways, as it is returned."""

# of what the files hold, because those who pack them compress them differently
_SHA256: dict[str, dict[str, str]] = {
    "train": {
        "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
        "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    },
    "test": {
        "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
        "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
    },
}
_IMAGES_HEADER, _LABELS_HEADER, _DRAWN = 16, 8, 28  # bytes before the pixels and the classes; pixels of a drawing


class Fashion(DataSource):
    """60 000 images to train on and 10 000 held out, [n, 1, 32, 32]: the 28x28 of the files with two black pixels on
    every side."""

    name = "fashion"
    conditioning = "class"
    recipes = {
        "denoiser": {
            "iterations": 8400,  # six minutes of an H200
            "learning_rate": 1e-3,
            "ema": 0.9995,
            "affine": {},
            "bfloat16": True,
            "compile": True,
            "log_every": 1400,  # the losses of a line take three seconds
        },
        "classifier": {  # 20 passes over the images
            "iterations": 2400,
            "batch_size": 512,
            "affine": {"rotation": 5, "scale": 0.05, "shift": 1},
            "log_every": 400,
        },
    }
    takes_folder = True  # of the part's two idx files, compressed by gzip or not
    usual_folders = (Path("/usr/share/datasets/fashion-mnist"), Path("data/FashionMNIST/raw"))
    get = "install Debian's dataset-fashion-mnist, or let torchvision download FashionMNIST into data/"

    def images(self, held_out: bool = False) -> Dataset:
        """A part of the files; raises UserError if one is missing or is not the data set's."""
        import torch
        import torch.nn.functional as F

        images, labels = (self._read(*file) for file in _SHA256["test" if held_out else "train"].items())
        pixels = torch.from_numpy(images[_IMAGES_HEADER:].reshape(-1, 1, _DRAWN, _DRAWN)).float() / 127.5 - 1
        margin = (SIDE - _DRAWN) // 2
        return Dataset(F.pad(pixels, [margin] * 4, value=-1), torch.from_numpy(labels[_LABELS_HEADER:]).long())

    def _read(self, name: str, digest: str) -> np.ndarray:
        assert self.folder  # one of the usual ones at least
        plain, packed = self.folder / name, self.folder / f"{name}.gz"
        path = plain if plain.exists() else packed
        try:
            content = plain.read_bytes() if plain.exists() else gzip.decompress(packed.read_bytes())
        except FileNotFoundError as error:
            raise UserError(f"{path}: not found; {self.get}") from error
        except (OSError, EOFError) as error:  # gzip's own errors among them
            raise UserError(f"{path}: cannot be read ({error}); get it again") from error
        found = hashlib.sha256(content).hexdigest()
        if found != digest:
            raise UserError(f"{path}: holds sha256 {found[:12]}..., not {digest[:12]}...; get Fashion-MNIST again")
        return np.frombuffer(bytearray(content), np.uint8)
