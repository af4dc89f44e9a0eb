"""The closed language of the embedded suites' captions, and which captions no model is trained on."""

import zlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

from tcbench.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

_WORDS = """<pad> <end> a an in at the of small large left right above below top bottom centre row
    moving standing still up down slowly quickly
    zero one two three four five six seven eight nine
    zeros ones twos threes fours fives sixes sevens eights nines"""
WORDS = tuple(_WORDS.split())
"""The vocabulary; a word's id is its place."""
LENGTH = 16
"""Word ids of a caption, its end included; shorter ones are padded."""

PAD, END = 0, 1
_IDS = {word: number for number, word in enumerate(WORDS)}
DIGITS = WORDS[_IDS["zero"] : _IDS["zero"] + 10]


def article(digit: int) -> str:
    """The article before a digit's name."""
    return "an" if digit == 8 else "a"


def plural(digit: int) -> str:
    """A digit's name in the plural."""
    return WORDS[_IDS["zeros"] + digit]


def encode(captions: Sequence[str]) -> "Tensor":
    """Word ids of captions, int64 [n, LENGTH]: the words, END, then PAD. The null caption of guidance is "".

    Raises:
        UserError: a caption has a word that is not in the vocabulary, or too many words.
    """
    import torch

    rows = []
    for caption in captions:
        words = caption.split()
        unknown = [word for word in words if word not in _IDS]
        if unknown or len(words) >= LENGTH:
            problem = f"unknown word {unknown[0]!r}" if unknown else f"more than {LENGTH - 1} words"
            raise UserError(f"caption {caption!r}: {problem}; give one like 'a large three left of a small seven'")
        rows.append([*(_IDS[word] for word in words), END] + [PAD] * (LENGTH - 1 - len(words)))
    return torch.tensor(rows)


def decode(ids_NT: "Tensor") -> list[str]:
    """The captions of word ids [n, LENGTH]."""
    return [" ".join(WORDS[word] for word in row if word > END) for row in ids_NT.tolist()]


def is_held_out(caption: str) -> bool:
    """Whether a caption, in the wording that stands for all of its meaning, is kept from training: one in ten is."""
    return zlib.crc32(caption.encode()) % 10 == 0
