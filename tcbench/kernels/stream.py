"""Residual additions and modulated LayerNorm over the token stream, one pass over memory each."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from tcbench.kernels.chosen import Chosen, Path

try:
    import triton
    import triton.language as tl
except ImportError:  # a platform without Triton has only the "torch" path
    triton = None

Term = tuple[Tensor, Tensor | None]
"""Something to add to the stream: a value [R, N, D] and its gate [R, D], None for 1."""

Modulate = tuple[Tensor, Tensor]
"""(shift, scale), each [R, D]: LayerNorm(x) * (1 + scale) + shift."""


def advance(
    x_RND: Tensor,
    terms: Sequence[Term],
    *,
    modulate: Modulate | None = None,
    chosen: Chosen | None = None,
    before_RND: Tensor | None = None,
    eps: float = 1e-6,
    path: Path = "triton",
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Add up to two terms to the stream and, in the same pass, prepare the next branch's input.

    Args:
        x_RND: the stream, contiguous.
        terms: added in order, in float32.
        modulate: normalise and modulate the sum; for all tokens, or for those of `chosen` into a compact buffer.
        before_RND: an earlier stream; the difference to it is the update that a cache stores.

    Returns:
        (stream [R, N, D], the same tensor if there are no terms; update [R, N, D] or None; modulated [R, N, D], or
        [M, D] with `chosen`, or None)
    """
    if path == "torch":
        return _advance_reference(x_RND, terms, modulate, chosen, before_RND, eps)
    rows, tokens, width = x_RND.shape
    after = torch.empty_like(x_RND) if terms else x_RND
    update = torch.empty_like(x_RND) if before_RND is not None else None
    modulated = None
    if modulate:
        modulated = torch.empty_like(x_RND) if chosen is None else x_RND.new_empty(chosen.capacity, width)
    (y1, gate1), (y2, gate2) = (*terms, *[(x_RND, None)] * (2 - len(terms)))
    shift, scale = modulate or (x_RND, x_RND)
    index, used = (chosen.index_RK, chosen.used) if chosen else (x_RND, x_RND)
    _advance_kernel[(rows * tokens + (chosen.capacity if chosen else 0),)](
        x_RND,
        y1,
        y1 if gate1 is None else gate1,
        0 if gate1 is None else gate1.stride(0),
        y2,
        y2 if gate2 is None else gate2,
        0 if gate2 is None else gate2.stride(0),
        before_RND if before_RND is not None else x_RND,
        after,
        update if update is not None else x_RND,
        shift,
        scale,
        shift.stride(0),
        modulated if modulated is not None else x_RND,
        index,
        used,
        rows,
        tokens,
        index.stride(0),
        width,
        eps,
        TERMS=len(terms),
        GATE1=gate1 is not None,
        GATE2=gate2 is not None,
        UPDATE=update is not None,
        NORM=modulate is not None and chosen is None,
        CHOSEN=chosen is not None,
        BLOCK=triton.next_power_of_2(width),
        num_warps=4,
    )
    return after, update, modulated


def norm_rows(x_MD: Tensor, modulate: Modulate, chosen: Chosen, eps: float = 1e-6, path: Path = "triton") -> Tensor:
    """LayerNorm and modulation of compact rows: [M, D]."""
    shift, scale = modulate
    if path == "torch":
        row, out = chosen.rows(), torch.empty_like(x_MD)
        out[: len(row)] = _norm_reference(x_MD[: len(row)], shift[row], scale[row], eps)
        return out
    out = torch.empty_like(x_MD)
    _norm_rows_kernel[(chosen.capacity,)](
        x_MD,
        shift,
        scale,
        shift.stride(0),
        out,
        chosen.used,
        len(chosen.index_RK),
        x_MD.shape[1],
        eps,
        BLOCK=triton.next_power_of_2(x_MD.shape[1]),
        num_warps=4,
    )
    return out


def _norm_reference(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    normalised = F.layer_norm(x.float(), x.shape[-1:], eps=eps)
    return (normalised * (1 + scale.float()) + shift.float()).to(x.dtype)


def _advance_reference(
    x: Tensor,
    terms: Sequence[Term],
    modulate: Modulate | None,
    chosen: Chosen | None,
    before: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    total = x.float()
    for value, gate in terms:
        total = total + (value.float() if gate is None else gate.float()[:, None] * value.float())
    update = None if before is None else (total - before.float()).to(x.dtype)
    after = total.to(x.dtype) if terms else x
    if modulate is None:
        return after, update, None
    shift, scale = modulate
    if chosen is None:
        return after, update, _norm_reference(total, shift[:, None], scale[:, None], eps).to(x.dtype)
    flat, row = chosen.flat(), chosen.rows()
    out = x.new_empty(chosen.capacity, x.shape[-1])
    out[: len(flat)] = _norm_reference(total.flatten(0, 1)[flat], shift[row], scale[row], eps).to(x.dtype)
    return after, update, out


if triton is not None:

    @triton.jit
    def _modulated(x, mask, shift, scale, width, eps, column):
        mean = tl.sum(x, axis=0) / width
        centred = tl.where(mask, x - mean, 0.0)
        variance = tl.sum(centred * centred, axis=0) / width
        shift = tl.load(shift + column, mask, other=0.0).to(tl.float32)
        scale = tl.load(scale + column, mask, other=0.0).to(tl.float32)
        return centred * tl.rsqrt(variance + eps) * (1 + scale) + shift

    @triton.jit
    def _advance_kernel(
        x,
        y1,
        gate1,
        gate1_stride,
        y2,
        gate2,
        gate2_stride,
        before,
        after,
        update,
        shift,
        scale,
        modulate_stride,
        modulated,
        index,
        used,
        rows,
        tokens,
        index_stride,
        width,
        eps,
        TERMS: tl.constexpr,
        GATE1: tl.constexpr,
        GATE2: tl.constexpr,
        UPDATE: tl.constexpr,
        NORM: tl.constexpr,
        CHOSEN: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        # The first rows * tokens programs advance the stream; with CHOSEN the others normalise one chosen token each,
        # adding the terms once more rather than waiting for the stream.
        program = tl.program_id(0)
        column = tl.arange(0, BLOCK)
        mask = column < width
        is_stream = True
        if CHOSEN:
            is_stream = program < rows * tokens
        token, row = program, program // tokens
        place = program
        if CHOSEN:
            if not is_stream:
                place = program - rows * tokens
                count = tl.load(used)
                if place >= rows * count:
                    return
                row = place // count
                token = row * tokens + tl.load(index + row * index_stride + place % count).to(tl.int32)
        start = token.to(tl.int64) * width + column
        total = tl.load(x + start, mask, other=0.0).to(tl.float32)
        if TERMS >= 1:
            value = tl.load(y1 + start, mask, other=0.0).to(tl.float32)
            if GATE1:
                value *= tl.load(gate1 + row * gate1_stride + column, mask, other=0.0).to(tl.float32)
            total += value
        if TERMS >= 2:
            value = tl.load(y2 + start, mask, other=0.0).to(tl.float32)
            if GATE2:
                value *= tl.load(gate2 + row * gate2_stride + column, mask, other=0.0).to(tl.float32)
            total += value
        if is_stream:
            if TERMS >= 1:
                tl.store(after + start, total, mask)
            if UPDATE:
                tl.store(update + start, total - tl.load(before + start, mask, other=0.0).to(tl.float32), mask)
        if NORM:
            modulation = row * modulate_stride
            tl.store(
                modulated + start,
                _modulated(total, mask, shift + modulation, scale + modulation, width, eps, column),
                mask,
            )
        if CHOSEN:
            if not is_stream:
                modulation = row * modulate_stride
                tl.store(
                    modulated + place.to(tl.int64) * width + column,
                    _modulated(total, mask, shift + modulation, scale + modulation, width, eps, column),
                    mask,
                )

    @triton.jit
    def _norm_rows_kernel(x, shift, scale, modulate_stride, out, used, rows, width, eps, BLOCK: tl.constexpr):
        place = tl.program_id(0)
        count = tl.load(used)
        if place >= rows * count:
            return
        column = tl.arange(0, BLOCK)
        mask = column < width
        start = place.to(tl.int64) * width + column
        value = tl.load(x + start, mask, other=0.0).to(tl.float32)
        modulation = (place // count) * modulate_stride
        tl.store(out + start, _modulated(value, mask, shift + modulation, scale + modulation, width, eps, column), mask)
