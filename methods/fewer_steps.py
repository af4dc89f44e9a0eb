"""The control that needs no cache at all: the same sampler with fewer steps."""

from pydantic import PositiveInt

from tcbench.errors import UserError
from tcbench.method import Look, Method
from tcbench.plan import Plan


class FewerSteps(Method):
    """Compute everything at each of `steps` steps, respaced over the same noise schedule.

    Options:
        steps: number of sampling steps; the default is the paper's control at 50 steps.
    """

    name = "fewer_steps"
    label = "fewer steps"
    decides = "ahead"
    knob = "steps"

    steps: PositiveInt = 21

    def sampled_steps(self, nfe: int) -> int:
        """`steps`, of no more than the reference takes."""
        if self.steps > nfe:
            raise UserError(f"fewer_steps: steps: {self.steps} are more than the run's {nfe}; give {nfe} or fewer")
        return self.steps

    def plan(self, look: Look) -> Plan:
        """Nothing is cached."""
        return Plan()
