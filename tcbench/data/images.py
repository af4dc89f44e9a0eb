"""Images in files, such as MSCOCO's and ImageNet's: listed and checked at once, decoded when they are needed.

Every reader of image files of the package goes through `read_rgb`, and every folder through `list_images`;
docs/user-files.md says by which rules.
"""

import os
import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate, chain
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from PIL import Image, ImageOps, PngImagePlugin
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from tcbench.data.prompts import coco_files
from tcbench.errors import UserError
from tcbench.outside.foreign import refuse_stand_in
from tcbench.record.files import digest

if TYPE_CHECKING:  # listing images must not pay for importing torch
    from torch import Tensor

SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".jp2", ".png", ".apng", ".webp", ".avif", ".gif", ".bmp", ".dib"}
    | {".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm"}
)
"""Of files that are taken for images; which format one is in, its content says."""

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "DIB", "GIF", "TIFF", "PPM", "JPEG2000", "AVIF")
"""Of PIL's; not those that start other programs (EPS) or that draw vectors."""

PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY  # image generators put whole workflows into one chunk

Resize = Literal["once", "halving"]
"""How an image becomes a square: see `to_square`."""


@dataclass(frozen=True)
class Listing:
    """Images of a folder, in a fixed order, none of them decoded.

    Attributes:
        paths: of n images.
        captions: what they show, in words, if captions were given.
        classes: their classes' numbers, if every class has a folder.
        num_classes: of the folder.
        resize: how they become squares.
    """

    paths: tuple[Path, ...]
    captions: tuple[str, ...] = ()
    classes: tuple[int, ...] = ()
    num_classes: int = 0
    resize: Resize = "once"

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def digest(self) -> str:
        """Identifies the files, by name, their order, and what is made of them."""
        return digest([self.resize, *map(str, self.paths)])

    def decoded(self, side: int, batch_size: int, start: int = 0, stop: int | None = None) -> "Iterator[Tensor]":
        """Batches of the images from `start` to `stop` as squares, uint8 [n, 3, side, side].

        Raises:
            UserError: as `read_rgb` and `to_square`.
        """
        import torch

        def decode(path: Path) -> "Tensor":
            square = to_square(read_rgb(path), side, self.resize, path)
            return torch.from_numpy(np.array(square)).permute(2, 0, 1)

        chosen = self.paths[start:stop]
        with ThreadPoolExecutor() as pool:  # PIL decodes and resizes outside the interpreter's lock
            for first in tqdm(range(0, len(chosen), batch_size), "read images", delay=3, leave=False, disable=None):
                yield torch.stack(list(pool.map(decode, chosen[first : first + batch_size])))


# --- one image


def read_rgb(path: Path) -> Image.Image:
    """A file's image as a viewer shows it: turned as its EXIF data say, in RGB of 8 bit, over white.

    The content says which format it is, whatever the suffix; of several frames or pages the first is read. Of 16 bit
    the upper 8 are kept, grey and palettes become colours, and CMYK does by PIL's formula, without colour profiles.

    Raises:
        UserError: the file is missing or no image, is damaged or too large, or does not say what is white.
    """
    try:
        with Image.open(path, formats=FORMATS) as image:
            image.load()
            return _in_rgb(_upright(image), image, path)
    except UserError:
        raise
    except Image.DecompressionBombError as error:
        raise UserError(f"{path}: has more pixels than are read ({error}); scale it down") from error
    except Exception as error:  # what decoders make of damaged bytes has no bounds
        refuse_stand_in(path, "a readable image")
        raise UserError(f"{path}: not a readable image ({error}); get it again or convert it") from error


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # damaged EXIF data, which some of ImageNet's files have, say nothing of the picture
        return image


def _in_rgb(image: Image.Image, opened: Image.Image, path: Path) -> Image.Image:
    """In 8 bit and without transparency; `opened` is the image as its file has it."""
    if image.mode.startswith("I"):
        tags = getattr(opened, "tag_v2", {258: (16,), 262: 1})  # a TIFF's bits, and whether black is 0
        if (image.mode == "I" and opened.format != "PPM") or (tags.get(258), tags.get(262)) != ((16,), 1):
            raise UserError(f"{path}: holds integers whose black and white are not known; save it in 8 or 16 bit")
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))  # PIL does the same with 16-bit colours
    elif image.mode == "F":
        raise UserError(f"{path}: holds floating-point numbers, whose white is not known; save it in 8 or 16 bit")
    if image.has_transparency_data:
        over = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", over.size, "white"), over)
    return image.convert("RGB")


def to_square(image: Image.Image, side: int, resize: Resize, path: Path) -> Image.Image:
    """The centre of an image, `side` pixels wide and high; smaller images are enlarged.

    Args:
        image: in RGB.
        side: in pixels.
        resize: "once" takes the largest centred square and resizes it with PIL's bicubic kernel, which looks at every
            pixel when it shrinks. "halving" is what ADM (Dhariwal and Nichol 2021) does, and DiT was trained on: it
            averages boxes of 2 x 2 pixels while the short side is at least twice `side`, resizes the whole so that
            the short side is `side`, bicubic as well, and then cuts the square out, at a whole pixel.
        path: for the error.

    Raises:
        UserError: the whole image would have too many pixels.
    """
    if resize == "once":
        return ImageOps.fit(image, (side, side), Image.Resampling.BICUBIC)
    while min(image.size) >= 2 * side:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = side / min(image.size)
    width, height = round(image.width * scale), round(image.height * scale)
    if width * height > (Image.MAX_IMAGE_PIXELS or np.inf):
        raise UserError(f"{path}: {width}x{height} pixels when its short side has {side}; cut it to a picture")
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - side) // 2, (height - side) // 2
    return image.crop((left, top, left + side, top + side))


# --- a folder of images


def list_images(folder: Path, captions: Path | None = None, resize: Resize = "once") -> Listing:
    """The images of a folder, without hidden files and what operating systems leave in folders.

    Args:
        folder: of images, or of a folder per class, as ImageNet comes; in the order of their names, in which numbers
            count by value (`2` before `10`), as classes are numbered, too.
        captions: a captions_*.json of MSCOCO, which says what belongs to the folder; an image's caption is its first.
        resize: how the images become squares.

    Raises:
        UserError: the folder is missing or empty, mixes images and classes, holds something else besides, or lacks
            images that `captions` lists.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: not found; `tcbench validate CONFIG --files` says how to get it")
    if captions:
        return _captioned(folder, captions, resize)
    inside = _visible(folder)
    images = [path for path in inside if path.suffix.lower() in SUFFIXES]
    others = [path for path in inside if path.suffix.lower() not in SUFFIXES]
    classes = [path for path in others if path.is_dir()]
    if bool(images) == bool(classes):
        what = "images and folders side by side" if images else "no images"
        raise UserError(f"{folder}: holds {what}; give a folder of images, or of a folder per class")
    if images:
        return Listing(_only_images(inside), resize=resize)
    if stray := [path for path in others if path not in classes]:
        raise UserError(f"{stray[0]}: lies beside the classes' folders; move it into one, or away")
    by_class = [
        _only_images(_visible(path)) for path in tqdm(classes, "list images", delay=3, leave=False, disable=None)
    ]
    if empty := [path for path, paths in zip(classes, by_class, strict=True) if not paths]:
        raise UserError(f"{empty[0]}: no images in the folder of a class; fill or remove it")
    numbers = [number for number, paths in enumerate(by_class) for _ in paths]
    return Listing(tuple(chain.from_iterable(by_class)), (), tuple(numbers), len(classes), resize)


def _visible(folder: Path) -> list[Path]:
    """What is in a folder and belongs to its content, numbers in names by value."""
    try:
        inside = list(folder.iterdir())
    except OSError as error:
        raise UserError(f"{folder}: cannot be listed ({error.strerror}); correct its permissions") from error
    return sorted((path for path in inside if not _LEFT_BEHIND.match(path.name)), key=_by_number)


_LEFT_BEHIND = re.compile(r"\.|(thumbs\.db|desktop\.ini|__macosx)$", re.IGNORECASE)


def _by_number(path: Path) -> tuple[list[str | int], str]:
    parts = re.split(r"([0-9]+)", path.name)  # text and digits in turn
    return [int(part) if place % 2 else part for place, part in enumerate(parts)], path.name


def _only_images(paths: Sequence[Path]) -> tuple[Path, ...]:
    """All of them; raises UserError for one that is none by its suffix."""
    for path in paths:
        if path.suffix.lower() not in SUFFIXES:
            if path.is_dir():
                raise UserError(f"{path}: a folder inside a class's folder; move its images up, or it away")
            raise UserError(f"{path}: not one of {', '.join(sorted(SUFFIXES))}; convert it or move it away")
    return tuple(paths)


def _captioned(folder: Path, captions: Path, resize: Resize) -> Listing:
    described = coco_files(captions)
    there = {path.name for path in _visible(folder)}  # one look at the folder, not one for every image
    if lacking := [name for name, _ in described if name not in there and not os.path.exists(folder / name)]:
        raise UserError(
            f"{folder}: lacks {len(lacking)} of the {len(described)} images that {captions} describes, "
            f"{lacking[0]} for one; unpack its archive again"
        )
    return Listing(
        tuple(folder / name for name, _ in described), tuple(caption for _, caption in described), resize=resize
    )


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
        return torch.cat([self._slices[shard][place : place + 1].float() for shard, place in rows])
