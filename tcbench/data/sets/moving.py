"""Captioned videos: one or two handwritten digits that move or stand on a blank canvas."""

from dataclasses import dataclass

import numpy as np

from tcbench.data.captioned import Bank, Captioned
from tcbench.data.captions import DIGITS, article, is_held_out

FRAMES, SIDE, SIZE = 5, 16, 8
"""Frames of a video, pixels of the canvas and of a digit, both ways."""
SPEEDS = {"slowly": 1, "quickly": 2}
"""Pixels per frame."""
DIRECTIONS = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}

_ROOM = SIDE - SIZE


@dataclass(frozen=True)
class Mover:
    """A digit in a video: its square's upper left corner in the first frame, and pixels per frame down and right."""

    digit: int
    top: int
    left: int
    down: int
    right: int


@dataclass(frozen=True)
class Clip:
    """What a caption says, and one motion that it is true of; as `scenes.Scene`."""

    caption: str
    items: tuple[Mover, ...]
    meaning: str


def draw_clip(random: np.random.Generator, held_out: bool) -> Clip:
    """A random clip whose meaning is, or is not, held out of training."""
    while True:
        clip = _one(random) if random.random() < 0.5 else _two(random)
        if is_held_out(clip.meaning) == held_out:
            return clip


def _motion(random: np.random.Generator, directions: tuple[str, ...]) -> tuple[str, int, int]:
    """(words, pixels down per frame, pixels right per frame); one in five stands still."""
    if random.random() < 0.2:
        return "standing still", 0, 0
    direction, speed = str(random.choice(directions)), str(random.choice(list(SPEEDS)))
    down, right = DIRECTIONS[direction]
    return f"moving {direction} {speed}", down * SPEEDS[speed], right * SPEEDS[speed]


def _start(random: np.random.Generator, step: int) -> int:
    """A first position from which FRAMES - 1 steps stay on the canvas."""
    path = step * (FRAMES - 1)
    return int(random.integers(max(0, -path), _ROOM - max(0, path) + 1))


def _one(random: np.random.Generator) -> Clip:
    digit = int(random.integers(10))
    words, down, right = _motion(random, tuple(DIRECTIONS))
    caption = f"{article(digit)} {DIGITS[digit]} {words}"
    return Clip(caption, (Mover(digit, _start(random, down), _start(random, right), down, right),), caption)


def _two(random: np.random.Generator) -> Clip:
    """One digit in the left half, one in the right, each on its way up or down."""
    movers, phrases = [], []
    for left in (0, _ROOM):
        digit = int(random.integers(10))
        words, down, right = _motion(random, ("up", "down"))
        movers.append(Mover(digit, _start(random, down), left, down, right))
        phrases.append(f"{article(digit)} {DIGITS[digit]} {words}")
    caption = " left of ".join(phrases)
    return Clip(caption, tuple(movers), caption)


class Moving(Captioned):
    """Videos [n, 1, 5, 16, 16]; captions and handwriting are held out."""

    name = "moving"
    # the reader that judges it is trained on `scenes`
    recipes = {"denoiser": {"iterations": 12000, "batch_size": 128, "learning_rate": 1.5e-3, "affine": {}}}

    def item(self, random: np.random.Generator, held_out: bool) -> Clip:
        """As `draw_clip`."""
        return draw_clip(random, held_out)

    def canvas(self, item: Clip, random: np.random.Generator, bank: Bank) -> np.ndarray:
        """Each digit in one handwriting throughout, [5, 16, 16]."""
        canvas = np.full((FRAMES, SIDE, SIDE), -1, np.float32)
        for mover in item.items:
            image = random.choice(bank(SIZE)[mover.digit])
            for frame, pixels in enumerate(canvas):
                top, left = mover.top + frame * mover.down, mover.left + frame * mover.right
                pixels[top : top + SIZE, left : left + SIZE] = image
        return canvas
