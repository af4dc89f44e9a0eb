"""Plans as data, and the budget arithmetic that methods share."""

from collections import Counter
from itertools import pairwise
from typing import Literal, get_args

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from tcbench.choose import allocate_evenly, allocate_tokens, best_tokens, top_tokens
from tcbench.errors import UserError
from tcbench.guidance import GuidedPair
from tcbench.ledger import block_macs, plan_macs
from tcbench.method import Artefacts, Run
from tcbench.plan import (
    ALL,
    NONE,
    Block,
    Decision,
    Deferred,
    Forecast,
    Mix,
    Output,
    Plan,
    PlanError,
    Rows,
    Site,
    Span,
    Spread,
    Tokens,
    Unit,
    every_unit,
)
from tcbench.schedule import Placement, full_steps, reverse_gaps, spread_by_scores, spread_evenly

from .conftest import make_shape

FLAT_50_12 = (0, 14, 20, 24, 28, 32, 35, 38, 40, 43, 45, 47)


# --- plans


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (Block(1), Site(1, "attn")),
        (Site(2, "mlp"), Span(0, 3)),
        (Span(0, 2), Span(1, 3)),
        (Block(0), Span(0, 4)),
    ],
    ids=str,
)
def test_overlaps_are_refused(first: Unit, second: Unit) -> None:
    for units in ([first, second], [second, first]):
        with pytest.raises(ValueError, match="overlap") as caught:
            every_unit(units, ALL)
        assert str(first) in str(caught.value) and str(second) in str(caught.value)


def test_neighbours_do_not_overlap() -> None:
    plan = every_unit([Span(0, 2), Block(2), Site(3, "attn"), Site(3, "mlp")], NONE)
    assert [unit for unit, _ in make_shape(4, 2).walk(plan)] == list(plan.decisions)
    assert plan.at(Block(2)) == Decision(NONE) and plan.at(Block(3)) is None


@pytest.mark.parametrize("observe", ["attn", "cross"])
@pytest.mark.parametrize("unit", [Site(0, "mlp"), Site(0, "attn"), Site(0, "cross"), Block(0), Span(0, 2)], ids=str)
def test_only_attention_that_a_unit_computes_can_be_observed(unit: Unit, observe: Literal["attn", "cross"]) -> None:
    text, plain = make_shape(2, 2, text_tokens=3), make_shape(2, 2)
    if isinstance(unit, Span):
        with pytest.raises(ValueError, match=f"observes {observe} at {unit}"):
            Plan({unit: Decision(ALL, observe=observe)})
        return
    plan = Plan({unit: Decision(ALL, observe=observe)})
    if isinstance(unit, Block) or unit.part == observe:
        text.check(plan)
    if unit != Site(0, "cross") and observe == "attn" and unit != Site(0, "mlp"):
        plain.check(plan)
        return
    with pytest.raises(ValueError, match=f"observes {observe} at {unit}, which does not compute it|does not have"):
        plain.check(plan)


def test_plans_can_be_read() -> None:
    index = torch.tensor([[3, 1]])
    plan = Plan(
        {
            Block(0): Decision(ALL),
            Site(1, "attn"): Decision(Tokens(index), keys="cached"),
            Span(2, 4): Decision(Deferred(lambda x: NONE, like=ALL)),
            Block(4): Decision(NONE),
            Block(5): Decision(NONE, Forecast(2)),
        }
    )
    assert str(plan) == (
        "block 0: all, block 1 attn: 2, blocks 2-3: decided at the block (like all), block 4: none, block 5: forecast 2"
    )
    with pytest.raises(TypeError, match="was not executed"):
        plan.executed()
    assert str(Plan()) == "everything computed, nothing cached"


def refused() -> dict[str, tuple[Unit, Decision]]:
    some, group = Tokens(torch.tensor([[0]])), torch.tensor([[0, 0]])
    counted = Tokens(some.index_RK, torch.tensor([1], dtype=torch.int32))
    modulated = Deferred(lambda h: NONE, like=ALL, sees="modulated")
    return {
        "mixes the used values of block 1 and recomputes": (Block(1), Decision(some, Mix((1.0,), of="used"))),
        "spreads values at block 0 attn; recompute some": (Site(0, "attn"), Decision(NONE, spread=Spread(group, 0.5))),
        "spreads values at block 0 mlp; recompute some": (Site(0, "mlp"), Decision(counted, spread=Spread(group, 0.5))),
        "spreads values at block 0; spread": (Block(0), Decision(some, spread=Spread(group, 0.5))),
        "some rows of block 0; decide parts": (Block(0), Decision(Rows((True, False)))),
        "some rows of block 0 mlp; decide": (Site(0, "mlp"), Decision(Rows((True, False)), Forecast(1))),
        "decides the output for some tokens": (Output(), Decision(some)),
        "a decision at blocks 0-1 sees a modulated input": (Span(0, 2), Decision(modulated)),
        "observes output at blocks 0-1": (Span(0, 2), Decision(ALL, observe="output")),
    }


@pytest.mark.parametrize("says", refused())
def test_what_cannot_be_decided_is_refused(says: str) -> None:
    with pytest.raises(PlanError, match=says):
        Plan(dict([refused()[says]]))


def test_checks_are_of_blocks_that_are_reached_apart() -> None:
    for decisions in ({Span(0, 2): Decision(NONE)}, {Block(0): Decision(NONE), Output(): Decision(NONE)}):
        with pytest.raises(PlanError, match="checks block 0, which it does not reach apart"):
            Plan(decisions, checks=(0,))
    with pytest.raises(PlanError, match="checks block 2, which a model of 2 blocks does not have"):
        make_shape(2, 2).check(Plan(checks=(2,)))


def test_a_held_output_leaves_what_is_held_behind_the_last_computed_unit_out() -> None:
    shape, held = make_shape(3, 2), Decision(NONE)
    plan = Plan({Block(0): held, Block(1): Decision(ALL), Block(2): held, Output(): held})
    assert [unit for unit, _ in shape.walk(plan)] == [Block(0), Block(1), Output()]
    assert plan_macs(plan, shape) == shape.outer + block_macs(shape, 1, None)
    with pytest.raises(PlanError, match="holds the output and leaves block 1 attn to be computed for nothing"):
        shape.check(Plan({Block(0): held, Output(): held, Block(2): held}))


def test_top_tokens_are_the_highest_of_each_row() -> None:
    tokens = top_tokens(torch.tensor([[0.1, 0.9, 0.5, 0.7], [0.8, 0.2, 0.6, 0.4]]), 2)
    assert tokens.count == 2
    assert tokens.index_RK.sort(dim=1).values.tolist() == [[1, 3], [0, 2]]


# --- I-steps


@given(st.integers(1, 300), st.sampled_from(get_args(Placement)), st.data())
def test_spread_evenly(nfe: int, placement: Placement, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, nfe))
    steps = spread_evenly(count, nfe, placement)
    assert list(steps) == sorted(set(steps)) and len(steps) == count and steps[0] == 0 and steps[-1] < nfe
    *gaps, last = (b - a for a, b in pairwise([*steps, nfe]))
    assert max(gaps, default=0) - min(gaps, default=0) <= 1
    if gaps:  # what follows the last full step, itself included: a gap, nothing, half a gap
        wanted = {"start": nfe / count, "end": 1, "interior": nfe / (2 * count - 1)}[placement]
        assert abs(last - wanted) < 1


@pytest.mark.parametrize("count", [0, 11])
def test_impossible_counts_are_refused(count: int) -> None:
    for spread in (lambda: spread_evenly(count, 10), lambda: spread_by_scores((0.5,) * 10, count, -1.0)):
        with pytest.raises(UserError, match=rf"num_full_steps={count} must lie between 1 and .*10"):
            spread()


@pytest.mark.parametrize("level", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("beta", [-8000.0, -1.0])
def test_a_flat_alpha_bar_gives_late_steps(level: float, beta: float) -> None:
    """Then gamma is the logarithm of the number of steps so far, whatever the level and beta."""
    assert spread_by_scores((level,) * 50, 12, beta) == FLAT_50_12


@given(
    st.lists(st.floats(0, 1), min_size=1, max_size=60),
    st.floats(-8000, 0),
    st.data(),
)
def test_spread_by_scores_gives_exactly_count_steps(alpha_bar: list[float], beta: float, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, len(alpha_bar)))
    steps = spread_by_scores(tuple(alpha_bar), count, beta)
    assert len(set(steps)) == len(steps) == count
    assert steps[0] == 0 and steps[-1] < len(alpha_bar) and list(steps) == sorted(steps)


@given(st.lists(st.floats(0.3, 0.7), min_size=5, max_size=50), st.sampled_from([-8e3, -2e3, 0.0, 500.0]), st.data())
def test_spread_by_scores_agrees_with_torch(alpha_bar: list[float], beta: float, data: st.DataObject) -> None:
    """Where no quantile lies on a step's edge, which rounding decides."""
    count = data.draw(st.integers(2, len(alpha_bar)))
    gamma = torch.logcumsumexp(beta * torch.tensor(alpha_bar, dtype=torch.float64), dim=0)
    cumulative = gamma.softmax(dim=0).cumsum(dim=0)
    quantiles = torch.arange(1, count, dtype=torch.float64) / count
    assume((cumulative[:, None] - quantiles).abs().min() > 1e-12)
    places = torch.searchsorted(cumulative, quantiles).tolist()
    if len({0, *places}) == count:  # no duplicate moved
        assert spread_by_scores(tuple(alpha_bar), count, beta) == (0, *places)


def test_spread_by_scores_is_denser_where_scores_are_low() -> None:
    """beta is negative, so steps with low scores add most to gamma."""
    early = spread_by_scores((0.0,) * 10 + (0.01,) * 40, 10, -500.0)
    late = spread_by_scores((0.01,) * 40 + (0.0,) * 10, 10, -500.0)
    assert sum(step >= 40 for step in late) > sum(step >= 40 for step in early)


@pytest.mark.parametrize(
    ("alpha_bar", "count", "expected"),
    [
        ((1.0,) * 5 + (0.0,), 3, (0, 4, 5)),  # both quantiles fall on the last step
        ((1.0,) * 4 + (0.0, 1.0), 5, (0, 2, 3, 4, 5)),  # two on each of the last two, of equal weight
    ],
)
def test_duplicates_move_to_unused_steps(alpha_bar: tuple[float, ...], count: int, expected: tuple[int, ...]) -> None:
    assert spread_by_scores(alpha_bar, count, -8000.0) == expected


@given(st.integers(2, 80), st.data())
def test_reverse_gaps(nfe: int, data: st.DataObject) -> None:
    later = data.draw(st.sets(st.integers(1, nfe - 1)))
    steps = (0, *sorted(later))
    reverse = reverse_gaps(steps, nfe)

    def gaps(chosen: tuple[int, ...]) -> list[int]:
        return [b - a for a, b in zip(chosen, [*chosen[1:], nfe], strict=True)]

    assert reverse[0] == 0 and len(reverse) == len(steps)
    assert gaps(reverse) == gaps(steps)[::-1]
    assert Counter(gaps(reverse)) == Counter(gaps(steps))
    assert reverse_gaps(reverse, nfe) == steps


def test_full_steps_by_schedule() -> None:
    shape = make_shape(2, 2)
    trained = Run(shape, tuple(range(50)), GuidedPair(), torch.arange(1), artefacts=Artefacts(alpha_bar=(0.5,) * 50))
    assert full_steps(trained, 12, "adaptive", -8000) == FLAT_50_12
    assert full_steps(trained, 12, "reversed", -8000) == reverse_gaps(FLAT_50_12, 50)
    assert full_steps(trained, 12, "even", -8000) == spread_evenly(12, 50)
    untrained = Run(shape, tuple(range(50)), GuidedPair(), torch.arange(1))
    assert full_steps(untrained, 12, "even", -8000) == spread_evenly(12, 50)
    with pytest.raises(UserError, match=r"adaptive.* needs alpha_bar.*artefacts_from.*even"):
        full_steps(untrained, 12, "adaptive", -8000)


# --- tokens per block


@given(st.integers(1, 40), st.data())
def test_allocate_evenly(blocks: int, data: st.DataObject) -> None:
    budget = data.draw(st.integers(0, 5000))
    counts = allocate_evenly(blocks, budget)
    assert sum(counts) == budget and len(counts) == blocks and max(counts) - min(counts) <= 1


@st.composite
def scores_and_budget(draw: st.DrawFn) -> tuple[torch.Tensor, int]:
    rows, blocks, tokens = (draw(st.integers(1, high)) for high in (5, 8, 12))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    if draw(st.booleans()):  # few distinct values, so many ties
        score_RLN = torch.randint(0, 2, (rows, blocks, tokens), generator=generator) / 2
    else:
        score_RLN = torch.rand(rows, blocks, tokens, generator=generator)
    return score_RLN, draw(st.integers(0, blocks * tokens))


@given(scores_and_budget())
def test_allocate_tokens_spends_the_budget(case: tuple[torch.Tensor, int]) -> None:
    score_RLN, budget = case
    _, blocks, tokens = score_RLN.shape
    counts = allocate_tokens(score_RLN, budget).tolist()
    assert sum(counts) == budget and len(counts) == blocks
    assert all(0 <= count <= tokens for count in counts)


@given(st.integers(1, 6), st.integers(1, 12), st.data())
def test_allocate_tokens_prefers_higher_scores(blocks: int, tokens: int, data: st.DataObject) -> None:
    """Blocks whose tokens all score higher than another's are filled before it."""
    order = data.draw(st.permutations(range(blocks)))
    budget = data.draw(st.integers(0, blocks * tokens))
    level_L = torch.empty(blocks)
    for rank, block in enumerate(order):
        level_L[block] = blocks - rank
    score_RLN = level_L[None, :, None] + torch.rand(2, blocks, tokens, generator=torch.Generator().manual_seed(0)) / 2
    counts = allocate_tokens(score_RLN, budget).tolist()
    expected = [min(tokens, max(0, budget - rank * tokens)) for rank in range(blocks)]
    assert [counts[block] for block in order] == expected


def test_allocate_tokens_rounds_by_largest_remainder() -> None:
    score_RLN = torch.zeros(3, 2, 4)
    score_RLN[:, 0, 0] = 1  # 3 marks in block 0, and the 3 left go to ...
    score_RLN[:1, 0, 1] = 1  # ... block 0 once
    score_RLN[:2, 1, 0] = 1  # ... block 1 twice
    assert allocate_tokens(score_RLN, 2).tolist() == [1, 1]  # shares 4/3 and 2/3


def test_allocate_tokens_marks_earlier_rows_and_blocks_among_equal_scores() -> None:
    score_RLN = torch.zeros(2, 3, 4)
    assert allocate_tokens(score_RLN, 3).tolist() == [2, 1, 0]  # 6 marks, all in row 0: 4, 2 and 0
    score_RLN[1, 2] = 1  # 4 marks, and 2 are left for block 0 of row 0
    assert allocate_tokens(score_RLN, 3).tolist() == [1, 0, 2]


def test_best_tokens_are_the_budget_s() -> None:
    score_RLN = torch.tensor([[[0.1, 0.9, 0.8], [0.2, 0.3, 0.7]], [[0.6, 0.5, 0.9], [0.3, 0.8, 0.8]]])
    chosen = [tokens.index_RK[:, : tokens.count].tolist() for tokens in best_tokens(score_RLN, 3)]
    assert chosen == [[[1, 2], [2, 0]], [[2], [1]]]  # 3 marks a block; among equals the lower block and the lower token


def test_allocate_tokens_without_values_is_even() -> None:
    assert allocate_tokens(torch.empty(2, 3, 8, device="meta"), 10) == allocate_evenly(3, 10)
