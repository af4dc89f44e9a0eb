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
    return torch.empty(shape, device=generator.device).uniform_(-bound, bound, generator=generator)


def turn_pairs(x: Tensor, rotary: tuple[Tensor, Tensor], index_RK: Tensor | None) -> Tensor:
    """Rotary positions on neighbouring channels (Su et al. 2021), as FLUX.1 and Wan 2.1 have them.

    Args:
        x: [R, heads, K, head_dim].
        rotary: (cos, sin) of every token, float32 [N, head_dim], each angle twice.
        index_RK: places of the K tokens; None: all, in order.
    """
    cos, sin = (table.to(x.device) for table in rotary)
    if index_RK is not None:
        cos, sin = cos[index_RK][:, None], sin[index_RK][:, None]
    first, second = x.unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([-second, first], dim=-1).flatten(-2)
    return (x * cos + turned * sin).to(x.dtype)  # in float32, for the tables are; a third fewer bytes than of copies
