"""DPM-Solver++ and Euler-ancestral: against diffusers' schedulers, and what every chain of noise levels keeps."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from diffusers.schedulers.scheduling_unipc_multistep import UniPCMultistepScheduler
from torch import Tensor

from tcbench.errors import UserError
from tcbench.samplers import (
    AncestralDDPM,
    Chain,
    EulerAncestral,
    FlowEuler,
    FlowUniPC,
    ReferenceDDIM,
    ReferenceDPMSolver,
    SamplerSettings,
    make_sampler,
    passed_levels,
    shift_exponent,
    zero_snr_scheduler,
)
from tests.floors import ANCESTRAL, SAMPLER, assert_close

from .conftest import make_adapter

SHAPE = (2, 4, 8, 8)


def noise(seed: int) -> Tensor:
    return torch.randn(SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def toy(x: Tensor, kept: float) -> Tensor:
    """The exact noise prediction for data of variance 1/4: deterministic, and curved in time."""
    return (1 - kept) ** 0.5 * x / (kept / 4 + 1 - kept)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(5)


def chains(nfe: int) -> dict[str, Chain]:
    return {
        "ddim": ReferenceDDIM(nfe),
        "dpm": ReferenceDPMSolver(nfe),
        "euler_ancestral": EulerAncestral(nfe, lambda step: torch.zeros(SHAPE)),
        "flow": FlowEuler(nfe, shift=3.0),
        "flow_unipc": FlowUniPC(nfe, shift=3.0),
    }


def walk(sampler: ReferenceDPMSolver, x: Tensor) -> Tensor:
    for step in range(len(sampler.timesteps)):
        x, _ = sampler.step(toy(x, sampler.signal[step].item() ** 2), step, x)
    return x


@pytest.mark.parametrize("nfe", [5, 20, 50])
def test_euler_ancestral_is_diffusers_with_noise_of_our_own(nfe: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Step by step in diffusers' units, in which latents are divided by sqrt(kept)."""
    scheduler = zero_snr_scheduler()
    scheduler.set_timesteps(nfe)
    ours = EulerAncestral(nfe, lambda step: noise(step))
    assert ours.timesteps == tuple(scheduler.timesteps.tolist()) and ours.timesteps[0] == 999
    x = noise(1000)
    for step, timestep in enumerate(scheduler.timesteps):
        theirs = x * (scheduler.sigmas[step].double() ** 2 + 1) ** 0.5
        assert_close(scheduler.scale_model_input(theirs, timestep), x, SAMPLER)
        output = noise(2000 + step)
        module = "diffusers.schedulers.scheduling_euler_ancestral_discrete.randn_tensor"
        monkeypatch.setattr(module, lambda *_, step=step, **__: noise(step))
        stepped = scheduler.step(output, timestep, theirs)
        following, x0 = ours.step(output, step, x)
        scale = (scheduler.sigmas[step + 1].double() ** 2 + 1) ** 0.5
        assert_close(x0, stepped.pred_original_sample, SAMPLER)
        assert_close(following * scale, stepped.prev_sample, ANCESTRAL)
        x = following
    assert torch.equal(following, x0)


@pytest.mark.parametrize("nfe", [4, 28])
@pytest.mark.parametrize("tokens", [256, 1024, 4096])
def test_euler_along_a_flow_is_fluxpipelines(nfe: int, tokens: int) -> None:
    """To the bit, timesteps and noise levels too; the shift by tokens is the pipeline's own."""
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / nfe, nfe), mu=calculate_shift(tokens))
    ours = FlowEuler(nfe, "by_tokens", tokens)
    assert ours.timesteps == tuple(scheduler.timesteps.tolist()) and torch.equal(ours.sigma, scheduler.sigmas)
    assert shift_exponent(tokens) == calculate_shift(tokens)
    x = noise(0).float()
    for step, timestep in enumerate(scheduler.timesteps):
        output = noise(step).float()
        following, _ = ours.step(output, step, x)
        assert_close(following, scheduler.step(output, timestep, x).prev_sample, SAMPLER)
        x = following


def test_unipc_along_a_flow_is_wanpipelines() -> None:
    """As the conversion of Wan 2.1 for 480 lines sets the scheduler; its last step leaves no noise."""
    settings = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
    scheduler, ours, x = UniPCMultistepScheduler(**settings), FlowUniPC(8, 3.0), noise(0).float()
    scheduler.set_timesteps(8)
    assert ours.timesteps == tuple(scheduler.timesteps.tolist()) and ours.sigma[-1] == 0
    theirs = x
    for step, timestep in enumerate(scheduler.timesteps):
        output = noise(step).float()
        x, x0 = ours.step(output, step, x)
        theirs = scheduler.step(output, timestep, theirs).prev_sample
        assert torch.equal(x, theirs)
    assert_close(x, x0, SAMPLER)


@pytest.mark.parametrize(("nfe", "error"), [(8, 0.04), (20, 0.01), (50, 0.003)])
def test_dpm_is_diffusers_up_to_rounded_timesteps(nfe: int, error: float) -> None:
    scheduler = DPMSolverMultistepScheduler(beta_schedule="linear", final_sigmas_type="sigma_min")
    scheduler.set_timesteps(nfe)
    x = ours = noise(0)
    for step, timestep in enumerate(scheduler.timesteps):
        kept = 1 / (1 + scheduler.sigmas[step].item() ** 2)
        x = scheduler.step(toy(x, kept), timestep, x).prev_sample
    assert (walk(ReferenceDPMSolver(nfe), ours) - x).abs().max() < error * x.abs().max()


def test_dpm_converges_at_second_order() -> None:
    exact = walk(ReferenceDPMSolver(900), noise(0))
    errors = [(walk(ReferenceDPMSolver(nfe), noise(0)) - exact).abs().max().item() for nfe in (40, 80)]
    assert 3 < errors[0] / errors[1] < 5


def test_dpm_walks_uniformly_and_stops_a_step_before_the_image() -> None:
    sampler = ReferenceDPMSolver(20)
    assert sampler.timesteps == pytest.approx([999 - 49.95 * step for step in range(20)])
    assert sampler.signal[-1].item() ** 2 == pytest.approx(1 - 1e-4) and len(sampler.signal) == 21


@pytest.mark.parametrize("name", ["ddim", "dpm", "euler_ancestral", "flow", "flow_unipc"])
def test_a_chain_trains_on_its_own_grid(name: str) -> None:
    """From the right prediction the deterministic step leads from q(x_t | x0) to q(x_s | x0), with the same noise."""
    chain = chains(6)[name]
    x0, eps, step = noise(0), noise(1), torch.tensor([1, 4])
    x = chain.noised(x0, step, eps)
    output = chain.target(x0, step, eps)
    assert torch.equal(output, eps) == (chain.prediction == "eps")
    levels = (level[step].view(-1, 1, 1, 1) for level in (chain.signal, chain.sigma))
    if name != "euler_ancestral":  # whose step adds noise
        assert_close(chain.step_rows(output, step, x, generator()), chain.noised(x0, step + 1, eps), SAMPLER)
    recovered, noise_again = chain.x0_and_eps(output, *levels, x)
    assert_close(recovered, x0, SAMPLER)
    assert_close(noise_again, eps, SAMPLER)
    assert len(chain.signal) == len(chain.sigma) == 7 and (chain.signal.diff() > 0).all()


@pytest.mark.parametrize("name", ["dpm", "euler_ancestral"])
def test_first_steps_without_noise_are_ddim(name: str) -> None:
    """DPM-Solver++'s first step is of first order; an ancestral step to the clean image adds nothing."""
    chain = chains(6)[name]
    step = 0 if name == "dpm" else 5
    following, _ = chain.step(noise(2), step, noise(3))
    assert_close(following, chain.step_rows(noise(2), torch.full((2,), step), noise(3), generator()), SAMPLER)


@pytest.mark.parametrize("name", ["ddim", "dpm", "flow", "flow_unipc"])
def test_deterministic_chains_draw_nothing_in_training(name: str) -> None:
    drawing = generator()
    chains(6)[name].step_rows(noise(2), torch.tensor([1, 4]), noise(3), drawing)
    assert torch.equal(drawing.get_state(), generator().get_state())


@pytest.mark.parametrize("step", [0, 3, 5])
def test_ancestral_pairs_are_the_samplers_own_steps(step: int) -> None:
    """What is added in training is what sampling adds: noise of variance signal^2 up^2, on top of the same mean."""
    nfe, rows = 6, 2000
    chain = EulerAncestral(nfe, lambda _: torch.zeros(SHAPE[1:]))
    output, x = (noise(seed)[:1].expand(rows, *SHAPE[1:]) for seed in (2, 3))
    pairs = chain.step_rows(output, torch.full((rows,), step), x, generator())
    mean, _ = chain.step(output[0], step, x[0])
    here, there = ((1 / level**2 - 1) ** 0.5 for level in chain.signal[step : step + 2].double().tolist())
    variance = chain.signal[step + 1].item() ** 2 * there**2 * (1 - there**2 / here**2)
    assert pairs.var(0).mean().item() == pytest.approx(variance, rel=0.01, abs=1e-12)
    assert ((pairs.mean(0) - mean).abs() <= 5 * (variance / rows) ** 0.5 + 1e-5 * mean.abs().max()).all()


@pytest.mark.parametrize("step", [0, 3, 5])
def test_pairs_from_the_posterior_are_ancestral_steps(step: int) -> None:
    """Those of the reference's ancestral sampler at the least variance, beta-tilde, with the same noise."""
    output, x = noise(2), noise(3)
    added = torch.randn(SHAPE, generator=generator()).double()
    expected, _ = AncestralDDPM(6, added.expand(6, *SHAPE)).step(output, step, x, variance=-torch.ones(SHAPE))
    drawn = ReferenceDDIM(6).posterior_rows(output, torch.full(SHAPE[:1], step), x, generator())
    assert_close(drawn, expected, SAMPLER)


@pytest.mark.parametrize("solver", ["ddim", "dpm", "euler_ancestral"])
def test_impossible_numbers_of_steps_are_refused(solver: str) -> None:
    with pytest.raises(UserError, match="give 2 to 1000"):
        make_sampler(make_adapter("tiny-pixart"), 1, SamplerSettings(1.5, solver=solver), torch.arange(1))


def test_unknown_solvers_are_refused() -> None:
    with pytest.raises(UserError, match="solver: 'heun' is not one of ddim, dpm, euler_ancestral"):
        make_sampler(make_adapter("tiny-pixart"), 4, SamplerSettings(1.5, solver="heun"), torch.arange(1))


def test_runs_of_other_steps_walk_the_same_noise() -> None:
    """Where the predicted x0 is one, x is one at every level that both reach: 5 steps are every second of 10."""
    clean, start = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(0))
    index = torch.arange(SHAPE[0])
    adapter = SimpleNamespace(spec=SimpleNamespace(latent_shape=SHAPE[1:]))
    settings = SamplerSettings(1.0, seed=3, solver="euler_ancestral")
    reached = {}
    for nfe in (5, 10):
        sampler, x = make_sampler(adapter, nfe, settings, index), start
        for step in range(nfe - 1):
            signal, sigma = sampler.signal[step], sampler.sigma[step]
            eps = (x - signal * clean) / sigma
            x, _ = sampler.step(signal * eps - sigma * clean, step, x)
            reached[nfe, sampler.timesteps[step + 1]] = x
    shared = [timestep for nfe, timestep in reached if nfe == 5]
    assert len(shared) == 4
    for timestep in shared:
        torch.testing.assert_close(reached[5, timestep], reached[10, timestep], rtol=0, atol=2e-5)
    assert (reached[5, shared[1]] - reached[5, shared[0]]).abs().max() > 0.1


@pytest.mark.parametrize("nfe", [3, 7])
def test_the_noise_of_a_step_is_standard_normal(nfe: int) -> None:
    """Its levels are consecutive, none is passed twice, and squared weights add up to 1."""
    passed = passed_levels(nfe)
    assert len(passed) == nfe - 1
    levels = [timestep for step in passed for timestep, _ in reversed(step)]
    assert (
        levels == sorted(set(levels), reverse=True) == list(range(levels[0], levels[-1] - 1, -1)) and levels[0] == 995
    )
    for step in passed:
        assert sum(weight**2 for _, weight in step) == pytest.approx(1)
