"""The harness against outputs of the original public code (tests/golden; see docs/reproduction-notes.md, "Goldens")."""

import json

import pytest
import torch

from tcbench.engine import Engine
from tcbench.files import read_tensors
from tcbench.method import Artefacts
from tcbench.registry import make_method
from tcbench.sampling import SamplerSettings, denoise, guide, start_run

from .conftest import GOLDEN

SETTINGS = SamplerSettings(guidance_scale=1.5)


def run_case(adapter, method, nfe):
    """(timesteps, eps [S, n, C, H, W], final [n, C, H, W], executed plans) from the golden noise and labels."""
    inputs, _ = read_tensors(GOLDEN / "inputs.safetensors")
    x, label = inputs["z"], inputs["labels"]
    sampler, run = start_run(adapter, method, nfe, SETTINGS, torch.arange(len(x)), Artefacts())
    engine = Engine(adapter, run, method.start(run))
    with torch.inference_mode():
        steps = list(denoise(adapter, engine, sampler, SETTINGS, x, label))
    return sampler.timesteps, torch.stack([eps for eps, _, _ in steps]), steps[-1][2], engine.plans


@pytest.mark.parametrize(
    ("case", "method"),
    [("full_ddim20", make_method("uncached", {})), ("fora_ddim20_n3", make_method("fora", {"interval": 3}))],
)
def test_trajectory(golden_model, case, method):
    expected, _ = read_tensors(GOLDEN / f"{case}.safetensors")
    timesteps, eps, final, plans = run_case(golden_model, method, 20)
    assert timesteps == tuple(expected["timesteps"].tolist())
    assert (eps - expected["eps"]).abs().max() <= 3e-5
    assert (final - expected["final"]).abs().max() <= 1e-3
    everything = torch.ones(20, golden_model.shape.num_blocks, 2)
    for step, plan in enumerate(plans):
        for block, (attn, mlp) in enumerate(expected.get("recomputed", everything)[step].tolist()):
            for branch, recomputed in (("attn", attn), ("mlp", mlp)):
                assert (plan.get(f"block {block} {branch}", "all") == "all") == bool(recomputed), (step, block, branch)


def test_every_step_alone(golden_model):
    """From the stored inputs, so that errors do not add up; tight enough to see a LayerNorm epsilon."""
    expected, _ = read_tensors(GOLDEN / "full_ddim20.safetensors")
    label = read_tensors(GOLDEN / "inputs.safetensors")[0]["labels"]
    rows = torch.cat([label, torch.full_like(label, golden_model.spec.num_classes)])
    method = make_method("uncached", {})
    _, run = start_run(golden_model, method, 20, SETTINGS, torch.arange(len(label)), Artefacts())
    engine = Engine(golden_model, run, method.start(run))
    with torch.inference_mode():
        for step, x in enumerate(expected["x_in"]):
            eps = guide(engine(step, torch.cat([x, x]), rows), 1.5, 3, 4)
            assert (eps - expected["eps"][step]).abs().max() <= 1e-5


def test_respaced_alphas_match_the_reference():
    from tcbench.sampling import respaced_timesteps, training_alphas_cumprod

    settings = json.loads((GOLDEN / "full_ddim20.json").read_text())
    alphas = training_alphas_cumprod()[list(respaced_timesteps(20))]
    assert alphas == pytest.approx(settings["alphas_cumprod_used"], rel=1e-9)
