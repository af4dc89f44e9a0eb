"""Losses on examples that are kept from training: when a stage ends, which weights it keeps, if it went well."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from tcbench.errors import UserError
from tcbench.trainable import TrainRefiners, TrainScorer

EVALUATIONS, LEAST_APART = 20, 10
"""How many held-out losses are taken in a stage's training, and the iterations between them at least."""

BATCHES = 4
"""Batches that each of them is of."""

QUIET, LEAST_FALL = 5, 0.01
"""A loss has stopped falling if the best of it fell by less than this share over so many evaluations."""

DIVERGED = 2.0
"""A loss that ends above this multiple of its first value was driven off, not trained."""

SEED = 0x4E1D
"""Of the held-out draws, which are the same for every training seed."""


class HeldOut:
    """Watches a stage's training.

    Args:
        weights: what is trained, by name.
        loss: the held-out loss as things are now, of the same draws at every call.

    Attributes:
        losses: the held-out losses so far.
    """

    def __init__(
        self, stage: TrainScorer | TrainRefiners, weights: Mapping[str, Tensor], loss: Callable[[], float]
    ) -> None:
        self.stage, self.weights, self.loss = stage, weights, loss
        self.every = max(LEAST_APART, stage.iterations // EVALUATIONS)
        self.losses: list[float] = []
        self._best: dict[str, Tensor] = {}

    def state_dict(self) -> dict[str, Any]:
        """The losses so far and the best weights."""
        return {"losses": list(self.losses), "best": dict(self._best)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go back to them."""
        self.losses = state["losses"]
        self._best = {name: best.to(self.weights[name].device) for name, best in state["best"].items()}

    def enough(self, done: int) -> bool:
        """Whether training may end after so many iterations; to be called before every one."""
        if done % self.every:
            return False
        self._look()
        return self.stage.patience is not None and self._quiet(self.stage.patience)

    def finish(self) -> dict[str, Any]:
        """Look a last time, put the best weights back where the stage has patience, and say how it went, for the log.

        Raises:
            UserError: the loss ended far above its start.
        """
        self._look()
        first, last, kept = self.losses[0], self.losses[-1], self.losses[-1]
        if not last <= DIVERGED * first:
            raise UserError(
                f"{type(self.stage).__name__}: the held-out loss went from {first:.3g} to {last:.3g}; "
                f"lower the learning rate, {self.stage.learning_rate:g}, and train again"
            )
        if self.stage.patience is not None:
            kept = min(self.losses)
            for name, best in self._best.items():
                self.weights[name].data.copy_(best)
        ended = "trained to convergence" if self._quiet(self.stage.patience or QUIET) else "stopped early"
        return {"held_out_loss": self.losses, "held_out_loss_kept": kept, "ended": ended}

    def _look(self) -> None:
        self.losses.append(self.loss())
        if self.stage.patience is not None and self.losses[-1] <= min(self.losses):
            self._best = {name: weight.detach().clone() for name, weight in self.weights.items()}

    def _quiet(self, evaluations: int) -> bool:
        """Whether the loss has stopped falling."""
        before = self.losses[:-evaluations]
        return bool(before) and min(self.losses) > (1 - LEAST_FALL) * min(before)
