"""Every fused kernel against the plain PyTorch beside it: in Triton's interpreter on the CPU, compiled on a GPU."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("triton")

from tcbench.choose import AttentionScore, allocate_tokens, best_tokens, choose_by_attention, top_tokens_by_block
from tcbench.kernels import Chosen, context, rows, selection, stream
from tcbench.kernels.attention import SelfAttention
from tcbench.kernels.rotary import turn
from tcbench.kernels.scores import token_scores
from tcbench.tensors.groups import group_of, join_groups, split_groups
from tests.floors import HALF, KERNEL, assert_close

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # tests/conftest.py turns the interpreter on without a GPU
R, N, D, H = 2, 24, 40, 5


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(DEVICE)


def choose(used: int, capacity: int = N, expected: int = 4) -> Chosen:
    order = random(R, N, seed=9).argsort(dim=1)[:, :capacity]
    return Chosen(order, torch.tensor([used], dtype=torch.int32, device=DEVICE), N, expected)


close = partial(assert_close, floor=KERNEL)


def terms_of(count: int, gated: bool) -> list[stream.Term]:
    gates = [random(R, 6, D, seed=i)[:, 2] if gated or i % 2 else None for i in range(count)]
    return [(random(R, N, D, seed=20 + i), gate) for i, gate in enumerate(gates)]


def sum_of(x: Tensor, terms: list[stream.Term]) -> Tensor:
    return x + sum((value if gate is None else gate[:, None] * value) for value, gate in terms)


@pytest.mark.parametrize("count", [0, 1, 2, stream.MAX_TERMS])
@pytest.mark.parametrize("gated", [True, False])
def test_advance_adds_the_terms_and_normalises(count: int, gated: bool) -> None:
    x, before, terms = random(R, N, D), random(R, N, D, seed=1), terms_of(count, gated)
    modulate = (random(R, 6, D, seed=7)[:, 0], random(R, 6, D, seed=8)[:, 1])
    results = [
        stream.advance(x, terms, modulate=modulate, before_RND=before if count else None, backend=backend)
        for backend in ("triton", "torch")
    ]
    for actual, expected in zip(*results, strict=True):
        assert (actual is None) == (expected is None)
        if expected is not None:
            close(actual, expected)
    total = sum_of(x, terms)
    close(results[0][0], total)
    close(results[0][2], F.layer_norm(total, (D,), eps=1e-6) * (1 + modulate[1][:, None]) + modulate[0][:, None])


@pytest.mark.parametrize("used", [0, 1, 7, N])
@pytest.mark.parametrize("count", [0, 3])
def test_gather_reads_chosen_tokens_of_the_stream_and_what_waits(used: int, count: int) -> None:
    x, modulate = random(R, N, D), (random(R, D, seed=7), random(R, D, seed=8))
    terms, chosen = terms_of(count, gated=False), choose(used)
    for backend in ("triton", "torch"):
        sums, compact = stream.gather(x, terms, modulate, chosen, backend=backend)
        total = sum_of(x, terms)
        close(sums[: R * used], total.flatten(0, 1)[chosen.flat()])
        expected = F.layer_norm(total, (D,), eps=1e-6) * (1 + modulate[1][:, None]) + modulate[0][:, None]
        close(compact[: R * used], expected.flatten(0, 1)[chosen.flat()])
        close(stream.norm_rows(sums, modulate, chosen, backend=backend)[: R * used], compact[: R * used])


def test_gather_without_a_norm_gives_the_sums() -> None:
    x, terms, chosen = random(R, N, D), terms_of(2, gated=True), choose(7)
    for backend in ("triton", "torch"):
        sums, same = stream.gather(x, terms, None, chosen, backend=backend)
        assert same is sums
        close(sums[: R * 7], sum_of(x, terms).flatten(0, 1)[chosen.flat()])


@pytest.mark.parametrize("used", [0, 5, N])
@pytest.mark.parametrize("features", [40, 130])
def test_linear_layers_on_chosen_tokens(used: int, features: int) -> None:
    chosen, weight, bias = choose(used), random(features, D), random(features)
    a = random(R * N, D)
    count = R * used
    for activation in ("none", "gelu"):
        close(rows.linear(a, weight, bias, chosen, activation)[:count],
              rows.linear(a, weight, bias, chosen, activation, backend="torch")[:count])  # fmt: skip
    gate, base = random(R, 6, features, seed=3)[:, 4], random(R * N, features, seed=4)
    close(rows.linear_residual(a, weight, bias, chosen, gate, base)[:count],
          rows.linear_residual(a, weight, bias, chosen, gate, base, backend="torch")[:count])  # fmt: skip
    outs = [random(R, N, features, seed=5) for _ in range(4)]
    middle = random(R * N, features, seed=6)
    for out, backend in zip(outs[:2], ("triton", "torch"), strict=True):
        rows.linear_scatter(a, weight, bias, chosen, out, backend=backend)
    for out, backend in zip(outs[2:], ("triton", "torch"), strict=True):
        rows.linear_update(a, weight, bias, chosen, gate, base, middle, out, backend=backend)
    close(outs[0], outs[1])
    close(outs[2], outs[3])
    untouched = torch.ones(R * N, dtype=torch.bool, device=DEVICE)
    untouched[chosen.flat()] = False
    for out in (outs[0], outs[2]):
        assert torch.equal(out.flatten(0, 1)[untouched], random(R, N, features, seed=5).flatten(0, 1)[untouched])


@pytest.mark.parametrize("used", [0, 1, 9, N])
@pytest.mark.parametrize("among", [False, True])
def test_attention_of_chosen_tokens(used: int, among: bool) -> None:
    chosen = choose(used, capacity=max(used, 1))
    q, k, v = random(R, N, 3 * D).chunk(3, dim=2)
    actual = rows.attention(q, k, v, H, chosen, among)
    close(actual[: R * used], rows.attention(q, k, v, H, chosen, among, backend="torch")[: R * used])


@pytest.mark.parametrize("width", [40, 72 * H])
def test_attention_of_all_tokens(width: int) -> None:
    q, k, v = random(R, N, 3 * width).chunk(3, dim=2)
    close(rows.attention(q, k, v, H), rows.attention(q, k, v, H, backend="torch"))


@pytest.mark.parametrize(("channels", "features"), [(256, 80), (80, 80), (40, 80)])
def test_half_precision_tiles(channels: int, features: int) -> None:
    """Other tiles than float32's, which differ by shape; the interpreter has no bfloat16."""
    chosen = choose(9)
    a, weight, bias = random(R * N, channels).half(), random(features, channels).half(), random(features).half()
    outs = [
        rows.linear(a, weight, bias, chosen, backend=backend)[: R * 9].float()
        for backend in ("triton", "torch", "triton")
    ]
    assert_close(outs[0], outs[1], HALF)
    assert torch.equal(outs[0], outs[2])


@pytest.mark.parametrize("used", [None, 0, 7, N])
@pytest.mark.parametrize("texts", [5, 70])
def test_attention_over_the_text(used: int | None, texts: int) -> None:
    chosen = None if used is None else choose(used)
    queries = random(R, N, D) if used is None else random(R * N, D)
    keys, values = (random(R, texts, D, seed=seed).unflatten(2, (H, -1)).transpose(1, 2) for seed in (1, 2))
    bias = torch.where(random(R, 1, 1, texts) > 0.5, -10000.0, 0.0)
    count = R * (N if used is None else used)
    mixed = [
        context.text_attention(queries, keys, values, bias, chosen, backend)[:count] for backend in ("triton", "torch")
    ]
    entropies = [torch.full((R, N), -1.0, device=DEVICE) for _ in range(2)]
    for entropy, backend in zip(entropies, ("triton", "torch"), strict=True):
        context.text_entropy(queries, keys, bias, entropy, chosen, backend)
    close(*mixed)
    close(*entropies)
    assert (entropies[0] == -1).sum() == R * N - count


GROUPS = [(4, 1), (2, 3)]


@pytest.mark.parametrize("used", [0, 7, N])
@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("among", [False, True])
def test_attention_of_chosen_tokens_in_groups(used: int, groups: tuple[int, int], among: bool) -> None:
    chosen = choose(used)
    q, k, v = random(R, N, 3 * D).chunk(3, dim=2)
    actual = context.group_attention(q, k, v, H, groups, chosen, among)[: R * used]
    close(actual, context.group_attention(q, k, v, H, groups, chosen, among, backend="torch")[: R * used])
    if used == N:
        everyone, _ = SelfAttention(H, None, "torch").everyone(torch.cat([q, k, v], dim=2), groups)
        close(actual, everyone.flatten(0, 1)[chosen.flat()])


@pytest.mark.parametrize("groups", GROUPS)
def test_tokens_of_a_group_are_side_by_side(groups: tuple[int, int]) -> None:
    places = torch.arange(R * N).view(R, N, 1)
    parted = split_groups(places, groups, 1)[:, :, 0]
    assert (group_of(parted % N, groups) == torch.arange(groups[0]).repeat(R)[:, None]).all()
    assert torch.equal(join_groups(split_groups(places, groups, 1), groups, 1), places)
    by_head = random(R, H, N, 2)
    assert torch.equal(join_groups(split_groups(by_head, groups, 2), groups, 2), by_head)
    assert torch.equal(split_groups(by_head, groups, 2)[:, 1], split_groups(by_head[:, 1], groups, 1))


@pytest.mark.parametrize("used", [None, 0, 5, N])
@pytest.mark.parametrize("parts", [1, 2, 3])
def test_turning_to_positions(used: int | None, parts: int) -> None:
    heads, head_dim = 2, 12
    chosen, rotary = None if used is None else choose(used), (random(N, head_dim), random(N, head_dim, seed=1))
    channels = parts * heads * head_dim
    stacked = random(R, N, channels) if used is None else random(R * N, channels)
    outs = [torch.zeros(R, N, channels, device=DEVICE) for _ in range(2)]
    for out, backend in zip(outs, ("triton", "torch"), strict=True):
        turn(stacked, rotary, heads, out, chosen, backend)
    close(*outs)
    assert int((outs[0] != 0).any(dim=2).sum()) == R * (N if used is None else used)


@pytest.mark.parametrize("width", [40, 72 * H])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_attention_received_sums_the_columns_of_the_map(width: int, dtype: torch.dtype) -> None:
    q, k, v = random(R, N, 3 * width).to(dtype).chunk(3, dim=2)
    results = []
    for backend in ("triton", "torch"):
        log_sums = torch.empty(R, H, N, device=DEVICE)
        rows.attention(q, k, v, H, log_sums_RHN=log_sums, backend=backend)
        results.append(rows.attention_received(q, k, log_sums, H, backend=backend))
    received, expected = results
    if dtype == torch.float16:
        assert_close(received, expected, HALF)
        return
    close(received, expected)
    close(received.sum(dim=1), torch.full((R,), float(N), device=DEVICE))


@pytest.mark.parametrize("width, blocks", [(D, 5), (72 * H, 33)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_scores_of_tokens(width: int, blocks: int, dtype: torch.dtype) -> None:
    x = (random(R, N, width) + 3).to(dtype)
    weight, bias = random(blocks, width) / width**0.5, random(blocks)
    actual, expected = (token_scores(x, weight, bias, backend) for backend in ("triton", "torch"))
    assert actual.shape == (R, blocks, N) and actual.dtype == torch.float32
    close(actual, expected)


SCORES = {
    "distinct": random(R, 2, N),
    "some equal": random(R, 2, N).round(),  # with both zeros
    "all equal": torch.full((R, 2, N), 0.5, device=DEVICE),
    "tokens first": random(R, N, 2).half().sigmoid().mT,
}


@pytest.mark.parametrize("case", SCORES)
@pytest.mark.parametrize("budget", [0, 1, N // 3, 2 * N])
def test_the_best_tokens_of_a_budget(case: str, budget: int) -> None:
    """Exactly what the plan's own functions say, whichever scores are equal."""
    score_RLN = SCORES[case]
    index_RLN, counts = selection.best_tokens(score_RLN, budget)
    assert torch.equal(counts, allocate_tokens(score_RLN, budget)) and counts.sum() == budget
    assert torch.equal(index_RLN, score_RLN.contiguous().argsort(dim=2, descending=True, stable=True))


def test_the_plan_takes_tokens_from_the_kernels_where_they_run(monkeypatch: pytest.MonkeyPatch) -> None:
    score_RLN = SCORES["distinct"]
    chosen = {}
    for runs in (False, True):
        monkeypatch.setattr(selection, "available", lambda device, runs=runs: runs)
        assert selection.serves(score_RLN) == runs
        of_budget, counted = best_tokens(score_RLN, 13), top_tokens_by_block(score_RLN, [3, 5])
        assert isinstance(of_budget[0].used, Tensor) and counted[1].used is None
        chosen[runs] = [tokens.index_RK[:, : tokens.count].tolist() for tokens in (*of_budget, *counted)]
    assert chosen[False] == chosen[True]
    assert not selection.serves(torch.empty(1, 1, selection.MAX_TOKENS + 1)) and not selection.serves(
        score_RLN.double()
    )


CHOICES = {  # grid, frames, cell, rows of a sample that choose alike by the text
    "by attention": ((8, 8), 1, 2, None),
    "by the text of a pair": ((8, 8), 1, 4, 2),
    "without guidance": ((8, 8), 1, 4, 1),
    "sides that are no powers of two": ((6, 12), 1, 3, None),
    "a video": ((6, 6), 5, 2, 2),
}


@pytest.mark.parametrize(
    ("case", "recent"),
    [(case, "by block") for case in CHOICES]
    + [(case, recent) for case in list(CHOICES)[:2] for recent in ("all at once", "by token")],
)
def test_choice_by_attention_and_age(case: str, recent: str) -> None:
    """The same tokens, ages and scores, in blocks that choose none, some and all."""
    grid, frames, cell, halves = CHOICES[case]
    rows, step, tokens = 4, 7, grid[0] * grid[1] * frames
    score = AttentionScore(grid, 0.25, 3, 0.4, cell, halves)
    observed = [random(rows, tokens, seed=seed).abs() for seed in range(4)]
    some = [random(rows, tokens, seed=seed).argsort(dim=1).int() % step for seed in range(4)]
    if halves == 2:  # the rows of a pair have chosen alike before
        some = [ages[: rows // 2].repeat(2, 1) for ages in some]
    before = {"all at once": [3] * 4, "by token": some, "by block": [3, some[1], 3, 5]}[recent]
    counts = [5, 0, tokens, tokens // 3]
    results = [choose_by_attention(score, observed, before, step, counts, backend) for backend in ("triton", "torch")]
    for count, (index, scores, after), (expected_index, expected, expected_after) in zip(counts, *results, strict=True):
        assert index.shape == (rows, count)
        close(scores, expected)
        assert torch.equal(index.sort(dim=1).values, expected_index.sort(dim=1).values)
        assert torch.equal(after, expected_after)
        assert int((after == step).sum()) == rows * count
        if halves == 2:
            assert torch.equal(index[:2], index[2:])


def test_of_equal_scores_the_lower_token_is_chosen() -> None:
    """The first token of every cell, which has its bonus, and the lowest of the others."""
    score, equal = AttentionScore((4, 4), 0.25, 3, 0.5), torch.ones(2, 16, device=DEVICE)
    [(index, _, _)] = choose_by_attention(score, [equal], [0], 1, [6], "triton")
    assert index.sort(dim=1).values.tolist() == [[0, 1, 2, 3, 8, 10]] * 2
