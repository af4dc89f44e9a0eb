"""The denoising loop, the same for every method: the references' samplers, guidance, noise keyed per sample.

All samplers work on latents as the networks see them, x = signal x0 + sigma noise. Diffusion chains preserve variance,
signal^2 + sigma^2 = 1; flows are straight, signal + sigma = 1.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal, Protocol, get_args

import numpy as np
import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from diffusers.schedulers.scheduling_euler_ancestral_discrete import EulerAncestralDiscreteScheduler
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from tcbench import noise
from tcbench.cache import Cache
from tcbench.engine import Blocks, Engine, PlainBlocks
from tcbench.errors import UserError
from tcbench.fused import FusedBlocks, can_fuse
from tcbench.method import Artefacts, Method, Policy, Run
from tcbench.models.adapter import Adapter, Prompt
from tcbench.models.specs import DiTSpec
from tcbench.timesteps import TRAIN_TIMESTEPS, respaced_timesteps

Solver = Literal["ddim", "dpm", "euler_ancestral", "flow"]
"""`ddim` is DiT's sampler, `dpm` PixArt-alpha's, `euler_ancestral` Open-Sora-Plan's, `flow` FLUX's and Wan's."""

Prediction = Literal["eps", "v", "flow"]
"""What a network predicts: the noise, signal noise - sigma x0 (Salimans and Ho 2022), or noise - x0."""


def training_alphas_cumprod() -> np.ndarray:
    """DiT's noise schedule: linear betas 1e-4..0.02 over 1000 timesteps; cumulative alphas, float64 [1000]."""
    return np.cumprod(1 - np.linspace(1e-4, 0.02, TRAIN_TIMESTEPS))


Prompts = Callable[[Tensor], Prompt]
"""Sample indices [n] -> what the samples shall show."""


class Sampler(Protocol):
    """One step back along a chain of noise levels; made for one run, because some remember the last steps."""

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
        signal, sigma: scales of the clean latent and of the noise at every step, and at the end of the chain; float32
            [S + 1].
    """

    prediction: ClassVar[Prediction] = "eps"

    def __init__(self, timesteps: tuple[float, ...], signal: Tensor, sigma: Tensor) -> None:
        self.timesteps, self.signal, self.sigma = timesteps, signal, sigma

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

    def step_rows(self, output: Tensor, step_R: Tensor, x: Tensor) -> Tensor:
        """The first-order deterministic step (DDIM; Euler's along a flow), with a sampling step per row."""
        signal, sigma = self._levels(step_R + 1, x)
        x0, eps = self.x0_and_eps(output, *self._levels(step_R, x), x)
        return signal * x0 + sigma * eps

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
        shape = (-1, *[1] * (x.ndim - 1))
        return self.signal.to(step_R.device)[step_R].view(shape), self.sigma.to(step_R.device)[step_R].view(shape)


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
        self.draw, self._sigmas = draw, scheduler.sigmas.tolist()  # the scheduler's are sigma / signal
        kept = 1 / (scheduler.sigmas.double() ** 2 + 1).float()
        super().__init__(tuple(scheduler.timesteps.tolist()), *variance_preserving(kept))

    def step(self, output: Tensor, step: int, x: Tensor, variance: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(the next latent, the predicted x0); the last step adds no noise."""
        x0, eps = self.x0_and_eps(output, self.signal[step], self.sigma[step], x)
        here, there = self._sigmas[step : step + 2]
        if there == 0:
            return x0, x0
        up = there * (1 - there**2 / here**2) ** 0.5
        down = there**2 / here  # sqrt(there^2 - up^2)
        noise = self.draw(step).to(x)
        return self.signal[step + 1] * (x0 + down * eps + up * noise), x0


class FlowEuler(Chain):
    """Euler's method along a flow from noise to data, by diffusers' scheduler, as FLUX and Wan sample.

    Args:
        nfe: number of steps, evenly spaced before they are shifted.
        shift: moves the steps towards noise, sigma -> shift sigma / (1 + (shift - 1) sigma) (Esser et al. 2024).
    """

    prediction = "flow"

    def __init__(self, nfe: int, shift: float = 1.0) -> None:
        respaced_timesteps(nfe)  # refuses an impossible number
        scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
        scheduler.set_timesteps(sigmas=np.linspace(1, 1 / nfe, nfe))
        super().__init__(tuple(scheduler.timesteps.tolist()), 1 - scheduler.sigmas, scheduler.sigmas)

    def step(self, output: Tensor, step: int, x: Tensor, variance: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(the next latent, the predicted x0)."""
        here, there = self.sigma[step : step + 2].tolist()
        return x + (there - here) * output, x - here * output


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
        shift: of a flow's steps towards noise (`FlowEuler`).
    """

    guidance_scale: float
    seed: int = 0
    spacing: str = "linspace"
    solver: Solver = "ddim"
    shift: float = 1.0


@dataclass
class Samples:
    """One finished batch.

    Attributes:
        image: final latents or images, float32 [n, C, H, W], or videos [n, C, F, H, W].
        label: classes [n]; sample indices where prompts are captions.
        x0, xt: predicted clean image and next latent at every step, [S, n, C, ...], for the first `traced` samples.
        macs: the ledger's totals per sample.
        plans: executed plans in sampling order.
        i_steps: the steps at which everything was computed.
        cache_bytes: features held at the end of the run.
    """

    image: Tensor
    label: Tensor
    x0: Tensor
    xt: Tensor
    macs: dict[str, int | dict[str, int]]
    plans: list[dict[str, str | int]]
    i_steps: tuple[int, ...]
    cache_bytes: int


def sample_labels(sample_index: Tensor, num_classes: int) -> Tensor:
    """Classes in turn, so that every stretch of consecutive samples is balanced."""
    return sample_index % num_classes


def default_prompts(adapter: Adapter, sample_index: Tensor) -> Tensor:
    """The class labels of samples that come without prompts.

    Raises:
        UserError: the model reads captions.
    """
    if not isinstance(adapter.spec, DiTSpec):
        raise UserError(f"{adapter.spec.name}: samples need prompts; name them in the config")
    return sample_labels(sample_index, adapter.spec.num_classes)


def initial_noise(adapter: Adapter, seed: int, sample_index: Tensor) -> Tensor:
    """x_T of each sample, [n, C, ...]."""
    return noise.gaussian(seed, sample_index, adapter.spec.latent_shape)


def ancestral_noise(adapter: Adapter, settings: SamplerSettings, sample_index: Tensor, step: int) -> Tensor:
    """What an ancestral sampler adds to each sample at a step, [n, C, ...]."""
    return noise.gaussian(settings.seed, sample_index, adapter.spec.latent_shape, step)


def make_sampler(
    adapter: Adapter,
    steps: int,
    settings: SamplerSettings,
    sample_index: Tensor,
    draw: Callable[[int], Tensor] | None = None,
) -> ReferenceDDIM | ReferenceDPMSolver | EulerAncestral | FlowEuler:
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
            return EulerAncestral(steps, draw or partial(ancestral_noise, adapter, settings, sample_index))
        case "flow":
            return FlowEuler(steps, settings.shift)
    raise UserError(f"solver: {settings.solver!r} is not one of {', '.join(get_args(Solver))}")


def start_run(
    adapter: Adapter,
    method: Method,
    nfe: int,
    settings: SamplerSettings,
    sample_index: Tensor,
    artefacts: Artefacts,
) -> tuple[Sampler, Run]:
    """The sampler and the run of one batch; `nfe` is the uncached reference's number of steps."""
    sampler = make_sampler(adapter, method.sampled_steps(nfe), settings, sample_index)
    guidance = adapter.spec.guidance(settings.guidance_scale)
    index = sample_index.to(adapter.device)
    run = Run(adapter.shape, sampler.timesteps, guidance, index, settings.seed, artefacts)
    return sampler, run


class Passes:
    """The engines of one batch, one for each pass that guidance makes; together they give the guided prediction.

    Args:
        start: makes the policy of a pass, `method.start` for one: passes share no state.
        blocks: makes what executes the plans.
    """

    def __init__(
        self,
        adapter: Adapter,
        run: Run,
        start: Callable[[Run], Policy],
        blocks: Callable[[Adapter, Run, Cache], Blocks] | None = None,
    ) -> None:
        self.adapter, self.run = adapter, run
        self.engines = [Engine(adapter, run, start(run), blocks) for _ in range(run.guidance.passes)]
        self._contexts: list[Any] = []

    def prepare(self, prompt: Prompt) -> None:
        """Called once per run, with what the samples show."""
        prompts = self.run.guidance.prompts(self.adapter, prompt)
        self._contexts = [engine.prepare(rows) for engine, rows in zip(self.engines, prompts, strict=True)]

    def __call__(self, step: int, x: Tensor) -> tuple[Tensor, Tensor]:
        """(guided prediction [n, C, ...], the rest of the model's output for the same samples) at a step."""
        guidance, channels = self.run.guidance, self.adapter.spec.in_channels
        rows = guidance.latents(x)
        outputs = [engine(step, rows, context) for engine, context in zip(self.engines, self._contexts, strict=True)]
        return guidance.combine([output[:, :channels] for output in outputs]), outputs[0][: len(x), channels:]

    @property
    def macs(self) -> dict[str, int | dict[str, int]]:
        """The ledgers' totals per sample, of all passes together."""
        return sum((engine.ledger for engine in self.engines[1:]), self.engines[0].ledger).totals()

    @property
    def plans(self) -> list[dict[str, str | int]]:
        """The plans executed so far; where a later pass had another one, with its units beside the first's."""
        first, *later = (engine.plans for engine in self.engines)
        together = [dict(plan) for plan in first]
        for number, plans in enumerate(later, start=2):
            for plan, other, mine in zip(together, plans, first, strict=True):
                if other != mine:
                    plan.update({f"pass {number}: {unit}": who for unit, who in other.items()})
        return together

    @property
    def cache_bytes(self) -> int:
        """Memory that the caches hold."""
        return sum(engine.cache.num_bytes() for engine in self.engines)


def denoise(passes: Passes, sampler: Sampler, x: Tensor, prompt: Prompt) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield (prediction, predicted x0, next latent), each [n, C, ...], at every step of a run, from the noise `x`."""
    passes.prepare(prompt)
    for step in range(passes.run.nfe):
        prediction, variance = passes(step, x)
        x, x0 = sampler.step(prediction, step, x, variance)
        yield prediction, x0, x


@torch.inference_mode()
def sample_batch(
    adapter: Adapter,
    method: Method,
    nfe: int,
    settings: SamplerSettings,
    sample_index: Tensor,
    artefacts: Artefacts | None = None,
    traced: int = 0,
    prompts: Prompts | None = None,
) -> Samples:
    """Generate the samples named by `sample_index` (int64 [n]) as one batch.

    Args:
        nfe: number of steps of the uncached reference; the method may take fewer.
        traced: keep the trajectory of the first `traced` samples.
        prompts: sample indices [n] -> what they shall show; without it, class labels in turn (`sample_labels`).

    Raises:
        UserError: a sample became NaN or infinite; names the sample.
    """
    sampler, run = start_run(adapter, method, nfe, settings, sample_index, artefacts or Artefacts())
    passes = Passes(adapter, run, method.start, FusedBlocks if can_fuse(adapter) else PlainBlocks)
    device, dtype = adapter.device, adapter.dtype
    x = initial_noise(adapter, settings.seed, sample_index).to(device, dtype)
    prompt = default_prompts(adapter, sample_index) if prompts is None else prompts(sample_index)
    x0s, xts = [], []
    for _, x0, x in denoise(passes, sampler, x, prompt.to(device)):  # noqa: B020 (x: threaded)
        x0s.append(x0[:traced])
        xts.append(x[:traced])
    bad = ~x.flatten(1).isfinite().all(dim=1)
    if bad.any():
        first = int(sample_index[bad.cpu()][0])
        raise UserError(
            f"{method.name}: sample {first} became NaN or infinite; check the weights and the method's plan"
        )
    return Samples(
        image=x.float().cpu(),
        label=prompt.cpu() if isinstance(prompt, Tensor) else sample_index,
        x0=torch.stack(x0s).float().cpu(),
        xt=torch.stack(xts).float().cpu(),
        macs=passes.macs,
        plans=(plans := passes.plans),
        i_steps=tuple(step for step, plan in enumerate(plans) if set(plan.values()) <= {"all"}),
        cache_bytes=passes.cache_bytes,
    )
