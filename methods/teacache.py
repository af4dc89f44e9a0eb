"""TeaCache: Timestep Embedding Tells: It's Time to Cache for Video Diffusion Model (arXiv 2411.19108).

The residual of the whole block stack is held while the accumulated change of the first block's modulated input stays
below a threshold. The change of a step is the relative L1 distance to the step before, through a polynomial that was
fitted for the model. As in the released code the first and the last step are always computed, and one decision holds
for the whole batch.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pydantic import Field

from tcbench.method import Look, Method, Run, relative_change
from tcbench.plan import ALL, NONE, Plan, Span, every_unit

if TYPE_CHECKING:
    from torch import Tensor


class TeaCache(Method):
    """Hold the residual of all blocks while the modulated input moves little.

    Options:
        threshold: the accumulated change at which a step is computed; published are 0.1 and 0.2 for video models, 0.25
            to 0.8 for FLUX.
        coefficients: of the polynomial, highest power first. They are fitted for a model; none are published for DiT or
            PixArt-alpha, and the default takes the change as it is.
    """

    name = "teacache"
    label = "TeaCache"
    knob = "threshold"
    decides = "host"

    threshold: float = Field(0.2, ge=0, le=2)
    coefficients: tuple[float, ...] = Field((1.0, 0.0), min_length=1)

    def start(self, run: Run) -> "_Accumulation":
        """The accumulated change lives for one run."""
        return _Accumulation(self)

    def outcomes(self, run: Run, step: int) -> tuple[Plan, ...]:
        """Everything, or nothing."""
        return whole_stack(run, computed=True), whole_stack(run, computed=False)

    def rescaled(self, change: float) -> float:
        """The polynomial's value, by Horner's rule."""
        value = 0.0
        for coefficient in self.coefficients:
            value = value * change + coefficient
        return value


def whole_stack(run: Run, computed: bool) -> Plan:
    """All blocks as one unit."""
    return every_unit([Span(0, run.shape.num_blocks)], ALL if computed else NONE)


@dataclass
class _Accumulation:
    """One run's memory: the last step's signal, and the change since the last computed step."""

    method: TeaCache
    before: "Tensor | None" = None
    change: float = 0.0

    def plan(self, look: Look) -> Plan:
        """Everything at the ends of the run and where the change has grown to the threshold."""
        signal, before = look.modulated_input(), self.before
        at_an_end = before is None or look.step == look.run.nfe - 1
        if before is not None and not at_an_end:
            self.change += self.method.rescaled(look.read(relative_change(signal, before)))
        self.before = signal
        computed = at_an_end or self.change >= self.method.threshold
        if computed:
            self.change = 0.0
        return whole_stack(look.run, computed)
