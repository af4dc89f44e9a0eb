"""The denoising loop, the same for every method: the references' samplers, guidance, noise keyed per sample.

All samplers work on variance-preserving latents, x = sqrt(kept) x0 + sqrt(1 - kept) noise, as the networks see them.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal, Protocol, get_args

import numpy as np
import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from diffusers.schedulers.scheduling_euler_ancestral_discrete import EulerAncestralDiscreteScheduler
from torch import Tensor

from tcbench import noise
from tcbench.engine import Engine, PlainBlocks
from tcbench.errors import UserError
from tcbench.fused import FusedBlocks, can_fuse
from tcbench.method import Artefacts, Method, Run
from tcbench.models.adapter import Adapter, Prompt
from tcbench.models.specs import DiTSpec
from tcbench.timesteps import TRAIN_TIMESTEPS, respaced_timesteps

Solver = Literal["ddim", "dpm", "euler_ancestral"]
"""`ddim` is DiT's sampler, `dpm` PixArt-alpha's, `euler_ancestral` Open-Sora-Plan's, whose networks predict v."""


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
        prediction: what the network predicts: the noise, or v = sqrt(kept) noise - sqrt(1 - kept) x0 (Salimans and Ho
            2022).
        kept: cumulative alpha at every step, and at the end of the chain; float32 [S + 1].
    """

    prediction: ClassVar[Literal["eps", "v"]] = "eps"

    def __init__(self, timesteps: tuple[float, ...], kept: Tensor) -> None:
        self.timesteps, self.kept = timesteps, kept

    def noised(self, x0: Tensor, step_R: Tensor, noise: Tensor) -> Tensor:
        """q(x_t | x0) at a sampling step per row: [R, C, ...]."""
        kept = self._kept(step_R, x0)
        return kept.sqrt() * x0 + (1 - kept).sqrt() * noise

    def target(self, x0: Tensor, step_R: Tensor, noise: Tensor) -> Tensor:
        """What the network should predict there: [R, C, ...]."""
        kept = self._kept(step_R, x0)
        return noise if self.prediction == "eps" else kept.sqrt() * noise - (1 - kept).sqrt() * x0

    def step_rows(self, output: Tensor, step_R: Tensor, x: Tensor) -> Tensor:
        """The first-order deterministic step (DDIM) to the next noise level, with a sampling step per row."""
        kept, next_kept = self._kept(step_R, x), self._kept(step_R + 1, x)
        x0, eps = self.x0_and_eps(output, kept, x)
        return next_kept.sqrt() * x0 + (1 - next_kept).sqrt() * eps

    def x0_and_eps(self, output: Tensor, kept: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """The clean latent and the noise that a prediction implies."""
        if self.prediction == "v":
            return kept.sqrt() * x - (1 - kept).sqrt() * output, kept.sqrt() * output + (1 - kept).sqrt() * x
        return (x - (1 - kept).sqrt() * output) / kept.sqrt(), output

    def _kept(self, step_R: Tensor, x: Tensor) -> Tensor:
        return self.kept.to(step_R.device)[step_R].view(-1, *[1] * (x.ndim - 1))


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
        super().__init__(timesteps, torch.cat([self._scheduler.alphas_cumprod.flip(0), torch.ones(1)]))

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
        super().__init__(tuple(times[:-1].tolist()), torch.from_numpy(np.exp(log_kept)).float())
        self._scheduler = DPMSolverMultistepScheduler(
            beta_schedule="linear", final_sigmas_type="sigma_min", lower_order_final=nfe < 10
        )
        self._scheduler.set_timesteps(nfe)
        self._scheduler.sigmas = torch.from_numpy(np.sqrt(np.expm1(-log_kept))).float()
        self._scheduler.set_begin_index(0)

    def step(self, output: Tensor, step: int, x: Tensor, variance: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(the next latent, the predicted x0); steps are taken in order, a learned variance plays no part."""
        x0, _ = self.x0_and_eps(output, self.kept[step], x)
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
        self.draw, self.sigmas = draw, scheduler.sigmas.tolist()
        super().__init__(tuple(scheduler.timesteps.tolist()), 1 / (scheduler.sigmas.double() ** 2 + 1).float())

    def step(self, output: Tensor, step: int, x: Tensor, variance: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(the next latent, the predicted x0); the last step adds no noise."""
        x0, eps = self.x0_and_eps(output, self.kept[step], x)
        here, there = self.sigmas[step : step + 2]
        if there == 0:
            return x0, x0
        up = there * (1 - there**2 / here**2) ** 0.5
        down = there**2 / here  # sqrt(there^2 - up^2)
        noise = self.draw(step).to(x)
        return self.kept[step + 1].sqrt() * (x0 + down * eps + up * noise), x0


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


def guide(output_R: Tensor, scale: float, guided_channels: int, channels: int) -> Tensor:
    """Classifier-free guidance on the first `guided_channels` of `channels` predicted channels: [n, C, ...].

    DiT guides 3 of its 4 latent channels; the rest, and the variance logits beyond `channels`, stay conditional.
    """
    conditional, unconditional = output_R[:, :channels].chunk(2)
    guided = torch.lerp(unconditional[:, :guided_channels], conditional[:, :guided_channels], scale)
    return torch.cat([guided, conditional[:, guided_channels:]], dim=1)


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
) -> ReferenceDDIM | ReferenceDPMSolver | EulerAncestral:
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
    device = adapter.device
    run = Run(adapter.shape, sampler.timesteps, True, sample_index.to(device), settings.seed, artefacts)
    return sampler, run


def denoise(
    adapter: Adapter,
    engine: Engine,
    sampler: Sampler,
    settings: SamplerSettings,
    x: Tensor,
    prompt: Prompt,
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield (prediction, predicted x0, next latent), each [n, C, ...], at every step of a run, from the noise `x`."""
    spec, context = adapter.spec, engine.prepare(adapter.guided(prompt))
    for step in range(engine.run.nfe):
        output = engine(step, torch.cat([x, x]), context)
        guided = guide(output, settings.guidance_scale, spec.guided_channels, spec.in_channels)
        x, x0 = sampler.step(guided, step, x, output[: len(x), spec.in_channels :])
        yield guided, x0, x


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
    engine = Engine(adapter, run, method.start(run), FusedBlocks if can_fuse(adapter) else PlainBlocks)
    device, dtype = adapter.device, adapter.dtype
    x = initial_noise(adapter, settings.seed, sample_index).to(device, dtype)
    prompt = default_prompts(adapter, sample_index) if prompts is None else prompts(sample_index)
    x0s, xts = [], []
    for _, x0, x in denoise(adapter, engine, sampler, settings, x, prompt.to(device)):  # noqa: B020 (x: threaded)
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
        macs=engine.ledger.totals(),
        plans=engine.plans,
        i_steps=tuple(step for step, plan in enumerate(engine.plans) if set(plan.values()) <= {"all"}),
        cache_bytes=engine.cache.num_bytes(),
    )
