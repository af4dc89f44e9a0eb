"""Fused blocks do what plain blocks do: for every method the same tokens, and latents that differ by rounding."""

import copy
from functools import partial

import pytest
import torch
from torch import Tensor

from tcbench.engine import Engine, PlainBlocks
from tcbench.fused import FusedBlocks
from tcbench.method import Artefacts, Run
from tcbench.models.adapter import Adapter
from tcbench.models.predictor import CachePredictor
from tcbench.models.specs import make_adapter as adapt
from tcbench.plan import (
    ALL,
    NONE,
    Block,
    Decision,
    Deferred,
    Forecast,
    Plan,
    Site,
    Span,
    Tokens,
    every_unit,
    top_tokens,
)
from tcbench.registry import make_method, method_names
from tcbench.replay import Replay
from tcbench.sampling import SamplerSettings, default_prompts, denoise, initial_noise, start_run
from tests.conftest import make_adapter

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SAMPLES, NFE = 2, 6
CPU = partial(FusedBlocks, path="torch")
INTERPRETED = partial(FusedBlocks, path="triton")
FEW = {
    "tokencache": {"num_full_steps": 2, "refiner_blocks": 1, "schedule": "even", "beta": -1.0, "cache_ratio": 0.7},
    "random_tokens": {"num_full_steps": 2, "refiner_blocks": 1},
    "no_tokens": {"num_full_steps": 2, "refiner_blocks": 1},
    "tome": {"num_full_steps": 2, "refiner_blocks": 1},
    "toca_tokens": {"num_full_steps": 2, "refiner_blocks": 1},
    "oracle_tokens": {"num_full_steps": 2, "refiner_blocks": 1},
    "fewer_steps": {"steps": 4},
    "fora": {"num_full_steps": 3},
}


@pytest.fixture(scope="module")
def model() -> Adapter:
    adapter = make_adapter("tiny-dit")
    torch.nn.Module.to(adapter.model, DEVICE)
    return adapter


def close(actual: Tensor, expected: Tensor) -> None:
    """Rounding grows with the largest values that are added up, so it is judged beside them."""
    error = (actual - expected).abs().max().item() / expected.abs().max().item()
    assert error < 2e-5, f"largest error {error:.1e} of the largest value"


def artefacts(adapter: Adapter) -> Artefacts:
    predictor = CachePredictor(adapter)
    generator = torch.Generator().manual_seed(3)
    predictor.head.weight.data = torch.randn(predictor.head.weight.shape, generator=generator)
    table = tuple(tuple(row) for row in torch.randn(NFE, 2 * adapter.shape.num_blocks, generator=generator).tolist())
    predictor.to(adapter.model.device)
    return Artefacts(scorers={"predictor": predictor.eval()}, alpha_bar=(0.5,) * NFE, tables={"router": table})


@torch.inference_mode()
def sample(adapter: Adapter, name: str, options: dict, blocks) -> tuple[Tensor, Engine]:
    index, settings = torch.arange(SAMPLES), SamplerSettings(1.5)
    method = make_method(name, options)
    sampler, run = start_run(adapter, method, NFE, settings, index, artefacts(adapter))
    engine = Engine(adapter, run, method.start(run), blocks)
    x = initial_noise(adapter, 0, index).to(DEVICE)
    *_, (_, _, final) = denoise(adapter, engine, sampler, settings, x, default_prompts(adapter, index).to(DEVICE))
    return final, engine


VARIANTS = [
    (name, FEW.get(name, {}) | keys)
    for name in method_names()
    for keys in (
        [{"keys": "cached"}, {"keys": "fresh"}, {"keys": "recomputed"}]
        if "keys" in type(make_method(name, {})).model_fields
        else [{}]
    )
]


@pytest.mark.parametrize("name, options", VARIANTS, ids=[f"{name} {o.get('keys', '')}" for name, o in VARIANTS])
def test_every_method_samples_alike(model: Adapter, name: str, options: dict) -> None:
    plain, engine = sample(model, name, options, PlainBlocks)
    fused, fused_engine = sample(model, name, options, CPU)
    assert fused_engine.plans == engine.plans
    assert fused_engine.ledger.totals() == engine.ledger.totals()
    close(fused, plain)


def test_refiners_act_on_p_steps_alone(model: Adapter) -> None:
    refined = adapt(copy.deepcopy(model.model), model.spec)
    refined.blocks[-1].attn1.to_out[0].weight.data *= 2
    refined.on_full_steps(model)
    plain, _ = sample(refined, "no_tokens", FEW["no_tokens"], PlainBlocks)
    fused, _ = sample(refined, "no_tokens", FEW["no_tokens"], CPU)
    close(fused, plain)
    assert (plain - sample(model, "no_tokens", FEW["no_tokens"], PlainBlocks)[0]).abs().max() > 1e-3
    full = [sample(adapter, "uncached", {}, CPU)[0] for adapter in (refined, model)]
    assert torch.equal(*full)


def test_the_kernels_sample_alike(model: Adapter) -> None:
    """One method through the kernels themselves, whose every part is tested in test_kernels."""
    pytest.importorskip("triton")
    plain, _ = sample(model, "tokencache", FEW["tokencache"], PlainBlocks)
    fused, _ = sample(model, "tokencache", FEW["tokencache"], INTERPRETED)
    close(fused, plain)


UNITS = [Block(block) for block in range(4)]
SITES = [Site(block, branch) for block in range(4) for branch in ("attn", "mlp")]
PLANS = {
    "everything": (Plan(), Plan()),
    "blocks held": (every_unit(UNITS, ALL), every_unit(UNITS[:3], NONE)),
    "branches held": (every_unit(SITES, ALL), every_unit(SITES, NONE)),
    "forecast": (every_unit(SITES, ALL, Forecast(2)), every_unit(SITES, NONE, Forecast(2))),
    "a span held": (every_unit([Span(1, 3)], ALL), every_unit([Span(1, 3)], NONE)),
    "attention of some tokens": (
        every_unit(SITES, ALL, keys="cached"),
        every_unit(SITES[2:], Tokens(torch.tensor([[3, 1], [5, 9], [0, 63], [8, 7]], device=DEVICE)), keys="cached"),
    ),
    "decided at the block": (
        every_unit(UNITS, ALL),
        Plan({unit: Decision(Deferred(lambda x: top_tokens(x[..., 0], 5), NONE)) for unit in UNITS[:3]}),
    ),
}


@pytest.mark.parametrize("case", PLANS)
@torch.inference_mode()
def test_every_kind_of_decision_gives_the_same_tokens(model: Adapter, case: str) -> None:
    full, reused = PLANS[case]
    outputs = []
    for blocks in (PlainBlocks, CPU):
        run = Run(model.shape, (900, 600, 300, 100), True, torch.arange(SAMPLES, device=DEVICE))
        engine = Engine(model, run, blocks=blocks)
        latent = initial_noise(model, 0, torch.arange(2 * SAMPLES)).to(DEVICE)
        context = engine.prepare(model.guided(default_prompts(model, torch.arange(SAMPLES)).to(DEVICE)))
        for step, plan in enumerate((full, full, full, reused)):
            x, condition = engine.embed(step, latent + step, context)
            hidden = engine.hidden(plan, step, x, condition)
        outputs.append((hidden, engine.blocks.unembed(condition), engine.plans))
    (plain, plain_output, plans), (fused, fused_output, fused_plans) = outputs
    assert plans == fused_plans
    close(fused, plain)
    close(fused_output, plain_output)


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU: captured graphs")
@pytest.mark.parametrize("name", method_names())
def test_replayed_graphs_sample_alike(model: Adapter, name: str) -> None:
    plain, _ = sample(model, name, FEW.get(name, {}), PlainBlocks)
    replay = Replay(
        model, make_method(name, FEW.get(name, {})), NFE, SamplerSettings(1.5), torch.arange(SAMPLES), artefacts(model)
    )
    for _ in range(2):  # a repetition starts afresh
        close(replay.run(), plain)
