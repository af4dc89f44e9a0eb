"""Linear layers and attention for a few tokens of each row, their number known to the device alone."""

from functools import lru_cache
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from tcbench.kernels.chosen import Backend, Chosen

try:
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:
    triton = None

Activation = Literal["none", "gelu"]
LOG2_E = 1.4426950408889634  # exponentials are taken in base 2, the fast one


def linear(
    a_MC: Tensor,
    weight: Tensor,
    bias: Tensor,
    chosen: Chosen,
    activation: Activation = "none",
    backend: Backend = "triton",
) -> Tensor:
    """activation(a W^T + b), compact: [M, O]; `gelu` is the tanh approximation."""
    out = a_MC.new_empty(len(a_MC), len(weight))
    if backend == "torch":
        value = _product(a_MC, weight, bias, chosen)
        out[: len(value)] = (F.gelu(value, approximate="tanh") if activation == "gelu" else value).to(out.dtype)
        return out
    _launch(a_MC, weight, bias, chosen, out, GELU=activation == "gelu")
    return out


def linear_scatter(
    a_MC: Tensor, weight: Tensor, bias: Tensor, chosen: Chosen, out_RNO: Tensor, backend: Backend = "triton"
) -> None:
    """Write a W^T + b into the chosen tokens of `out_RNO` [R, N, O], leaving the others."""
    if backend == "torch":
        out_RNO.view(-1, out_RNO.shape[-1])[chosen.flat()] = _product(a_MC, weight, bias, chosen).to(out_RNO.dtype)
        return
    _launch(a_MC, weight, bias, chosen, out_RNO, SCATTER=True)


def linear_residual(
    a_MC: Tensor,
    weight: Tensor,
    bias: Tensor,
    chosen: Chosen,
    gate_RO: Tensor,
    base_MO: Tensor,
    backend: Backend = "triton",
) -> Tensor:
    """base + gate * (a W^T + b), compact: [M, O]."""
    out = a_MC.new_empty(len(a_MC), len(weight))
    if backend == "torch":
        value = gate_RO.float()[chosen.rows()] * _product(a_MC, weight, bias, chosen)
        out[: len(value)] = (base_MO[: len(value)].float() + value).to(out.dtype)
        return out
    _launch(a_MC, weight, bias, chosen, out, gate=gate_RO, base=base_MO)
    return out


def linear_update(
    a_MC: Tensor,
    weight: Tensor,
    bias: Tensor,
    chosen: Chosen,
    gate_RO: Tensor,
    base_MO: Tensor,
    middle_MO: Tensor,
    out_RNO: Tensor,
    backend: Backend = "triton",
) -> None:
    """Write middle + gate * (a W^T + b) - base into the chosen tokens of `out_RNO`: a block's update, refreshed."""
    if backend == "torch":
        value = gate_RO.float()[chosen.rows()] * _product(a_MC, weight, bias, chosen)
        value = middle_MO[: len(value)].float() + value - base_MO[: len(value)].float()
        out_RNO.view(-1, out_RNO.shape[-1])[chosen.flat()] = value.to(out_RNO.dtype)
        return
    _launch(a_MC, weight, bias, chosen, out_RNO, gate=gate_RO, base=base_MO, middle=middle_MO, SCATTER=True)


def attention(
    queries_RND: Tensor,
    keys_RND: Tensor,
    values_RND: Tensor,
    heads: int,
    chosen: Chosen | None = None,
    among_chosen: bool = False,
    log_sums_RHN: Tensor | None = None,
    backend: Backend = "triton",
) -> Tensor:
    """Self-attention of all tokens, [R, N, D], or of the chosen ones, compact [M, D].

    Args:
        queries_RND, keys_RND, values_RND: [R, N, D], any stride between tokens, heads side by side in D.
        among_chosen: the literal reading of the paper, keys and values of the recomputed tokens only.
        log_sums_RHN: float32 [R, H, N], filled with the base-2 logarithm of every query's softmax denominator, of which
            `attention_received` makes the map; only with attention of all tokens.
    """
    rows, tokens, width = queries_RND.shape
    head_dim = width // heads
    if backend == "torch":
        if log_sums_RHN is not None:
            log_sums_RHN.copy_(_scores(queries_RND, keys_RND, heads).logsumexp(dim=3) * LOG2_E)
        return _attention_reference(queries_RND, keys_RND, values_RND, heads, chosen, among_chosen)
    if chosen is None:
        out, capacity = queries_RND.new_empty(rows, tokens, width), tokens
    else:
        out, capacity = queries_RND.new_empty(chosen.capacity, width), chosen.index_RK.shape[1]
    tile = _attention_tile(tokens if chosen is None else chosen.expected, queries_RND.element_size())
    main, rest = split_channels(head_dim)
    keys, values = keys_RND.flatten(0, 1), values_RND.flatten(0, 1)
    _attention_kernel[(rows * heads, triton.cdiv(capacity, tile["BLOCK_Q"]))](
        queries_RND,
        queries_RND.stride(0),
        queries_RND.stride(1),
        *(_descriptor(part, tile["BLOCK_K"], columns) for part in (keys, values) for columns in (main, rest)),
        keys,
        keys.stride(0),
        values,
        values.stride(0),
        out,
        log_sums_RHN,
        chosen.index_RK if chosen else None,
        chosen.used if chosen else None,
        heads,
        tokens,
        chosen.index_RK.stride(0) if chosen else 0,
        head_dim**-0.5,
        HEAD_DIM=head_dim,
        MAIN=main,
        REST=rest,
        AMONG=among_chosen,
        PRECISION=precision(),
        **tile,
    )
    return out


def _attention_reference(
    queries_RND: Tensor, keys_RND: Tensor, values_RND: Tensor, heads: int, chosen: Chosen | None, among_chosen: bool
) -> Tensor:
    parts = [queries_RND, keys_RND, values_RND]
    if chosen:
        places = chosen.index_RK[:, : int(chosen.used), None].expand(-1, -1, queries_RND.shape[2])
        parts = [part.gather(1, places) if among_chosen or part is queries_RND else part for part in parts]
    mixed = F.scaled_dot_product_attention(*(part.unflatten(2, (heads, -1)).transpose(1, 2) for part in parts))
    mixed = mixed.transpose(1, 2).flatten(2)
    if chosen is None:
        return mixed
    out = queries_RND.new_empty(chosen.capacity, queries_RND.shape[2])
    out[: mixed.shape[0] * mixed.shape[1]] = mixed.flatten(0, 1)
    return out


def _attention_tile(queries: int, element_size: int) -> dict[str, int]:
    """Tile sizes by the likely number of queries in a row; see `_tile`."""
    if element_size == 4:
        return {"BLOCK_Q": 16, "BLOCK_K": 32, "num_warps": 4, "num_stages": 2}
    if queries < 128:
        return {"BLOCK_Q": 64, "BLOCK_K": 128, "num_warps": 4, "num_stages": 2}
    return {"BLOCK_Q": 128, "BLOCK_K": 64, "num_warps": 8, "num_stages": 3}


def attention_received(
    queries_RND: Tensor, keys_RND: Tensor, log_sums_RHN: Tensor, heads: int, backend: Backend = "triton"
) -> Tensor:
    """Column sums of the head-mean attention map, float32 [R, N]: a second pass over QK^T beside the fused attention.

    Args:
        log_sums_RHN: what `attention` filled in for the same queries and keys.
    """
    rows, tokens, width = queries_RND.shape
    head_dim = width // heads
    if backend == "torch":
        score = _scores(queries_RND, keys_RND, heads) * LOG2_E
        return (score - log_sums_RHN[..., None]).exp2().mean(dim=1).sum(dim=1)
    tile = _received_tile(queries_RND.element_size())
    main, rest = split_channels(head_dim)
    received = torch.empty(rows, heads, tokens, device=queries_RND.device, dtype=torch.float32)
    queries = queries_RND.flatten(0, 1)
    _received_kernel[(rows * heads, triton.cdiv(tokens, tile["BLOCK_K"]))](
        *(_descriptor(queries, tile["BLOCK_Q"], columns) for columns in (main, rest)),
        keys_RND,
        keys_RND.stride(0),
        keys_RND.stride(1),
        log_sums_RHN,
        received,
        heads,
        tokens,
        head_dim**-0.5,
        HEAD_DIM=head_dim,
        MAIN=main,
        REST=rest,
        PRECISION=precision(),
        **tile,
    )
    return received.mean(dim=1)


def _received_tile(element_size: int) -> dict[str, int]:
    """Tile sizes; see `_tile`."""
    if element_size == 4:
        return {"BLOCK_Q": 32, "BLOCK_K": 32, "num_warps": 4, "num_stages": 2}
    return {"BLOCK_Q": 64, "BLOCK_K": 128, "num_warps": 4, "num_stages": 2}


def _scores(queries_RND: Tensor, keys_RND: Tensor, heads: int) -> Tensor:
    """Q K^T / sqrt(d), float32 [R, H, N, N]."""
    queries, keys = (part.unflatten(2, (heads, -1)).transpose(1, 2).float() for part in (queries_RND, keys_RND))
    return queries * queries.shape[3] ** -0.5 @ keys.transpose(2, 3)


def _product(a: Tensor, weight: Tensor, bias: Tensor, chosen: Chosen) -> Tensor:
    count = len(chosen.index_RK) * int(chosen.used)
    return F.linear(a[:count].float(), weight.float(), bias.float())


def precision() -> str:
    """How float32 products are taken, which is torch's own setting; bfloat16 ones do not ask."""
    return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee"


def _launch(
    a: Tensor,
    weight: Tensor,
    bias: Tensor,
    chosen: Chosen,
    out: Tensor,
    gate: Tensor | None = None,
    base: Tensor | None = None,
    middle: Tensor | None = None,
    **flags: bool,
) -> None:
    features, channels = weight.shape
    tile = _tile(len(chosen.index_RK) * chosen.expected, features, channels, a.element_size())
    tiles = triton.cdiv(chosen.capacity, tile["BLOCK_M"]) * triton.cdiv(features, tile["BLOCK_N"])
    _linear_kernel[(min(tiles, 2 * _processors(a.device)),)](
        _descriptor(a, tile["BLOCK_M"], tile["BLOCK_K"]),
        _descriptor(weight, tile["BLOCK_N"], tile["BLOCK_K"]),
        bias,
        out,
        gate,
        gate.stride(0) if gate is not None else 0,
        base,
        middle,
        chosen.index_RK,
        chosen.used,
        len(chosen.index_RK),
        chosen.tokens,
        chosen.index_RK.stride(0),
        features,
        channels,
        SCATTER=flags.get("SCATTER", False),
        GELU=flags.get("GELU", False),
        PRECISION=precision(),
        **tile,
    )


def _descriptor(matrix: Tensor, rows: int, columns: int) -> "TensorDescriptor":
    """A matrix whose tiles the copy engine fetches; what lies outside is zero."""
    return TensorDescriptor(matrix, list(matrix.shape), list(matrix.stride()), [rows, columns])


def split_channels(channels: int) -> tuple[int, int]:
    """Channels as two powers of two, because products take nothing else: 72 is 64 + 16, half of it unused."""
    main = max(16, 1 << (channels.bit_length() - 1))
    rest = channels - main
    return main, max(16, triton.next_power_of_2(rest)) if rest > 0 else 16


@lru_cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def _tile(rows: int, features: int, channels: int, element_size: int) -> dict[str, int]:
    """Tile sizes, the fastest of those tried on an H200 for DiT-XL/2's layers at 416 and 1664 rows (docs/speed.md)."""
    if element_size == 4:
        return _named(64, 64, 32, 4, 3)
    if rows >= 1024 and features > 3 * channels:
        return _named(128, 256, 64, 8, 3)
    if rows >= 1024 or features > channels:
        return _named(64, 128, 64, 4, 4)
    return _named(64, 64, 128, 4, 4) if features < channels else _named(64, 32, 128, 4, 4)


def _named(m: int, n: int, k: int, warps: int, stages: int) -> dict[str, int]:
    return {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "num_warps": warps, "num_stages": stages}


if triton is not None:

    @triton.jit
    def _linear_kernel(
        a,
        weight,
        bias,
        out,
        gate,
        gate_stride,
        base,
        middle,
        index,
        used,
        rows,
        tokens,
        index_stride,
        features,
        channels,
        SCATTER: tl.constexpr,
        GELU: tl.constexpr,
        PRECISION: tl.constexpr,
        BLOCK_M: tl.constexpr,
        BLOCK_N: tl.constexpr,
        BLOCK_K: tl.constexpr,
    ):
        count = tl.load(used)
        total = rows * count
        tiles_m = tl.cdiv(total, BLOCK_M)
        # the grid is fixed before the number of tokens is known, so that programs walk over as many tiles as there are;
        # neighbouring programs share a panel of the weights, which are what has to come from memory; `flatten` fetches
        # the next tile of a program while it stores the last one
        for tile in tl.range(tl.program_id(0), tiles_m * tl.cdiv(features, BLOCK_N), tl.num_programs(0), flatten=True):
            first_m, first_n = (tile % tiles_m) * BLOCK_M, (tile // tiles_m) * BLOCK_N
            acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
            for k in range(0, channels, BLOCK_K):
                acc = tl.dot(a.load([first_m, k]), weight.load([first_n, k]).T, acc, input_precision=PRECISION)
            # rows from `total` on were computed from undefined values, and are not stored
            m, n = first_m + tl.arange(0, BLOCK_M), first_n + tl.arange(0, BLOCK_N)
            in_m, in_n = m < total, n < features
            both = in_m[:, None] & in_n[None, :]
            acc += tl.load(bias + n, in_n, other=0.0).to(tl.float32)[None, :]
            if GELU:
                inner = 0.7978845608028654 * (acc + 0.044715 * acc * acc * acc)
                acc = acc * tl.sigmoid(2 * inner)  # 0.5 (1 + tanh(z)) = sigmoid(2z)
            compact = m[:, None].to(tl.int64) * features + n[None, :]  # a large batch has more than 2^31 elements
            row = m // count
            if gate is not None:
                acc *= tl.load(gate + row[:, None] * gate_stride + n[None, :], both, other=0.0).to(tl.float32)
                rest = tl.load(base + compact, both, other=0.0).to(tl.float32)
                if middle is not None:  # the update of the whole block: what it has become, less what it began with
                    rest = tl.load(middle + compact, both, other=0.0).to(tl.float32) - rest
                acc += rest
            place = compact
            if SCATTER:
                token = row * tokens + tl.load(index + row * index_stride + m % count, in_m, other=0).to(tl.int32)
                place = token[:, None].to(tl.int64) * features + n[None, :]
            tl.store(out + place, acc.to(out.dtype.element_ty), both)

    @triton.jit
    def _attention_kernel(
        queries,
        q_row,
        q_token,
        keys_main,
        keys_rest,
        values_main,
        values_rest,
        keys,
        k_token,
        values,
        v_token,
        out,
        log_sums,
        index,
        used,
        heads,
        tokens,
        index_stride,
        scale,
        HEAD_DIM: tl.constexpr,
        MAIN: tl.constexpr,
        REST: tl.constexpr,
        BLOCK_Q: tl.constexpr,
        BLOCK_K: tl.constexpr,
        AMONG: tl.constexpr,
        PRECISION: tl.constexpr,
    ):
        count = tokens if used is None else tl.load(used)
        if tl.program_id(1) * BLOCK_Q >= count:  # the grid is made for as many tokens as there can be
            return
        row, head = tl.program_id(0) // heads, tl.program_id(0) % heads
        q = tl.program_id(1) * BLOCK_Q + tl.arange(0, BLOCK_Q)
        in_q = q < count
        # a head's channels are two tiles, `main` and `rest`, because the side of a tile is a power of two
        main, rest = tl.arange(0, MAIN), MAIN + tl.arange(0, REST)
        in_main, in_rest = main < HEAD_DIM, rest < HEAD_DIM
        at_main, at_rest = in_q[:, None] & in_main[None, :], in_q[:, None] & in_rest[None, :]
        first = head * HEAD_DIM
        token = q if index is None else tl.load(index + row * index_stride + q, in_q, other=0)
        at = queries + row.to(tl.int64) * q_row + token[:, None] * q_token + first
        query = tl.load(at + main[None, :], at_main, other=0.0)
        query_rest = tl.load(at + rest[None, :], at_rest, other=0.0)
        to_base_2 = scale * 1.4426950408889634
        best = tl.full((BLOCK_Q,), float("-inf"), dtype=tl.float32)
        weight_sum = tl.zeros((BLOCK_Q,), dtype=tl.float32)
        acc = tl.zeros((BLOCK_Q, MAIN), dtype=tl.float32)
        acc_rest = tl.zeros((BLOCK_Q, REST), dtype=tl.float32)
        context = count if AMONG else tokens
        # softmax in one pass: weights are relative to the best score so far, and what was summed shrinks when a better
        # one comes
        for start in range(0, context, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            in_k = k < context
            if AMONG:  # the copy engine fetches neighbouring rows alone, and the chosen ones are scattered
                place = row * tokens + tl.load(index + row * index_stride + k, in_k, other=0)
                k_at, v_at = keys + place[:, None] * k_token + first, values + place[:, None] * v_token + first
                key = tl.load(k_at + main[None, :], in_k[:, None] & in_main[None, :], other=0.0)
                key_rest = tl.load(k_at + rest[None, :], in_k[:, None] & in_rest[None, :], other=0.0)
                value = tl.load(v_at + main[None, :], in_k[:, None] & in_main[None, :], other=0.0)
                value_rest = tl.load(v_at + rest[None, :], in_k[:, None] & in_rest[None, :], other=0.0)
            else:
                # channels of the next head come along; they meet zeros of the query, or are not stored
                key, value = (
                    keys_main.load([row * tokens + start, first]),
                    values_main.load([row * tokens + start, first]),
                )
                key_rest = keys_rest.load([row * tokens + start, first + MAIN])
                value_rest = values_rest.load([row * tokens + start, first + MAIN])
            score = tl.dot(query, key.T, input_precision=PRECISION)
            score = tl.dot(query_rest, key_rest.T, score, input_precision=PRECISION)
            score = tl.where(in_k[None, :], score * to_base_2, float("-inf"))
            new_best = tl.maximum(best, tl.max(score, axis=1))
            weight = tl.exp2(score - new_best[:, None])
            shrink = tl.exp2(best - new_best)
            weight_sum = weight_sum * shrink + tl.sum(weight, axis=1)
            weight = weight.to(value.dtype)  # both factors of a product have one type; the sum stays in float32
            acc = tl.dot(weight, value, acc * shrink[:, None], input_precision=PRECISION)
            acc_rest = tl.dot(weight, value_rest, acc_rest * shrink[:, None], input_precision=PRECISION)
            best = new_best
        to = out + (row * count + q).to(tl.int64)[:, None] * (heads * HEAD_DIM) + first
        kept = 1 / weight_sum[:, None]
        tl.store(to + main[None, :], (acc * kept).to(out.dtype.element_ty), at_main)
        tl.store(to + rest[None, :], (acc_rest * kept).to(out.dtype.element_ty), at_rest)
        if log_sums is not None:
            tl.store(log_sums + tl.program_id(0) * tokens + q, best + tl.log2(weight_sum), in_q)

    @triton.jit
    def _received_kernel(
        queries_main,
        queries_rest,
        keys,
        k_row,
        k_token,
        log_sums,
        received,
        heads,
        tokens,
        scale,
        HEAD_DIM: tl.constexpr,
        MAIN: tl.constexpr,
        REST: tl.constexpr,
        BLOCK_Q: tl.constexpr,
        BLOCK_K: tl.constexpr,
        PRECISION: tl.constexpr,
    ):
        # a program has some keys and walks over all queries: no two programs add to one sum, whose order would vary
        row, head = tl.program_id(0) // heads, tl.program_id(0) % heads
        k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
        in_k = k < tokens
        main, rest = tl.arange(0, MAIN), MAIN + tl.arange(0, REST)
        first = head * HEAD_DIM
        at = keys + row.to(tl.int64) * k_row + k[:, None] * k_token + first
        key = tl.load(at + main[None, :], in_k[:, None] & (main < HEAD_DIM)[None, :], other=0.0)
        key_rest = tl.load(at + rest[None, :], in_k[:, None] & (rest < HEAD_DIM)[None, :], other=0.0)
        total = tl.zeros((BLOCK_K,), dtype=tl.float32)
        for start in range(0, tokens, BLOCK_Q):
            # channels of the next head come along and meet zeros of the keys
            query = queries_main.load([row * tokens + start, first])
            query_rest = queries_rest.load([row * tokens + start, first + MAIN])
            score = tl.dot(query, key.T, input_precision=PRECISION)
            score = tl.dot(query_rest, key_rest.T, score, input_precision=PRECISION)
            q = start + tl.arange(0, BLOCK_Q)
            # an infinite denominator leaves nothing of queries beyond the last
            log_sum = tl.load(log_sums + tl.program_id(0) * tokens + q, q < tokens, other=float("inf"))
            total += tl.sum(tl.exp2(score * (scale * 1.4426950408889634) - log_sum[:, None]), axis=0)
        tl.store(received + tl.program_id(0) * tokens + k, total, in_k)
