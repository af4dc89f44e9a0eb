"""FORA: Fast-Forward Caching in Diffusion Transformer Acceleration (arXiv 2407.01425).

Every `interval` steps all branches are computed; in between, the attention and MLP outputs of the last full step are
reused and pass through the current step's gates.
"""

from pydantic import PositiveInt, model_validator

from tcbench.method import Look, Method, Run
from tcbench.plan import ALL, NONE, Plan, every_unit
from tcbench.schedule import Placement, StepList, check_one, stated_steps


class Fora(Method):
    """Static interval caching of branch outputs before their gates.

    Options (one of the first three; interval 3, the published setting, if none is given):
        interval: the published rule. As in the reference code it is anchored at the *end*: a step is full if the number
            of steps after it is a multiple of `interval`, and the first step always is.
        num_full_steps: a labelled variant that reaches budgets no interval gives: this many full steps, spread evenly.
        full_steps: a list of them.
        placement: of the even spread; `end` is anchored as the published rule is (`tcbench.schedule.spread_evenly`).
    """

    name = "fora"
    label = "FORA"
    decides = "ahead"
    knob = "num_full_steps"

    interval: PositiveInt | None = None
    num_full_steps: PositiveInt | None = None
    full_steps: StepList | None = None
    placement: Placement = "end"

    @model_validator(mode="after")
    def _one_schedule(self) -> "Fora":
        check_one(self)
        return self

    def i_steps(self, run: Run) -> tuple[int, ...]:
        """Full steps, in sampling order."""
        if stated := stated_steps(self, run.nfe):
            return stated
        interval = self.interval or 3
        return tuple(step for step in range(run.nfe) if step == 0 or (run.nfe - 1 - step) % interval == 0)

    def plan(self, look: Look) -> Plan:
        """All branches of all blocks: computed and stored, or held."""
        return every_unit(look.run.shape.sites, ALL if look.step in self.i_steps(look.run) else NONE)
