"""LazyDiT's gates (arXiv 2412.12444): how much of a part is computed, told from what the part is given.

A gate is a linear layer without bias on a part's modulated input; summed over the tokens and through a sigmoid it says
for every row how much of the part is fresh. As in the released code, gates learn on pairs of neighbouring steps drawn
as Learning-to-Cache's are: the later one's output with soft gates is held to that of the same network that computes
everything, and the sums of the gates of all attentions and of all MLPs, means over rows, have a price each. Weights
start at 0, where every gate is one half and, with the threshold at one half, open. Only every second step is a later
one; the others' gates stay there.
"""

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from tcbench.artefacts import as_table
from tcbench.engine.soft import Gate, soft_hidden
from tcbench.method import Table
from tcbench.models.adapter import Prompt
from tcbench.plan import Site, Unit
from tcbench.shapes import Kind
from tcbench.trainable import TrainGates
from tcbench.training.routers import train_on_second_steps
from tcbench.training.sizes import row_errors
from tcbench.training.unfinished import Stateful, Unfinished, Weights

if TYPE_CHECKING:
    from tcbench.training.pairs import Pairs


KINDS: tuple[Kind, Kind] = "mix", "pointwise"
"""Of the parts that have gates."""


@dataclass(frozen=True)
class GateLoss:
    """One training step.

    Attributes:
        total: what was minimised.
        mse_R: mean squared error of every sample's model output, over channels and pixels.
        mix, pointwise: sums of the gates of attentions and of MLPs, means over rows.
    """

    total: Tensor
    mse_R: Tensor
    mix: Tensor
    pointwise: Tensor


class GateTrainer:
    """AdamW on the gates of one step at a time; the model must be frozen.

    Every step's weights are a parameter of their own: a batch that does not use them must leave their momentum alone.

    Args:
        pairs: the model and the sampler's grid.
        weight_SPD: where to start, by step counted from the last one and by part of `KINDS`.
    """

    def __init__(self, pairs: "Pairs", stage: TrainGates, weight_SPD: Tensor) -> None:
        self.pairs, self.stage = pairs, stage
        self.steps = [nn.Parameter(weight.to(pairs.adapter.device, copy=True)) for weight in weight_SPD]
        self.optimiser = torch.optim.AdamW(self.steps, stage.learning_rate, betas=(0.9, 0.999), weight_decay=0)

    def step(self, odd: int, x: Tensor, label: Prompt) -> GateLoss:
        """Update the gates of the step behind `odd`.

        Args:
            odd: the pair's earlier step, counted from the last sampled step.
            x: latents at that step, [R, C, ...].
            label: labels or captions, some of them dropped; the same in all three passes.
        """
        pairs, adapter, shape = self.pairs, self.pairs.adapter, self.pairs.adapter.shape
        sites, open_R = shape.sites_of(*KINDS), dict[Site, Tensor]()
        pair = pairs.outputs(torch.full((len(x),), len(self.steps) - 1 - odd), x, label, sites)

        def gate(site: Site, weight_D: Tensor, h_RND: Tensor) -> Tensor:
            open_R[site] = (h_RND.float() * weight_D).sum(dim=(1, 2)).sigmoid()
            return open_R[site][:, None, None]

        gates: dict[Unit, Gate] = {
            site: partial(gate, site, weight_D) for site, weight_D in zip(sites, self.steps[odd - 1], strict=True)
        }
        hidden = soft_hidden(adapter, pair.tokens, pair.condition, gates, pair.cached, None, pairs.checkpointed)
        mse_R = row_errors(adapter.unembed(hidden, pair.condition), pair.target)
        mix, pointwise = (torch.stack([open_R[site] for site in shape.sites_of(kind)]).sum(0).mean() for kind in KINDS)
        total = mse_R.mean() + self.stage.mix_cost_weight * mix + self.stage.pointwise_cost_weight * pointwise
        self.optimiser.zero_grad()
        total.backward()
        pairs.crew.average_gradients(self.steps)
        self.optimiser.step()
        return GateLoss(total.detach(), mse_R.detach(), mix.detach(), pointwise.detach())

    def weights(self) -> Tensor:
        """The gates as they are now: [S, P, D], on the CPU."""
        return torch.stack([step.detach().cpu() for step in self.steps])


def train_gates(pairs: "Pairs", stage: TrainGates, unfinished: Unfinished) -> tuple[Table, dict[str, list[float]]]:
    """Train gates from 0.

    Raises:
        UserError: the loss became NaN or infinite.
    """
    steps, shape = len(pairs.sampler.timesteps), pairs.adapter.shape
    trainer = GateTrainer(pairs, stage, torch.zeros(steps, len(shape.sites_of(*KINDS)), shape.width))
    learnt = Weights({str(number): weight for number, weight in enumerate(trainer.steps)})
    parts: dict[str, Stateful] = {"steps": learnt, "optimiser": trainer.optimiser}

    def said(loss: GateLoss) -> dict[str, float]:
        means = {"cache_loss": loss.mse_R.mean(), "open_mix": loss.mix, "open_pointwise": loss.pointwise}
        return {name: pairs.crew.mean(value).item() for name, value in means.items()}

    history = train_on_second_steps(pairs, stage, unfinished, parts, trainer.step, said)
    return as_table(trainer.weights().flatten(0, 1)), history
