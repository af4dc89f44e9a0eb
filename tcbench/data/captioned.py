"""Captioned data sets composed of handwritten digits: every item is a function of its part, its seed and its index.

The two parts share neither captions nor handwriting: what is held out says things that were never said in training
(`captions.is_held_out`), with digits that other people wrote.
"""

from abc import abstractmethod
from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import numpy as np
from tqdm import tqdm

from tcbench.data import Dataset, handwriting, split
from tcbench.data.captions import encode
from tcbench.data.source import DataSource

if TYPE_CHECKING:  # a config is checked without torch
    from torch import Tensor

Bank = Callable[[int], tuple[np.ndarray, ...]]
"""The handwritten images of every digit at a size in pixels, both ways: float32 [m, size, size] each, in [-1, 1]."""


class Item(Protocol):
    """What an item shows, and how its caption says it."""

    @property
    def caption(self) -> str:
        """In words of `captions.WORDS`."""

    @property
    def meaning(self) -> str:
        """The one wording of all captions that say the same."""


class Captioned(DataSource):
    """Digits drawn on a canvas, as a caption says."""

    conditioning = "text"
    length: ClassVar[int] = 2048
    """Items of a part, where all of them are asked for."""

    @abstractmethod
    def item(self, random: np.random.Generator, held_out: bool) -> Any:
        """A random `Item` whose meaning is, or is not, held out of training."""

    @abstractmethod
    def canvas(self, item: Any, random: np.random.Generator, bank: Bank) -> np.ndarray:
        """An item in handwriting chosen at random, float32 [H, W] or [T, H, W] in [-1, 1]."""

    def draw(self, index: int, held_out: bool, seed: int = 0) -> Any:
        """What item `index` shows, without its handwriting."""
        return self.item(_generator(index, held_out, seed), held_out)

    def compose(self, indices: Iterable[int], held_out: bool, seed: int = 0) -> Dataset:
        """The items of some indices: images or videos [n, 1, ...] with the word ids of captions."""
        import torch

        images, captions = [], []
        for index in tqdm(indices, desc=f"compose {self.name}", delay=3, leave=False):
            random = _generator(index, held_out, seed)
            item = self.item(random, held_out)
            images.append(self.canvas(item, random, lambda size: _bank(held_out, size)))
            captions.append(item.caption)
        return Dataset(torch.from_numpy(np.stack(images)).unsqueeze(1), encode(captions))

    def captions(self, index_N: "Tensor", held_out: bool, seed: int = 0) -> "Tensor":
        """Word ids of the captions of some indices, int64 [n, LENGTH]; evaluated samples get held-out ones."""
        return encode([self.draw(index, held_out, seed).caption for index in index_N.tolist()])

    def images(self, held_out: bool = False) -> Dataset:
        """2048 items."""
        return self.compose(range(self.length), held_out)

    def parts(self, examples: int) -> tuple[Dataset, Dataset]:
        """That many examples, and 512 held-out ones."""
        return self.compose(range(examples), held_out=False), self.compose(range(512), held_out=True)


def _generator(index: int, held_out: bool, seed: int) -> np.random.Generator:
    return np.random.default_rng((seed, int(held_out), index))


@lru_cache
def _bank(held_out: bool, size: int) -> tuple[np.ndarray, ...]:
    import torch.nn.functional as F

    digits = split(handwriting())[held_out]
    images = F.interpolate(digits.images, size=size, mode="bicubic", align_corners=False, antialias=True).clamp(-1, 1)
    return tuple(images[digits.labels == digit, 0].numpy() for digit in range(10))
