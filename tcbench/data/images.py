"""Images in files, such as MSCOCO's and ImageNet's: listed and checked at once, decoded when they are needed."""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate, chain
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageOps
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from tcbench.data.prompts import coco_captions
from tcbench.errors import UserError
from tcbench.record.files import digest, read_json

if TYPE_CHECKING:  # listing images must not pay for importing torch
    from torch import Tensor

SUFFIXES = frozenset({".jpg", ".jpeg", ".png"})


@dataclass(frozen=True)
class Listing:
    """Images of a folder, in a fixed order, none of them decoded.

    Attributes:
        paths: of n images.
        captions: what they show, in words, if captions were given.
        classes: their classes' numbers, if every class has a folder.
        num_classes: of the folder.
    """

    paths: tuple[Path, ...]
    captions: tuple[str, ...] = ()
    classes: tuple[int, ...] = ()
    num_classes: int = 0

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def digest(self) -> str:
        """Identifies the files and their order, by name."""
        return digest([str(path) for path in self.paths])

    def decoded(self, side: int, batch_size: int, start: int = 0, stop: int | None = None) -> "Iterator[Tensor]":
        """Batches of the images from `start` to `stop`, uint8 [n, 3, side, side]: the largest centred square, resized
        with PIL's bicubic kernel, which looks at every pixel when it shrinks.

        Raises:
            UserError: a file is no image.
        """
        import torch

        chosen = self.paths[start:stop]
        with ThreadPoolExecutor() as pool:  # PIL decodes and resizes outside the interpreter's lock
            for first in tqdm(range(0, len(chosen), batch_size), "read images", delay=3, leave=False, disable=None):
                yield torch.stack(list(pool.map(lambda path: _read(path, side), chosen[first : first + batch_size])))


def _read(path: Path, side: int) -> "Tensor":
    import torch

    try:
        with Image.open(path) as image:
            square = ImageOps.fit(image.convert("RGB"), (side, side), Image.Resampling.BICUBIC)
    except OSError as error:  # PIL's own errors are OSErrors
        raise UserError(f"{path}: not a readable image ({error}); get it again") from error
    return torch.from_numpy(np.array(square)).permute(2, 0, 1)


def list_images(folder: Path, captions: Path | None = None) -> Listing:
    """The images of a folder.

    Args:
        folder: of images, or of a folder per class, as ImageNet comes; classes are numbered in their names' order.
        captions: a captions_*.json of MSCOCO, which says what belongs to the folder; an image's caption is its first.

    Raises:
        UserError: the folder is missing or empty, mixes images and classes, or lacks images that `captions` lists.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: not found; `tcbench validate CONFIG --files` says how to get it")
    if captions:
        return _captioned(folder, captions)
    inside = sorted(folder.iterdir())
    images = tuple(path for path in inside if path.suffix.lower() in SUFFIXES)
    names = [path for path in inside if path.is_dir()]
    if bool(images) == bool(names):
        what = "images and folders side by side" if images else "no images"
        raise UserError(f"{folder}: holds {what}; give a folder of images, or of a folder per class")
    if images:
        return Listing(images)
    by_class = [
        [path for path in sorted(name.iterdir()) if path.suffix.lower() in SUFFIXES]
        for name in tqdm(names, "list images", delay=3, leave=False, disable=None)
    ]
    if empty := [name for name, paths in zip(names, by_class, strict=True) if not paths]:
        raise UserError(f"{empty[0]}: no images in the folder of a class; unpack it again")
    classes = [number for number, paths in enumerate(by_class) for _ in paths]
    return Listing(tuple(chain.from_iterable(by_class)), classes=tuple(classes), num_classes=len(names))


def _captioned(folder: Path, captions: Path) -> Listing:
    try:
        names = {image["id"]: image["file_name"] for image in read_json(captions)["images"]}
        described = coco_captions(captions)
        paths = tuple(folder / names[image] for image, _ in described)
    except (KeyError, TypeError) as error:
        raise UserError(
            f"{captions}: not captions of MSCOCO ({type(error).__name__}: {error}); get it again"
        ) from error
    there = {path.name for path in folder.iterdir()}
    if lacking := [path.name for path in paths if path.name not in there]:
        raise UserError(
            f"{folder}: lacks {len(lacking)} of the {len(paths)} images that {captions} describes, "
            f"{lacking[0]} for one; unpack its archive again"
        )
    return Listing(paths, captions=tuple(caption for _, caption in described))


class Latents:
    """What an autoencoder made of images, read from shards by index.

    Args:
        shards: safetensors files of float16 "latent" [m, C, H, W], or [m, C, T, H, W] of videos, in order.

    Raises:
        UserError: a shard is missing or damaged.
    """

    def __init__(self, shards: Sequence[Path]) -> None:
        try:  # mapped into memory, not read
            self._slices = [safe_open(path, "pt").get_slice("latent") for path in shards]
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"{shards[0].parent}: a shard of latents is missing or damaged ({error}); encode again"
            ) from error
        self._ends = list(accumulate(latents.get_shape()[0] for latents in self._slices))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index_n: "Tensor") -> "Tensor":
        """Latents of some images, float32 [n, C, H, W], or of videos."""
        import torch

        shards = [bisect_right(self._ends, index) for index in index_n.tolist()]
        places = [index - ([0, *self._ends])[shard] for index, shard in zip(index_n.tolist(), shards, strict=True)]
        rows = zip(shards, places, strict=True)
        return torch.cat([self._slices[shard][place : place + 1] for shard, place in rows]).float()
