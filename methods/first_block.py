"""First-block cache (ParaAttention; diffusers' `FirstBlockCacheConfig`): the first block says whether the rest moved.

Every step computes the first block. If its residual is close to that of the last computed step, the residual of all
other blocks is held; else they are computed, and the first block's residual is the one to compare with from then on. As
released there is no accumulation, no forced last step, and one decision for the whole batch.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pydantic import Field

from tcbench.method import Look, Method, Run, relative_change
from tcbench.plan import ALL, NONE, All, Block, Decision, Deferred, Nothing, Plan, Span

if TYPE_CHECKING:
    from torch import Tensor


class FirstBlock(Method):
    """Hold the residual of all blocks but the first while that of the first moves little.

    Options:
        threshold: the relative change above which a step is computed; diffusers' default is 0.05.
    """

    name = "first_block"
    label = "first-block cache"
    knob = "threshold"
    decides = "host"

    threshold: float = Field(0.05, ge=0, le=1)

    def start(self, run: Run) -> "_Comparison":
        """The residual to compare with lives for one run."""
        return _Comparison(self.threshold)


@dataclass
class _Comparison:
    """One run's memory: the first block's residual at the last step that was computed."""

    threshold: float
    residual: "Tensor | None" = None

    def plan(self, look: Look) -> Plan:
        """The first block, and what it says of the others."""

        def choose(stream: "Callable[[], Tensor]") -> All | Nothing:
            residual = stream() - look.latent()
            before = self.residual
            if before is not None and look.read(relative_change(residual, before)) <= self.threshold:
                return NONE
            self.residual = residual
            return ALL

        rest = Deferred(choose, like=ALL, least=NONE if look.step else ALL)
        return Plan({Block(0): Decision(ALL), Span(1, look.run.shape.num_blocks): Decision(rest)})
