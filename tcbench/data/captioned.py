"""Captioned data sets composed of handwritten digits: every item is a function of its part, its seed and its index.

The two parts share neither captions nor handwriting: what is held out says things that were never said in training
(`captions.is_held_out`), with digits that other people wrote.
"""

from collections.abc import Iterable
from functools import lru_cache
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from tcbench.data import Dataset, handwriting, moving, scenes, split
from tcbench.data.captions import encode
from tcbench.data.moving import Clip, draw_clip
from tcbench.data.scenes import Scene, draw_scene

CaptionedName = Literal["scenes", "moving"]


def draw(name: CaptionedName, index: int, held_out: bool, seed: int = 0) -> Scene | Clip:
    """What item `index` shows, without its handwriting."""
    return (draw_scene if name == "scenes" else draw_clip)(_generator(index, held_out, seed), held_out)


def compose(name: CaptionedName, indices: Iterable[int], held_out: bool, seed: int = 0) -> Dataset:
    """The items of some indices: images [n, 1, 24, 24] or videos [n, 1, 5, 16, 16], with the word ids of captions."""
    images, captions = [], []
    for index in tqdm(indices, desc=f"compose {name}", delay=3, leave=False):
        random = _generator(index, held_out, seed)
        if name == "scenes":
            scene = draw_scene(random, held_out)
            images.append(_draw_scene(scene, random, held_out))
            captions.append(scene.caption)
        else:
            clip = draw_clip(random, held_out)
            images.append(_draw_clip(clip, random, held_out))
            captions.append(clip.caption)
    return Dataset(torch.from_numpy(np.stack(images)).unsqueeze(1), encode(captions))


def captions(name: CaptionedName, index_n: Tensor, held_out: bool, seed: int = 0) -> Tensor:
    """Word ids of the captions of some indices, int64 [n, LENGTH]; evaluated samples get held-out ones."""
    return encode([draw(name, index, held_out, seed).caption for index in index_n.tolist()])


def _generator(index: int, held_out: bool, seed: int) -> np.random.Generator:
    return np.random.default_rng((seed, int(held_out), index))


@lru_cache
def _bank(held_out: bool, size: int) -> tuple[np.ndarray, ...]:
    """The handwritten images of every digit, enlarged bicubically: float32 [m, size, size] each, in [-1, 1]."""
    digits = split(handwriting())[held_out]
    images = F.interpolate(digits.images, size=size, mode="bicubic", align_corners=False, antialias=True).clamp(-1, 1)
    return tuple(images[digits.labels == digit, 0].numpy() for digit in range(10))


def _draw_scene(scene: Scene, random: np.random.Generator, held_out: bool) -> np.ndarray:
    canvas = np.full((scenes.SIDE, scenes.SIDE), -1, np.float32)
    for item in scene.items:
        image = random.choice(_bank(held_out, item.size)[item.digit])
        canvas[item.top : item.top + item.size, item.left : item.left + item.size] = image
    return canvas


def _draw_clip(clip: Clip, random: np.random.Generator, held_out: bool) -> np.ndarray:
    canvas = np.full((moving.FRAMES, moving.SIDE, moving.SIDE), -1, np.float32)
    for item in clip.items:
        image = random.choice(_bank(held_out, moving.SIZE)[item.digit])
        for frame, pixels in enumerate(canvas):
            top, left = item.top + frame * item.down, item.left + frame * item.right
            pixels[top : top + moving.SIZE, left : left + moving.SIZE] = image
    return canvas
