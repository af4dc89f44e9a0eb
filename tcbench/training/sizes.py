"""How large the error of caching is at every step, which is the unit that a relative loss counts in.

Eq. (9) adds up errors of x^L as they are. Where x^L moves by orders of magnitude more at some steps, the sum is theirs,
and what is learned there drowns the rest. The unit of a step is its *reuse error*: the mean square by which x^L is off
when every block that may be cached reuses its update of the step before. That is what the cost loss is traded against,
so that one lambda means the same at every step; the change of x^L itself would count blocks that are always computed.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from tcbench.engine.soft import soft_hidden
from tcbench.errors import UserError
from tcbench.plan import Block, Unit
from tcbench.shapes import ModelShape
from tcbench.trainable import Loss

if TYPE_CHECKING:
    from tcbench.training.pairs import Pairs

LARGEST_SPAN = 1e3
"""Largest by smallest reuse error up to which a raw loss is taken to see every step."""

PAIRS_PER_STEP = 2
BATCH = 16
"""Pairs at once, or as many as fit."""

ROW_BYTES = 2**34
"""What is kept of all rows at once may take so much."""


def rows_at_once(shape: ModelShape, kept: int) -> int:
    """As many rows as `ROW_BYTES` hold, or one, if `kept` tensors of every block are kept of each, in float32."""
    return max(1, ROW_BYTES // (4 * kept * shape.num_blocks * shape.stream_tokens * shape.width))


def pairs_at_once(shape: ModelShape) -> int:
    """As many pairs as fit, of whose both steps the updates are kept."""
    return rows_at_once(shape, 2)


@dataclass(frozen=True)
class ReuseErrors:
    """The reuse error of every step.

    Attributes:
        error_S: float32 [S]; the first step, which nothing can be reused at, has that of the second.
    """

    error_S: Tensor

    @property
    def span(self) -> float:
        """The largest by the smallest."""
        return (self.error_S.max() / self.error_S.min()).item()

    def kind(self, loss: Loss) -> Literal["raw", "relative"]:
        """What `auto` stands for here; the others stand for themselves."""
        if loss == "auto":
            return "relative" if LARGEST_SPAN < self.span < float("inf") else "raw"
        return loss

    def weights(self, loss: Loss) -> Tensor:
        """What errors are multiplied with, [S]: 1, or so that every step counts as one of median reuse error does.

        The median keeps a relative loss, and lambda, on the scale of the raw one.

        Raises:
            UserError: there is a step at which reuse costs nothing, or is not finite.
        """
        if self.kind(loss) == "raw":
            return torch.ones_like(self.error_S)
        if not self.span < float("inf"):
            raise UserError("loss: relative needs an error of reuse at every step, and a step has none; set loss: raw")
        return self.error_S.median() / self.error_S

    def record(self, loss: Loss) -> dict[str, Any]:
        """For the log of a stage."""
        kind = self.kind(loss)
        told: dict[str, Any] = {"loss_used": kind, "reuse_error": self.error_S.tolist()}
        if kind == "raw" and self.span > LARGEST_SPAN:
            told["marks"] = [f"few steps decide the raw loss: errors of reuse span {self.span:.0e} over the steps"]
        return told


@torch.no_grad()
def measure_reuse(pairs: "Pairs", free_blocks: int) -> ReuseErrors:
    """Measure it at every step, on a few pairs each, whose cache is one step old."""
    adapter, nfe = pairs.adapter, len(pairs.sampler.timesteps)
    closed: dict[Unit, Tensor] = {Block(block): torch.zeros((), device=adapter.device) for block in range(free_blocks)}
    total_S = torch.zeros(nfe)
    for step_R in torch.arange(nfe - 1).repeat(PAIRS_PER_STEP).split(min(BATCH, pairs_at_once(adapter.shape))):
        pair = pairs.at(step_R)
        hidden = soft_hidden(adapter, pair.tokens, pair.condition, closed, pair.cached)
        total_S.index_add_(0, pair.step_R, row_errors(hidden, pair.target, adapter.shape.joint_text).float().cpu())
    error_S = total_S / PAIRS_PER_STEP
    error_S[0] = error_S[1]
    return ReuseErrors(error_S)


def row_errors(hidden: Tensor, target: Tensor, text: int = 0) -> Tensor:
    """Mean square of every row's error of x^L, or of the model's output: [R].

    Args:
        text: tokens at the head of x^L that no output is made of.
    """
    return (hidden[:, text:].float() - target[:, text:].float()).square().flatten(1).mean(1)
