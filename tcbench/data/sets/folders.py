"""Colour images of your own: a folder of folders, one per class."""

import numpy as np

from tcbench.data import Dataset, split
from tcbench.data.images import Listing, list_images, read_rgb
from tcbench.data.source import DataSource
from tcbench.errors import UserError
from tcbench.record.files import digest


class Folders(DataSource):
    """RGB images of one size, [n, 3, H, W], listed and read as all image files are (`tcbench.data.images`).

    No part is held out but, in equal proportion of the classes, a tenth for pretraining's log.
    """

    name = "folders"
    conditioning = "class"
    recipes = {"denoiser": {}}
    takes_folder = True
    get = "it is yours: a folder per class inside, with images of one size"

    def images(self, held_out: bool = False) -> Dataset:
        """All images.

        Raises:
            UserError: a file is no image or has another size, or a folder holds nothing; names it.
        """
        import torch

        listing, pixels = self._listing(), []
        for path in listing.paths:
            pixels.append(np.array(read_rgb(path)))
            if pixels[-1].shape != pixels[0].shape:
                raise UserError(f"{path}: is {_size(pixels[-1])}, the first image {_size(pixels[0])}; use one size")
        images = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2) / 127.5 - 1
        return Dataset(images.contiguous(), torch.tensor(listing.classes))

    def parts(self, examples: int) -> tuple[Dataset, Dataset]:
        """Nine tenths and a tenth, with the classes in equal proportion."""
        return split(self.images())

    def fingerprint(self) -> str:
        """Of names and sizes; "" while a folder is missing or wrong, which `images` explains."""
        try:
            paths = self._listing().paths
            return digest([(str(path.relative_to(str(self.folder))), path.stat().st_size) for path in paths])
        except (UserError, OSError):
            return ""

    def _listing(self) -> Listing:
        if self.folder is None or not self.folder.is_dir():
            raise UserError(f"data.folder: {self.folder} is not a folder; give one with a folder per class")
        listing = list_images(self.folder)
        if not listing.classes:
            raise UserError(f"{self.folder}: holds no folders; give a folder per class")
        return listing


def _size(pixels: np.ndarray) -> str:
    return f"{pixels.shape[1]}x{pixels.shape[0]}"
