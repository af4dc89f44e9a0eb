"""ToCa's choice of tokens in one launch: scores, the best of every cell, the highest of each row, and new ages.

The plain PyTorch beside it is `tcbench.choose.choose_by_attention`, through which both are called.
"""

from math import log

import torch
from torch import Tensor

from tcbench.kernels.chosen import available, on_device

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

TOKENS_A_WARP = 256
"""So that counting keys takes no barrier where tokens are few."""

MAX_TOKENS = 8192
"""Of a row, which one program holds."""


def serves(observed_RBN: Tensor) -> bool:
    """Whether the kernel chooses among these tokens where they are."""
    return available(observed_RBN.device) and observed_RBN.shape[2] <= MAX_TOKENS


def choose_by_attention(
    observed_RBN: Tensor,
    refreshed_RBN: Tensor | int,
    step: int,
    counts: tuple[int, ...],
    *,
    grid: tuple[int, int],
    age_weight: float,
    interval: float,
    bonus: float,
    cell: int,
    halves: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `tcbench.choose.choose_by_attention` by an `AttentionScore` of these settings, up to rounding of the scores.

    Of equal scores the lower token is chosen.

    Returns:
        indices, int64 [R, B, max(counts)], of which the leading `counts[b]` are block b's; scores and refreshed,
        [R, B, N]
    """
    rows, blocks, tokens = observed_RBN.shape
    observed = observed_RBN if observed_RBN.stride(2) == 1 else observed_RBN.contiguous()
    score_RBN = torch.empty(rows, blocks, tokens, device=observed.device)
    refreshed = torch.empty_like(score_RBN, dtype=torch.int32)
    index_RBK = torch.empty(rows, blocks, max(counts), dtype=torch.int64, device=observed.device)
    before = refreshed_RBN.contiguous() if isinstance(refreshed_RBN, Tensor) else None
    cells, area = triton.next_power_of_2(tokens // cell**2), triton.next_power_of_2(cell**2)
    _choice_kernel[(rows, blocks)](
        observed,
        observed.stride(0),
        observed.stride(1),
        before,
        0 if isinstance(refreshed_RBN, Tensor) else refreshed_RBN,
        on_device(counts, observed.device),
        score_RBN,
        refreshed,
        index_RBK,
        index_RBK.shape[2],
        step,
        tokens,
        grid[1],
        rows // (halves or 1),
        1 + log(halves) if halves else 0.0,
        age_weight,
        float(interval),
        bonus,
        HALVES=halves or 1,
        CELL=cell,
        CELLS=cells,
        AREA=area,
        KEY_BITS=32 + (cells * area).bit_length() - 1,
        num_warps=max(1, min(16, cells * area // TOKENS_A_WARP)),
    )
    return index_RBK, score_RBN, refreshed


if triton is not None:

    @triton.jit(do_not_specialize=["last", "step"])  # or some steps were kernels of their own
    def _choice_kernel(
        observed,
        observed_row,
        observed_block,
        before,
        last,
        counts,
        scores,
        refreshed,
        index,
        capacity,
        step,
        tokens,
        columns,
        half,
        shift,
        age_weight,
        interval,
        bonus,
        HALVES: tl.constexpr,
        CELL: tl.constexpr,
        CELLS: tl.constexpr,
        AREA: tl.constexpr,
        KEY_BITS: tl.constexpr,
    ):
        row, block = tl.program_id(0), tl.program_id(1)
        cell, inner = tl.arange(0, CELLS)[:, None], tl.arange(0, AREA)[None, :]  # a row of the tile is a cell
        across = columns // CELL
        token = (cell // across * CELL + inner // CELL) * columns + cell % across * CELL + inner % CELL
        valid = (cell < tokens // (CELL * CELL)) & (inner < CELL * CELL)

        seen = tl.zeros((CELLS, AREA), tl.float32)
        for i in tl.static_range(HALVES):
            at = observed + (row % half + i * half) * observed_row + block * observed_block
            seen += tl.load(at + token, valid, other=0.0)
        seen = tl.where(valid, seen / HALVES + shift, 0.0)
        norm = tl.maximum(tl.sqrt(tl.sum(seen * seen)), 1e-12)  # as torch's normalize
        start = (row * tl.num_programs(1) + block) * tokens
        young = tl.load(before + start + token, valid, other=0) if before is not None else token * 0 + last
        score = seen / norm + age_weight * ((step - 1 - young).to(tl.float32) / interval)
        score = tl.where(valid, score, float("-inf"))
        best, place = tl.max(score, axis=1, return_indices=True, return_indices_tie_break_left=True)
        score = tl.where(valid & (inner == place[:, None]), score + bonus * best[:, None], score)

        # distinct keys in the order of the scores: the bits of a float (a negative one has them backwards), the token
        bits = score.to(tl.int32, bitcast=True)
        bits = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64) + 0x80000000
        key = tl.where(valid, bits * (CELLS * AREA) + (CELLS * AREA - 1 - token), -1)
        key, token, valid = tl.ravel(key), tl.ravel(token), tl.ravel(valid)
        # the highest threshold that `count` keys reach, from its first bit on
        count = tl.load(counts + block)
        threshold = tl.full((), 0, tl.int64)
        bit = tl.full((), 1 << (KEY_BITS - 1), tl.int64)
        for _ in range(KEY_BITS):
            reached = tl.sum((key >= threshold + bit).to(tl.int32), axis=0)
            threshold += tl.where(reached >= count, bit, 0)
            bit >>= 1
        chosen = valid & (key >= threshold)
        order = tl.cumsum(chosen.to(tl.int32), axis=0) - 1
        tl.store(index + (row * tl.num_programs(1) + block) * capacity + order, token.to(tl.int64), chosen)
        tl.store(scores + start + token, tl.ravel(score), valid)
        tl.store(refreshed + start + token, tl.where(chosen, step, tl.ravel(young)), valid)
