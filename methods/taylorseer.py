"""TaylorSeer: From Reusing to Forecasting, Accelerating Diffusion Models with TaylorSeers (arXiv 2503.06923).

Between full steps the output of every branch is forecast with a Taylor polynomial whose derivatives are difference
quotients of the last full steps, and passes through the current step's gates. The order grows by one with every full
step, and all orders share one divisor, the distance of the last two full steps.
"""

from typing import Literal

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from tcbench.method import Look, Method, Run
from tcbench.plan import ALL, NONE, Forecast, Plan, Span, Unit, every_unit
from tcbench.schedule import Placement, StepList, after_a_start, check_one, stated_steps


class TaylorSeer(Method):
    """Forecast branch outputs before their gates.

    Options:
        interval: a step is full after `interval` - 1 forecasts; 4 is recommended for DiT with order 4, and 3 to 9 are
            published.
        order: of the polynomial; lower as long as fewer full steps lie behind; 0 holds.
        first_enhance: how many steps are full before the counting starts, 2 in the authors' DiT code, 3 in that for
            FLUX. Of 3 or more theirs takes quotients from the last two alone, this from all of them.
        num_full_steps: instead of `interval`: this many full steps, those after the first ones spread evenly.
        full_steps: a list of them, in the place of all that places them.
        placement: of the even spread (`tcbench.schedule.spread_evenly`).
        schedule: when steps are full. `counted` is the authors' code: the counter starts at the last of the first
            steps, and the last step may be a forecast. `diffusers` is that of its hook, which counts from two steps
            later (defaults there: interval 5, order 1, 3 first steps).
        unit: what is forecast: every branch, or the residual of the whole stack (diffusers' lite mode, roughly), which
            needs little memory.
    """

    name = "taylorseer"
    label = "TaylorSeer"
    decides = "ahead"
    knob = "num_full_steps"

    interval: PositiveInt | None = None
    order: NonNegativeInt = Field(4, le=8)
    first_enhance: PositiveInt = 2
    num_full_steps: PositiveInt | None = None
    full_steps: StepList | None = None
    placement: Placement = "start"
    schedule: Literal["counted", "diffusers"] = "counted"
    unit: Literal["branch", "stack"] = "branch"

    @model_validator(mode="after")
    def _one_schedule(self) -> "TaylorSeer":
        check_one(self)
        return self

    def i_steps(self, run: Run) -> tuple[int, ...]:
        """Full steps, in sampling order."""
        first, interval = self.first_enhance, self.interval or 4
        if stated := stated_steps(self, run.nfe, first):
            return stated
        if self.schedule == "counted":
            return after_a_start(first, interval, run.nfe)
        return tuple(step for step in range(run.nfe) if step < first or (step - first - 1) % interval == 0)

    def plan(self, look: Look) -> Plan:
        """All units: computed and stored with their quotients, or forecast."""
        shape = look.run.shape
        units: tuple[Unit, ...] = shape.sites if self.unit == "branch" else (Span(0, shape.num_blocks),)
        return every_unit(units, ALL if look.step in self.i_steps(look.run) else NONE, Forecast(self.order))
