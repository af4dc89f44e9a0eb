"""Rotary positions on three axes (Su et al. 2021), applied while queries, keys and values go to their places."""

import torch
from torch import Tensor

from tcbench.kernels.chosen import Backend, Chosen

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

Rotary = tuple[Tensor, Tensor]
"""(cos, sin) of every token, float32 [N, head_dim]; a third of a head's channels for each axis, in two halves."""


def turn(
    stacked: Tensor,
    rotary: Rotary,
    heads: int,
    out_RNC: Tensor,
    chosen: Chosen | None = None,
    backend: Backend = "triton",
) -> None:
    """Write queries and keys turned to their positions, and values as they are, into `out_RNC`.

    Args:
        stacked: queries, keys and values, or keys and values, or queries, side by side in C, heads side by side in
            each; of all tokens, [R, N, C], or of the chosen ones, compact [M, C], which leaves the others. Contiguous.
    """
    cos, sin = rotary
    tokens, head_dim = cos.shape
    rows, _, channels = out_RNC.shape
    width = heads * head_dim
    turned = max(width, channels - width)  # values come last, where there are any
    if backend == "torch":
        places = chosen.flat() if chosen else torch.arange(rows * tokens, device=stacked.device)
        values = stacked.view(-1, channels)[: len(places)]
        x = values[:, :turned].float().unflatten(1, (-1, head_dim))  # [M, heads of queries and keys, head_dim]
        first, second = x.unflatten(2, (3, 2, -1)).unbind(3)
        swapped = torch.stack([-second, first], dim=3).flatten(2)
        x = x * cos[places % tokens, None] + swapped * sin[places % tokens, None]
        out_RNC.view(-1, channels)[places] = torch.cat([x.flatten(1).to(stacked.dtype), values[:, turned:]], dim=1)
        return
    _turn_kernel[(chosen.capacity if chosen else rows * tokens, channels // width)](
        stacked,
        cos,
        sin,
        out_RNC,
        chosen.index_RK if chosen else None,
        chosen.index_RK.stride(0) if chosen else 0,
        chosen.used if chosen else None,
        rows,
        tokens,
        width,
        turned,
        HEAD_DIM=head_dim,
        BLOCK=triton.next_power_of_2(width),
        num_warps=4,
    )


if triton is not None:

    @triton.jit
    def _turn_kernel(
        stacked,
        cos,
        sin,
        out,
        index,
        index_row,
        used,
        rows,
        tokens,
        width,
        turned,
        HEAD_DIM: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        place, part = tl.program_id(0), tl.program_id(1)
        count = tokens if used is None else tl.load(used)
        if place >= rows * count:
            return
        row, token = place // count, place % count
        if index is not None:
            token = tl.load(index + row * index_row + token).to(tl.int32)
        to = row * tokens + token
        column = tl.arange(0, BLOCK)
        mask = column < width
        parts = tl.num_programs(1)
        start = stacked + (place.to(tl.int64) * parts + part) * width
        x = tl.load(start + column, mask, other=0.0)
        if part * width < turned:
            half: tl.constexpr = HEAD_DIM // 6
            is_second = column // half % 2  # a channel's partner is half an axis further on, or back
            other = tl.load(start + column + half - 2 * half * is_second, mask, other=0.0).to(tl.float32)
            at = token * HEAD_DIM + column % HEAD_DIM
            turned_x = x.to(tl.float32) * tl.load(cos + at, mask, other=0.0)
            turned_x += tl.where(is_second == 1, other, -other) * tl.load(sin + at, mask, other=0.0)
            x = turned_x.to(x.dtype)
        tl.store(out + (to.to(tl.int64) * parts + part) * width + column, x, mask)
