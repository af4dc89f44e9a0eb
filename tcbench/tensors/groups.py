"""Groups of tokens that attend among themselves (skiparse attention): one rule for models and kernels.

`groups` is (count, stride): token n is in group n // stride % count, so n = (i * count + group) * stride + k.
"""

from torch import Tensor

Groups = tuple[int, int]
"""(count, stride)."""


def group_of(places: Tensor, groups: Groups) -> Tensor:
    """The groups of tokens by their places, in the shape of `places`."""
    count, stride = groups
    return places // stride % count


def split_groups(x: Tensor, groups: Groups, dim: int) -> Tensor:
    """Tokens along `dim` by group: [R, ..., N, ...] becomes [R * count, ..., N / count, ...]."""
    count, stride = groups
    return x.unflatten(dim, (-1, count, stride)).movedim(dim + 1, 1).flatten(dim + 1, dim + 2).flatten(0, 1)


def join_groups(x: Tensor, groups: Groups, dim: int) -> Tensor:
    """The inverse of `split_groups`."""
    count, stride = groups
    return x.unflatten(0, (-1, count)).unflatten(dim + 1, (-1, stride)).movedim(1, dim + 1).flatten(dim, dim + 2)
