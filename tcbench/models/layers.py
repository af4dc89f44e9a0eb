"""Pieces that several families share."""

import math

import torch
from torch import Tensor


def unpatchify(x_RND: Tensor, grid: tuple[int, int], patch: int) -> Tensor:
    """Images [R, C, H, W] of tokens that hold a patch each, channels last."""
    x = x_RND.unflatten(2, (patch, patch, -1)).unflatten(1, grid)  # [R, h, w, p, q, C]
    return x.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)


def xavier_uniform(shape: torch.Size, generator: torch.Generator, matrices: int = 1) -> Tensor:
    """Xavier-uniform numbers for a layer that is one of `matrices` stacked ones."""
    bound = math.sqrt(6 / (math.prod(shape[1:]) + matrices * shape[0]))
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)
