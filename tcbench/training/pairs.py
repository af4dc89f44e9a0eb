"""Pairs of neighbouring steps of the sampler's grid, which is what every caching method learns from.

x at the earlier step is the data noised to its level (Alg. 1, line 5). The chain's own first-order step, on the
uncached and unguided prediction, leads to the later one (line 7). It is deterministic for DDIM and flows, and adds
noise where the sampler does, or everywhere if the stage draws from the posterior, as Alg. 1 writes it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tcbench.engine.engine import Engine
from tcbench.errors import UserError
from tcbench.guidance import Unguided
from tcbench.method import Run
from tcbench.models.adapter import Adapter, Prompt
from tcbench.plan import ALL, Block, Hold, Unit, every_unit
from tcbench.samplers import Chain
from tcbench.trainable import PairStep
from tcbench.training.crew import ALONE, Crew

if TYPE_CHECKING:  # sampling loads artefacts here, and must not pay for importing scikit-learn
    from tcbench.data import Dataset


LABEL_DROPOUT = 0.1  # as in the training of DiT and of Learning-to-Cache's routers
CALIBRATION_SEED = 0xCA11  # of what is measured before training, the same for every training seed
CALIBRATION_INDEX = 1 << 40  # sample indices from here on never meet those of an evaluated sample


HELD_OUT = 10
"""Every tenth example, or the last of fewer, is kept from training: held-out losses are of these."""


@dataclass(frozen=True)
class Pair:
    """A batch of pairs of steps, uncached on both sides.

    Attributes:
        step_R: the later steps.
        cached: every block's update at the earlier steps, [R, N, D].
        tokens, condition: what enters the first block at the later steps.
        target: x^L there, [R, N, D].
        updates: every block's update there.
    """

    step_R: Tensor
    cached: dict[Unit, Tensor]
    tokens: Tensor
    condition: Any
    target: Tensor
    updates: dict[Unit, Tensor]


@dataclass(frozen=True)
class OutputPair:
    """A batch of pairs of steps for what is judged by the model's output.

    Attributes:
        cached: what the earlier steps leave of every unit, [R, N, D].
        tokens, condition: what enters the first block at the later steps.
        target: the model's output there, all channels, [R, C, ...].
    """

    cached: dict[Unit, Tensor]
    tokens: Tensor
    condition: Any
    target: Tensor


class Pairs:
    """Draws pairs of steps, all from one seeded CPU generator.

    Args:
        held_out: draw from the examples that are kept from training.
        step: how the later x of a pair follows from the earlier one.
        checkpointed: what learns from them computes blocks again for the gradient (`soft_hidden`).
        crew: who learns from them together; what is drawn is then this process's share.

    Raises:
        UserError: there are too few examples to hold one out.
    """

    def __init__(
        self,
        adapter: Adapter,
        data: "Dataset",
        sampler: Chain,
        seed: int,
        *,
        held_out: bool = False,
        step: PairStep = "solver",
        checkpointed: bool = False,
        crew: Crew = ALONE,
    ) -> None:
        self.adapter, self.data, self.sampler, self.held_out = adapter, data, sampler, held_out
        self.step, self.checkpointed, self.crew = step, checkpointed, crew
        self.generator = torch.Generator().manual_seed(seed)
        self.timesteps = torch.tensor([*sampler.timesteps, 0])
        if len(data) < 2:
            raise UserError(f"training: {len(data)} examples; give two or more, because one in {HELD_OUT} is held out")

    def again(self, seed: int, *, held_out: bool = False) -> "Pairs":
        """Other draws from the same examples and chain."""
        of = self.adapter, self.data, self.sampler
        how: dict[str, Any] = {"step": self.step, "checkpointed": self.checkpointed, "crew": self.crew}
        return Pairs(*of, seed, held_out=held_out, **how)

    def steps(self, batch_size: int, gap: int = 1) -> Tensor:
        """Earlier steps of pairs that are `gap` steps apart, uniform over the grid: [R]."""
        return torch.randint(len(self.sampler.timesteps) - gap, (batch_size,), generator=self.generator)

    def one_of(self, steps: Sequence[int]) -> int:
        """One step out of `steps`, uniformly."""
        return steps[int(torch.randint(len(steps), (), generator=self.generator))]

    def start(self, step_R: Tensor) -> tuple[Tensor, Prompt]:
        """(x at the earlier steps [R, C, ...], labels or captions with some dropped), of the share of `step_R`."""
        x, label = self.start_of_all(step_R)
        return self.crew.share(x).to(self.adapter.device), self.crew.share(label).to(self.adapter.device)

    def start_of_all(self, step_R: Tensor) -> tuple[Tensor, Prompt]:
        """The same of the whole batch, on the CPU."""
        chosen = self._examples(len(step_R))
        x0, label = self.data.images[chosen], self.data.labels[chosen]
        dropped = torch.rand(len(step_R), generator=self.generator) < LABEL_DROPOUT
        label = self.adapter.drop(label, dropped)
        noise = torch.randn(x0.shape, generator=self.generator)
        return self.sampler.noised(x0, step_R, noise), label

    def _examples(self, count: int) -> Tensor:
        """Indices of examples, [count]: of those that are held out, or of the others."""
        every = min(HELD_OUT, len(self.data))
        kept = len(self.data) // every
        if self.held_out:
            return every * torch.randint(kept, (count,), generator=self.generator) + every - 1
        chosen = torch.randint(len(self.data) - kept, (count,), generator=self.generator)
        return chosen + chosen // (every - 1)

    def embed(self, x: Tensor, step_R: Tensor, label: Prompt) -> tuple[Tensor, Any]:
        """(tokens [R, N, D], condition)."""
        timestep = self.timesteps[step_R].to(x.device)
        context = self.adapter.prepare(label)
        return self.adapter.embed(x, context), self.adapter.condition(timestep, context)

    def draw(self, batch_size: int, longest_gap: int = 1) -> Pair:
        """A batch of pairs at random steps, 1 to `longest_gap` steps apart, the same for the whole batch."""
        gap = 1 if longest_gap == 1 else self.one_of(range(1, longest_gap + 1))
        return self.at(self.steps(batch_size, gap), gap)

    @torch.no_grad()
    def at(self, step_R: Tensor, gap: int = 1) -> Pair:
        """Pairs whose earlier steps are `step_R`; the chain walks `gap` steps, uncached, to the later ones."""
        x, label = self.start(step_R)
        step_R = self.crew.share(step_R)
        tokens, condition = self.embed(x, step_R, label)
        target, updates = uncached_updates(self.adapter, tokens, condition)
        cached = updates
        for _ in range(gap):
            x = self.next(x, target, condition, step_R)
            step_R = step_R + 1
            tokens, condition = self.embed(x, step_R, label)
            target, updates = uncached_updates(self.adapter, tokens, condition)
        return Pair(step_R, cached, tokens, condition, target, updates)

    @torch.no_grad()
    def outputs(self, step_R: Tensor, x: Tensor, label: Prompt, units: Sequence[Unit]) -> "OutputPair":
        """The pair of `step_R` and what follows, from the latents x [R, C, ...], with the model's output there."""
        tokens, condition = self.embed(x, step_R, label)
        hidden, cached = uncached_values(self.adapter, tokens, condition, units)
        tokens, condition = self.embed(self.next(x, hidden, condition, step_R), step_R + 1, label)
        hidden, _ = uncached_values(self.adapter, tokens, condition, [])
        return OutputPair(cached, tokens, condition, self.adapter.unembed(hidden, condition))

    def next(self, x: Tensor, hidden: Tensor, condition: Any, step_R: Tensor) -> Tensor:
        """x at the following steps, from the last block's output at `step_R`."""
        output = self.adapter.unembed(hidden, condition)[:, : self.adapter.spec.in_channels]
        step_rows = self.sampler.step_rows if self.step == "solver" else self.sampler.posterior_rows
        # the step may draw, and then for the whole batch
        output, step_R, x = (self.crew.joined(rows) for rows in (output, step_R.to(x.device), x))
        return self.crew.share(step_rows(output, step_R, x, self.generator))


def uncached_updates(adapter: Adapter, tokens: Tensor, condition: Any) -> tuple[Tensor, dict[Unit, Tensor]]:
    """(x^L, every block's update f^l), without a gradient."""
    return uncached_values(adapter, tokens, condition, [Block(block) for block in range(adapter.shape.num_blocks)])


def uncached_values(
    adapter: Adapter, tokens: Tensor, condition: Any, units: Sequence[Unit]
) -> tuple[Tensor, dict[Unit, Tensor]]:
    """(x^L, what would be cached of every unit) of a forward that computes everything, without a gradient."""
    engine = Engine(adapter, Run(adapter.shape, (0,), Unguided(), torch.arange(len(tokens))))
    with torch.no_grad():
        hidden = engine.hidden(every_unit(units, ALL), 0, tokens, condition)
    return hidden, {unit: engine.cache.read(unit, Hold(), 0) for unit in units}
