"""Pairs of neighbouring steps of the sampler's grid, which is what every caching method learns from.

x at the earlier step is the data noised to its level (Alg. 1, line 5). The chain's own first-order step, on the
uncached and unguided prediction, leads to the later one (line 7). It is deterministic for DDIM and flows, and adds
noise where the sampler does.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tcbench.engine.engine import Engine
from tcbench.guidance import Unguided
from tcbench.method import Run
from tcbench.models.adapter import Adapter, Prompt
from tcbench.plan import ALL, Block, Hold, Unit, every_unit
from tcbench.samplers import Chain

if TYPE_CHECKING:  # sampling loads artefacts here, and must not pay for importing scikit-learn
    from tcbench.data import Dataset


LABEL_DROPOUT = 0.1  # as in the training of DiT and of Learning-to-Cache's routers
CALIBRATION_SEED = 0xCA11  # of what is measured before training, the same for every training seed
CALIBRATION_INDEX = 1 << 40  # sample indices from here on never meet those of an evaluated sample


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


class Pairs:
    """Draws pairs of steps, all from one seeded CPU generator."""

    def __init__(self, adapter: Adapter, data: "Dataset", sampler: Chain, seed: int) -> None:
        self.adapter, self.data, self.sampler = adapter, data, sampler
        self.generator = torch.Generator().manual_seed(seed)
        self.timesteps = torch.tensor([*sampler.timesteps, 0])

    def steps(self, batch_size: int) -> Tensor:
        """Earlier steps of the pairs, uniform over the grid: [R]."""
        return torch.randint(len(self.sampler.timesteps) - 1, (batch_size,), generator=self.generator)

    def one_of(self, steps: Sequence[int]) -> int:
        """One step out of `steps`, uniformly."""
        return steps[int(torch.randint(len(steps), (), generator=self.generator))]

    def start(self, step_R: Tensor) -> tuple[Tensor, Prompt]:
        """(x at the earlier steps [R, C, ...], labels or captions with some dropped)."""
        device = self.adapter.device
        chosen = torch.randint(len(self.data), (len(step_R),), generator=self.generator)
        x0, label = self.data.images[chosen], self.data.labels[chosen]
        dropped = torch.rand(len(step_R), generator=self.generator) < LABEL_DROPOUT
        label = self.adapter.drop(label, dropped)
        noise = torch.randn(x0.shape, generator=self.generator)
        return self.sampler.noised(x0, step_R, noise).to(device), label.to(device)

    def embed(self, x: Tensor, step_R: Tensor, label: Prompt) -> tuple[Tensor, Any]:
        """(tokens [R, N, D], condition)."""
        timestep = self.timesteps[step_R].to(x.device)
        context = self.adapter.prepare(label)
        return self.adapter.embed(x, context), self.adapter.condition(timestep, context)

    def draw(self, batch_size: int) -> Pair:
        """A batch of pairs at random steps."""
        return self.at(self.steps(batch_size))

    @torch.no_grad()
    def at(self, step_R: Tensor) -> Pair:
        """Pairs whose earlier steps are `step_R`."""
        x, label = self.start(step_R)
        tokens, condition = self.embed(x, step_R, label)
        hidden, cached = uncached_updates(self.adapter, tokens, condition)
        later = self.next(x, hidden, condition, step_R)
        tokens, condition = self.embed(later, step_R + 1, label)
        return Pair(step_R + 1, cached, tokens, condition, *uncached_updates(self.adapter, tokens, condition))

    def next(self, x: Tensor, hidden: Tensor, condition: Any, step_R: Tensor) -> Tensor:
        """x at the following steps, from the last block's output at `step_R`."""
        output = self.adapter.unembed(hidden, condition)[:, : self.adapter.spec.in_channels]
        return self.sampler.step_rows(output, step_R.to(x.device), x, self.generator)


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
