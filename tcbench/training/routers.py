"""Learning-to-Cache's routers (arXiv 2406.01733): training, and the file format of the released ones.

A router is a table of logits [S, G], G = branches * L gates in block order: row i belongs to the step that is i steps
before the last one. Only even rows are used: odd steps compute everything, each even one reuses what the step before it
computed. Training draws one such pair of steps per batch and softens the choice: a branch's output before its gate is
s * fresh + (1 - s) * cached with s = sigmoid(logit), and the error of the model's output, on all channels, is weighed
against the sum of s.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeVar

import torch
from torch import Tensor, nn
from tqdm import tqdm

from tcbench.artefacts import as_table
from tcbench.engine.soft import soft_hidden
from tcbench.method import ModelShape, Table
from tcbench.models.adapter import Prompt
from tcbench.plan import Site, Unit
from tcbench.trainable import TrainGates, TrainRouter
from tcbench.training.running import check_finite
from tcbench.training.sizes import row_errors
from tcbench.training.unfinished import Stateful, Unfinished, Weights

if TYPE_CHECKING:
    from tcbench.training.pairs import Pairs

LOGIT_BOUND = 5.0  # logits are clamped to this after every step, so that no gate stops learning


@dataclass(frozen=True)
class RouterLoss:
    """One training step.

    Attributes:
        total: what was minimised, mean(mse_R) + lambda * gates, of this process's share of the batch.
        mse_R: mean squared error of every sample's model output, over channels and pixels.
        gates: sum of the soft gates.
    """

    total: Tensor
    mse_R: Tensor
    gates: Tensor


class RouterTrainer:
    """AdamW on a router's rows, one pair of steps at a time; the model must be frozen.

    Every row is a parameter of its own: a step that does not use a row must leave its momentum alone.

    Args:
        pairs: the model and the sampler's grid.
        logits: where to start, [S, G].
    """

    def __init__(self, pairs: "Pairs", stage: TrainRouter, logits: Tensor) -> None:
        self.pairs, self.stage = pairs, stage
        device = pairs.adapter.device
        self.rows = [nn.Parameter(row.to(device, copy=True)) for row in logits]
        self.optimiser = torch.optim.AdamW(self.rows, stage.learning_rate, betas=(0.9, 0.999), weight_decay=0)

    def step(self, odd: int, x: Tensor, label: Prompt) -> RouterLoss:
        """Update the row below `odd`.

        Args:
            odd: the pair's earlier step, counted from the last sampled step.
            x: latents at that step, [R, C, ...].
            label: labels or captions, some of them dropped; the same in all three passes.
        """
        pairs, adapter = self.pairs, self.pairs.adapter
        sites = router_sites(adapter.shape)
        pair = pairs.outputs(torch.full((len(x),), len(self.rows) - 1 - odd), x, label, sites)
        soft_G = self.rows[odd - 1].sigmoid()
        gate_G = soft_G
        if self.stage.straight_through is not None:
            # in this order the gates are 0 and 1 to the bit
            gate_G = (soft_G > self.stage.straight_through).float() + (soft_G - soft_G.detach())
        gates: dict[Unit, Tensor] = dict(zip(sites, gate_G, strict=True))
        hidden = soft_hidden(adapter, pair.tokens, pair.condition, gates, pair.cached, None, pairs.checkpointed)
        mse_R = row_errors(adapter.unembed(hidden, pair.condition), pair.target)
        total = mse_R.mean() + self.stage.cost_weight * soft_G.sum()
        self.optimiser.zero_grad()
        total.backward()
        pairs.crew.average_gradients(self.rows)
        self.optimiser.step()
        with torch.no_grad():
            self.rows[odd - 1].clamp_(-LOGIT_BOUND, LOGIT_BOUND)
        return RouterLoss(total.detach(), pairs.crew.joined(mse_R.detach()), soft_G.detach().sum())

    def logits(self) -> Tensor:
        """The router as it is now: [S, G], on the CPU."""
        return torch.stack([row.detach().cpu() for row in self.rows])


def router_sites(shape: ModelShape) -> list[Site]:
    """The branches in the order of a router's columns."""
    return list(shape.sites)


def train_router(pairs: "Pairs", stage: TrainRouter, unfinished: Unfinished) -> tuple[Table, dict[str, list[float]]]:
    """Train a router from random logits.

    Raises:
        UserError: the loss became NaN or infinite.
    """
    steps = len(pairs.sampler.timesteps)
    gates = len(router_sites(pairs.adapter.shape))
    trainer = RouterTrainer(pairs, stage, torch.randn(steps, gates, generator=pairs.generator))
    rows = Weights({str(number): row for number, row in enumerate(trainer.rows)})
    parts: dict[str, Stateful] = {"rows": rows, "optimiser": trainer.optimiser}

    def said(loss: RouterLoss) -> dict[str, float]:
        return {
            "cache_loss": loss.mse_R.mean().item(),
            "cost_loss": loss.gates.item(),
            "mean_gate": trainer.logits()[: steps - 1 : 2].sigmoid().mean().item(),
        }

    history = train_on_second_steps(pairs, stage, unfinished, parts, trainer.step, said)
    return as_table(trainer.logits()), history


class HasTotal(Protocol):
    """The loss of a training step; `total` is what was minimised."""

    @property
    def total(self) -> Tensor:
        """One number."""


Loss = TypeVar("Loss", bound=HasTotal)


def train_on_second_steps(
    pairs: "Pairs",
    stage: TrainRouter | TrainGates,
    unfinished: Unfinished,
    parts: dict[str, Stateful],
    step: Callable[[int, Tensor, Prompt], Loss],
    said: Callable[[Loss], dict[str, float]],
) -> dict[str, list[float]]:
    """Train on pairs of neighbouring steps whose earlier one is odd, counted from the last.

    Args:
        parts: what changes from iteration to iteration (`unfinished.Stage`).
        step: one update, of (the earlier step, latents [R, C, ...] there, labels or captions).
        said: what the history keeps of a loss, by name, fifty times in all; it may wait for the device.

    Returns:
        The history.

    Raises:
        UserError: the loss became NaN or infinite.
    """
    steps, history = len(pairs.sampler.timesteps), dict[str, list[float]]()
    left = unfinished.stage(pairs.generator, history, parts).iterations(stage.iterations)
    progress = tqdm(left, desc=f"train {stage.name}", total=stage.iterations, mininterval=1)
    for iteration in progress:
        odd = pairs.one_of(list(range(1, steps, 2)))
        x, label = pairs.start(torch.full((stage.batch_size,), steps - 1 - odd))
        loss = step(odd, x, label)
        check_finite(loss.total, stage, iteration)
        if iteration % max(1, stage.iterations // 50) == 0 or iteration == stage.iterations - 1:
            for name, value in said(loss).items():
                history.setdefault(name, []).append(value)
            progress.set_postfix({name: f"{values[-1]:.3g}" for name, values in history.items()})
    return history
