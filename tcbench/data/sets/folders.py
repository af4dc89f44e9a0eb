"""Colour images of your own: a folder of folders, one per class."""

import re
from pathlib import Path

import numpy as np
from PIL import Image

from tcbench.data import Dataset, split
from tcbench.data.source import DataSource
from tcbench.errors import UserError
from tcbench.record.files import digest

SUFFIXES = frozenset({".png", ".jpg", ".jpeg"})


class Folders(DataSource):
    """RGB images of one size, [n, 3, H, W]. Classes are numbered by their folders' names, numbers in them by value
    (`2` before `10`); images are ordered likewise. Hidden files and folders are ignored.

    No part is held out but, in equal proportion of the classes, a tenth for pretraining's log.
    """

    name = "folders"
    conditioning = "class"
    recipes = {"denoiser": {}}
    takes_folder = True
    get = "it is yours: a folder per class inside, with RGB images of one size"

    def images(self, held_out: bool = False) -> Dataset:
        """All images.

        Raises:
            UserError: a file is no RGB image or has another size, or a folder holds nothing; names it.
        """
        import torch

        pixels, labels = [], []
        for label, paths in enumerate(self._classes()):
            for path in paths:
                pixels.append(_read(path))
                labels.append(label)
                if pixels[-1].shape != pixels[0].shape:
                    raise UserError(f"{path}: is {_size(pixels[-1])}, the first image {_size(pixels[0])}; use one size")
        images = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2) / 127.5 - 1
        return Dataset(images.contiguous(), torch.tensor(labels))

    def parts(self, examples: int) -> tuple[Dataset, Dataset]:
        """Nine tenths and a tenth, with the classes in equal proportion."""
        return split(self.images())

    def fingerprint(self) -> str:
        """Of names and sizes; "" while a folder is missing or wrong, which `images` explains."""
        try:
            paths = [path for paths in self._classes() for path in paths]
        except UserError:
            return ""
        return digest([(str(path.relative_to(str(self.folder))), path.stat().st_size) for path in paths])

    def _classes(self) -> list[list[Path]]:
        """The images of every class."""
        if self.folder is None or not self.folder.is_dir():
            raise UserError(f"data.folder: {self.folder} is not a folder; give one with a folder per class")
        classes = [_visible(path) for path in _visible(self.folder) if _folder(path)]
        if not classes:
            raise UserError(f"{self.folder}: holds no folders; give a folder per class")
        return classes


def _visible(folder: Path) -> list[Path]:
    """What is in a folder, numbers in names by value; raises UserError if it is nothing."""
    paths = [path for path in folder.iterdir() if not path.name.startswith(".")]
    if not paths:
        raise UserError(f"{folder}: is empty; fill or remove it")
    return sorted(paths, key=lambda path: ([int(n) if n.isdigit() else n for n in re.split(r"(\d+)", path.name)], path))


def _folder(path: Path) -> bool:
    if not path.is_dir():
        raise UserError(f"{path}: lies beside the classes' folders; move it into one, or away")
    return True


def _read(path: Path) -> np.ndarray:
    if path.suffix.lower() not in SUFFIXES:
        raise UserError(f"{path}: not one of {', '.join(sorted(SUFFIXES))}; convert or remove it")
    try:
        with Image.open(path) as image:
            if image.mode != "RGB":
                raise UserError(f"{path}: holds {image.mode}, not RGB; convert it")
            return np.array(image)
    except OSError as error:  # PIL's own errors are OSErrors
        raise UserError(f"{path}: not a readable image ({error}); get it again") from error


def _size(pixels: np.ndarray) -> str:
    return f"{pixels.shape[1]}x{pixels.shape[0]}"
