"""The best tokens of each row in each block, and a budget shared out over the blocks, in five launches.

`tcbench.choose` says what is computed (`allocate_tokens`, `top_tokens_by_block`) and calls these where they run. They
give exactly the same, and among equal scores the same tokens, so that nothing else need know.

Each row's scores in each block, a *list*, are sorted by a key that falls with the score (`_falling`) and, among equals,
rises with the token. The threshold, the key of the last token that the budget of all rows allows, is found digit by
digit from the top: a launch counts the keys that share the digits found so far by their next one.
"""

import torch
from torch import Tensor

from tcbench.kernels.chosen import available

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

MAX_TOKENS = 4096
"""A program sorts a list at once; longer ones are left to torch."""

DIGIT_BITS = 11
PASSES = 3  # digits of a key of 32 bits
BINS = 1 << DIGIT_BITS
CHUNK = 1024


def serves(score_RLN: Tensor) -> bool:
    """Whether the kernels run on these scores."""
    fits = score_RLN.shape[2] <= MAX_TOKENS and score_RLN.dtype in (torch.float32, torch.bfloat16, torch.float16)
    return fits and available(score_RLN.device)


def rank_tokens(score_RLN: Tensor) -> Tensor:
    """The tokens of each row in each block, best first and the lower one among equals: int64 [R, L, N]."""
    return _sort(score_RLN, None, None)


def best_tokens(score_RLN: Tensor, budget: int) -> tuple[Tensor, Tensor]:
    """`rank_tokens`, and how many of the first count in each block (Eq. 12): int32 [L], summing to `budget`.

    Args:
        budget: tokens per row, summed over blocks; 0..L*N.
    """
    rows, blocks, tokens = score_RLN.shape
    keys = score_RLN.new_empty(score_RLN.shape, dtype=torch.int64)
    histograms = keys.new_empty(PASSES, BINS, dtype=torch.int32)  # emptied by the first launch
    found = keys.new_empty(PASSES, 2)
    index_RLN = _sort(score_RLN, keys, histograms)
    for digit in range(PASSES):
        _count_kernel[(triton.cdiv(keys.numel(), CHUNK),)](
            keys,
            histograms,
            found,
            keys.numel(),
            budget * rows,
            PASS=digit,
            SHIFT=(PASSES - 1 - digit) * DIGIT_BITS,
            BITS=DIGIT_BITS,
            CHUNK=CHUNK,
            num_warps=4,
        )
    counts = histograms.new_empty(blocks)
    _share_kernel[(1,)](
        keys,
        histograms[-1],
        found[-1],
        counts,
        rows,
        blocks,
        tokens,
        budget,
        ROWS=triton.next_power_of_2(rows),
        BLOCKS=triton.next_power_of_2(blocks),
        HALVINGS=tokens.bit_length(),
        BITS=DIGIT_BITS,
        num_warps=8,
    )
    return index_RLN, counts


def _sort(score_RLN: Tensor, keys: Tensor | None, histograms: Tensor | None) -> Tensor:
    rows, blocks, tokens = score_RLN.shape
    index_RLN = score_RLN.new_empty(score_RLN.shape, dtype=torch.int64)
    size = triton.next_power_of_2(tokens)
    _sort_kernel[(rows * blocks,)](
        score_RLN,
        *score_RLN.stride(),
        index_RLN,
        keys,
        histograms,
        0 if histograms is None else histograms.numel(),
        blocks,
        tokens,
        BLOCK=size,
        num_warps=min(16, max(1, size // 128)),
    )
    return index_RLN


if triton is not None:

    @triton.jit
    def _falling(score):
        """A float32's bits as a number of 32 bits that is the smaller, the higher the score; both zeros are one."""
        bits = tl.where(score == 0, 0.0, score).to(tl.int32, bitcast=True)
        return tl.where(bits < 0, bits, bits ^ 0x7FFFFFFF).to(tl.uint32, bitcast=True).to(tl.int64)

    @triton.jit
    def _sort_kernel(
        scores,
        row_stride,
        block_stride,
        token_stride,
        index,
        keys,
        histograms,
        bins,
        blocks,
        tokens,
        BLOCK: tl.constexpr,
    ):
        row, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
        n = tl.arange(0, BLOCK)
        inside = n < tokens
        score = tl.load(scores + row.to(tl.int64) * row_stride + block * block_stride + n * token_stride, inside)
        # score above, token below: one sort orders by both; what pads the list comes last
        ordered = tl.sort(tl.where(inside, (_falling(score.to(tl.float32)) << 16) | n, 1 << 62))
        place = tl.program_id(0).to(tl.int64) * tokens + n
        tl.store(index + place, ordered & 0xFFFF, inside)
        if keys is not None:
            tl.store(keys + place, ordered >> 16, inside)
            for start in range(tl.program_id(0) * BLOCK, bins, tl.num_programs(0) * BLOCK):
                tl.store(histograms + start + n, 0, start + n < bins)

    @triton.jit
    def _narrowed(histogram, found, BITS: tl.constexpr):
        """One more digit: (digits of the threshold, how many of the keys that start so are within the budget)."""
        counts = tl.load(histogram + tl.arange(0, 1 << BITS)).to(tl.int64)
        wanted = tl.load(found + 1)
        passed = tl.cumsum(counts, axis=0) < wanted
        digit = tl.sum(passed.to(tl.int64), axis=0)
        return (tl.load(found) << BITS) + digit, wanted - tl.sum(tl.where(passed, counts, 0), axis=0)

    @triton.jit
    def _digit(keys, i, inside, prefix, SHIFT: tl.constexpr, BITS: tl.constexpr):
        """The next digit of the keys that start with the prefix, -1 of others."""
        key = tl.load(keys + i, inside, other=-1)
        return tl.where(inside & ((key >> (SHIFT + BITS)) == prefix), (key >> SHIFT) & ((1 << BITS) - 1), -1)

    @triton.jit
    def _count_kernel(
        keys,
        histograms,
        found,
        total,
        wanted,
        PASS: tl.constexpr,
        SHIFT: tl.constexpr,
        BITS: tl.constexpr,
        CHUNK: tl.constexpr,
    ):
        prefix, wanted = tl.full((), 0, tl.int64), tl.full((), 0, tl.int64) + wanted
        if PASS > 0:
            prefix, wanted = _narrowed(histograms + ((PASS - 1) << BITS), found + 2 * (PASS - 1), BITS)
        if tl.program_id(0) == 0:
            tl.store(found + 2 * PASS, prefix)
            tl.store(found + 2 * PASS + 1, wanted)
        offset = tl.arange(0, CHUNK)
        i = tl.program_id(0) * CHUNK + offset
        digit = _digit(keys, i, i < total, prefix, SHIFT, BITS)
        before = _digit(keys, i - 1, (i <= total) & (offset > 0), prefix, SHIFT, BITS)
        after = _digit(keys, i + 1, (i + 1 < total) & (offset < CHUNK - 1), prefix, SHIFT, BITS)
        # lists are sorted, so equal digits stand in runs: two additions a run instead of one a key
        at = histograms + (PASS << BITS) + digit
        tl.atomic_add(at, offset + 1, (digit >= 0) & (digit != after), sem="relaxed")
        tl.atomic_add(at, -offset, (digit >= 0) & (digit != before) & (offset > 0), sem="relaxed")

    @triton.jit
    def _keys_below(keys, bound, tokens, inside, HALVINGS: tl.constexpr):
        """How many keys of each sorted list lie below the bound; `keys` points to the first of each."""
        # all lists are halved together, as often as the longest needs
        low = tl.where(inside, 0, 0)
        high = tl.where(inside, tokens, 0)
        for _ in range(HALVINGS):
            middle = (low + high) // 2
            below = tl.load(keys + middle, low < high, other=0) < bound
            high = tl.where((low < high) & ~below, middle, high)
            low = tl.where((low < high) & below, middle + 1, low)
        return low

    @triton.jit
    def _share_kernel(
        keys,
        histogram,
        found,
        counts,
        rows,
        blocks,
        tokens,
        budget,
        ROWS: tl.constexpr,
        BLOCKS: tl.constexpr,
        HALVINGS: tl.constexpr,
        BITS: tl.constexpr,
    ):
        threshold, wanted = _narrowed(histogram, found, BITS)
        row, block = tl.arange(0, ROWS)[:, None], tl.arange(0, BLOCKS)[None, :]
        inside = (row < rows) & (block < blocks)
        at = keys + (row.to(tl.int64) * blocks + block) * tokens
        above = _keys_below(at, threshold, tokens, inside, HALVINGS)
        equal = _keys_below(at, threshold + 1, tokens, inside, HALVINGS) - above
        # those equal to the threshold count in the order of rows, then blocks, as far as the budget goes
        of_row = tl.sum(equal, axis=1)
        before = (tl.cumsum(of_row, axis=0) - of_row)[:, None] + tl.cumsum(equal, axis=1) - equal
        left = tl.maximum(wanted - before, 0)
        total = tl.sum(above + tl.minimum(equal, left), axis=0)
        share = total // rows
        one = tl.arange(0, BLOCKS)
        # the remainders, and among equal ones the lower block, in one number
        rest = tl.where(one < blocks, (total % rows) * BLOCKS + BLOCKS - 1 - one, -1)
        place = tl.sum((rest[None, :] > rest[:, None]).to(tl.int64), axis=1)
        share += (place < budget - tl.sum(share, axis=0)).to(tl.int64)
        tl.store(counts + one, share.to(tl.int32), one < blocks)
