"""ToMe as a selector: the matching against a slow one made by hand, its price, and the limits of its cells."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tcbench.budget.costing import macs_of
from tcbench.engine.engine import Engine
from tcbench.errors import UserError
from tcbench.method import Method, Run
from tcbench.models.dit import DiTAdapter
from tcbench.plan import Block, Deferred, Tokens
from tcbench.registry import make_method
from tcbench.samplers import SamplerSettings
from tcbench.sampling import sample_batch

from .conftest import make_run

NFE, P_STEP = 6, 1


def tome(**options: float) -> Method:
    return make_method("tome", {"num_full_steps": 2, "refiner_blocks": 1, "cache_ratio": 0.8} | options)


def choice(adapter: DiTAdapter, run: Run, method: Method, block: int) -> Deferred:
    """What is left to decide at a block of a P-step."""
    plan = Engine(adapter, run, method.start(run)).plan(P_STEP, torch.empty(0), torch.empty(0))
    who = plan.decisions[Block(block)].who
    assert isinstance(who, Deferred)
    return who


def chosen(who: Deferred, x_RND: Tensor) -> list[set[int]]:
    tokens = who.choose(lambda: x_RND)
    assert isinstance(tokens, Tokens)
    rows = [set(row) for row in tokens.index_RK.tolist()]
    assert all(len(row) == tokens.count for row in rows), "a token is named twice"
    return rows


@pytest.fixture
def run(tiny: DiTAdapter) -> Run:
    return make_run(tiny, NFE, torch.arange(2))


def random_tokens(rows: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, 64, 96, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("cell", "ratio", "kept"), [(4, 0.9, 6), (4, 0.9375, 4), (4, 0.0, 64), (2, 0.7, 19), (3, 0.8, 13)]
)
def test_the_least_similar_tokens_are_recomputed(tiny, run, cell: int, ratio: float, kept: int) -> None:
    """By hand, row by row: the destinations, and the sources whose nearest destination is farthest."""
    who, x_RND = choice(tiny, run, tome(cell=cell, cache_ratio=ratio), 2), random_tokens(4)
    rows = chosen(who, x_RND)
    cells = (8 // cell) ** 2
    # Rows have little in common but the destinations, which are found as what fresh random inputs always share.
    destinations = set.intersection(
        *rows, *(row for seed in range(1, 60) for row in chosen(who, random_tokens(4, seed)))
    )
    if ratio:
        assert len(destinations) == cells
    for x_ND, row in zip(x_RND, rows, strict=True):
        assert len(row) == kept == who.like.count
        if ratio == 0:
            continue
        sources = sorted(set(range(64)) - destinations)
        similarity = F.cosine_similarity(x_ND[sources, None], x_ND[None, sorted(destinations)], dim=2).amax(1)
        ranked = [sources[rank] for rank in similarity.argsort().tolist()]
        assert row == destinations | set(ranked[: kept - cells])


def test_one_destination_a_cell_drawn_anew(tiny, run) -> None:
    everywhere = set()
    for seed in range(8):
        method = tome(cache_ratio=0.9375)  # destinations alone are recomputed
        seeded = Run(run.shape, run.timesteps, run.guidance, run.sample_index, seed=seed)
        drawn = [chosen(choice(tiny, seeded, method, block), random_tokens(4)) for block in range(3)]
        for rows in drawn:
            assert all(row == rows[0] for row in rows), "the same for all rows"
            cells = {(token // 8 // 4, token % 8 // 4) for token in rows[0]}
            assert cells == {(0, 0), (0, 1), (1, 0), (1, 1)}
        assert not drawn[0][0] == drawn[1][0] == drawn[2][0]
        everywhere |= set.union(*drawn[0], *drawn[1], *drawn[2])
    assert len(everywhere) > 40


def test_twins_of_a_destination_are_reused(tiny, run) -> None:
    who, x_RND = choice(tiny, run, tome(cache_ratio=0.9), 0), random_tokens(1)
    destinations = set.intersection(*(row for seed in range(60) for row in chosen(who, random_tokens(2, seed))))
    twins = sorted(set(range(64)) - destinations)[:50]
    x_RND[:, twins] = 2 * x_RND[:, [min(destinations)]]  # the same direction
    (row,) = chosen(who, x_RND)
    assert row & set(twins) == set() and destinations <= row


@pytest.mark.parametrize("options", [{"cache_ratio": 0.95}, {"cell": 2, "cache_ratio": 0.8}, {"cell": 9}])
def test_cells_limit_what_can_be_reused(run, options: dict[str, float]) -> None:
    with pytest.raises(UserError, match=r"tome: cells of \d x \d keep \d+ of 64 tokens.* at most 0\.\d+"):
        tome(**options).start(run)


def test_the_matching_is_charged(tiny) -> None:
    """(N - cells) x cells x width per row, block and P-step; `tcbench macs` says what sampling charges."""
    method = tome()
    samples = sample_batch(tiny, method, NFE, SamplerSettings(guidance_scale=1.5), torch.arange(2))
    assert samples.macs["by_tag"]["score"] == 2 * 3 * (NFE - 2) * (64 - 4) * 4 * 96
    totals = macs_of("tiny-dit", method, NFE)
    assert {key: totals[key] for key in samples.macs} == samples.macs
    assert samples.plans.to_json()[P_STEP] == {"block 0": 13, "block 1": 13, "block 2": 13}


def test_matching_a_block_of_dit_xl() -> None:
    """4.42 MMACs a block at 256 tokens and cells of 4 x 4."""
    by_tag = macs_of("dit-xl-2-256", make_method("tome", {}), 50)["by_tag"]
    assert by_tag["score"] / (2 * 24 * 38) == 240 * 16 * 1152 == pytest.approx(4.42e6, rel=1e-3)
