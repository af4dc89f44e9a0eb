"""A score in (0, 1) for every token in every block: LayerNorm, a linear head and a sigmoid in one pass."""

import torch
import torch.nn.functional as F
from torch import Tensor

from tcbench.kernels.chosen import Backend

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

EPS = 1e-5
BLOCK_M = 16  # tokens of a program: few, so that every multiprocessor has some
PRECISION = "tf32x3"
"""Of the products, whatever torch's setting. Three products in TF32 are as exact as one in float32 (largest error of a
score 4e-7 against 1e-6) and, on an H200, three times as fast; in a single one close scores would coincide."""


def token_scores(x_RND: Tensor, weight_LD: Tensor, bias_L: Tensor, backend: Backend = "triton") -> Tensor:
    """sigmoid(LayerNorm(x) W^T + b), float32 [R, L, N].

    Computed in float32 whatever the dtype of x, because close scores must stay distinct.

    Args:
        x_RND: contiguous, any float dtype.
        weight_LD, bias_L: the head, float32.
    """
    if backend == "torch":
        return F.linear(F.layer_norm(x_RND.float(), x_RND.shape[-1:], eps=EPS), weight_LD, bias_L).sigmoid().mT
    rows, tokens, width = x_RND.shape
    blocks = len(weight_LD)
    out = x_RND.new_empty(rows, blocks, tokens, dtype=torch.float32)
    _scores_kernel[(triton.cdiv(rows * tokens, BLOCK_M),)](
        x_RND,
        weight_LD,
        bias_L,
        out,
        rows * tokens,
        tokens,
        blocks,
        width,
        EPS,
        BLOCK_M=BLOCK_M,
        BLOCK_K=64,
        BLOCK_L=max(16, triton.next_power_of_2(blocks)),
        PRECISION=PRECISION,
        num_warps=4,
    )
    return out


if triton is not None:

    @triton.jit
    def _scores_kernel(
        x,
        weight,
        bias,
        out,
        rows,
        tokens,
        blocks,
        width,
        eps,
        BLOCK_M: tl.constexpr,
        BLOCK_L: tl.constexpr,
        BLOCK_K: tl.constexpr,
        PRECISION: tl.constexpr,
    ):
        m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
        block, column = tl.arange(0, BLOCK_L), tl.arange(0, BLOCK_K)
        in_m, in_l = (m < rows)[:, None], block < blocks
        at = x + m.to(tl.int64)[:, None] * width + column[None, :]
        # the tokens are read three times, the second and third time from the cache: a mean, then squares around it
        total = tl.zeros((BLOCK_M, BLOCK_K), dtype=tl.float32)
        for k in range(0, width, BLOCK_K):
            total += tl.load(at + k, in_m & (k + column < width)[None, :], other=0.0).to(tl.float32)
        mean = (tl.sum(total, axis=1) / width)[:, None]
        squares = tl.zeros((BLOCK_M, BLOCK_K), dtype=tl.float32)
        for k in range(0, width, BLOCK_K):
            inside = in_m & (k + column < width)[None, :]
            centred = tl.where(inside, tl.load(at + k, inside, other=0.0).to(tl.float32) - mean, 0.0)
            squares += centred * centred
        scale = tl.rsqrt(tl.sum(squares, axis=1) / width + eps)[:, None]
        acc = tl.zeros((BLOCK_M, BLOCK_L), dtype=tl.float32)
        for k in range(0, width, BLOCK_K):
            in_k = k + column < width
            inside = in_m & in_k[None, :]
            h = tl.where(inside, (tl.load(at + k, inside, other=0.0).to(tl.float32) - mean) * scale, 0.0)
            w = tl.load(weight + block[None, :] * width + k + column[:, None], in_l[None, :] & in_k[:, None], other=0.0)
            acc = tl.dot(h, w, acc, input_precision=PRECISION)
        acc += tl.load(bias + block, in_l, other=0.0)[None, :]
        place = (m // tokens * blocks * tokens + m % tokens).to(tl.int64)[:, None] + block[None, :] * tokens
        tl.store(out + place, tl.sigmoid(acc), in_m & in_l[None, :])
