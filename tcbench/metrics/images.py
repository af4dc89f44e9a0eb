"""Images of a row block by block: those of a full run exceed memory."""

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

BLOCK_BYTES = 2**28


class Rows(Protocol):
    """A tensor [n, ...], or `Images`, of which a slice is a tensor."""

    @property
    def shape(self) -> torch.Size:
        """[n, ...]."""

    def is_floating_point(self) -> bool:
        """Whether numbers may be NaN."""

    def __len__(self) -> int: ...

    def __getitem__(self, rows: slice, /) -> Tensor: ...


class Images:
    """Images [n, C, H, W] or videos [n, C, T, H, W] as they lie on disk, memory-mapped shard by shard.

    As a tensor of all of them for whoever takes a slice at a time.

    Args:
        parts: [n_i, ...] each, of one shape otherwise.
        index: int64 [n], which of all and in which order; all if not given.

    Attributes:
        parts: those.
    """

    def __init__(self, parts: Sequence[Tensor], index: Tensor | None = None) -> None:
        self.parts = parts
        self._ends = torch.tensor([len(part) for part in parts]).cumsum(0)
        self._index = torch.arange(int(self._ends[-1])) if index is None else index

    @classmethod
    def of(cls, rows: Rows) -> "Images":
        """A tensor as such."""
        return rows if isinstance(rows, Images) else cls([rows[:]])

    def __len__(self) -> int:
        return len(self._index)

    @property
    def shape(self) -> torch.Size:
        """[n, C, ...]."""
        return torch.Size((len(self), *self.parts[0].shape[1:]))

    def is_floating_point(self) -> bool:
        """As of a tensor."""
        return self.parts[0].is_floating_point()

    def __getitem__(self, rows: slice) -> Tensor:
        index = self._index[rows]
        number = torch.bucketize(index, self._ends, right=True)
        found = []
        for part, local in zip(*self._runs(index, number), strict=True):
            one_by_one = torch.equal(local, torch.arange(int(local[0]), int(local[0]) + len(local)))
            found.append(part[int(local[0]) : int(local[-1]) + 1] if one_by_one else part[local])
        return found[0] if len(found) == 1 else torch.cat(found)

    def _runs(self, index: Tensor, number: Tensor) -> tuple[list[Tensor], Sequence[Tensor]]:
        """(the parts that rows are in, one after the other; which rows of each)."""
        parts, counts = torch.unique_consecutive(number, return_counts=True)
        starts = torch.cat([torch.zeros(1, dtype=torch.long), self._ends])[number]
        return [self.parts[part] for part in parts.tolist()], (index - starts).split(counts.tolist())

    def taken(self, index: Tensor) -> "Images":
        """Some of them, in another order."""
        return Images(self.parts, self._index[index])


def blocks(*sides: Rows, most: int = 256) -> Iterator[tuple[Tensor, ...]]:
    """The same rows of each, at most so many and `BLOCK_BYTES` of each at a time."""
    first = sides[0][:1]
    rows = max(1, min(most, BLOCK_BYTES // max(1, first.numel() * first.element_size())))
    for start in range(0, len(sides[0]), rows):
        yield tuple(side[start : start + rows] for side in sides)
