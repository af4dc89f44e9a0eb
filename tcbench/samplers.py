"""The references' samplers: one step back along a chain of noise levels.

All work on latents as the networks see them, x = signal x0 + sigma noise. Diffusion chains preserve variance,
signal^2 + sigma^2 = 1; flows are straight, signal + sigma = 1.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import pairwise
from typing import ClassVar, Literal, Protocol, get_args

import numpy as np
import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from diffusers.schedulers.scheduling_euler_ancestral_discrete import EulerAncestralDiscreteScheduler
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from diffusers.schedulers.scheduling_unipc_multistep import UniPCMultistepScheduler
from torch import Tensor

from tcbench.errors import UserError
from tcbench.models.adapter import Adapter
from tcbench.models.specs import Shift
from tcbench.tensors import draws
from tcbench.timesteps import TRAIN_TIMESTEPS, respaced_timesteps

Solver = Literal["ddim", "dpm", "euler_ancestral", "flow", "flow_unipc"]
"""`ddim` is DiT's sampler, `dpm` PixArt-alpha's, `euler_ancestral` Open-Sora-Plan's, `flow` FLUX.1's, `flow_unipc`
Wan's."""

Prediction = Literal["eps", "v", "flow"]
"""What a network predicts: the noise, signal noise - sigma x0 (Salimans and Ho 2022), or noise - x0."""


def training_alphas_cumprod() -> np.ndarray:
    """DiT's noise schedule: linear betas 1e-4..0.02 over 1000 timesteps; cumulative alphas, float64 [1000]."""
    return np.cumprod(1 - np.linspace(1e-4, 0.02, TRAIN_TIMESTEPS))


class Sampler(Protocol):
    """One step back along a chain of noise levels; made for one run, because some remember the last steps.

    Attributes:
        captures: whether steps can be captured in a CUDA graph.
    """

    captures: ClassVar[bool]

    @property
    def timesteps(self) -> tuple[float, ...]:
        """What the network is told, in sampling order."""

    def step(self, output: Tensor, step: int, x: Tensor, variance: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(the next latent, the predicted x0), from what the network predicts at sampling step `step`.

        `variance` is the rest of the model's output, the logits of a learned variance, if it has one.
        """


class Chain:
    """The noise levels of a sampler, for training on its grid.

    Attributes:
        timesteps: what the network is told, in sampling order.
        prediction: what the network predicts.
        captures: whether its steps can be captured in a CUDA graph.
        signal, sigma: scales of the clean latent and of the noise at every step, and at the end of the chain; float32
            [S + 1].
    """

    prediction: ClassVar[Prediction] = "eps"
    captures: ClassVar[bool] = True

    def __init__(self, timesteps: tuple[float, ...], signal: Tensor, sigma: Tensor) -> None:
        self.timesteps, self.signal, self.sigma = timesteps, signal, sigma

    @property
    def noise_levels(self) -> tuple[tuple[float, float], ...]:
        """(signal, sigma) at every step."""
        steps = len(self.timesteps)
        return tuple(zip(self.signal[:steps].tolist(), self.sigma[:steps].tolist(), strict=True))

    def noised(self, x0: Tensor, step_R: Tensor, noise: Tensor) -> Tensor:
        """q(x_t | x0) at a sampling step per row: [R, C, ...]."""
        signal, sigma = self._levels(step_R, x0)
        return signal * x0 + sigma * noise

    def target(self, x0: Tensor, step_R: Tensor, noise: Tensor) -> Tensor:
        """What the network should predict there: [R, C, ...]."""
        signal, sigma = self._levels(step_R, x0)
        match self.prediction:
            case "eps":
                return noise
            case "v":
                return signal * noise - sigma * x0
            case "flow":
                return noise - x0

    def step_rows(self, output: Tensor, step_R: Tensor, x: Tensor, generator: torch.Generator) -> Tensor:
        """The chain's step of first order, as training takes it: [R, C, ...], with a sampling step per row.

        Here it is deterministic (DDIM; Euler's along a flow) and draws nothing; an ancestral chain's adds noise from
        the CPU `generator`.
        """
        signal, sigma = self._levels(step_R + 1, x)
        x0, eps = self.x0_and_eps(output, *self._levels(step_R, x), x)
        return signal * x0 + sigma * eps

    def posterior_rows(self, output: Tensor, step_R: Tensor, x: Tensor, generator: torch.Generator) -> Tensor:
        """x at the following steps drawn from the posterior q(x' | x, x0) at the predicted x0: [R, C, ...].

        With r = sigma / signal, x' = signal' (x0 + r'^2 / r eps + r' sqrt(1 - r'^2 / r^2) noise): Eq. 7 of Ho et al.
        2020 on this chain's levels. The noise is from the CPU `generator`.
        """
        (signal, sigma), (next_signal, next_sigma) = self._levels(step_R, x), self._levels(step_R + 1, x)
        x0, eps = self.x0_and_eps(output, signal, sigma, x)
        here, there = sigma / signal, next_sigma / next_signal
        noise = torch.randn(x.shape, generator=generator).to(x)
        up = there * (1 - (there / here).square()).sqrt()
        return next_signal * (x0 + there.square() / here * eps + up * noise)

    def x0_and_eps(self, output: Tensor, signal: Tensor, sigma: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """The clean latent and the noise that a prediction implies."""
        match self.prediction:
            case "eps":
                return (x - sigma * output) / signal, output
            case "v":
                return signal * x - sigma * output, signal * output + sigma * x
            case "flow":
                return x - sigma * output, x + signal * output

    def _levels(self, step_R: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        return self._per_row(self.signal, step_R, x), self._per_row(self.sigma, step_R, x)

    @staticmethod
    def _per_row(scale_S: Tensor, step_R: Tensor, x: Tensor) -> Tensor:
        """The scale of every row's step, to multiply `x` with."""
        return scale_S.to(step_R.device)[step_R].view(-1, *[1] * (x.ndim - 1))


def variance_preserving(kept: Tensor) -> tuple[Tensor, Tensor]:
    """(signal, sigma) of cumulative alphas: sqrt(kept) and sqrt(1 - kept)."""
    return kept.sqrt(), (1 - kept).sqrt()


class ReferenceDDIM(Chain):
    """DDIM with eta 0 on a respaced grid, by diffusers' scheduler.

    No setting of `DDIMScheduler` steps between respaced timesteps as the reference does, because it always jumps by
    1000 // N. Giving it the betas *of the respaced chain* does, and the network is fed the original timesteps
    (docs/reproduction-notes.md, reading 8; proved against the reference in tests/test_golden.py).
    """

    def __init__(self, nfe: int, spacing: str = "linspace") -> None:
        timesteps = respaced_timesteps(nfe, spacing)
        used = training_alphas_cumprod()[list(timesteps[::-1])]
        self._scheduler = DDIMScheduler(
            num_train_timesteps=nfe,
            trained_betas=1 - used / np.concatenate([[1.0], used[:-1]]),
            clip_sample=False,
            set_alpha_to_one=True,
            steps_offset=0,
            timestep_spacing="leading",
        )
        self._scheduler.set_timesteps(nfe)
        kept = torch.cat([self._scheduler.alphas_cumprod.flip(0), torch.ones(1)])
        super().__init__(timesteps, *variance_preserving(kept))

    def step(self, output: Tensor, step: int, x: Tensor, variance: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(the next latent, the predicted x0); with eta 0 a learned variance plays no part."""
        stepped = self._scheduler.step(output, len(self.timesteps) - 1 - step, x)
        return stepped.prev_sample, stepped.pred_original_sample


class ReferenceDPMSolver(Chain):
    """DPM-Solver++(2M) as PixArt-alpha samples (Lu et al. 2022), by diffusers' scheduler.

    The reference walks continuous time uniformly from t = 999 to t = 0, a step short of the clean image
    (`final_sigmas_type="sigma_min"`), and shows the network fractional timesteps. diffusers would round them, so it is
    given the reference's noise levels: log alpha, linear between the training timesteps. The last of fewer than ten
    steps is of first order.
    """

    def __init__(self, nfe: int) -> None:
        respaced_timesteps(nfe)  # refuses an impossible number
        times = np.linspace(TRAIN_TIMESTEPS - 1, 0, nfe + 1)
        log_kept = np.interp(times, np.arange(TRAIN_TIMESTEPS), np.log(training_alphas_cumprod()))
        kept = torch.from_numpy(np.exp(log_kept)).float()
        super().__init__(tuple(times[:-1].tolist()), *variance_preserving(kept))
        self._scheduler = DPMSolverMultistepScheduler(
            beta_schedule="linear", final_sigmas_type="sigma_min", lower_order_final=nfe < 10
        )
        self._scheduler.set_timesteps(nfe)
        self._scheduler.sigmas = torch.from_numpy(np.sqrt(np.expm1(-log_kept))).float()
        self._scheduler.set_begin_index(0)

    def step(self, output: Tensor, step: int, x: Tensor, variance: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(the next latent, the predicted x0); steps are taken in order, a learned variance plays no part."""
        x0, _ = self.x0_and_eps(output, self.signal[step], self.sigma[step], x)
        return self._scheduler.step(output, self._scheduler.timesteps[step], x).prev_sample, x0


class EulerAncestral(Chain):
    """Euler's method with ancestral noise and zero terminal signal, as Open-Sora-Plan v1.3 samples.

    Noise levels are those of diffusers' `EulerAncestralDiscreteScheduler` with `rescale_betas_zero_snr` (Lin et al.
    2024) and trailing timesteps; the network predicts v. Its step is written out here because the scheduler's draws
    noise for a whole batch from one generator; tests/test_sampling.py holds them together.

    Args:
        nfe: number of steps.
        draw: step -> standard normal noise [n, C, F, H, W] for it.
    """

    prediction = "v"

    def __init__(self, nfe: int, draw: Callable[[int], Tensor]) -> None:
        respaced_timesteps(nfe)  # refuses an impossible number
        scheduler = zero_snr_scheduler()
        scheduler.set_timesteps(nfe)
        self.draw, sigmas = draw, scheduler.sigmas.tolist()  # the scheduler's are sigma / signal
        # a step goes down to _down[step] deterministically and back up by noise; their squares add up to sigma^2
        self._down = [there**2 / here for here, there in pairwise(sigmas)]
        self._up = [there * (1 - there**2 / here**2) ** 0.5 for here, there in pairwise(sigmas)]
        kept = 1 / (scheduler.sigmas.double() ** 2 + 1).float()
        super().__init__(tuple(scheduler.timesteps.tolist()), *variance_preserving(kept))

    def step(self, output: Tensor, step: int, x: Tensor, variance: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(the next latent, the predicted x0); the last step adds no noise."""
        x0, eps = self.x0_and_eps(output, self.signal[step], self.sigma[step], x)
        if step == len(self.timesteps) - 1:
            return x0, x0
        noise = self.draw(step).to(x)
        return self.signal[step + 1] * (x0 + self._down[step] * eps + self._up[step] * noise), x0

    def step_rows(self, output: Tensor, step_R: Tensor, x: Tensor, generator: torch.Generator) -> Tensor:
        """The ancestral step, which is a draw from the posterior, with noise from `generator`."""
        return self.posterior_rows(output, step_R, x, generator)


def shift_exponent(tokens: int) -> float:
    """FLUX.1-dev's mu, whose exponential is the shift: linear in an image's tokens, 0.5 at 256 and 1.15 at 4096."""
    slope = (1.15 - 0.5) / (4096 - 256)
    return tokens * slope + (0.5 - slope * 256)


class Flow(Chain):
    """The straight path from noise to data: signal + sigma = 1."""

    prediction = "flow"

    def __init__(self, timesteps: tuple[float, ...], sigma: Tensor) -> None:
        super().__init__(timesteps, 1 - sigma, sigma)


class FlowEuler(Flow):
    """Euler's method along a flow, by diffusers' scheduler, as FLUX.1 samples.

    Args:
        nfe: number of steps, evenly spaced before they are shifted.
        shift: moves the steps towards noise, sigma -> shift sigma / (1 + (shift - 1) sigma) (Esser et al. 2024);
            `by_tokens` is the exponential of `shift_exponent`.
        tokens: of the image.
    """

    def __init__(self, nfe: int, shift: Shift = 1.0, tokens: int = 0) -> None:
        respaced_timesteps(nfe)  # refuses an impossible number
        sigmas = np.linspace(1.0, 1 / nfe, nfe)
        if shift == "by_tokens":
            scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
            scheduler.set_timesteps(sigmas=sigmas, mu=shift_exponent(tokens))
        else:
            scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
            scheduler.set_timesteps(sigmas=sigmas)
        super().__init__(tuple(scheduler.timesteps.tolist()), scheduler.sigmas)

    def step(self, output: Tensor, step: int, x: Tensor, variance: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(the next latent, the predicted x0)."""
        here, there = self.sigma[step : step + 2].tolist()
        return x + (there - here) * output, x - here * output


class FlowUniPC(Flow):
    """UniPC of second order along a flow (Zhao et al. 2023), by diffusers' scheduler, as Wan 2.1 samples.

    Args:
        nfe: number of steps.
        shift: as `FlowEuler`'s; 3 for 480 lines and 5 for 720 in diffusers' conversion of Wan 2.1.
    """

    captures: ClassVar[bool] = False  # it keeps sigmas on the host and copies them to the device at every step

    def __init__(self, nfe: int, shift: float = 1.0) -> None:
        respaced_timesteps(nfe)  # refuses an impossible number
        self._scheduler = UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift
        )
        self._scheduler.set_timesteps(nfe)
        self._scheduler.set_begin_index(0)
        super().__init__(tuple(self._scheduler.timesteps.tolist()), self._scheduler.sigmas.clone())

    def step(self, output: Tensor, step: int, x: Tensor, variance: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(the next latent, the predicted x0); steps are taken in order."""
        x0, _ = self.x0_and_eps(output, self.signal[step], self.sigma[step], x)
        return self._scheduler.step(output, self._scheduler.timesteps[step], x).prev_sample, x0


def zero_snr_scheduler() -> EulerAncestralDiscreteScheduler:
    """Open-Sora-Plan's scheduler; its `alphas_cumprod` [1000] is the noise schedule to train such a network on."""
    return EulerAncestralDiscreteScheduler(
        prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing"
    )


class AncestralDDPM:
    """The reference's ancestral sampler on a respaced grid, with learned variance and given noise.

    x_{t-1} is drawn from the posterior q(x_{t-1} | x_t, x0) of the respaced chain (Ho et al. 2020, Eq. 7); the model
    interpolates the logarithm of its variance between those of beta-tilde and beta (Nichol and Dhariwal 2021, Eq. 15).
    The last step adds no noise. diffusers' `DDPMScheduler` agrees (tests/test_sampling.py) but draws its own noise.

    Args:
        nfe: number of steps.
        noise: standard normal, [S, n, C, H, W] in sampling order; the last step's may be left out.
    """

    captures: ClassVar[bool] = True

    def __init__(self, nfe: int, noise: Tensor, spacing: str = "linspace") -> None:
        self.timesteps = respaced_timesteps(nfe, spacing)
        self.noise = noise
        kept = training_alphas_cumprod()[list(self.timesteps)]  # in sampling order, like all below
        before = np.append(kept[1:], 1.0)
        beta = 1 - kept / before
        self._from_x, self._from_eps = ((1 / kept) ** 0.5).tolist(), ((1 / kept - 1) ** 0.5).tolist()
        self._mean_x0 = (beta * before**0.5 / (1 - kept)).tolist()
        self._mean_x = ((1 - before) * (kept / before) ** 0.5 / (1 - kept)).tolist()
        self._log_least = np.log((beta * (1 - before) / (1 - kept))[:-1]).tolist()
        self._log_most = np.log(beta[:-1]).tolist()

    def step(self, output: Tensor, step: int, x: Tensor, variance: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(the next latent, the predicted x0).

        Raises:
            UserError: the model learned no variance.
        """
        if variance is None or variance.shape != output.shape:
            raise UserError("ancestral sampling needs a model that learned its variance (out_channels = 2 in_channels)")
        x0 = self._from_x[step] * x - self._from_eps[step] * output
        mean = self._mean_x0[step] * x0 + self._mean_x[step] * x
        if step == len(self.timesteps) - 1:
            return mean, x0
        share = (variance + 1) / 2
        log_variance = share * self._log_most[step] + (1 - share) * self._log_least[step]
        return mean + (0.5 * log_variance).exp() * self.noise[step], x0


@dataclass(frozen=True)
class SamplerSettings:
    """What every row of a comparison shares.

    Attributes:
        guidance_scale: CFG scale; 1 still runs both halves, as the reference does.
        seed: keys noise together with the sample index.
        spacing: timestep respacing of DDIM, see `respaced_timesteps`.
        solver: whose steps.
    """

    guidance_scale: float
    seed: int = 0
    spacing: str = "linspace"
    solver: Solver = "ddim"


@lru_cache
def passed_levels(nfe: int) -> tuple[tuple[tuple[int, float], ...], ...]:
    """By step of `EulerAncestral` but the last: the training timesteps that it passes, and their weights in its noise.

    With a noise-to-signal ratio r = sigma / signal and a prediction x0, a step from r to r' adds a normal number of
    variance 1 / r'^2 - 1 / r^2 to (x / signal - x0) / r^2: a Brownian motion whose clock is 1 / r^2. Its increment over
    a step is the sum of those over the training timesteps that the step passes, so that every run, however many steps
    it takes, walks the same path: two that predict the same x0 have the same x at every level that both reach. What is
    left between them is what their predictions differ by.
    """
    scheduler = zero_snr_scheduler()
    kept = scheduler.alphas_cumprod.double().numpy()
    clock = kept / (1 - kept)
    clock = np.maximum(clock, clock[-1])  # diffusers gives the last timestep more signal than the one before has
    ticks = -np.diff(clock)  # on the way from timestep k + 1 to k
    scheduler.set_timesteps(nfe)
    timesteps = [int(timestep) for timestep in scheduler.timesteps]
    return tuple(
        tuple((k, (ticks[k] / ticks[there:here].sum()) ** 0.5) for k in range(there, here) if ticks[k])
        for here, there in pairwise(timesteps)
    )


def ancestral_noise(adapter: Adapter, settings: SamplerSettings, sample_index: Tensor, nfe: int, step: int) -> Tensor:
    """What `EulerAncestral` adds to each sample at a step of `nfe`, standard normal, [n, C, ...].

    Keyed by the noise levels that the step passes (`passed_levels`).
    """
    noise = torch.zeros(len(sample_index), *adapter.spec.latent_shape)
    for timestep, weight in passed_levels(nfe)[step]:
        noise += weight * draws.gaussian(settings.seed, sample_index, adapter.spec.latent_shape, timestep)
    return noise


def make_sampler(
    adapter: Adapter,
    steps: int,
    settings: SamplerSettings,
    sample_index: Tensor,
    draw: Callable[[int], Tensor] | None = None,
) -> ReferenceDDIM | ReferenceDPMSolver | EulerAncestral | FlowEuler | FlowUniPC:
    """A fresh sampler for the samples `sample_index`.

    Args:
        draw: step -> `ancestral_noise`, for who keeps it; without it, it is drawn when it is needed.

    Raises:
        UserError: unknown solver, or a number of steps it cannot take.
    """
    match settings.solver:
        case "ddim":
            return ReferenceDDIM(steps, settings.spacing)
        case "dpm":
            return ReferenceDPMSolver(steps)
        case "euler_ancestral":
            return EulerAncestral(steps, draw or partial(ancestral_noise, adapter, settings, sample_index, steps))
        case "flow":
            return FlowEuler(steps, adapter.spec.shift, adapter.shape.num_tokens)
        case "flow_unipc":
            return FlowUniPC(steps, float(adapter.spec.shift))
    raise UserError(f"solver: {settings.solver!r} is not one of {', '.join(get_args(Solver))}")
