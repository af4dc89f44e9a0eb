"""The denoising loop, the same for every method: the reference's samplers, guidance, noise keyed per sample."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate, repeat
from typing import Protocol

import numpy as np
import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from torch import Tensor

from tcbench import noise
from tcbench.engine import Engine
from tcbench.errors import UserError
from tcbench.method import Artefacts, Method, Run
from tcbench.models.dit import DiTAdapter

TRAIN_TIMESTEPS = 1000
SPACINGS = ("linspace", "leading")


def training_alphas_cumprod() -> np.ndarray:
    """DiT's noise schedule: linear betas 1e-4..0.02 over 1000 timesteps; cumulative alphas, float64 [1000]."""
    return np.cumprod(1 - np.linspace(1e-4, 0.02, TRAIN_TIMESTEPS))


def respaced_timesteps(nfe: int, spacing: str = "linspace") -> tuple[int, ...]:
    """Timesteps in sampling order, as the reference code respaces them.

    `linspace` is its respacing string "N", which DiT, FORA, ToCa and L2C sample with: round(i * 999 / (N - 1)), the
    products by repeated addition, which is what rounds a tie like 499.5 up or down.
    `leading` is "ddimN": 0, k, 2k, ... for the whole stride k that fits exactly N times into 1000.

    Raises:
        UserError: unknown spacing, a number of steps outside 2..1000, or one that no whole stride gives.
    """
    if spacing not in SPACINGS:
        raise UserError(f"spacing: {spacing!r} is not one of {', '.join(SPACINGS)}")
    if not 2 <= nfe <= TRAIN_TIMESTEPS:
        raise UserError(f"nfe: {nfe} sampling steps; give 2 to {TRAIN_TIMESTEPS}")
    if spacing == "leading":
        timesteps = range(0, TRAIN_TIMESTEPS, -(-TRAIN_TIMESTEPS // nfe))
        if len(timesteps) != nfe:
            raise UserError(f"nfe: no whole stride gives {nfe} leading timesteps; {len(timesteps)} is the next below")
        return tuple(timesteps)[::-1]
    strides = repeat((TRAIN_TIMESTEPS - 1) / (nfe - 1), nfe - 1)
    return tuple(round(timestep) for timestep in accumulate(strides, initial=0.0))[::-1]


class Sampler(Protocol):
    """One step back along the respaced chain."""

    timesteps: tuple[int, ...]

    def step(self, eps: Tensor, step: int, x: Tensor, variance: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(the next latent, the predicted x0), from the noise predicted at sampling step `step`.

        `variance` is the rest of the model's output, the logits of a learned variance, if it has one.
        """


class ReferenceDDIM:
    """DDIM with eta 0 on a respaced grid, by diffusers' scheduler.

    No setting of `DDIMScheduler` steps between respaced timesteps as the reference does, because it always jumps by
    1000 // N. Giving it the betas *of the respaced chain* does, and the network is fed the original timesteps
    (docs/reproduction-notes.md, reading 8; proved against the reference in tests/test_golden.py).
    """

    def __init__(self, nfe: int, spacing: str = "linspace") -> None:
        self.timesteps = respaced_timesteps(nfe, spacing)
        used = training_alphas_cumprod()[list(self.timesteps[::-1])]
        self._scheduler = DDIMScheduler(
            num_train_timesteps=nfe,
            trained_betas=1 - used / np.concatenate([[1.0], used[:-1]]),
            clip_sample=False,
            set_alpha_to_one=True,
            steps_offset=0,
            timestep_spacing="leading",
        )
        self._scheduler.set_timesteps(nfe)

    def step(self, eps: Tensor, step: int, x: Tensor, variance: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(the next latent, the predicted x0); with eta 0 a learned variance plays no part."""
        output = self._scheduler.step(eps, len(self.timesteps) - 1 - step, x)
        return output.prev_sample, output.pred_original_sample

    def noised(self, x0: Tensor, step_R: Tensor, noise: Tensor) -> Tensor:
        """q(x_t | x0) at a sampling step per row: [R, C, H, W]."""
        kept = self._kept(step_R)
        return kept.sqrt() * x0 + (1 - kept).sqrt() * noise

    def step_rows(self, eps: Tensor, step_R: Tensor, x: Tensor) -> Tensor:
        """`step` with a sampling step per row, for training; the next latent."""
        kept, next_kept = self._kept(step_R), self._kept(step_R + 1)
        x0 = (x - (1 - kept).sqrt() * eps) / kept.sqrt()
        return next_kept.sqrt() * x0 + (1 - next_kept).sqrt() * eps

    def _kept(self, step_R: Tensor) -> Tensor:
        """Cumulative alpha at sampling steps 0..NFE, the last being the clean image: [R, 1, 1, 1]."""
        alphas = self._scheduler.alphas_cumprod
        return torch.cat([alphas.flip(0), torch.ones(1)]).to(step_R.device)[step_R, None, None, None]


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

    def step(self, eps: Tensor, step: int, x: Tensor, variance: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(the next latent, the predicted x0).

        Raises:
            UserError: the model learned no variance.
        """
        if variance is None or variance.shape != eps.shape:
            raise UserError("ancestral sampling needs a model that learned its variance (out_channels = 2 in_channels)")
        x0 = self._from_x[step] * x - self._from_eps[step] * eps
        mean = self._mean_x0[step] * x0 + self._mean_x[step] * x
        if step == len(self.timesteps) - 1:
            return mean, x0
        share = (variance + 1) / 2
        log_variance = share * self._log_most[step] + (1 - share) * self._log_least[step]
        return mean + (0.5 * log_variance).exp() * self.noise[step], x0


def guide(output_R: Tensor, scale: float, guided_channels: int, channels: int) -> Tensor:
    """Classifier-free guidance on the first `guided_channels` of `channels` noise channels: eps, [n, C, H, W].

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
        spacing: timestep respacing, see `respaced_timesteps`.
    """

    guidance_scale: float
    seed: int = 0
    spacing: str = "linspace"


@dataclass
class Samples:
    """One finished batch.

    Attributes:
        image: final latents or images, float32 [n, C, H, W].
        label: classes [n].
        x0, xt: predicted clean image and next latent at every step, [S, n, C, H, W], for the first `traced` samples.
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


def initial_noise(adapter: DiTAdapter, seed: int, sample_index: Tensor) -> Tensor:
    """x_T of each sample, [n, C, H, W]."""
    spec = adapter.spec
    return noise.gaussian(seed, sample_index, (spec.in_channels, spec.sample_size, spec.sample_size))


def start_run(
    adapter: DiTAdapter,
    method: Method,
    nfe: int,
    settings: SamplerSettings,
    sample_index: Tensor,
    artefacts: Artefacts,
) -> tuple[ReferenceDDIM, Run]:
    """The sampler and the run of one batch; `nfe` is the uncached reference's number of steps."""
    sampler = ReferenceDDIM(method.sampled_steps(nfe), settings.spacing)
    device = adapter.model.device
    run = Run(adapter.shape, sampler.timesteps, True, sample_index.to(device), settings.seed, artefacts)
    return sampler, run


def denoise(
    adapter: DiTAdapter,
    engine: Engine,
    sampler: Sampler,
    settings: SamplerSettings,
    x: Tensor,
    label: Tensor,
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield (eps, predicted x0, next latent), each [n, C, H, W], at every step of a run, from the noise `x`."""
    spec = adapter.spec
    rows = torch.cat([label, torch.full_like(label, spec.num_classes)])
    for step in range(engine.run.nfe):
        output = engine(step, torch.cat([x, x]), rows)
        eps = guide(output, settings.guidance_scale, spec.guided_channels, spec.in_channels)
        x, x0 = sampler.step(eps, step, x, output[: len(x), spec.in_channels :])
        yield eps, x0, x


@torch.inference_mode()
def sample_batch(
    adapter: DiTAdapter,
    method: Method,
    nfe: int,
    settings: SamplerSettings,
    sample_index: Tensor,
    artefacts: Artefacts | None = None,
    traced: int = 0,
) -> Samples:
    """Generate the samples named by `sample_index` (int64 [n]) as one batch.

    Args:
        nfe: number of steps of the uncached reference; the method may take fewer.
        traced: keep the trajectory of the first `traced` samples.

    Raises:
        UserError: a sample became NaN or infinite; names the sample.
    """
    sampler, run = start_run(adapter, method, nfe, settings, sample_index, artefacts or Artefacts())
    engine = Engine(adapter, run, method.start(run))
    device, dtype = adapter.model.device, adapter.model.dtype
    x = initial_noise(adapter, settings.seed, sample_index).to(device, dtype)
    label = sample_labels(sample_index, adapter.spec.num_classes).to(device)
    x0s, xts = [], []
    for _, x0, x in denoise(adapter, engine, sampler, settings, x, label):  # noqa: B020 (x is threaded through)
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
        label=label.cpu(),
        x0=torch.stack(x0s).float().cpu(),
        xt=torch.stack(xts).float().cpu(),
        macs=engine.ledger.totals(),
        plans=engine.plans,
        i_steps=tuple(step for step, plan in enumerate(engine.plans) if set(plan.values()) <= {"all"}),
        cache_bytes=engine.cache.num_bytes(),
    )
