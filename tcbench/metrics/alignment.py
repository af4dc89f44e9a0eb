"""Whether a picture shows what its caption says, decided exactly: the digits are read and compared with the words.

Captions are those of `tcbench.data.sets.scenes` and `moving`; what cannot be read cannot be right, so the share of real
held-out pictures that pass, not 1, is the ceiling.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise, permutations
from statistics import mode

import numpy as np
import torch
from torch import Tensor

from tcbench.data.captions import DIGITS, plural
from tcbench.data.sets.moving import DIRECTIONS, SPEEDS
from tcbench.data.sets.scenes import SIDE
from tcbench.metrics.readings import frames
from tcbench.models.reader import DigitReader, Reading, load_reader, read_digits

_NUMBER = {word: digit for digit in range(10) for word in (DIGITS[digit], plural(digit))}
_COUNTS = {"a": 1, "an": 1, "two": 2, "three": 3}
_PHRASE = re.compile(rf"\b({'|'.join(_COUNTS)}) (?:(small|large) )?({'|'.join(_NUMBER)})\b")
_MOTION = re.compile(rf"moving ({'|'.join(DIRECTIONS)}) ({'|'.join(SPEEDS)})|standing still")
_THIRDS = {"y": {"top": 0, "bottom": 2}, "x": {"left": 0, "right": 2}}
_RELATIONS = {"left of": ("x", 1), "right of": ("x", -1), "above": ("y", 1), "below": ("y", -1)}
_APART = 4.0  # pixels, half a small digit: less is neither left of nor above


@dataclass(frozen=True)
class Alignment:
    """Reads samples and compares each with its caption."""

    reader: DigitReader

    def __call__(self, media: Tensor, captions: Sequence[str]) -> Tensor:
        """1 where a sample shows what its caption says, else 0: float32 [n] on the CPU.

        `media`: uint8 scenes [n, 1, H, W] or videos [n, 1, T, H, W].
        """
        pixels = media.to(next(self.reader.parameters()).device).float() / 127.5 - 1
        if media.ndim == 4:
            right = map(scene_agrees, captions, read_digits(self.reader, pixels))
        else:
            read, length = read_digits(self.reader, frames(pixels)), media.shape[2]
            videos = (read[start : start + length] for start in range(0, len(read), length))
            right = map(video_agrees, captions, videos)
        return torch.tensor([float(agrees) for agrees in right])


def load_alignment(device: torch.device | str = "cpu") -> Alignment:
    """With the reader that ships with the package."""
    return Alignment(load_reader().to(device))


def scene_agrees(caption: str, read: Sequence[Reading]) -> bool:
    """Exactly the digits named, in their sizes, and where the caption says: by thirds of the canvas or by relation."""
    phrases = _PHRASE.findall(caption)
    named = [(_NUMBER[digit], size) for count, size, digit in phrases for _ in range(_COUNTS[count])]
    if Counter(named) != Counter((item.digit, item.size) for item in read):
        return False
    rest = _PHRASE.sub("", caption).strip()
    if rest in _RELATIONS:
        axis, sign = _RELATIONS[rest]
        return any(
            sign * (getattr(other, axis) - getattr(one, axis)) > _APART
            for one, other in permutations(read)
            if (one.digit, one.size) == named[0]
        )
    if rest == "in a row":
        places, line = sorted(item.x for item in read), [item.y for item in read]
        return max(line) - min(line) < _APART < min(b - a for a, b in pairwise(places))
    words = rest.split()
    for axis, thirds in _THIRDS.items():
        third = next((thirds[word] for word in words if word in thirds), None)
        if third is None and len(read) == 1:
            third = 1  # "at the top" of one digit is its middle; of two, anywhere along it
        if third is not None and any(getattr(item, axis) * 3 // SIDE != third for item in read):
            return False
    return True


def video_agrees(caption: str, read: Sequence[Sequence[Reading]]) -> bool:
    """Exactly the digits named, from left to right, in most frames, and each moves as its caption says.

    Motion is the least-squares speed over those frames, rounded to whole pixels per frame.
    """
    phrases = caption.split(" left of ")
    shown = [
        (frame, sorted(items, key=lambda item: item.x))
        for frame, items in enumerate(read)
        if len(items) == len(phrases)
    ]
    if 2 * len(shown) <= len(read):
        return False
    times = [frame for frame, _ in shown]
    for number, phrase in enumerate(phrases):
        track = [items[number] for _, items in shown]
        motion, digit = _MOTION.search(phrase), _PHRASE.search(phrase)
        assert motion and digit, caption
        direction, speed = motion.groups()
        wanted = tuple(step * SPEEDS[speed] for step in DIRECTIONS[direction]) if direction else (0, 0)
        seen = tuple(round(np.polyfit(times, [getattr(item, axis) for item in track], 1)[0]) for axis in "yx")
        if mode(item.digit for item in track) != _NUMBER[digit[3]] or seen != wanted:
            return False
    return True
