"""ToCa's score as a selector: whom it chooses, whom age brings back, when maps are taken and what they cost."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from tcbench.budget.costing import macs_of
from tcbench.errors import UserError
from tcbench.guidance import GuidedPair, Unguided
from tcbench.method import Artefacts, Method, ModelShape, Run
from tcbench.plan import ALL, Block, Plan, Tokens
from tcbench.registry import make_method
from tcbench.samplers import SamplerSettings
from tcbench.sampling import sample_batch
from tests.conftest import make_adapter, make_prompt, make_shape

SMALL = make_shape(3, 4)
ROWS, FREE = 2, 2


@dataclass
class FakeLook:
    """Fixed attention, different in each row and block."""

    run: Run
    step: int = 0

    def attention_received(self, block: int) -> Tensor:
        return torch.rand(ROWS, 16, generator=torch.Generator().manual_seed(block)) + 0.1

    def attention_entropy(self, block: int) -> Tensor:
        return torch.rand(ROWS, 16, generator=torch.Generator().manual_seed(100 + block))


def selector(**options: float | str) -> Method:
    return make_method("toca_tokens", {"num_full_steps": 1, "cache_ratio": 0.75, "refiner_blocks": 1} | options)


def run_of(nfe: int, artefacts: Artefacts | None = None, shape: ModelShape = SMALL) -> Run:
    return Run(shape, tuple(range(nfe))[::-1], Unguided(), torch.arange(ROWS), artefacts=artefacts or Artefacts())


def plans_of(method: Method, run: Run) -> list[Plan]:
    look, state = FakeLook(run), method.start(run)
    plans = []
    for look.step in range(run.nfe):
        plans.append(state.plan(look))
        assert set(plans[-1].decisions) == {Block(0), Block(1)}, "refiners are left alone"
    return plans


def chosen(plan: Plan, block: int) -> list[set[int]]:
    decision = plan.at(Block(block))
    assert decision is not None and isinstance(decision.who, Tokens)
    return [set(row) for row in decision.who.index_RK.tolist()]


def test_tokens_follow_the_attention_map() -> None:
    """Without age and bonus: the four tokens of each row and block that receive most, at every P-step."""
    run = run_of(4)
    first, *others = plans_of(selector(soft_fresh_weight=0.0, bonus=0.0), run)
    assert all(decision.who is ALL for decision in first.decisions.values())
    for plan in others:
        for block in range(FREE):
            received = FakeLook(run).attention_received(block)
            assert chosen(plan, block) == [set(row) for row in received.argsort(descending=True)[:, :4].tolist()]


def test_a_high_bonus_takes_one_token_a_cell() -> None:
    for rows in (chosen(plan, 0) for plan in plans_of(selector(bonus=50.0), run_of(6))[1:]):
        for row in rows:
            assert {(token // 8, token % 4 // 2) for token in row} == {(0, 0), (0, 1), (1, 0), (1, 1)}


def test_age_brings_back_the_tokens_that_attention_leaves_out() -> None:
    """When age is all that counts, four P-steps recompute all 16 tokens, and the next four do so in the same order."""
    plans = plans_of(selector(soft_fresh_weight=100.0, bonus=0.0), run_of(9))
    for block in range(FREE):
        for row in range(ROWS):
            turns = [chosen(plan, block)[row] for plan in plans[1:]]
            assert set.union(*turns[:4]) == set(range(16)) and turns[:4] == turns[4:]
    ignored = plans_of(selector(soft_fresh_weight=0.0, bonus=0.0), run_of(9))
    assert len(set.union(*(chosen(plan, 0)[0] for plan in ignored[1:]))) == 4


def test_age_is_counted_in_mean_distances_of_i_steps() -> None:
    """By hand over the P-steps between two of 2 I-steps in 12: age over 6, 0 in the step after a refresh."""
    run = run_of(12)
    method = selector(num_full_steps=2, soft_fresh_weight=0.9, bonus=0.0)
    plans = plans_of(method, run)
    received = FakeLook(run).attention_received(0)[0]
    age = torch.zeros(16)
    for step in range(1, 6):
        score = received / received.norm() + 0.9 * age / 6
        best = set(score.argsort(descending=True)[:4].tolist())
        assert chosen(plans[step], 0)[0] == best, step
        age += 1
        age[sorted(best)] = 0
    assert plans[6].at(Block(0)).who is ALL
    assert chosen(plans[7], 0) == chosen(plans[1], 0), "an I-step refreshes everyone"


@pytest.mark.parametrize(("ratio", "observed"), [(0.75, {0, 4}), (1.0, set())])
def test_attention_is_observed_only_if_it_is_read(ratio: float, observed: set[int]) -> None:
    """On the I-steps of a run's alpha-bar, some of them back to back and the last step one of them."""
    run = run_of(8, Artefacts(alpha_bar=tuple(0.01 * abs(step - 3) for step in range(8))))
    method = selector(num_full_steps=5, schedule="adaptive", beta=-50.0, cache_ratio=ratio)
    assert method.i_steps(run) == (0, 3, 4, 6, 7)  # even: (0, 1, 3, 4, 6)
    plans = plans_of(method, run)
    for block in range(FREE):
        assert {step for step, plan in enumerate(plans) if plan.at(Block(block)).observe} == observed


def test_a_schedule_without_alpha_bar_is_refused() -> None:
    with pytest.raises(UserError, match="name a trained one in artefacts_from"):
        selector(schedule="adaptive").start(run_of(8))


def test_an_odd_grid_is_refused() -> None:
    with pytest.raises(UserError, match=r"toca_tokens: its 2x2 cells need an even token grid, not \(3, 3\)"):
        selector().start(run_of(8, shape=make_shape(2, 3)))


def test_halves_choose_alike_by_the_entropy_over_the_text() -> None:
    """Where there is text the four tokens of the highest mean entropy, in both halves of the guided pair."""
    shape = make_shape(3, 4, text_tokens=5)
    run = Run(shape, (3, 2, 1, 0), GuidedPair(), torch.arange(1))
    first, *others = plans_of(selector(soft_fresh_weight=0.0, bonus=0.0), run)
    assert {decision.observe for decision in first.decisions.values()} == {"cross"}
    for plan in others:
        for block in range(FREE):
            best = FakeLook(run).attention_entropy(block).mean(0).topk(4).indices.tolist()
            assert chosen(plan, block) == [set(best)] * 2


def test_maps_over_the_text_are_charged() -> None:
    """N x text x width per row, cached block and I-step, in costing as in a run."""
    method, adapter = selector(num_full_steps=2), make_adapter("tiny-pixart")
    samples = sample_batch(
        adapter,
        method,
        6,
        SamplerSettings(4.5, solver="dpm"),
        torch.arange(2),
        prompts=lambda _: make_prompt(adapter, 2),
    )
    assert samples.macs["by_tag"]["score"] == 2 * 3 * 2 * 64 * 12 * 96
    assert macs_of("tiny-pixart", method, 6)["by_tag"]["score"] == samples.macs["by_tag"]["score"]


def test_maps_are_charged(tiny) -> None:
    """N^2 x width per row, cached block and I-step; all else costs what random tokens do."""
    options = {"num_full_steps": 2, "refiner_blocks": 1, "cache_ratio": 0.8}
    samples = sample_batch(
        tiny, make_method("toca_tokens", options), 6, SamplerSettings(guidance_scale=1.5), torch.arange(2)
    )
    assert samples.macs["by_tag"]["score"] == 2 * 3 * 2 * 64**2 * 96
    assert samples.plans.to_json()[1] == {"block 0": 13, "block 1": 13, "block 2": 13}
    totals = macs_of("tiny-dit", make_method("toca_tokens", options), 6)
    assert {key: totals[key] for key in samples.macs} == samples.macs
    random = macs_of("tiny-dit", make_method("random_tokens", options), 6)
    assert totals["per_sample_without_overheads"] == random["per_sample"]
