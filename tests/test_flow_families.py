"""FLUX.1 and Wan 2.1: full size by shapes, 16 bit, parallel blocks, and TokenCache's training on both."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from tcbench.data import Dataset
from tcbench.engine.engine import Engine
from tcbench.engine.soft import soft_hidden
from tcbench.ledger import plan_macs
from tcbench.models.adapter import Adapter, Text
from tcbench.models.networks import build_transformer
from tcbench.models.networks import make_adapter as adapt
from tcbench.models.specs import MODELS
from tcbench.plan import ALL, NONE, Block, Plan, Site, Tokens, every_unit
from tcbench.plan import Decision as D
from tcbench.registry import make_method
from tcbench.samplers import SamplerSettings
from tcbench.sampling import sample_batch
from tcbench.training.caching import train
from tests.floors import NETWORK, assert_close

from .conftest import make_adapter, make_prompt, make_run, model_inputs

FAMILIES = ["tiny-flux", "tiny-wan"]


# --- full size


@pytest.mark.parametrize(
    ("name", "millions", "tokens", "tmacs"),
    [
        ("flux-dev", 11901.408, 4096, 37.1859),  # 50 steps are 3718.6 TFLOPs; papers print 3719.50 and 3726.87
        ("flux-schnell", 11891.178, 4096, 34.7301),
        ("wan-1.3b", 1418.997, 32760, 141.4240),
    ],
)
def test_full_size_by_shapes(name: str, millions: float, tokens: int, tmacs: float) -> None:
    spec = MODELS[name]
    model = build_transformer(spec, device="meta", dtype=torch.bfloat16)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=1e-3)
    assert spec.num_tokens == math.prod(spec.grid) * spec.shape.frames == tokens
    assert plan_macs(Plan(), spec.shape).matmul / 1e12 == pytest.approx(tmacs, abs=1e-4)


@pytest.mark.parametrize("name", ["flux-dev", "flux-schnell", "wan-1.3b"])
def test_a_step_at_full_size_by_torchs_counter(name: str) -> None:
    """On meta tensors, by diffusers' own forward, which projects the text at every step and not once a run."""
    spec = MODELS[name].model_copy(update={"num_blocks": 3} | ({"double_blocks": 1} if "flux" in name else {}))
    adapter = adapt(build_transformer(spec, device="meta"), spec)
    latent = torch.empty(1, *spec.latent_shape, device="meta")
    states = torch.empty(1, spec.caption_tokens, spec.caption_channels, device="meta")
    text = Text(states, torch.ones(1, spec.caption_tokens, dtype=torch.bool), guidance_scale=3.5)
    if "flux" in name:
        text = replace(text, pooled_RC=torch.empty(1, spec.pooled_channels, device="meta"))
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        adapter.plain(latent, torch.ones(1, device="meta"), text)
    assert counter.get_total_flops() == 2 * (plan_macs(Plan(), spec.shape).matmul + spec.shape.once.matmul)


def test_impossible_shapes_are_refused() -> None:
    for change in ({"axes": (8, 8, 4)}, {"double_blocks": 4}):
        with pytest.raises(ValidationError, match=r"axes|double_blocks"):
            type(MODELS["tiny-flux"])(**(MODELS["tiny-flux"].model_dump() | change))


# --- 16 bit


@pytest.mark.parametrize("name", FAMILIES)
def test_off_is_off_in_bfloat16(name: str) -> None:
    adapter = adapt(build_transformer(MODELS[name], dtype=torch.bfloat16), MODELS[name])
    latent, prompt = model_inputs(adapter, rows=2)
    latent, prompt = latent.bfloat16(), prompt.to("cpu", torch.bfloat16)
    engine = Engine(adapter, make_run(adapter, 4, torch.arange(2)))
    with torch.inference_mode():
        expected = adapter.plain(latent, torch.full((2,), engine.run.timesteps[1]), prompt)
        for plan in (Plan(), every_unit([Block(block) for block in range(3)], ALL)):
            x, condition = engine.embed(1, latent, engine.prepare(prompt))
            assert torch.equal(adapter.unembed(engine.hidden(plan, 1, x, condition), condition), expected)
    assert expected.dtype == torch.bfloat16 and expected.float().std() > 0.1


def test_wan_keeps_in_float32_what_diffusers_does() -> None:
    model = build_transformer(MODELS["tiny-wan"], dtype=torch.bfloat16)
    kinds = {name: tensor.dtype for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    assert kinds["blocks.0.scale_shift_table"] == kinds["rope.freqs_cos"] == torch.float32
    assert kinds["condition_embedder.time_embedder.linear_1.weight"] == kinds["blocks.1.norm2.weight"] == torch.float32
    assert kinds["blocks.0.attn1.to_q.weight"] == kinds["blocks.0.attn1.norm_q.weight"] == torch.bfloat16


# --- parallel blocks


@pytest.fixture(scope="module")
def flux() -> Adapter:
    return make_adapter("tiny-flux")


def run_plans(adapter: Adapter, *plans: Plan) -> tuple[list[Tensor], Engine]:
    """The streams behind the plans of steps in order, from other latents in each."""
    engine, streams = Engine(adapter, make_run(adapter, 4, torch.arange(2))), []
    with torch.inference_mode():
        for step, plan in enumerate(plans):
            latent, prompt = model_inputs(adapter, rows=2, seed=step)
            x, condition = engine.embed(step, latent, engine.prepare(prompt))
            streams.append(engine.hidden(plan, step, x, condition))
    return streams, engine


def test_parts_of_a_parallel_block_add_up_to_it(flux: Adapter) -> None:
    """What its parts hold together is what the block adds, before its one gate."""
    (stream,), apart = run_plans(flux, every_unit([Site(2, "attn"), Site(2, "mlp")], ALL))
    (joined,), _ = run_plans(flux, Plan())
    assert_close(stream, joined, NETWORK)
    (_, later), held = run_plans(flux, every_unit(flux.shape.sites, ALL), every_unit(flux.shape.sites, NONE))
    assert not torch.equal(later, joined) and held.cache.num_bytes() == 2 * 3 * 2 * 70 * 48 * 4
    assert apart.cache.num_bytes() == 2 * 2 * 70 * 48 * 4  # two parts of two rows of 6 + 64 tokens


def test_both_parts_take_what_enters_the_block(flux: Adapter) -> None:
    """A held part leaves the other's input alone: attention held at another step's value moves nothing of the MLP."""
    sites = [Site(2, "attn"), Site(2, "mlp")]
    first = every_unit(sites, ALL)
    mixed = Plan({sites[0]: D(NONE), sites[1]: D(ALL)})
    (_, held_attention), one = run_plans(flux, first, mixed)
    (_, both_fresh), two = run_plans(flux, first, first)
    assert torch.equal(one.cache.read(sites[1], D(ALL).fill, 1), two.cache.read(sites[1], D(ALL).fill, 1))
    assert (held_attention - both_fresh).abs().max() > 1e-3


def test_recomputing_every_token_is_computing_all(flux: Adapter) -> None:
    every = Tokens(torch.arange(64).expand(2, -1))
    for units in (flux.shape.sites, [Block(block) for block in range(3)]):
        kept = [D(ALL, keys="cached"), D(every, keys="cached")]
        first, second = (Plan(dict.fromkeys(units, decision)) for decision in kept)
        (_, again), _ = run_plans(flux, first, second)
        (_, full), _ = run_plans(flux, first, first)
        assert_close(again, full, NETWORK)


def test_the_training_path_is_the_engines(flux: Adapter) -> None:
    """Blocks gated by 0 hold what is stored; ungated parallel blocks are computed by their one projection."""
    latent, prompt = model_inputs(flux, rows=2)
    (_, expected), engine = run_plans(flux, every_unit([Block(1)], ALL), every_unit([Block(1)], NONE))
    latent, prompt = model_inputs(flux, rows=2, seed=1)
    with torch.inference_mode():
        x, condition = engine.embed(1, latent, engine.prepare(prompt))
        stored = {Block(1): engine.cache.read(Block(1), D(ALL).fill, 0)}
        soft = soft_hidden(flux, x, condition, {Block(1): torch.zeros(())}, stored)
        assert_close(soft, expected, NETWORK)
        opened = soft_hidden(flux, x, condition, {Block(1): torch.ones(())}, stored)
        assert_close(opened, engine.hidden(Plan(), 1, x, condition), NETWORK)


# --- TokenCache


FEW: dict[str, Any] = {
    "num_full_steps": 2,
    "beta": -20.0,
    "refiner_blocks": 1,
    "predictor_iterations": 8,
    "predictor_learning_rate": 1e-2,
    "refiner_iterations": 3,
    "refiner_rank": 2,
    "refiner_learning_rate": 1e-2,
    "training_batch_size": 2,
    "alpha_samples": 2,
}


@pytest.mark.parametrize("name", FAMILIES)
def test_tokencache_trains_and_samples(name: str) -> None:
    adapter = make_adapter(name)
    spec, captions = adapter.spec, make_prompt(adapter, rows=12)
    images = torch.randn(12, *spec.latent_shape, generator=torch.Generator().manual_seed(0))
    method = make_method("tokencache", FEW)
    settings = SamplerSettings(1.5, solver=spec.solvers[-1])

    def prompts(index: Tensor) -> Text:
        return captions[index % 12]

    artefacts, refiners, log = train(adapter, method, 5, settings, Dataset(images, captions), 0, prompts=prompts)
    assert [stage["kind"] for stage in log["stages"]] == ["TrainScorer", "CollectScores", "TrainRefiners"]
    assert len(artefacts.alpha_bar or ()) == 5 and any(value.abs().max() > 0 for value in refiners.values())
    trained = {key.split(".lora_")[0].rpartition("blocks.")[2] for key in refiners}
    own = {"attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp", "proj_out"}
    assert not {"1.add_q_proj", "0.ff_context"} & trained
    assert name == "tiny-wan" or {part.partition(".")[2] for part in trained} == own
    samples = sample_batch(adapter, method, 5, settings, torch.arange(2), artefacts, prompts=prompts)
    assert len(samples.plans.i_steps) == 2 and samples.macs["by_tag"]["predictor"] > 0
