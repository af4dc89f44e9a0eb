"""HarmoniCa's router: trained along chains from noise, used at every step."""

from functools import partial

import pytest
import torch
from torch import Tensor

from tcbench.artefacts import as_table
from tcbench.data import Dataset
from tcbench.errors import UserError
from tcbench.method import Artefacts, Table
from tcbench.models.adapter import Adapter
from tcbench.precision import mixed
from tcbench.registry import make_method
from tcbench.samplers import SamplerSettings
from tcbench.sampling import default_prompts, sample_batch
from tcbench.trainable import TrainChainRouter
from tcbench.training.caching import train
from tcbench.training.chains import ChainTrainer
from tcbench.training.pairs import CALIBRATION_INDEX
from tests.floors import TRAJECTORY, assert_close

from .conftest import make_adapter

NFE, SETTINGS = 4, SamplerSettings(guidance_scale=1.5, seed=3)
OPTIONS = {"iterations": 6, "batch_size": 2, "learning_rate": 0.5, "refresh": 4}
IMAGES = Dataset(torch.zeros(4, 4, 16, 16), torch.arange(4))


@pytest.fixture(scope="module")
def adapter() -> Adapter:
    made = make_adapter("tiny-dit")
    made.model.requires_grad_(False)
    return made


def trainer_at(adapter: Adapter, logits: Tensor, cost_weight: float = 0.0) -> ChainTrainer:
    stage = TrainChainRouter("router", cost_weight, 0.1, iterations=1, batch_size=2, learning_rate=0.5, refresh=1)
    method = make_method("harmonica", {})
    return ChainTrainer(adapter, method, stage, NFE, SETTINGS, partial(default_prompts, adapter), logits)


def trained(adapter: Adapter, seed: int = 0, **options: float) -> Table:
    artefacts, _, _ = train(adapter, make_method("harmonica", OPTIONS | options), NFE, SETTINGS, IMAGES, seed)
    return artefacts.tables["router"]


def test_hard_gates_walk_the_chain_of_sampling(adapter: Adapter) -> None:
    closed = torch.rand(NFE, len(adapter.shape.sites), generator=torch.Generator().manual_seed(0)) < 0.5
    logits = torch.where(closed, -1e3, 1e3)
    chain = trainer_at(adapter, logits)._final(5, set(range(1, NFE)))
    index = CALIBRATION_INDEX + 5 * 2 + torch.arange(2)
    method, router = make_method("harmonica", {}), Artefacts(tables={"router": as_table(logits)})
    assert_close(chain, sample_batch(adapter, method, NFE, SETTINGS, index, router).image, TRAJECTORY)
    uncached = sample_batch(adapter, make_method("uncached", {}), NFE, SETTINGS, index).image
    assert (chain - uncached).abs().max() > 1e-2


def test_steps_weigh_what_their_gates_change(adapter: Adapter) -> None:
    logits = torch.full((NFE, len(adapter.shape.sites)), 1e3)
    logits[NFE - 1 - 2] = -1e3
    trainer = trainer_at(adapter, logits)
    trainer.weigh_steps(0)
    assert trainer.proxy_S[2] > 0 and trainer.proxy_S[1] == trainer.proxy_S[3] == 0


def test_guidance_and_sampler_are_float32_where_products_are_of_16_bits(adapter: Adapter) -> None:
    chain = trainer_at(adapter, torch.zeros(NFE, len(adapter.shape.sites))).chain(0)
    with mixed(adapter.device, "bf16"), torch.no_grad():
        outputs, used = chain.outputs(0, {})
    assert {value.dtype for value in used[0].values()} == {torch.bfloat16}
    assert {output.dtype for output in outputs} == {torch.float32}


@pytest.mark.parametrize(("cost_weight", "rises"), [(1e-12, True), (1.0, False)])
def test_gates_follow_the_price_of_computing(adapter: Adapter, cost_weight: float, rises: bool) -> None:
    before = torch.zeros(NFE, len(adapter.shape.sites))
    trainer = trainer_at(adapter, before, cost_weight)
    trainer.train(0)
    moved = trainer.logits()[: NFE - 1] - before[: NFE - 1]
    assert (moved.mean() > 0) == rises and (moved != 0).all()
    assert (trainer.logits()[NFE - 1] == 5).all(), "the first step is computed"


def test_training_needs_no_images_and_repeats_to_the_bit(adapter: Adapter) -> None:
    router = trained(adapter)
    assert router == trained(adapter) != trained(adapter, seed=1)
    method = make_method("harmonica", {"threshold": 0.5})
    samples = sample_batch(adapter, method, NFE, SETTINGS, torch.arange(2), Artefacts(tables={"router": router}))
    assert samples.plans.i_steps[0] == 0


def test_a_loss_that_is_not_finite_stops(adapter: Adapter) -> None:
    with pytest.raises(UserError, match="TrainChainRouter: the loss became nan at iteration 0"):
        trainer_at(adapter, torch.full((NFE, len(adapter.shape.sites)), float("nan"))).train(0)
