"""EasyCache: Less is Enough, Training-Free Video Diffusion Acceleration via Runtime-Adaptive Caching (2507.02860).

How much the network's output changes for a change of its input is nearly constant over neighbouring steps. The rate
measured between the last two full steps turns the input's changes into an estimate of the output's, and steps are
skipped while their sum is small.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pydantic import Field, NonNegativeInt, PositiveInt

from tcbench.method import Look, Method, Run
from tcbench.plan import ALL, NONE, Plan, Span, every_unit
from tcbench.tensors.unseen import on_values

if TYPE_CHECKING:
    from torch import Tensor


class EasyCache(Method):
    """Hold what the network adds while the estimated change of its output is small.

    The released code holds the difference between the network's output and its input. Here it is what all blocks add to
    the embedded input: the same idea where the output layer follows the current step.

    Options:
        threshold: the summed relative change up to which steps are skipped; 0.05 is the default, 0.1 and 0.2 gain about
            2 and 3 times on Wan 2.1.
        first_steps, last_steps: how many are always computed at either end; 10 and 1 in the code, 5 in some of it.
    """

    name = "easycache"
    label = "EasyCache"
    knob = "threshold"
    decides = "host"

    threshold: float = Field(0.05, ge=0, le=2)
    first_steps: PositiveInt = 10
    last_steps: NonNegativeInt = 1

    def start(self, run: Run) -> "_Rate":
        """The rate and the summed change live for one run."""
        return _Rate(self)

    def outcomes(self, run: Run, step: int) -> tuple[Plan, ...]:
        """Everything, or nothing."""
        return _whole(run, computed=True), _whole(run, computed=False)


def _whole(run: Run, computed: bool) -> Plan:
    return every_unit([Span(0, run.shape.num_blocks)], ALL if computed else NONE)


@dataclass
class _Rate:
    """One run's memory.

    Attributes:
        before: the last step's input.
        full: input and output of the last full step.
        rate: the output's change for the input's between the last two full steps, on the device.
        change: the summed estimate since the last full step.
        computed: whether the last step was.
    """

    method: EasyCache
    before: "Tensor | None" = None
    full: "tuple[Tensor, Tensor] | None" = None
    rate: "Tensor | None" = None
    change: float = 0.0
    computed: bool = False

    def plan(self, look: Look) -> Plan:
        """Everything at the ends of the run, and where the estimate has grown to the threshold."""
        if self.computed:
            self._renew(look.output())
        seen, before = look.input(), self.before
        self.before, method = seen, self.method
        at_an_end = look.step < method.first_steps or look.step >= look.run.nfe - method.last_steps
        computed = at_an_end
        if before is not None and self.full is not None and self.rate is not None and not at_an_end:
            self.change += look.read(on_values(_estimate, seen, before, self.full[1], self.rate, shape=()))
            computed = self.change >= method.threshold
        self.computed = computed or self.rate is None
        if self.computed:
            self.change = 0.0
        return _whole(look.run, self.computed)

    def _renew(self, output: "Tensor") -> None:
        """Measure the rate: `before` is the input of the step that was computed last, `output` its output."""
        assert self.before is not None
        if self.full is not None:
            self.rate = on_values(_rate, self.before, output, *self.full, shape=())
        self.full = self.before, output


def _rate(x: "Tensor", output: "Tensor", earlier_x: "Tensor", earlier_output: "Tensor") -> "Tensor":
    return (output - earlier_output).abs().mean() / (x - earlier_x).abs().mean()


def _estimate(x: "Tensor", before: "Tensor", output: "Tensor", rate: "Tensor") -> "Tensor":
    return rate * (x - before).abs().mean() / output.abs().mean()
