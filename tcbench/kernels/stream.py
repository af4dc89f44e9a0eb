"""Residual additions and modulated LayerNorm over the token stream, one pass over memory each."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from tcbench.kernels.chosen import Backend, Chosen

try:
    import triton
    import triton.language as tl
except ImportError:  # a platform without Triton has only the "torch" backend
    triton = None

MAX_TERMS = 8
"""Terms that wait at most; every number of them is a kernel to compile."""

Term = tuple[Tensor, Tensor | None]
"""Something to add to the stream: a value [R, N, D] and its gate [R, D], None for 1."""

Modulate = tuple[Tensor, Tensor]
"""(shift, scale), each [R, D]: LayerNorm(x) * (1 + scale) + shift."""


def advance(
    x_RND: Tensor,
    terms: Sequence[Term],
    *,
    modulate: Modulate | None = None,
    before_RND: Tensor | None = None,
    eps: float = 1e-6,
    backend: Backend = "triton",
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Add terms to the stream and, in the same pass, prepare the next branch's input.

    Args:
        x_RND: the stream, contiguous.
        terms: added in order, in float32.
        modulate: normalise and modulate the sum.
        before_RND: an earlier stream; the difference to it is the update that a cache stores.

    Returns:
        (stream, the same tensor if there are no terms; update or None; modulated or None), each [R, N, D]
    """
    if backend == "torch":
        total = _total(x_RND, terms)
        after = total.to(x_RND.dtype) if terms else x_RND
        update = None if before_RND is None else (total - before_RND.float()).to(x_RND.dtype)
        if modulate is None:
            return after, update, None
        shift, scale = modulate
        return after, update, _modulate(total, shift[:, None], scale[:, None], eps).to(x_RND.dtype)
    rows, tokens, width = x_RND.shape
    after = torch.empty_like(x_RND) if terms else x_RND
    update = torch.empty_like(x_RND) if before_RND is not None else None
    modulated = torch.empty_like(x_RND) if modulate else None
    _advance_kernel[(rows * tokens,)](
        x_RND,
        *_pointers(terms),
        before_RND,
        after,
        update,
        modulate[0] if modulate else None,
        modulate[1] if modulate else None,
        modulate[0].stride(0) if modulate else 0,
        modulated,
        tokens,
        width,
        eps,
        BLOCK=triton.next_power_of_2(width),
        num_warps=_warps(width),
    )
    return after, update, modulated


def gather(
    x_RND: Tensor,
    terms: Sequence[Term],
    modulate: Modulate | None,
    chosen: Chosen,
    *,
    eps: float = 1e-6,
    backend: Backend = "triton",
) -> tuple[Tensor, Tensor]:
    """The chosen tokens of the stream with its terms added, which goes on waiting for them, and the branch's input.

    Returns:
        (sum, modulated), both compact, [M, D]; the same tensor if there is nothing to modulate
    """
    sums = x_RND.new_empty(chosen.capacity, x_RND.shape[2])
    modulated = torch.empty_like(sums) if modulate else None
    shift, scale = modulate or (None, None)
    if backend == "torch":
        flat, row = chosen.flat(), chosen.rows()
        total = _total(x_RND, terms).flatten(0, 1)[flat]
        sums[: len(flat)] = total.to(x_RND.dtype)
        if modulate and modulated is not None:
            modulated[: len(flat)] = _modulate(total, modulate[0][row], modulate[1][row], eps).to(x_RND.dtype)
        return sums, sums if modulated is None else modulated
    _gather_kernel[(chosen.capacity,)](
        x_RND,
        *_pointers(terms),
        shift,
        scale,
        0 if shift is None else shift.stride(0),
        sums,
        modulated,
        chosen.index_RK,
        chosen.used,
        len(chosen.index_RK),
        chosen.tokens,
        chosen.index_RK.stride(0),
        x_RND.shape[2],
        eps,
        BLOCK=triton.next_power_of_2(x_RND.shape[2]),
        num_warps=_warps(x_RND.shape[2]),
    )
    return sums, sums if modulated is None else modulated


def norm_rows(
    x_MD: Tensor, modulate: Modulate, chosen: Chosen, eps: float = 1e-6, backend: Backend = "triton"
) -> Tensor:
    """LayerNorm and modulation of compact rows: [M, D]."""
    shift, scale = modulate
    out = torch.empty_like(x_MD)
    if backend == "torch":
        row = chosen.rows()
        out[: len(row)] = _modulate(x_MD[: len(row)].float(), shift[row], scale[row], eps).to(x_MD.dtype)
        return out
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
        num_warps=_warps(x_MD.shape[1]),
    )
    return out


def _total(x: Tensor, terms: Sequence[Term]) -> Tensor:
    total = x.float()
    for value, gate in terms:
        total = total + (value.float() if gate is None else gate.float()[:, None] * value.float())
    return total


def _modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=eps) * (1 + scale.float()) + shift.float()


def _pointers(terms: Sequence[Term]) -> tuple[tuple[Tensor, ...], tuple[Tensor | None, ...], tuple[int, ...]]:
    """Values, gates and the gates' row strides, as the kernels take them."""
    values, gates = tuple(value for value, _ in terms), tuple(gate for _, gate in terms)
    return values, gates, tuple(0 if gate is None else gate.stride(0) for gate in gates)


def _warps(width: int) -> int:
    """Of a program that holds one token."""
    return 2 if width <= 2048 else 4


if triton is not None:

    @triton.jit
    def _sum(x, values, gates, gate_strides, start, row, column, mask):
        # in float32, so that what waited rounds once, not once a term
        total = tl.load(x + start, mask, other=0.0).to(tl.float32)
        for i in tl.static_range(len(values)):  # unrolled: every number of terms is a kernel of its own
            value = tl.load(values[i] + start, mask, other=0.0).to(tl.float32)
            if gates[i] is not None:
                value *= tl.load(gates[i] + row * gate_strides[i] + column, mask, other=0.0).to(tl.float32)
            total += value
        return total

    @triton.jit
    def _normalised(x, mask, shift, scale, width, eps):
        # squares around the mean: the difference of two large sums would lose the digits that matter
        mean = tl.sum(x, axis=0) / width
        centred = tl.where(mask, x - mean, 0.0)
        variance = tl.sum(centred * centred, axis=0) / width
        shift = tl.load(shift, mask, other=0.0).to(tl.float32)
        scale = tl.load(scale, mask, other=0.0).to(tl.float32)
        return centred * tl.rsqrt(variance + eps) * (1 + scale) + shift

    @triton.jit
    def _advance_kernel(
        x,
        values,
        gates,
        gate_strides,
        before,
        after,
        update,
        shift,
        scale,
        modulate_stride,
        modulated,
        tokens,
        width,
        eps,
        BLOCK: tl.constexpr,
    ):
        token = tl.program_id(0)
        row = token // tokens
        column = tl.arange(0, BLOCK)
        mask = column < width
        start = token.to(tl.int64) * width + column
        total = _sum(x, values, gates, gate_strides, start, row, column, mask)
        if len(values) > 0:
            tl.store(after + start, total.to(after.dtype.element_ty), mask)
        if update is not None:
            change = total - tl.load(before + start, mask, other=0.0).to(tl.float32)
            tl.store(update + start, change.to(update.dtype.element_ty), mask)
        if modulated is not None:
            at = row * modulate_stride + column
            value = _normalised(total, mask, shift + at, scale + at, width, eps)
            tl.store(modulated + start, value.to(modulated.dtype.element_ty), mask)

    @triton.jit
    def _gather_kernel(
        x,
        values,
        gates,
        gate_strides,
        shift,
        scale,
        modulate_stride,
        sums,
        modulated,
        index,
        used,
        rows,
        tokens,
        index_stride,
        width,
        eps,
        BLOCK: tl.constexpr,
    ):
        # only reads the stream: its terms go on waiting for the tokens that are not chosen
        place = tl.program_id(0)
        count = tl.load(used)
        if place >= rows * count:
            return
        row = place // count
        token = row * tokens + tl.load(index + row * index_stride + place % count).to(tl.int32)
        column = tl.arange(0, BLOCK)
        mask = column < width
        total = _sum(x, values, gates, gate_strides, token.to(tl.int64) * width + column, row, column, mask)
        to = place.to(tl.int64) * width + column
        tl.store(sums + to, total.to(sums.dtype.element_ty), mask)
        if modulated is not None:
            at = row * modulate_stride + column
            value = _normalised(total, mask, shift + at, scale + at, width, eps)
            tl.store(modulated + to, value.to(modulated.dtype.element_ty), mask)

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
        at = (place // count) * modulate_stride + column
        value = _normalised(value, mask, shift + at, scale + at, width, eps)
        tl.store(out + start, value.to(out.dtype.element_ty), mask)
