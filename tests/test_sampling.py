"""Noise keyed by what it is for, the reference's time grid and DDIM step, guidance, and whole batches."""

import copy
from itertools import pairwise
from typing import get_args

import numpy as np
import pytest
import torch
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from torch import Tensor

from tcbench.budget.costing import macs_of
from tcbench.errors import UserError
from tcbench.guidance import GuidedPair
from tcbench.method import Look, Method
from tcbench.models.dit import DiTAdapter
from tcbench.plan import Plan
from tcbench.registry import make_method
from tcbench.samplers import (
    AncestralDDPM,
    ReferenceDDIM,
    SamplerSettings,
    Solver,
    make_sampler,
    training_alphas_cumprod,
)
from tcbench.sampling import Samples, initial_noise, sample_batch, sample_labels
from tcbench.tensors import draws
from tcbench.timesteps import TRAIN_TIMESTEPS, respaced_timesteps
from tests.conftest import make_adapter
from tests.floors import ANCESTRAL, SAMPLER, TRAJECTORY, assert_close

SETTINGS = SamplerSettings(guidance_scale=1.5)


# --- noise


@pytest.mark.parametrize(
    "draw",
    [lambda seed, index: draws.gaussian(seed, index, (2, 3)), lambda seed, index: draws.uniform(seed, index, 6, 4, 1)],
    ids=["gaussian", "uniform"],
)
def test_noise_depends_on_seed_and_index_alone(draw) -> None:
    index = torch.arange(20)
    torch.manual_seed(0)
    everything, state = draw(7, index), torch.get_rng_state()
    assert torch.equal(torch.get_rng_state(), state)  # the global generator is not touched ...
    torch.manual_seed(1)  # ... nor read
    order = torch.randperm(20)
    assert torch.equal(draw(7, order), everything[order])
    assert torch.equal(draw(7, index[13:14]), everything[13:14])
    assert not (draw(8, index) == everything).flatten(1).all(1).any()
    assert len(torch.unique(everything.flatten(1), dim=0)) == 20


def test_gaussian_moments() -> None:
    x = draws.gaussian(0, torch.arange(2000), (4, 8, 8)).flatten(1).double()
    error = x.numel() ** -0.5
    assert x.mean().abs() < 5 * error
    assert (x.var() - 1).abs() < 5 * 2**0.5 * error
    assert (x.pow(4).mean() - 3).abs() < 5 * 96**0.5 * error
    correlation = torch.corrcoef(x[:200]).fill_diagonal_(0)
    assert correlation.abs().max() < 6 * x.shape[1] ** -0.5


def test_uniform_moments() -> None:
    """Over tokens, samples, steps and blocks together, and between any two (sample, step, block)."""
    index = torch.arange(6)
    u = torch.stack([draws.uniform(0, index, 1024, step, block) for step in range(5) for block in range(4)]).double()
    assert u.min() >= 0 and u.max() < 1
    error = u.numel() ** -0.5
    assert (u.mean() - 1 / 2).abs() < 5 * 12**-0.5 * error
    assert (u.var() - 1 / 12).abs() < 5 * 180**-0.5 * error
    correlation = torch.corrcoef(u.flatten(0, 1)).fill_diagonal_(0)
    assert correlation.abs().max() < 6 * 1024**-0.5
    counts = torch.histc(u, bins=64, min=0, max=1)
    assert ((counts - counts.mean()).square() / counts.mean()).sum() < 63 + 5 * (2 * 63) ** 0.5  # chi-square


def test_purposes_do_not_collide() -> None:
    seen = [draws.uniform(0, torch.tensor([3]), 4, step, block) for step in range(30) for block in range(30)]
    assert len(torch.unique(torch.cat(seen), dim=0)) == 900


def splitmix64(z: int) -> int:
    """The finaliser in Python's integers."""
    mask = (1 << 64) - 1
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return z ^ (z >> 31)


@pytest.mark.parametrize("purpose", [(), (0, 0), (1, 0), (999, 55)])
@pytest.mark.parametrize(("seed", "index"), [(0, 0), (123, 49_999), (0, (1 << 40) + 5)])
def test_uniform_is_splitmix64(seed: int, index: int, purpose: tuple[int, ...]) -> None:
    """torch has no unsigned 64-bit arithmetic; the signed one must wrap to the same bits."""
    gamma, mask = 0x9E3779B97F4A7C15, (1 << 64) - 1
    key = splitmix64((index + splitmix64((seed + gamma) & mask)) & mask)
    for number in purpose:
        key = splitmix64((key + (number + 1) * gamma) & mask)
    expected = [(splitmix64((key + token * gamma) & mask) >> 40) / (1 << 24) for token in range(1, 6)]
    assert draws.uniform(seed, torch.tensor([index]), 5, *purpose).tolist() == [expected]


def test_uniform_reads_nothing_back() -> None:
    """On meta tensors every read of a value raises."""
    assert draws.uniform(0, torch.arange(3, device="meta"), 8, 2, 1).shape == (3, 8)


# --- time


@pytest.mark.parametrize(
    ("nfe", "first", "last"),
    [
        (250, [0, 4, 8, 12], [995, 999]),
        (50, [0, 20, 41, 61], [979, 999]),
        (20, [0, 53, 105], [946, 999]),
        (10, [0, 111, 222], [888, 999]),
    ],
)
def test_respaced_timesteps(nfe: int, first: list[int], last: list[int]) -> None:
    ascending = list(respaced_timesteps(nfe)[::-1])
    assert ascending[: len(first)] == first and ascending[-2:] == last


def test_every_number_of_steps() -> None:
    for nfe in range(2, 1001):
        timesteps = respaced_timesteps(nfe)
        assert len(timesteps) == nfe and timesteps[-1] == 0 and timesteps[0] == 999
        assert all(before > after for before, after in pairwise(timesteps))


def test_ties_fall_as_repeated_addition_has_them() -> None:
    """With 21 steps the 11th timestep is 499.5, or a little less after ten additions of 49.95."""
    total = 0.0
    for _ in range(10):
        total += 999 / 20
    assert total < 499.5 and respaced_timesteps(21)[10] == 499


def test_leading_is_ddim_n() -> None:
    assert respaced_timesteps(50, "leading") == tuple(range(980, -1, -20))
    for nfe in range(2, 1001):
        strides = [stride for stride in range(1, 1000) if len(range(0, TRAIN_TIMESTEPS, stride)) == nfe]
        if strides:
            assert respaced_timesteps(nfe, "leading")[::-1] == tuple(range(0, TRAIN_TIMESTEPS, strides[0]))
        else:
            with pytest.raises(UserError, match=f"no whole stride gives {nfe} leading timesteps"):
                respaced_timesteps(nfe, "leading")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [((1,), "nfe: 1 .*2 to 1000"), ((1001,), "nfe: 1001 .*2 to 1000"), ((50, "trailing"), "spacing: 'trailing'")],
)
def test_impossible_grids_are_refused(arguments: tuple, says: str) -> None:
    with pytest.raises(UserError, match=says):
        respaced_timesteps(*arguments)


# --- DDIM


def ddim(eps: Tensor, x: Tensor, alpha: float, next_alpha: float) -> tuple[Tensor, Tensor]:
    """Eq. (12) of Song et al. 2020 with eta 0, in float64."""
    x0 = (x.double() - (1 - alpha) ** 0.5 * eps.double()) / alpha**0.5
    return next_alpha**0.5 * x0 + (1 - next_alpha) ** 0.5 * eps.double(), x0


@pytest.mark.parametrize(("nfe", "spacing"), [(10, "linspace"), (50, "linspace"), (7, "leading")])
def test_ddim_step(nfe: int, spacing: str) -> None:
    sampler = ReferenceDDIM(nfe, spacing)
    alphas = [*training_alphas_cumprod()[list(sampler.timesteps)], 1.0]
    eps, x = torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    for step in range(nfe):
        expected, expected_x0 = ddim(eps, x, alphas[step], alphas[step + 1])
        after, x0 = sampler.step(eps, step, x)
        assert_close(after, expected, SAMPLER)
        assert_close(x0, expected_x0, SAMPLER)
    assert torch.equal(after, x0)  # the last step ends at the clean image


@pytest.mark.parametrize(("nfe", "spacing"), [(10, "linspace"), (50, "leading")])
def test_ancestral_step(nfe: int, spacing: str) -> None:
    """diffusers' ancestral step on the respaced chain, fed with the noise that it draws."""
    shape = (nfe, 3, 4, 8, 8)
    eps, x, variance = torch.randn(3, *shape[1:], generator=torch.Generator().manual_seed(0))
    noise = torch.cat(
        [torch.randn(1, *shape[1:], generator=torch.Generator().manual_seed(step)) for step in range(nfe)]
    )
    sampler = AncestralDDPM(nfe, noise[:-1], spacing)
    kept = training_alphas_cumprod()[list(sampler.timesteps[::-1])]
    theirs = DDPMScheduler(
        num_train_timesteps=nfe,
        trained_betas=1 - kept / np.concatenate([[1.0], kept[:-1]]),
        variance_type="learned_range",
        clip_sample=False,
        timestep_spacing="leading",
    )
    theirs.set_timesteps(nfe)
    for step in range(nfe):
        after, x0 = sampler.step(eps, step, x, variance.tanh())
        expected = theirs.step(
            torch.cat([eps, variance.tanh()], dim=1), nfe - 1 - step, x, generator=torch.Generator().manual_seed(step)
        )
        assert_close(x0, expected.pred_original_sample, SAMPLER)
        assert_close(after, expected.prev_sample, ANCESTRAL)


def test_ancestral_sampling_needs_a_learned_variance() -> None:
    eps, x = torch.randn(2, 3, 1, 8, 8)
    sampler = AncestralDDPM(10, torch.zeros(10, 3, 1, 8, 8))
    for variance in (None, eps[:, :0]):
        with pytest.raises(UserError, match="needs a model that learned its variance"):
            sampler.step(eps, 0, x, variance)


def test_rows_at_different_steps() -> None:
    sampler, step_R = ReferenceDDIM(20), torch.tensor([0, 7, 19])
    eps, x = torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    rows = sampler.step_rows(eps, step_R, x, torch.Generator())
    for row, step in enumerate(step_R.tolist()):
        assert_close(rows[row], sampler.step(eps[row], step, x[row])[0], SAMPLER)
    alpha = torch.tensor(training_alphas_cumprod()[np.array(sampler.timesteps)[step_R]])[:, None, None, None]
    assert_close(sampler.noised(x, step_R, eps), alpha.sqrt() * x + (1 - alpha).sqrt() * eps, SAMPLER)


def test_guidance_leaves_the_fourth_channel_conditional() -> None:
    output = torch.randn(4, 8, 2, 2, generator=torch.Generator().manual_seed(0))
    conditional, unconditional = output.chunk(2)
    eps = GuidedPair(1.5, channels=3).combine([output[:, :4]])
    assert eps.shape == (2, 4, 2, 2)
    assert_close(eps[:, :3], unconditional[:, :3] + 1.5 * (conditional - unconditional)[:, :3], SAMPLER)
    assert torch.equal(eps[:, 3], conditional[:, 3])
    assert torch.equal(GuidedPair(1.0, channels=3).combine([output[:, :4]]), conditional[:, :4])


# --- batches


def sampled(adapter: DiTAdapter, *index: int, method: str = "random_tokens", traced: int = 0) -> Samples:
    options = {"random_tokens": {"num_full_steps": 2, "refiner_blocks": 1}}.get(method, {})
    return sample_batch(adapter, make_method(method, options), 5, SETTINGS, torch.tensor(index), traced=traced)


@pytest.mark.parametrize("method", ["uncached", "random_tokens"])
def test_batches_and_shards_do_not_change_a_sample(tiny, method: str) -> None:
    whole = sampled(tiny, *range(6), method=method)
    parts = [sampled(tiny, *index, method=method) for index in ([0], [1, 2, 3], [4, 5])]
    image = torch.cat([part.image for part in parts])
    assert_close(image, whole.image, TRAJECTORY)
    assert torch.equal(torch.cat([part.label for part in parts]), whole.label)
    assert all(part.macs == whole.macs for part in parts)


def test_what_a_batch_returns(tiny) -> None:
    samples = sampled(tiny, 8, 9, 10, traced=2)
    assert samples.image.shape == (3, 4, 16, 16) and samples.image.dtype == torch.float32
    assert samples.label.tolist() == [8, 9, 0]
    assert samples.x0.shape == samples.xt.shape == (5, 2, 4, 16, 16)
    assert torch.equal(samples.xt[-1], samples.image[:2]) and torch.equal(samples.x0[-1], samples.image[:2])
    assert samples.plans.i_steps == (0, 2) and len(samples.plans.steps) == 5
    # rows x tokens x width x float32, times update, keys and values of three blocks
    assert samples.cache_bytes == 6 * 64 * 96 * 4 * 3 * 3
    assert sampled(tiny, 8, 9, 10).x0.shape == (5, 0, 4, 16, 16)


def test_initial_noise_and_labels(tiny) -> None:
    index = torch.arange(20)
    assert torch.equal(initial_noise(tiny, 0, index)[5:7], initial_noise(tiny, 0, index[5:7]))
    assert torch.bincount(sample_labels(index, 10)).tolist() == [2] * 10


def test_guidance_scale_matters(tiny) -> None:
    method, index = make_method("uncached", {}), torch.arange(2)
    images = [sample_batch(tiny, method, 3, SamplerSettings(scale), index).image for scale in (1.0, 1.5)]
    assert not torch.equal(*images)


def test_a_sample_that_is_not_finite_is_named(tiny) -> None:
    """NaN in the embedding of class 2 alone: of samples 10 to 13 only number 12 has that class."""
    broken = DiTAdapter(copy.deepcopy(tiny.model), tiny.spec)
    with torch.no_grad():
        broken.blocks[0].norm1.emb.class_embedder.embedding_table.weight[2] = float("nan")
    with pytest.raises(UserError, match=r"uncached: sample 12 became NaN or infinite") as caught:
        sampled(broken, 10, 11, 12, 13, method="uncached")
    assert "\n" not in str(caught.value)


def test_seeds_that_agree_in_their_low_32_bits_give_other_noise() -> None:
    """A generator that looks at 32 bits of its key would repeat noise among some ten thousand samples."""
    keys = draws._key(0, torch.arange(400_000))
    low = keys % (1 << 32)
    first = low.unique(return_inverse=True)[1]
    twice = (first.bincount() > 1).nonzero().flatten()
    assert len(twice), "the test needs a pair of keys that agree in 32 bits"
    pair = (first == twice[0]).nonzero().flatten()
    drawn = draws.gaussian(0, pair, (8,))
    assert not torch.equal(drawn[0], drawn[1])


@pytest.mark.parametrize("solver", get_args(Solver))
def test_a_method_sees_the_noise_level_of_a_step(solver: Solver) -> None:
    """What the sampler scales clean latent and noise by; costing knows only that there is one."""
    seen: list[Tensor] = []

    class Looking(Method):
        name = "looking"
        label = "looking"

        def plan(self, look: Look) -> Plan:
            seen.append(look.noise_level())
            return Plan()

    settings, index = SamplerSettings(1.5, solver=solver), torch.arange(2)
    adapter = make_adapter("tiny-dit")
    sample_batch(adapter, Looking(), 4, settings, index)
    sampler = make_sampler(adapter, 4, settings, index)
    expected = torch.stack([sampler.signal[:4], sampler.sigma[:4]], dim=1)
    assert torch.equal(torch.stack(seen), expected[:, None].expand(-1, 4, -1))
    seen.clear()
    macs_of("tiny-dit", Looking(), 4)
    assert len(seen) == 4 and all(level.shape[1:] == (2,) for level in seen)
