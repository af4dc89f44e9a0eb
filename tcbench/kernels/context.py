"""Attention over a context of any length: a text with a bias, or the tokens of the own group.

For a few tokens of each row, their number known to the device alone; over a text also for all of them.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from tcbench.kernels.chosen import Backend, Chosen
from tcbench.kernels.rows import LOG2_E, precision, split_channels
from tcbench.tensors.groups import Groups, group_of

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None


def text_attention(
    queries: Tensor,
    keys_RHTd: Tensor,
    values_RHTd: Tensor,
    bias_R11T: Tensor,
    chosen: Chosen | None = None,
    backend: Backend = "triton",
) -> Tensor:
    """softmax(Q K^T / sqrt(d) + bias) V in the shape of the queries, heads side by side in D.

    Args:
        queries: of all tokens, [R, N, D], which torch's own attention serves best, or of the chosen ones, compact
            [M, D]; contiguous.
        bias_R11T: what is added to the scores of each text token, [R, 1, 1, T].
    """
    rows, heads = keys_RHTd.shape[:2]
    if backend == "torch" or chosen is None:
        few = _by_head(queries, rows, heads, chosen)
        mixed = F.scaled_dot_product_attention(few, keys_RHTd, values_RHTd, bias_R11T).transpose(1, 2).flatten(2)
        if chosen is None:
            return mixed
        out = torch.empty_like(queries)
        out[: rows * mixed.shape[1]] = mixed.flatten(0, 1)
        return out
    out = torch.empty_like(queries)
    _launch(queries, queries.stride(-2), keys_RHTd, values_RHTd, out, chosen, bias=bias_R11T)
    return out


def group_attention(
    queries_RND: Tensor,
    keys_RND: Tensor,
    values_RND: Tensor,
    heads: int,
    groups: Groups,
    chosen: Chosen,
    among_chosen: bool = False,
    backend: Backend = "triton",
) -> Tensor:
    """Self-attention of the chosen tokens over those of their own group, compact [M, D].

    Args:
        queries_RND, keys_RND, values_RND: [R, N, D], any stride between tokens, heads side by side in D.
        groups: see `tcbench.tensors.groups`.
        among_chosen: keys and values of the chosen tokens only.
    """
    out = queries_RND.new_empty(chosen.capacity, queries_RND.shape[2])
    queries, keys, values = (x.unflatten(2, (heads, -1)).transpose(1, 2) for x in (queries_RND, keys_RND, values_RND))
    if backend == "torch":
        index = chosen.index_RK[:, : int(chosen.used)]
        places = index[:, None, :, None].expand(-1, heads, -1, queries.shape[3])
        asking = asked = group_of(index, groups)
        if among_chosen:
            keys, values = keys.gather(2, places), values.gather(2, places)
        else:
            asked = group_of(torch.arange(chosen.tokens, device=index.device), groups).expand(len(index), -1)
        mask = (asking[:, :, None] == asked[:, None])[:, None]
        mixed = F.scaled_dot_product_attention(queries.gather(2, places), keys, values, mask)
        mixed = mixed.transpose(1, 2).flatten(2).flatten(0, 1)
        out[: len(mixed)] = mixed
        return out
    token = queries_RND.stride(1)
    _launch(queries_RND, token, keys, values, out, chosen, GROUPS=groups[0], STRIDE=groups[1], AMONG=among_chosen)
    return out


def _launch(
    queries: Tensor,
    query_token: int,
    keys_RHTd: Tensor,
    values_RHTd: Tensor,
    out: Tensor,
    chosen: Chosen,
    bias: Tensor | None = None,
    **flags: int,
) -> None:
    rows, heads, context, head_dim = keys_RHTd.shape
    capacity = chosen.index_RK.shape[1]
    main, rest = split_channels(head_dim)
    tile = (16, 32) if queries.element_size() == 4 else (64, 64)
    _attention_kernel[(rows * heads, triton.cdiv(capacity, tile[0]))](
        queries,
        queries.stride(0),
        query_token,
        keys_RHTd,
        *keys_RHTd.stride()[:3],
        values_RHTd,
        *values_RHTd.stride()[:3],
        bias,
        0 if bias is None else bias.stride(0),
        out,
        chosen.index_RK,
        chosen.index_RK.stride(0),
        chosen.used,
        heads,
        context,
        head_dim**-0.5 * LOG2_E,
        HEAD_DIM=head_dim,
        MAIN=main,
        REST=rest,
        GROUPS=flags.get("GROUPS", 0),
        STRIDE=flags.get("STRIDE", 1),
        AMONG=flags.get("AMONG", False),
        BLOCK_Q=tile[0],
        BLOCK_K=tile[1],
        LOG2_E=LOG2_E,
        PRECISION=precision(),
        num_warps=4,
    )


def text_entropy(
    queries: Tensor,
    keys_RHTd: Tensor,
    bias_R11T: Tensor,
    out_RN: Tensor,
    chosen: Chosen | None = None,
    backend: Backend = "triton",
) -> None:
    """Write the entropy of each token's head-mean attention over the text, in nats, into float32 `out_RN`.

    A second pass beside the attention. Chosen tokens write theirs and leave the others.

    Args:
        queries: as in `text_attention`.
    """
    rows, heads, text, head_dim = keys_RHTd.shape
    if backend == "torch":
        few = _by_head(queries, rows, heads, chosen)
        weights = (few * head_dim**-0.5 @ keys_RHTd.transpose(2, 3) + bias_R11T).softmax(dim=3, dtype=torch.float32)
        entropy = torch.special.entr(weights.mean(dim=1)).sum(dim=2).flatten()
        out_RN.view(-1)[chosen.flat() if chosen else slice(None)] = entropy
        return
    tokens = chosen.index_RK.shape[1] if chosen else queries.shape[1]
    main, rest = split_channels(head_dim)
    block_q = 16  # a map of all the text is held at once
    _text_entropy_kernel[(rows, triton.cdiv(tokens, block_q))](
        queries,
        keys_RHTd,
        *keys_RHTd.stride()[:3],
        bias_R11T,
        bias_R11T.stride(0),
        out_RN,
        out_RN.shape[1],
        chosen.index_RK if chosen else None,
        chosen.index_RK.stride(0) if chosen else 0,
        chosen.used if chosen else None,
        heads,
        tokens,
        text,
        head_dim**-0.5,
        HEAD_DIM=head_dim,
        BLOCK_Q=block_q,
        BLOCK_T=max(16, triton.next_power_of_2(text)),
        MAIN=main,
        REST=rest,
        PRECISION=precision(),
        num_warps=4,
        num_stages=3 if queries.element_size() < 4 and text <= 128 else 1,
    )


def _by_head(queries: Tensor, rows: int, heads: int, chosen: Chosen | None) -> Tensor:
    """[R, heads, K, head_dim] of the queries that are there."""
    few = queries.view(-1, queries.shape[-1])[: rows * int(chosen.used)] if chosen else queries
    return few.view(rows, -1, heads, queries.shape[-1] // heads).transpose(1, 2)


if triton is not None:

    @triton.jit
    def _attention_kernel(
        queries,
        q_row,
        q_token,
        keys,
        k_row,
        k_head: tl.constexpr,  # a multiple of 8, but of 16 not always: known, it lets tiles come 16 bytes at a time
        k_token,
        values,
        v_row,
        v_head: tl.constexpr,
        v_token,
        bias,
        bias_row,
        out,
        index,
        index_row,
        used,
        heads,
        context,
        scale,
        HEAD_DIM: tl.constexpr,
        MAIN: tl.constexpr,
        REST: tl.constexpr,
        GROUPS: tl.constexpr,
        STRIDE: tl.constexpr,
        AMONG: tl.constexpr,
        BLOCK_Q: tl.constexpr,
        BLOCK_K: tl.constexpr,
        LOG2_E: tl.constexpr,
        PRECISION: tl.constexpr,
    ):
        count = tl.load(used)
        if tl.program_id(1) * BLOCK_Q >= count:  # the grid is made for as many tokens as there can be
            return
        row, head = tl.program_id(0) // heads, tl.program_id(0) % heads
        q = tl.program_id(1) * BLOCK_Q + tl.arange(0, BLOCK_Q)
        main, rest = tl.arange(0, MAIN), MAIN + tl.arange(0, REST)
        in_q = (q < count)[:, None]
        in_main, in_rest = in_q & (main < HEAD_DIM)[None, :], in_q & (rest < HEAD_DIM)[None, :]
        compact = (row * count + q).to(tl.int64)[:, None]
        if GROUPS:  # queries of all tokens are there, of which the chosen are taken
            token = tl.load(index + row * index_row + q, q < count, other=0)
            own = token // STRIDE % GROUPS
            at = queries + row.to(tl.int64) * q_row + token[:, None] * q_token + head * HEAD_DIM
        else:
            at = queries + compact * q_token + head * HEAD_DIM
        query = tl.load(at + main[None, :], in_main, other=0.0)
        query_rest = tl.load(at + rest[None, :], in_rest, other=0.0)
        keys += row.to(tl.int64) * k_row + head * k_head
        values += row.to(tl.int64) * v_row + head * v_head
        best = tl.full((BLOCK_Q,), -1e30, dtype=tl.float32)  # finite: a tile may hold nobody of a group
        weight_sum = tl.zeros((BLOCK_Q,), dtype=tl.float32)
        acc = tl.zeros((BLOCK_Q, MAIN), dtype=tl.float32)
        acc_rest = tl.zeros((BLOCK_Q, REST), dtype=tl.float32)
        last = count if AMONG else context
        # softmax in one pass, as in `rows`
        for start in range(0, last, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            in_k = k < last
            place = tl.load(index + row * index_row + k, in_k, other=0) if AMONG else k
            k_main, k_rest = in_k[:, None] & (main < HEAD_DIM)[None, :], in_k[:, None] & (rest < HEAD_DIM)[None, :]
            key = tl.load(keys + place[:, None] * k_token + main[None, :], k_main, other=0.0)
            key_rest = tl.load(keys + place[:, None] * k_token + rest[None, :], k_rest, other=0.0)
            value = tl.load(values + place[:, None] * v_token + main[None, :], k_main, other=0.0)
            value_rest = tl.load(values + place[:, None] * v_token + rest[None, :], k_rest, other=0.0)
            score = tl.dot(query, key.T, input_precision=PRECISION)
            score = tl.dot(query_rest, key_rest.T, score, input_precision=PRECISION) * scale
            if bias is not None:
                # the bias is in units of e, the scores of 2
                score += (tl.load(bias + row * bias_row + k, in_k, other=0.0).to(tl.float32) * LOG2_E)[None, :]
            seen = in_k[None, :]
            if GROUPS:
                seen = seen & ((place // STRIDE % GROUPS)[None, :] == own[:, None])
            score = tl.where(seen, score, float("-inf"))
            new_best = tl.maximum(best, tl.max(score, axis=1))
            weight = tl.exp2(score - new_best[:, None])
            shrink = tl.exp2(best - new_best)
            weight_sum = weight_sum * shrink + tl.sum(weight, axis=1)
            weight = weight.to(value.dtype)
            acc = tl.dot(weight, value, acc * shrink[:, None], input_precision=PRECISION)
            acc_rest = tl.dot(weight, value_rest, acc_rest * shrink[:, None], input_precision=PRECISION)
            best = new_best
        kept = 1 / weight_sum[:, None]
        to = out + compact * (heads * HEAD_DIM) + head * HEAD_DIM
        tl.store(to + main[None, :], (acc * kept).to(out.dtype.element_ty), in_main)
        tl.store(to + rest[None, :], (acc_rest * kept).to(out.dtype.element_ty), in_rest)

    @triton.jit
    def _text_entropy_kernel(
        queries,
        keys,
        k_row,
        k_head: tl.constexpr,
        k_token,
        bias,
        bias_row,
        out,
        out_row,
        index,
        index_stride,
        used,
        heads,
        tokens,
        text,
        scale,
        HEAD_DIM: tl.constexpr,
        BLOCK_Q: tl.constexpr,
        BLOCK_T: tl.constexpr,
        MAIN: tl.constexpr,
        REST: tl.constexpr,
        PRECISION: tl.constexpr,
    ):
        count = tokens if used is None else tl.load(used)
        if tl.program_id(1) * BLOCK_Q >= count:
            return
        row = tl.program_id(0)
        q, t = tl.program_id(1) * BLOCK_Q + tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_T)
        in_q, in_t = q < count, t < text
        main, rest = tl.arange(0, MAIN)[None, :], MAIN + tl.arange(0, REST)[None, :]
        q_main, q_rest = in_q[:, None] & (main < HEAD_DIM), in_q[:, None] & (rest < HEAD_DIM)
        k_main, k_rest = in_t[:, None] & (main < HEAD_DIM), in_t[:, None] & (rest < HEAD_DIM)
        queries += (row * count + q).to(tl.int64)[:, None] * (heads * HEAD_DIM)
        keys += row.to(tl.int64) * k_row + t[:, None] * k_token
        shift = tl.load(bias + row * bias_row + t, in_t, other=float("-inf")).to(tl.float32)
        mean = tl.zeros((BLOCK_Q, BLOCK_T), dtype=tl.float32)
        # the entropy of a mean is not the mean of entropies: the map of all heads is complete before it is taken
        for head in range(heads):
            query = tl.load(queries + head * HEAD_DIM + main, q_main, other=0.0)
            query_rest = tl.load(queries + head * HEAD_DIM + rest, q_rest, other=0.0)
            key = tl.load(keys + head * k_head + main, k_main, other=0.0)
            key_rest = tl.load(keys + head * k_head + rest, k_rest, other=0.0)
            score = tl.dot(query, key.T, input_precision=PRECISION)
            score = tl.dot(query_rest, key_rest.T, score, input_precision=PRECISION)
            score = score * scale + shift[None, :]
            weight = tl.exp(score - tl.max(score, axis=1)[:, None])
            mean += weight / (tl.sum(weight, axis=1) * heads)[:, None]
        entropy = -tl.sum(mean * tl.log(tl.where(mean > 0, mean, 1.0)), axis=1)  # x log x is 0 at 0
        token = q if index is None else tl.load(index + row * index_stride + q, in_q, other=0)
        tl.store(out + row * out_row + token, entropy, in_q)
