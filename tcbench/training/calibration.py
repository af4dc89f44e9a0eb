"""What uncached runs tell of reuse: SmoothCache's error curves, MagCache's ratios of magnitudes, TeaCache's changes.

Samples are generated without caching, with guidance and from calibration noise; what a policy that stores everything
leaves in the cache is read after every step.
"""

from collections import deque
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from tcbench.artefacts import as_table
from tcbench.method import Artefacts, Look, Method, Run, Table
from tcbench.models.adapter import Adapter, Prompt
from tcbench.plan import ALL, Hold, Output, Plan, Span, Unit, every_unit
from tcbench.samplers import Sampler, SamplerSettings
from tcbench.sampling import Passes, Prompts, denoise, initial_noise, start_run
from tcbench.shapes import ModelShape
from tcbench.trainable import CalibrateChanges, CalibrateMagnitudes, CalibrateReuse
from tcbench.training.pairs import CALIBRATION_INDEX

BATCH = 8  # samples that run together


@dataclass
class StoreAll:
    """A policy that computes everything and stores it.

    Attributes:
        modulated: the first block's modulated input at the last step, [R, N, D].
    """

    units: tuple[Unit, ...]
    modulated: Tensor | None = None

    def plan(self, look: Look) -> Plan:
        """The same at every step."""
        self.modulated = look.modulated_input()
        return every_unit(self.units, ALL)


class Observer(Protocol):
    """What adds up over the steps of uncached runs.

    Attributes:
        units: whose values it is shown.
    """

    units: tuple[Unit, ...]

    def see(self, step: int, values: dict[Unit, Tensor], modulated: Tensor) -> None:
        """A step's values and the first block's modulated input, [R, N, D] each; step 0 begins another batch."""

    def table(self) -> Table:
        """What is known by now."""


class BranchErrors:
    """The relative L1 distance of every branch's output to that of later steps, over all rows together.

    The denominator is the *later* output, as in the reference.
    """

    def __init__(self, shape: ModelShape, steps: int, lookahead: int) -> None:
        self.units: tuple[Unit, ...] = shape.sites
        self.shape, self.lookahead = shape, lookahead
        self._changes = torch.full((len(shape.sites), lookahead, steps), float("nan"), dtype=torch.float64)
        self._sizes = self._changes.clone()
        self._past: deque[dict[Unit, Tensor]] = deque(maxlen=lookahead)

    def see(self, step: int, values: dict[Unit, Tensor], modulated: Tensor) -> None:
        """Compare a step with those before it."""
        if step == 0:
            self._past.clear()
        for lag, before in enumerate(self._past, start=1):
            place = slice(None), lag - 1, step - lag
            for sums, new in (
                (self._changes, [(before[unit] - values[unit]).abs() for unit in self.units]),
                (self._sizes, [values[unit].abs() for unit in self.units]),
            ):
                added = torch.stack([tensor.sum(dtype=torch.float64) for tensor in new]).cpu()
                sums[place] = sums[place].nan_to_num(0) + added
        self._past.appendleft(values)

    def by_block(self) -> Tensor:
        """The error of every branch, float64 [branches, lags, S], NaN past the end."""
        return self._changes / self._sizes

    def by_part(self) -> Tensor:
        """Its mean over the blocks that have a part, [parts, lags, S]."""
        errors, sites = self.by_block(), self.shape.sites
        of_part = [[place for place, site in enumerate(sites) if site.part == part] for part in self.shape.kinds]
        return torch.stack([errors[places].mean(0) for places in of_part])

    def table(self) -> Table:
        """`by_part`, a row for each part and lag."""
        return as_table(self.by_part().flatten(0, 1))


class Magnitudes:
    """How the length of what the blocks add to a token changes from step to step, mean over tokens and rows."""

    def __init__(self, shape: ModelShape, steps: int) -> None:
        self.stack = Span(0, shape.num_blocks)
        self.units: tuple[Unit, ...] = (self.stack,)
        self._sums, self._counts = torch.zeros(2, steps, dtype=torch.float64)
        self._before: Tensor | None = None

    def see(self, step: int, values: dict[Unit, Tensor], modulated: Tensor) -> None:
        """Compare a step with the one before it."""
        size = values[self.stack].norm(dim=2)
        ratio = torch.ones_like(size) if step == 0 or self._before is None else size / (self._before + SMALLEST)
        self._sums[step] += ratio.sum(dtype=torch.float64).cpu()
        self._counts[step] += ratio.numel()
        self._before = size

    def table(self) -> Table:
        """One row, by step."""
        return as_table((self._sums / self._counts)[None])


class Changes:
    """How far the first block's modulated input and the last block's output move from step to step: the relative L1
    distance, for every sample, over the rows that are decided together.

    Args:
        rows_per_sample: of them.
    """

    def __init__(self, steps: int, rows_per_sample: int) -> None:
        self.units: tuple[Unit, ...] = (Output(),)
        self._steps, self._rows = steps, rows_per_sample
        self._batches: list[Tensor] = []  # of [2, samples, S]
        self._before: tuple[Tensor, Tensor] | None = None

    def see(self, step: int, values: dict[Unit, Tensor], modulated: Tensor) -> None:
        """Compare a step with the one before it."""
        now = modulated, values[Output()]
        if step == 0:
            samples = len(modulated) // self._rows
            self._batches.append(torch.full((2, samples, self._steps), float("nan"), dtype=torch.float64))
        elif self._before is not None:
            pairs = zip(now, self._before, strict=True)
            moved = [self._of_samples(new - old) / self._of_samples(old) for new, old in pairs]
            self._batches[-1][:, :, step] = torch.stack(moved).cpu()
        self._before = now

    def _of_samples(self, value_RND: Tensor) -> Tensor:
        """The mean of absolute values over a sample's rows, tokens and channels, float64 [n]."""
        return value_RND.abs().double().unflatten(0, (self._rows, -1)).mean(dim=(0, 2, 3))

    def table(self) -> Table:
        """The inputs' changes, a row a sample, and below them the outputs'."""
        return as_table(torch.cat(self._batches, dim=1).flatten(0, 1).float())


SMALLEST = 1e-8  # what the reference adds to a length before it divides


def observe(observer: Observer, adapter: Adapter, run: Run, sampler: Sampler, x: Tensor, prompt: Prompt) -> None:
    """Show an uncached run to an observer, from the noise x [n, C, ...]."""
    policies = [StoreAll(observer.units) for _ in range(run.guidance.passes)]
    waiting = iter(policies)
    passes = Passes(adapter, run, lambda _: next(waiting))
    for step, _ in enumerate(denoise(passes, sampler, x, prompt)):
        caches = [engine.cache for engine in passes.engines]
        observer.see(
            step,
            {unit: torch.cat([cache.read(unit, Hold(), step) for cache in caches]) for unit in observer.units},
            torch.cat([policy.modulated for policy in policies if policy.modulated is not None]),
        )


@torch.inference_mode()
def calibrate(
    adapter: Adapter,
    method: Method,
    stage: CalibrateReuse | CalibrateMagnitudes | CalibrateChanges,
    nfe: int,
    settings: SamplerSettings,
    prompts: Prompts,
) -> Table:
    """The table that a stage declares, from as many samples as it says.

    Args:
        nfe: steps of the uncached reference.
        prompts: sample indices [n] -> what they show.
    """
    steps, shape = method.sampled_steps(nfe), adapter.shape
    observer: Observer
    match stage:
        case CalibrateReuse():
            observer = BranchErrors(shape, steps, stage.lookahead)
        case CalibrateMagnitudes():
            observer = Magnitudes(shape, steps)
        case CalibrateChanges():
            observer = Changes(steps, adapter.spec.guidance(settings.guidance_scale).rows_per_sample)
    every = CALIBRATION_INDEX + torch.arange(stage.samples)
    for index in tqdm(every.split(BATCH), desc="calibrate", mininterval=1):
        sampler, run = start_run(adapter, method, nfe, settings, index, Artefacts())
        x = initial_noise(adapter, settings.seed, index).to(adapter.device)
        observe(observer, adapter, run, sampler, x, prompts(index).to(x.device))
    return observer.table()
