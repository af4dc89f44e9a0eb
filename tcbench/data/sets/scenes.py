"""Captioned scenes: one to three handwritten digits on a blank canvas, with where and how large in words."""

from dataclasses import dataclass

import numpy as np

from tcbench.data.captioned import Bank, Captioned
from tcbench.data.captions import DIGITS, is_held_out, plural

SIDE = 24
"""Pixels of the canvas, both ways."""
SIZES = {"small": 8, "large": 11}
"""Pixels of a digit's image, both ways; two large ones leave a gap."""

_LOW, _MIDDLE, _HIGH = 4, 12, 20  # centres of thirds of the canvas
Point = tuple[int, int]

_PLACES = {
    "in the centre": (_MIDDLE, _MIDDLE),
    "at the top": (_LOW, _MIDDLE),
    "at the bottom": (_HIGH, _MIDDLE),
    "at the left": (_MIDDLE, _LOW),
    "at the right": (_MIDDLE, _HIGH),
    "at the top left": (_LOW, _LOW),
    "at the top right": (_LOW, _HIGH),
    "at the bottom left": (_HIGH, _LOW),
    "at the bottom right": (_HIGH, _HIGH),
}
_OPPOSITE = {"left of": "right of", "above": "below"}


@dataclass(frozen=True)
class Item:
    """A digit in a scene: its square's upper left corner and side, in pixels."""

    digit: int
    size: int
    top: int
    left: int


@dataclass(frozen=True)
class Scene:
    """What a caption says, and one layout that it is true of.

    Attributes:
        caption: in words of `captions.WORDS`.
        items: the digits, without overlap, in the order of the caption.
        meaning: the one wording of all captions that say the same.
    """

    caption: str
    items: tuple[Item, ...]
    meaning: str


def draw_scene(random: np.random.Generator, held_out: bool) -> Scene:
    """A random scene whose meaning is, or is not, held out of training."""
    while True:
        scene = _KINDS[random.choice(len(_KINDS), p=(0.3, 0.45, 0.2, 0.05))](random)
        if is_held_out(scene.meaning) == held_out:
            return scene


def _item(random: np.random.Generator, digit: int, size: str, centre: Point, shift: Point) -> Item:
    """A digit centred near a point (y, x): moved by up to `shift` pixels, then inside the canvas."""
    pixels = SIZES[size]
    top, left = (
        min(max(middle + int(random.integers(-by, by + 1)) - pixels // 2, 0), SIDE - pixels)
        for middle, by in zip(centre, shift, strict=True)
    )
    return Item(digit, pixels, top, left)


def _halves(across: bool, line: int) -> tuple[Point, Point]:
    """The centres of two digits side by side on the line y, or one above the other on the line x."""
    return ((line, 6), (line, 18)) if across else ((6, line), (18, line))


def _free(size: str, across: bool, along: int) -> Point:
    """How far a digit may shift: inside its half of the canvas, and by `along` in the other direction."""
    near = (SIDE // 2 - SIZES[size]) // 2
    return (along, near) if across else (near, along)


def _one(random: np.random.Generator) -> Scene:
    digit, size, place = int(random.integers(10)), str(random.choice(list(SIZES))), str(random.choice(list(_PLACES)))
    caption = f"a {size} {DIGITS[digit]} {place}"
    return Scene(caption, (_item(random, digit, size, _PLACES[place], (1, 1)),), caption)


def _pair(random: np.random.Generator) -> Scene:
    """Two digits side by side or one above the other, in either wording."""
    digits, sizes = random.integers(10, size=2).tolist(), random.choice(list(SIZES), size=2).tolist()
    relation = str(random.choice(list(_OPPOSITE)))
    across = relation == "left of"
    items = tuple(
        _item(random, digit, size, centre, _free(size, across, 4))
        for digit, size, centre in zip(digits, sizes, _halves(across, _MIDDLE), strict=True)
    )
    first, second = (f"a {size} {DIGITS[digit]}" for digit, size in zip(digits, sizes, strict=True))
    meaning = f"{first} {relation} {second}"
    if random.integers(2):
        return Scene(meaning, items, meaning)
    return Scene(f"{second} {_OPPOSITE[relation]} {first}", items[::-1], meaning)


def _two_alike(random: np.random.Generator) -> Scene:
    digit, size = int(random.integers(10)), str(random.choice(list(SIZES)))
    place = str(random.choice(["at the top", "at the bottom", "at the left", "at the right"]))
    y, x = _PLACES[place]
    across = x == _MIDDLE
    items = tuple(
        _item(random, digit, size, centre, _free(size, across, 1)) for centre in _halves(across, y if across else x)
    )
    caption = f"two {size} {plural(digit)} {place}"
    return Scene(caption, items, caption)


def _three_alike(random: np.random.Generator) -> Scene:
    """Three digits in a row; in a column they would touch."""
    digit, line = int(random.integers(10)), _MIDDLE + int(random.integers(-6, 7))
    items = tuple(_item(random, digit, "small", (line, along), (0, 0)) for along in (_LOW, _MIDDLE, _HIGH))
    caption = f"three small {plural(digit)} in a row"
    return Scene(caption, items, caption)


_KINDS = (_one, _pair, _two_alike, _three_alike)


class Scenes(Captioned):
    """Images [n, 1, 24, 24]; captions and handwriting are held out."""

    name = "scenes"
    recipes = {"denoiser": {"iterations": 15000, "affine": {}}, "reader": {}, "clip": {}}

    def item(self, random: np.random.Generator, held_out: bool) -> Scene:
        """As `draw_scene`."""
        return draw_scene(random, held_out)

    def canvas(self, item: Scene, random: np.random.Generator, bank: Bank) -> np.ndarray:
        """Each digit in a handwriting of its own, [24, 24]."""
        canvas = np.full((SIDE, SIDE), -1, np.float32)
        for digit in item.items:
            square = np.s_[digit.top : digit.top + digit.size, digit.left : digit.left + digit.size]
            canvas[square] = random.choice(bank(digit.size)[digit.digit])
        return canvas
