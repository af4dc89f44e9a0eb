"""The denoising loop, the same for every method: the references' samplers, guidance, noise keyed per sample.

All samplers work on latents as the networks see them, x = signal x0 + sigma noise. Diffusion chains preserve variance,
signal^2 + sigma^2 = 1; flows are straight, signal + sigma = 1.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tcbench.engine.blocks import Blocks
from tcbench.engine.cache import Cache, num_bytes
from tcbench.engine.engine import Engine
from tcbench.engine.fastest import fastest
from tcbench.engine.kept import kept
from tcbench.errors import UserError
from tcbench.ledger import Ledger
from tcbench.method import Artefacts, Method, Policy, Run
from tcbench.models.adapter import Adapter, Prompt
from tcbench.models.specs import DiTSpec
from tcbench.record.executed import PlanRecord
from tcbench.samplers import Sampler, SamplerSettings, make_sampler
from tcbench.tensors import draws
from tcbench.watch.checking import checks_values
from tcbench.watch.undisturbed import undisturbed

MacTotals = dict[str, int | dict[str, int]]
"""What `Ledger.totals` says."""

Prompts = Callable[[Tensor], Prompt]
"""Sample indices [n] -> what the samples shall show."""


@dataclass
class Samples:
    """One finished batch.

    Attributes:
        image: final latents or images, float32 [n, C, H, W], or videos [n, C, F, H, W].
        label: classes [n]; sample indices where prompts are captions.
        x0, xt: predicted clean image and next latent at every step, [S, n, C, ...], for the first `traced` samples.
        macs: the ledger's totals per sample.
        plans: what was computed.
        cache_bytes: features held at the end of the run.
    """

    image: Tensor
    label: Tensor
    x0: Tensor
    xt: Tensor
    macs: MacTotals
    plans: PlanRecord
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


def latents_dtype(adapter: Adapter) -> torch.dtype:
    """What latents are kept and stepped in: float32 where the network's dtype has fewer bits."""
    return torch.promote_types(adapter.dtype, torch.float32)


def initial_noise(adapter: Adapter, seed: int, sample_index: Tensor) -> Tensor:
    """x_T of each sample, [n, C, ...]."""
    return draws.gaussian(seed, sample_index, adapter.spec.latent_shape)


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
    index = sample_index.to(adapter.device, copy=True)
    levels = sampler.noise_levels
    return sampler, Run(adapter.shape, sampler.timesteps, guidance, index, settings.seed, artefacts, levels)


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
        """(guided prediction [n, C, ...], the rest of the model's output for the same samples) at a step.

        The network sees latents in its own dtype; what comes of its output is in that of `x`.
        """
        guidance, channels = self.run.guidance, self.adapter.spec.in_channels
        rows = guidance.latents(x).to(self.adapter.dtype)
        runs = zip(self.engines, self._contexts, strict=True)
        outputs = [engine(step, rows, context).to(x.dtype) for engine, context in runs]
        return guidance.combine([output[:, :channels] for output in outputs]), outputs[0][: len(x), channels:]

    @property
    def macs(self) -> MacTotals:
        """The ledgers' totals per sample, of all passes together."""
        return _totals([engine.ledger for engine in self.engines])

    @property
    def plans(self) -> PlanRecord:
        """The plans executed so far; where a later pass had another one, with its units beside the first's."""
        return _side_by_side([engine.plans for engine in self.engines])

    @property
    def undecided(self) -> Tensor:
        """`Engine.undecided` of all passes, int32 [U] on the device."""
        counts = [used for engine in self.engines for used in engine.undecided]
        return torch.cat(counts) if counts else torch.empty(0, dtype=torch.int32, device=self.adapter.device)

    def account(self, counts: Sequence[int]) -> tuple[MacTotals, PlanRecord]:
        """`macs` and `plans` of a run that was repeated, if the numbers of `undecided` are these."""
        ledgers, plans, start = [], [], 0
        for engine in self.engines:
            stop = start + len(engine.undecided)
            ledger, planned = engine.account(counts[start:stop])
            ledgers.append(ledger)
            plans.append(planned)
            start = stop
        return _totals(ledgers), _side_by_side(plans)

    @property
    def cache_bytes(self) -> int:
        """Memory that the caches hold."""
        return sum(engine.cache.num_bytes() for engine in self.engines)

    @property
    def policy_bytes(self) -> int:
        """Memory that the policies hold besides."""
        return sum(num_bytes(kept(engine.policy)) for engine in self.engines)


def _totals(ledgers: Sequence[Ledger]) -> MacTotals:
    return sum(ledgers[1:], ledgers[0]).totals()


def _side_by_side(passes: Sequence[PlanRecord]) -> PlanRecord:
    first, *later = passes
    together = first
    for number, plans in enumerate(later, start=2):
        together = together.beside(plans, f"pass {number}", unless=first)
    return together


def denoise(passes: Passes, sampler: Sampler, x: Tensor, prompt: Prompt) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield (prediction, predicted x0, next latent), each [n, C, ...], at every step of a run, from the noise `x`."""
    passes.prepare(prompt)
    for step in range(passes.run.nfe):
        prediction, variance = passes(step, x)
        x, x0 = sampler.step(prediction, step, x, variance)
        yield prediction, x0, x


def finite(x: Tensor) -> Tensor:
    """Which samples neither became NaN nor infinite, bool [n]."""
    return x.flatten(1).isfinite().all(dim=1)


def refuse_broken(method: Method, sample_index: Tensor, finite_n: Tensor) -> None:
    """Raise UserError if a sample of `sample_index` is not finite; all on the CPU."""
    if not finite_n.all():
        first = int(sample_index[~finite_n][0])
        raise UserError(
            f"{method.name}: sample {first} became NaN or infinite; check the weights and the method's plan"
        )


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

    Inside `checking.values_unchecked`, whoever calls sees to it that the method disturbs nothing (`undisturbed`).

    Args:
        nfe: number of steps of the uncached reference; the method may take fewer.
        traced: keep the trajectory of the first `traced` samples.
        prompts: sample indices [n] -> what they shall show; without it, class labels in turn (`sample_labels`).

    Raises:
        UserError: a sample became NaN or infinite; names the sample. The method misbehaves; names it and the step.
    """
    sampler, run = start_run(adapter, method, nfe, settings, sample_index, artefacts or Artefacts())
    device = adapter.device
    x = initial_noise(adapter, settings.seed, sample_index).to(device, latents_dtype(adapter))
    prompt = default_prompts(adapter, sample_index) if prompts is None else prompts(sample_index)
    x0s, xts = [], []
    watched = (adapter.model, *run.artefacts.scorers.values(), run.sample_index)
    with undisturbed(method, *watched) if checks_values() else nullcontext():
        passes = Passes(adapter, run, method.start, fastest(adapter))
        for _, x0, x in denoise(passes, sampler, x, prompt.to(device)):  # noqa: B020 (x: threaded)
            x0s.append(x0[:traced])
            xts.append(x[:traced])
    refuse_broken(method, sample_index, finite(x).cpu())
    return Samples(
        image=x.float().cpu(),
        label=prompt.cpu() if isinstance(prompt, Tensor) else sample_index,
        x0=torch.stack(x0s).float().cpu(),
        xt=torch.stack(xts).float().cpu(),
        macs=passes.macs,
        plans=passes.plans,
        cache_bytes=passes.cache_bytes,
    )
