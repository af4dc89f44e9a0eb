"""LazyDiT's gates: what they are trained on, what they learn, and what a run does with them."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tcbench.data import Dataset
from tcbench.errors import UserError
from tcbench.method import Artefacts
from tcbench.models.dit import DiTAdapter
from tcbench.registry import make_method
from tcbench.samplers import ReferenceDDIM, SamplerSettings
from tcbench.sampling import sample_batch
from tcbench.trainable import TrainGates
from tcbench.training.caching import train
from tcbench.training.gates import GateTrainer
from tcbench.training.pairs import Pairs
from tests.floors import LOSS, assert_close

from .conftest import make_adapter

NFE, SETTINGS, PARTS, WIDTH = 6, SamplerSettings(guidance_scale=1.5, seed=3), 8, 96
DATA = Dataset(torch.randn(8, 4, 16, 16, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 5)


@pytest.fixture(scope="module")
def adapter() -> DiTAdapter:
    made = make_adapter("tiny-dit")
    made.model.requires_grad_(False)
    return made


def trainer_at(adapter: DiTAdapter, weight_SPD: Tensor, mix: float = 0.0, pointwise: float = 0.0) -> GateTrainer:
    stage = TrainGates("gates", mix, pointwise, iterations=1, batch_size=4, learning_rate=1e-4)
    return GateTrainer(Pairs(adapter, DATA, ReferenceDDIM(NFE), 0), stage, weight_SPD)


def one_step(trainer: GateTrainer, odd: int = 3) -> Any:
    return trainer.step(odd, *trainer.pairs.start(torch.full((4,), NFE - 1 - odd)))


def some_weights() -> Tensor:
    return 0.01 * torch.randn(NFE, PARTS, WIDTH, generator=torch.Generator().manual_seed(1))


def by_hand(adapter: DiTAdapter, weight_PD: Tensor, odd: int) -> tuple[Tensor, Tensor]:
    """(mean squared error, the sums of the gates by row and part [R, 2]), by diffusers' own modules."""
    pairs, sampler = Pairs(adapter, DATA, ReferenceDDIM(NFE), 0), ReferenceDDIM(NFE)
    step, stored = NFE - 1 - odd, []
    x, label = pairs.start(torch.full((4,), step))

    def output(x: Tensor, step: int, gated: bool) -> tuple[Tensor, Tensor]:
        tokens = adapter.model.pos_embed(x)
        condition = adapter.condition(torch.full((len(x),), sampler.timesteps[step]), adapter.prepare(label))
        opened, used = torch.zeros(len(x), 2), iter(stored)
        for number, block in enumerate(adapter.blocks):
            for which, (part, m) in enumerate(adapter.modulation(block, condition).items()):
                norm, module = (block.norm1.norm, block.attn1) if part == "attn" else (block.norm3, block.ff)
                h = norm(tokens) * (1 + m.scale) + m.shift
                value = module(h)
                if gated:
                    gate = torch.einsum("rnd,d->r", h, weight_PD[2 * number + which]).sigmoid()
                    opened[:, which] += gate
                    value = gate[:, None, None] * value + (1 - gate[:, None, None]) * next(used)
                else:
                    stored.append(value)
                tokens = tokens + m.gate * value
        return adapter.unembed(tokens, condition), opened

    eps, _ = output(x, step, gated=False)
    later, _ = sampler.step(eps[:, :4], step, x)
    target = adapter.plain(later, torch.full((4,), sampler.timesteps[step + 1]), label)
    soft, opened = output(later, step + 1, gated=True)
    return (soft - target).square().mean(), opened


def test_the_loss_is_that_of_the_rule_by_hand(adapter: DiTAdapter) -> None:
    loss = one_step(trainer_at(adapter, some_weights(), mix=0.2, pointwise=0.03))
    error, opened = by_hand(adapter, some_weights()[2], odd=3)
    attn, mlp = opened.mean(0)
    assert_close(loss.mse_R.mean(), error, LOSS)
    assert_close(loss.mix, attn, LOSS)
    assert_close(loss.pointwise, mlp, LOSS)
    assert_close(loss.total, error + 0.2 * attn + 0.03 * mlp, LOSS)


def test_only_the_later_steps_gates_learn(adapter: DiTAdapter) -> None:
    trainer = trainer_at(adapter, some_weights())
    for odd in (3, 5, 3):
        one_step(trainer, odd)
    moved = (trainer.weights() != some_weights()).flatten(1).any(1)
    assert moved.tolist() == [False, False, True, False, True, False]


@pytest.mark.parametrize(("price", "closes"), [((1e-12, 1e-12), False), ((1.0, 1.0), True)], ids=["cheap", "dear"])
def test_laziness_has_a_price(adapter: DiTAdapter, price: tuple[float, float], closes: bool) -> None:
    """Dear gates close; where they cost next to nothing, the error of the output opens them."""
    trainer = trainer_at(adapter, torch.zeros(NFE, PARTS, WIDTH), *price)
    before, after = one_step(trainer), [one_step(trainer) for _ in range(4)][-1]
    assert before.mix == before.pointwise == PARTS / 4, "all gates begin at one half"
    assert (after.mix < before.mix) == (after.pointwise < before.pointwise) == closes


def test_attentions_and_mlps_have_prices_of_their_own(adapter: DiTAdapter) -> None:
    trainer = trainer_at(adapter, torch.zeros(NFE, PARTS, WIDTH), mix=1.0)
    before, after = one_step(trainer), [one_step(trainer) for _ in range(4)][-1]
    assert after.mix < before.mix and after.pointwise > before.pointwise


def trained(adapter: DiTAdapter, seed: int = 0, **options: Any) -> Artefacts:
    method = make_method("lazydit", {"iterations": 6, "batch_size": 2, "learning_rate": 0.02} | options)
    artefacts, refiners, log = train(adapter, method, NFE, SETTINGS, DATA, seed)
    assert not refiners and log["stages"][0]["kind"] == "TrainGates"
    return artefacts


def computed(adapter: DiTAdapter, artefacts: Artefacts, **options: Any) -> float:
    """The share of rows, over all steps and gated parts."""
    samples = sample_batch(adapter, make_method("lazydit", options), NFE, SETTINGS, torch.arange(2), artefacts)
    return float(samples.plans.kept_shares(64).mean())


def test_training_repeats_to_the_bit_and_closes_what_is_sampled(adapter: DiTAdapter) -> None:
    dear = trained(adapter, cost_weight=1.0)
    assert dear.tables == trained(adapter, cost_weight=1.0).tables != trained(adapter, seed=1, cost_weight=1.0).tables
    assert computed(adapter, Artefacts()) == 1, "gates that learnt nothing compute everything"
    assert computed(adapter, dear) < 1


def test_gates_of_another_run_are_refused(adapter: DiTAdapter) -> None:
    gates = Artefacts(tables={"gates": ((0.0,) * WIDTH,) * (4 * PARTS)})
    with pytest.raises(UserError, match="the gates are 32 lines of 96 weights, the run has 6 steps of 8 parts"):
        computed(adapter, gates)


def test_a_loss_that_is_not_finite_stops(adapter: DiTAdapter) -> None:
    with pytest.raises(UserError, match="TrainGates: the loss became nan at iteration 0"):
        broken = Dataset(torch.full((4, 4, 16, 16), float("nan")), torch.arange(4))
        train(adapter, make_method("lazydit", {"iterations": 1, "batch_size": 2}), NFE, SETTINGS, broken, 0)
