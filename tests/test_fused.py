"""Fused blocks do what plain blocks do: for every method the same tokens, and latents that differ by rounding."""

import copy
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from tcbench.artefacts import as_table
from tcbench.choose import top_tokens
from tcbench.engine.engine import Engine
from tcbench.engine.fused import FusedBlocks
from tcbench.engine.plain import PlainBlocks
from tcbench.guidance import GuidedPair
from tcbench.kernels import choice
from tcbench.method import Artefacts, Run
from tcbench.models.adapter import Adapter
from tcbench.models.networks import make_adapter as adapt
from tcbench.models.predictor import CachePredictor
from tcbench.plan import ALL, NONE, Block, Decision, Deferred, Forecast, Plan, Site, Span, Tokens, every_unit
from tcbench.registry import make_method, method_names
from tcbench.replay import Replay
from tcbench.samplers import SamplerSettings, Solver
from tcbench.sampling import Passes, denoise, initial_noise, start_run
from tests.conftest import make_adapter, make_prompt
from tests.floors import TRAJECTORY, assert_close
from tests.pairs import marks_of

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SAMPLES, NFE = 2, 6
CPU = partial(FusedBlocks, backend="torch")
INTERPRETED = partial(FusedBlocks, backend="triton")
FEW = {
    "tokencache": {"num_full_steps": 2, "refiner_blocks": 1, "schedule": "even", "beta": -1.0, "cache_ratio": 0.7},
    "random_tokens": {"num_full_steps": 2, "refiner_blocks": 1},
    "no_tokens": {"num_full_steps": 2, "refiner_blocks": 1},
    "tome": {"num_full_steps": 2, "refiner_blocks": 1},
    "tome_merge": {"parts": "all"},
    "toca_tokens": {"num_full_steps": 2, "refiner_blocks": 1},
    "oracle_tokens": {"num_full_steps": 2, "refiner_blocks": 1},
    "fewer_steps": {"steps": 4},
    "fora": {"num_full_steps": 3},
    "dbcache": {"first_blocks": 1, "warmup_steps": 1, "threshold": 0.5, "order": 1},
    "easycache": {"first_steps": 1, "threshold": 0.5},
    "taylorseer": {"num_full_steps": 4},
    "speca": {"first_steps": 1, "min_drafts": 1, "base_threshold": 10.0},
    "clusca": {"interval": 3, "clusters": 5, "ratio": 0.2, "iterations": 5},
    "hicache": {"interval": 3},
    "duca": {"fresh_ratio": 0.3},
}
ONE_FULL = FEW["tokencache"] | {"num_full_steps": 1}
TOCA_WITH_TEXT = {"schedule": "pixart", "fresh_ratio": 0.5, "cell": 4}
SOLVERS: dict[str, Solver] = {"tiny-dit": "ddim", "tiny-pixart": "dpm", "tiny-osp": "euler_ancestral"}


@pytest.fixture(scope="module", params=SOLVERS)
def model(request: pytest.FixtureRequest) -> Adapter:
    """With two heads, because products take most of the time."""
    return make_adapter(request.param, DEVICE, num_heads=2)


def settings_of(adapter: Adapter) -> SamplerSettings:
    return SamplerSettings(1.5, solver=SOLVERS[adapter.spec.name])


close = partial(assert_close, floor=TRAJECTORY)


def artefacts(adapter: Adapter, nfe: int) -> Artefacts:
    predictor = CachePredictor(adapter)
    generator = torch.Generator().manual_seed(3)
    predictor.head.weight.data = torch.randn(predictor.head.weight.shape, generator=generator)
    columns = len(adapter.shape.sites)
    table = tuple(tuple(row) for row in torch.randn(nfe, columns, generator=generator).tolist())
    gated = [site for site in adapter.shape.sites if adapter.shape.kind(site) != "cross"]
    gates = as_table(torch.randn(nfe * len(gated), adapter.shape.width, generator=generator))
    predictor.to(adapter.model.device)
    tables = {"router": table, "gates": gates}
    return Artefacts(scorers={"predictor": predictor.eval()}, alpha_bar=(0.5,) * nfe, tables=tables)


@torch.inference_mode()
def sample(
    adapter: Adapter, name: str, options: dict, blocks, nfe: int = NFE, samples: int = SAMPLES
) -> tuple[Tensor, Passes]:
    index, settings = torch.arange(samples), settings_of(adapter)
    method = make_method(name, options)
    sampler, run = start_run(adapter, method, nfe, settings, index, artefacts(adapter, nfe))
    passes = Passes(adapter, run, method.start, blocks)
    x = initial_noise(adapter, 0, index).to(DEVICE)
    *_, (_, _, final) = denoise(passes, sampler, x, make_prompt(adapter, samples))
    return final, passes


VARIANTS = [
    (name, FEW.get(name, {}) | keys)
    for name in method_names()
    for keys in (
        [{"keys": "cached"}, {"keys": "fresh"}, {"keys": "recomputed"}]
        if "keys" in type(make_method(name, {})).model_fields
        else [{}, TOCA_WITH_TEXT]
        if name == "toca"
        else [{}]
    )
]


@pytest.mark.parametrize(
    "model, name, options",
    [
        pytest.param(
            model,
            name,
            options,
            id=f"{model} {name} {options.get('keys', options.get('schedule', ''))}",
            marks=marks_of(SOLVERS, model, name),
        )
        for model in SOLVERS
        for name, options in VARIANTS
    ],
    indirect=["model"],
)
def test_every_method_samples_alike(model: Adapter, name: str, options: dict) -> None:
    plain, engine = sample(model, name, options, PlainBlocks)
    fused, fused_engine = sample(model, name, options, CPU)
    assert fused_engine.plans == engine.plans
    assert fused_engine.macs == engine.macs
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


FEWER_TOKENS = {
    "tiny-dit": {"sample_size": 8},
    "tiny-pixart": {"sample_size": 8},
    "tiny-osp": {"sample_height": 8, "sample_width": 4},
}


@pytest.mark.parametrize(
    "name, method, options",
    [
        ("tiny-dit", "tokencache", ONE_FULL),
        ("tiny-pixart", "tokencache", ONE_FULL),
        ("tiny-pixart", "toca", TOCA_WITH_TEXT | {"cell": 2}),
        ("tiny-osp", "tokencache", ONE_FULL),
    ],
)
def test_the_kernels_sample_alike(name: str, method: str, options: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full step and another through the kernels themselves, whose every part is tested in test_kernels.

    Of few tokens and heads, because kernels have programs for each, which the interpreter takes milliseconds for."""
    pytest.importorskip("triton")
    model = make_adapter(name, DEVICE, num_heads=2, **FEWER_TOKENS[name])
    plain, _ = sample(model, method, options, PlainBlocks, nfe=2, samples=1)
    monkeypatch.setattr(choice, "serves", lambda observed: True)
    fused, _ = sample(model, method, options, INTERPRETED, nfe=2, samples=1)
    close(fused, plain)


UNITS = [Block(block) for block in range(4)]
SOME = Tokens(torch.tensor([[3, 1], [5, 9], [0, 63], [8, 7]], device=DEVICE))
CASES: dict[str, Callable[[list[Site]], tuple[Plan, Plan]]] = {  # sites -> plans of three full steps, and of another
    "everything": lambda sites: (Plan(), Plan()),
    "blocks held": lambda sites: (every_unit(UNITS, ALL), every_unit(UNITS[:3], NONE)),
    "branches held": lambda sites: (every_unit(sites, ALL), every_unit(sites, NONE)),
    "forecast": lambda sites: (every_unit(sites, ALL, Forecast(2)), every_unit(sites, NONE, Forecast(2))),
    "a span held": lambda sites: (every_unit([Span(1, 3)], ALL), every_unit([Span(1, 3)], NONE)),
    "branches of some tokens": lambda sites: (
        every_unit(sites, ALL, keys="cached"),
        every_unit(sites[2:], SOME, keys="cached"),
    ),
    "decided at the block": lambda sites: (
        every_unit(UNITS, ALL),
        Plan({unit: Decision(Deferred(lambda stream: top_tokens(stream()[..., 0], 5), NONE)) for unit in UNITS[:3]}),
    ),
    "observed": lambda sites: (
        Plan({site: Decision(ALL, observe=site.part) for site in sites if site.part != "mlp"}),
        Plan({site: Decision(SOME, observe="cross") for site in sites if site.part == "cross"}),
    ),
    "blocks observed": lambda sites: (
        every_unit(UNITS, ALL),
        Plan({unit: Decision(ALL, observe=sites[-2].part) for unit in UNITS}),
    ),
}


@pytest.mark.parametrize("case", CASES)
@torch.inference_mode()
def test_every_kind_of_decision_gives_the_same_tokens(model: Adapter, case: str) -> None:
    full, reused = CASES[case](list(model.shape.sites))
    outputs, observed = [], []
    for blocks in (PlainBlocks, CPU):
        run = Run(model.shape, (900, 600, 300, 100), GuidedPair(), torch.arange(SAMPLES, device=DEVICE))
        engine = Engine(model, run, blocks=blocks)
        latent = initial_noise(model, 0, torch.arange(2 * SAMPLES)).to(DEVICE)
        context = engine.prepare(model.guided(make_prompt(model, SAMPLES)))
        for step, plan in enumerate((full, full, full, reused)):
            x, condition = engine.embed(step, latent + step, context)
            hidden = engine.hidden(plan, step, x, condition)
        outputs.append((hidden, engine.blocks.unembed(condition), engine.plans))
        observed.append([*engine.cache._attention.values(), *engine.cache._entropy.values()])
    (plain, plain_output, plans), (fused, fused_output, fused_plans) = outputs
    assert plans == fused_plans
    close(fused, plain)
    close(fused_output, plain_output)
    assert bool(observed[0]) == ("observed" in case)
    for expected, actual in zip(*observed, strict=True):
        close(actual, expected)


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU: captured graphs")
@pytest.mark.parametrize("name", method_names())
def test_replayed_graphs_sample_alike(model: Adapter, name: str) -> None:
    options = FEW.get(name, {})
    plain, _ = sample(model, name, options, PlainBlocks)
    replay = Replay(
        model,
        make_method(name, options),
        NFE,
        settings_of(model),
        torch.arange(SAMPLES),
        artefacts(model, NFE),
        prompts=lambda index: make_prompt(model, len(index)),
    )
    for _ in range(2):  # a repetition starts afresh
        close(replay.run(), plain)
