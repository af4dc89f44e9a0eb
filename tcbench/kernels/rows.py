"""Linear layers and attention for a few tokens of each row, their number known to the device alone."""

from functools import lru_cache
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from tcbench.kernels.chosen import Chosen, Path

try:
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:
    triton = None

Activation = Literal["none", "gelu"]


def linear(
    a_MC: Tensor, weight: Tensor, bias: Tensor, chosen: Chosen, activation: Activation = "none", path: Path = "triton"
) -> Tensor:
    """activation(a W^T + b), compact: [M, O]; `gelu` is the tanh approximation."""
    out = a_MC.new_empty(len(a_MC), len(weight))
    if path == "torch":
        value = _product(a_MC, weight, bias, chosen)
        out[: len(value)] = (F.gelu(value, approximate="tanh") if activation == "gelu" else value).to(out.dtype)
        return out
    _launch(a_MC, weight, bias, chosen, out, GELU=activation == "gelu")
    return out


def linear_scatter(
    a_MC: Tensor, weight: Tensor, bias: Tensor, chosen: Chosen, out_RNO: Tensor, path: Path = "triton"
) -> None:
    """Write a W^T + b into the chosen tokens of `out_RNO` [R, N, O], leaving the others."""
    if path == "torch":
        out_RNO.view(-1, out_RNO.shape[-1])[chosen.flat()] = _product(a_MC, weight, bias, chosen).to(out_RNO.dtype)
        return
    _launch(a_MC, weight, bias, chosen, out_RNO, SCATTER=True)


def linear_residual(
    a_MC: Tensor, weight: Tensor, bias: Tensor, chosen: Chosen, gate_RO: Tensor, base_MO: Tensor, path: Path = "triton"
) -> Tensor:
    """base + gate * (a W^T + b), compact: [M, O]."""
    out = a_MC.new_empty(len(a_MC), len(weight))
    if path == "torch":
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
    path: Path = "triton",
) -> None:
    """Write middle + gate * (a W^T + b) - base into the chosen tokens of `out_RNO`: a block's update, refreshed."""
    if path == "torch":
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
    path: Path = "triton",
) -> Tensor:
    """Self-attention of all tokens, [R, N, D], or of the chosen ones, compact [M, D].

    Args:
        queries_RND, keys_RND, values_RND: [R, N, D], any stride between tokens, heads side by side in D.
        among_chosen: the literal reading of the paper, keys and values of the recomputed tokens only.
    """
    rows, tokens, width = queries_RND.shape
    head_dim = width // heads
    if path == "torch":
        return _attention_reference(queries_RND, keys_RND, values_RND, heads, chosen, among_chosen)
    if chosen is None:
        out, capacity = queries_RND.new_empty(rows, tokens, width), tokens
    else:
        out, capacity = queries_RND.new_empty(chosen.capacity, width), chosen.index_RK.shape[1]
    tile = _attention_tile(chosen is not None, tokens, queries_RND.element_size())
    main, rest = _split(head_dim)
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
        PRECISION=_precision(),
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


def _attention_tile(few: bool, tokens: int, element_size: int) -> dict[str, int]:
    """Tile sizes by kind; see `_tile`."""
    if element_size == 4:
        return {"BLOCK_Q": 16, "BLOCK_K": 32, "num_warps": 4, "num_stages": 2}
    if few:
        return {"BLOCK_Q": 64, "BLOCK_K": 128, "num_warps": 4, "num_stages": 2}
    return {"BLOCK_Q": 128, "BLOCK_K": 64, "num_warps": 8, "num_stages": 3}


def attention_received(queries_RND: Tensor, keys_RND: Tensor, heads: int, path: Path = "triton") -> Tensor:
    """Column sums of the head-mean attention map, float32 [R, N]: a second pass beside the fused attention."""
    rows, tokens, width = queries_RND.shape
    head_dim = width // heads
    if path == "torch":
        queries, keys = (
            part.unflatten(2, (heads, head_dim)).transpose(1, 2).float() for part in (queries_RND, keys_RND)
        )
        return (queries * head_dim**-0.5 @ keys.transpose(2, 3)).softmax(dim=3).mean(dim=1).sum(dim=1)
    block_q = 64
    parts = triton.cdiv(tokens, block_q)
    # partial sums, not atomics: the result must not depend on the order in which programs finish
    partial = torch.empty(rows, heads * parts, tokens, device=queries_RND.device, dtype=torch.float32)
    _received_kernel[(rows * heads, parts)](
        queries_RND,
        queries_RND.stride(0),
        queries_RND.stride(1),
        keys_RND,
        keys_RND.stride(0),
        keys_RND.stride(1),
        partial,
        heads,
        tokens,
        head_dim**-0.5,
        HEAD_DIM=head_dim,
        BLOCK_D=max(16, triton.next_power_of_2(head_dim)),
        BLOCK_Q=block_q,
        BLOCK_K=64,
        PRECISION=_precision(),
        num_warps=4,
    )
    return partial.sum(dim=1) / heads


def _product(a: Tensor, weight: Tensor, bias: Tensor, chosen: Chosen) -> Tensor:
    count = len(chosen.index_RK) * int(chosen.used)
    return F.linear(a[:count].float(), weight.float(), bias.float())


def _precision() -> str:
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
    split = tile["SPLIT"]
    tiles = triton.cdiv(chosen.capacity, tile["BLOCK_M"]) * triton.cdiv(features, tile["BLOCK_N"])
    partial, arrived = _workspace(
        a.device, tiles * split * tile["BLOCK_M"] * tile["BLOCK_N"] if split > 1 else 1, tiles
    )
    _linear_kernel[(min(tiles * split, 2 * _processors(a.device)),)](
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
        partial,
        arrived,
        len(chosen.index_RK),
        chosen.tokens,
        chosen.index_RK.stride(0),
        features,
        channels,
        SCATTER=flags.get("SCATTER", False),
        GELU=flags.get("GELU", False),
        PRECISION=_precision(),
        **tile,
    )


def _descriptor(matrix: Tensor, rows: int, columns: int) -> "TensorDescriptor":
    """A matrix whose tiles the copy engine fetches; what lies outside is zero."""
    return TensorDescriptor(matrix, list(matrix.shape), list(matrix.stride()), [rows, columns])


def _split(head_dim: int) -> tuple[int, int]:
    """A head's channels as two powers of two, because products take nothing else: 72 is 64 + 16, half of it unused."""
    main = 1 << (head_dim.bit_length() - 1)
    main = max(16, main)
    rest = head_dim - main
    return main, max(16, triton.next_power_of_2(rest)) if rest > 0 else 16


@lru_cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


_workspaces: dict[torch.device, tuple[Tensor, Tensor]] = {}


def _workspace(device: torch.device, elements: int, tiles: int) -> tuple[Tensor, Tensor]:
    """Partial products and counters of split sums, shared by all calls on a device's stream; counters rest at zero."""
    partial, arrived = _workspaces.get(device, (torch.empty(0, device=device), torch.empty(0, device=device)))
    if len(partial) < elements or len(arrived) < tiles:
        partial = torch.empty(max(elements, len(partial)), device=device)
        arrived = torch.zeros(max(tiles, len(arrived)), dtype=torch.int32, device=device)
        _workspaces[device] = partial, arrived
    return partial, arrived


def _tile(rows: int, features: int, channels: int, element_size: int) -> dict[str, int]:
    """Tile sizes, the fastest of those tried on an H200 for DiT-XL/2's layers at 416 and 1664 rows (docs/speed.md)."""
    if element_size == 4:
        return _named(64, 64, 32, 4, 3, 1)
    if rows >= 1024:
        if features > 3 * channels:
            return _named(128, 128, 64, 8, 3, 1)
        return _named(128, 128, 64, 4, 4, 1) if features > channels else _named(64, 128, 64, 4, 4, 1)
    if channels > 2 * features and channels % 256 == 0:
        return _named(64, 128, 128, 4, 3, 2)  # few tiles with long sums: two programs share one
    return _named(64, 128, 64, 8, 4, 1) if features > channels else _named(64, 32, 128, 4, 4, 1)


def _named(m: int, n: int, k: int, warps: int, stages: int, split: int) -> dict[str, int]:
    sizes = {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "SPLIT": split}
    return sizes | {"num_warps": warps, "num_stages": stages}


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
        partial,
        arrived,
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
        SPLIT: tl.constexpr,
    ):
        count = tl.load(used)
        total = rows * count
        tiles_m = tl.cdiv(total, BLOCK_M)
        work = tiles_m * tl.cdiv(features, BLOCK_N) * SPLIT
        # neighbouring programs share a panel of the weights, which are what has to come from memory
        for item in range(tl.program_id(0), work, tl.num_programs(0)):
            tile, part = item // SPLIT, item % SPLIT
            first_m, first_n = (tile % tiles_m) * BLOCK_M, (tile // tiles_m) * BLOCK_N
            span = tl.cdiv(channels, SPLIT)
            acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
            for k in range(part * span, (part + 1) * span, BLOCK_K):
                acc = tl.dot(a.load([first_m, k]), weight.load([first_n, k]).T, acc, input_precision=PRECISION)
            is_last = True
            if SPLIT > 1:
                # whoever arrives last adds up all parts in their order, so that the sum does not depend on who it is
                inside = tl.arange(0, BLOCK_M)[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
                own = partial + tile * (SPLIT * BLOCK_M * BLOCK_N) + inside
                tl.store(own + part * (BLOCK_M * BLOCK_N), acc)
                tl.debug_barrier()
                is_last = tl.atomic_add(arrived + tile, 1, sem="acq_rel") == SPLIT - 1
                if is_last:
                    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
                    for other in range(SPLIT):
                        acc += tl.load(own + other * (BLOCK_M * BLOCK_N))
                    tl.store(arrived + tile, 0)
            if is_last:
                m, n = first_m + tl.arange(0, BLOCK_M), first_n + tl.arange(0, BLOCK_N)
                in_m, in_n = m < total, n < features
                both = in_m[:, None] & in_n[None, :]
                acc += tl.load(bias + n, in_n, other=0.0).to(tl.float32)[None, :]
                if GELU:
                    inner = 0.7978845608028654 * (acc + 0.044715 * acc * acc * acc)
                    acc = acc * tl.sigmoid(2 * inner)  # 0.5 (1 + tanh(z)) = sigmoid(2z)
                compact = m[:, None].to(tl.int64) * features + n[None, :]
                row = m // count
                if gate is not None:
                    acc *= tl.load(gate + row[:, None] * gate_stride + n[None, :], both, other=0.0).to(tl.float32)
                    rest = tl.load(base + compact, both, other=0.0).to(tl.float32)
                    if middle is not None:
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
        if tl.program_id(1) * BLOCK_Q >= count:
            return
        row, head = tl.program_id(0) // heads, tl.program_id(0) % heads
        q = tl.program_id(1) * BLOCK_Q + tl.arange(0, BLOCK_Q)
        in_q = q < count
        main, rest = tl.arange(0, MAIN), MAIN + tl.arange(0, REST)
        in_main, in_rest = main < HEAD_DIM, rest < HEAD_DIM
        first = head * HEAD_DIM
        token = q if index is None else tl.load(index + row * index_stride + q, in_q, other=0)
        at = queries + row.to(tl.int64) * q_row + token[:, None] * q_token + first
        query = tl.load(at + main[None, :], in_q[:, None] & in_main[None, :], other=0.0)
        query_rest = tl.load(at + rest[None, :], in_q[:, None] & in_rest[None, :], other=0.0)
        to_base_2 = scale * 1.4426950408889634  # base 2, whose exponential is the fast one
        best = tl.full((BLOCK_Q,), float("-inf"), dtype=tl.float32)
        weight_sum = tl.zeros((BLOCK_Q,), dtype=tl.float32)
        acc = tl.zeros((BLOCK_Q, MAIN), dtype=tl.float32)
        acc_rest = tl.zeros((BLOCK_Q, REST), dtype=tl.float32)
        context = count if AMONG else tokens
        for start in range(0, context, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            in_k = k < context
            if AMONG:
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
            weight = weight.to(value.dtype)
            acc = tl.dot(weight, value, acc * shrink[:, None], input_precision=PRECISION)
            acc_rest = tl.dot(weight, value_rest, acc_rest * shrink[:, None], input_precision=PRECISION)
            best = new_best
        to = out + (row * count + q).to(tl.int64)[:, None] * (heads * HEAD_DIM) + first
        kept = 1 / weight_sum[:, None]
        tl.store(to + main[None, :], (acc * kept).to(out.dtype.element_ty), in_q[:, None] & in_main[None, :])
        tl.store(to + rest[None, :], (acc_rest * kept).to(out.dtype.element_ty), in_q[:, None] & in_rest[None, :])

    @triton.jit
    def _received_kernel(
        queries,
        q_row,
        q_token,
        keys,
        k_row,
        k_token,
        partial,
        heads,
        tokens,
        scale,
        HEAD_DIM: tl.constexpr,
        BLOCK_D: tl.constexpr,
        BLOCK_Q: tl.constexpr,
        BLOCK_K: tl.constexpr,
        PRECISION: tl.constexpr,
    ):
        row, head = tl.program_id(0) // heads, tl.program_id(0) % heads
        q = tl.program_id(1) * BLOCK_Q + tl.arange(0, BLOCK_Q)
        d = tl.arange(0, BLOCK_D)
        in_d, in_q = d < HEAD_DIM, q < tokens
        channel = head * HEAD_DIM + d
        query = tl.load(
            queries + row.to(tl.int64) * q_row + q[:, None] * q_token + channel[None, :],
            in_q[:, None] & in_d[None, :],
            other=0.0,
        )
        query = (query * (scale * 1.4426950408889634)).to(query.dtype)
        best = tl.full((BLOCK_Q,), float("-inf"), dtype=tl.float32)
        weight_sum = tl.zeros((BLOCK_Q,), dtype=tl.float32)
        for start in range(0, tokens, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            key = tl.load(
                keys + row.to(tl.int64) * k_row + k[:, None] * k_token + channel[None, :],
                (k < tokens)[:, None] & in_d[None, :],
                other=0.0,
            )
            score = tl.dot(query, tl.trans(key), input_precision=PRECISION)
            score = tl.where((k < tokens)[None, :], score, float("-inf"))
            new_best = tl.maximum(best, tl.max(score, axis=1))
            weight_sum = weight_sum * tl.exp2(best - new_best) + tl.sum(tl.exp2(score - new_best[:, None]), axis=1)
            best = new_best
        part = (row * heads + head) * tl.num_programs(1) + tl.program_id(1)
        for start in range(0, tokens, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            key = tl.load(
                keys + row.to(tl.int64) * k_row + k[:, None] * k_token + channel[None, :],
                (k < tokens)[:, None] & in_d[None, :],
                other=0.0,
            )
            score = tl.dot(query, tl.trans(key), input_precision=PRECISION)
            weight = tl.exp2(score - best[:, None]) / weight_sum[:, None]
            weight = tl.where(in_q[:, None], weight, 0.0)
            tl.store(partial + part.to(tl.int64) * tokens + k, tl.sum(weight, axis=0), k < tokens)
