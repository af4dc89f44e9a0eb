"""HiCache: Training-free Acceleration of Diffusion Models via Hermite Polynomial-based Feature Caching (ICLR 2026).

TaylorSeer's full steps and difference quotients, with Hermite polynomials in the place of powers: the output of every
part before its gate is forecast as F0 + sum_i F(i) s^i H_i(s d) / i!, d steps after the last full one, with F(i) the
i-th backward quotient and H_i the physicists' Hermite polynomial. At s = 0.5 the first order goes half as far as
Taylor's. The code (yiming-l21/CFGCache) is for FLUX and Qwen-Image; for DiT there is none, and what stands here is its
forecast under the schedule of TaylorSeer's code for DiT.
"""

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from tcbench.extrapolate import combine, hermite, quotient_weights
from tcbench.method import Look, Method, Run
from tcbench.plan import ALL, NONE, Mix, Plan, every_unit
from tcbench.schedule import Placement, StepList, after_a_start, check_one, stated_steps


class HiCache(Method):
    """Forecast every part's output with scaled Hermite polynomials.

    Options (interval 7, order 2 and scale 0.5 are published for FLUX; 0.3 for its distilled version):
        interval: the distance of full steps after the start.
        num_full_steps: instead of it, a labelled variant that reaches budgets no interval gives: this many full steps,
            those after the first ones spread evenly.
        full_steps: a list of them, in the place of all that places them.
        placement: of the even spread (`tcbench.schedule.spread_evenly`).
        order: of the forecast; it is lower as long as fewer full steps lie behind.
        scale: the contraction s of the polynomials.
        first_steps: full steps at the start, before the interval counts; 2 in TaylorSeer's code for DiT.
    """

    name = "hicache"
    label = "HiCache"
    decides = "ahead"
    knob = "num_full_steps"

    interval: PositiveInt | None = None
    num_full_steps: PositiveInt | None = None
    full_steps: StepList | None = None
    placement: Placement = "start"
    order: NonNegativeInt = Field(2, le=8)
    scale: float = Field(0.5, gt=0, le=2)
    first_steps: PositiveInt = 2

    @model_validator(mode="after")
    def _one_schedule(self) -> "HiCache":
        check_one(self)
        return self

    def i_steps(self, run: Run) -> tuple[int, ...]:
        """Full steps, in sampling order."""
        first = self.first_steps
        return stated_steps(self, run.nfe, first) or after_a_start(first, self.interval or 7, run.nfe)

    def plan(self, look: Look) -> Plan:
        """All parts of all blocks: computed and remembered, or forecast."""
        behind = [step for step in self.i_steps(look.run) if step <= look.step]
        if behind[-1] == look.step:
            return every_unit(look.run.shape.sites, ALL, Mix.keeping(self.order + 1))
        quotients = quotient_weights(behind[: -self.order - 2 : -1], self.order)
        factors = hermite(look.step - behind[-1], self.order, self.scale)
        return every_unit(look.run.shape.sites, NONE, Mix(combine(quotients, factors)))
