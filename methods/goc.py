"""GOC: Gradient-Optimized Cache (ICCV 2025; released code qiujx0520/GOC_ICCV2025, for DiT and 20 steps).

Where a cache holds a part's output, some steps go on from the last two outputs that were *used*, computed or not:
u1 + w (u1 - u2), before the gate. The weight belongs to the method, not to the distance, so that w = 1.2 goes further
than the line through both. Which steps reuse is the base's: a list on FORA; on Learning-to-Cache its router, and there
a block is extrapolated only if both its self-attention and its MLP are reused.
"""

from typing import Literal

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from tcbench.method import Artefacts, Look, Method, Run
from tcbench.plan import ALL, NONE, Decision, Mix, Plan, Site
from tcbench.schedule import Placement, opened, stated_steps

HELD = Mix.keeping(2, of="used")


class Goc(Method):
    """Extrapolate from used outputs at some steps of FORA or of Learning-to-Cache.

    Options (defaults as released on FORA, for 20 steps):
        base: what decides where outputs are reused: `fora` a list of steps, `learning_to_cache` a router at the second
            of every two steps.
        reused_steps: of `fora`; if it is not given, the odd steps of the first half. The released code has in a comment
            all odd steps instead.
        num_full_steps: of `fora`, instead of a list, a labelled variant: this many full steps, spread evenly; the
            others are reused.
        placement: of the even spread (`tcbench.schedule.spread_evenly`).
        extrapolated_steps: of the reused steps those that extrapolate; the others hold. All but the first if it is not
            given; released are 3, 5, 7, 9 on FORA, and 3, 5, ..., 15, 19 on Learning-to-Cache.
        weight: w; 1.2 is released on FORA, 0.8 on Learning-to-Cache.
        threshold: of `learning_to_cache`: a part is computed if the sigmoid of its logit is above. The router is that
            of a row of this method (`artefacts_from`), which may have imported it.
    """

    name = "goc"
    label = "GOC"
    decides = "ahead"
    knob = "num_full_steps"

    base: Literal["fora", "learning_to_cache"] = "fora"
    reused_steps: tuple[NonNegativeInt, ...] | None = None
    num_full_steps: PositiveInt | None = None
    placement: Placement = "start"
    extrapolated_steps: tuple[NonNegativeInt, ...] | None = None
    weight: float = Field(1.2, ge=0, le=4)
    threshold: float = Field(0.1, ge=0, le=1)

    @model_validator(mode="after")
    def _one_schedule(self) -> "Goc":
        if self.base != "fora" and (self.num_full_steps or self.reused_steps is not None):
            which = "num_full_steps" if self.num_full_steps else "reused_steps"
            raise ValueError(f"{which}: the steps of base {self.base} are its own; remove it, or set threshold instead")
        if self.num_full_steps and self.reused_steps is not None:
            raise ValueError("give either reused_steps or num_full_steps, not both")
        if self.reused_steps and 0 in self.reused_steps:
            raise ValueError("reused_steps: the first step has nothing to reuse; begin with a later one")
        return self

    def reused(self, nfe: int) -> tuple[int, ...]:
        """The steps at which outputs are reused, if their parts are."""
        if self.base == "learning_to_cache":
            return tuple(step for step in range(1, nfe) if (nfe - 1 - step) % 2 == 0)
        if full := stated_steps(self, nfe):
            return tuple(sorted(set(range(nfe)) - set(full)))
        return tuple(range(1, nfe // 2, 2)) if self.reused_steps is None else self.reused_steps

    def computed(self, run: Run, step: int) -> dict[Site, bool]:
        """Whether each part is computed at a step."""
        if step not in self.reused(run.nfe):
            return dict.fromkeys(run.shape.sites, True)
        from_router = opened(run, run.nfe - 1 - step, self.threshold) if self.base == "learning_to_cache" else None
        return from_router or dict.fromkeys(run.shape.sites, False)

    def i_steps(self, run: Run) -> tuple[int, ...]:
        """The steps that reuse nothing."""
        return tuple(step for step in range(run.nfe) if all(self.computed(run, step).values()))

    def plan(self, look: Look) -> Plan:
        """Every part: computed and remembered, held, or extrapolated."""
        run, step = look.run, look.step
        extrapolated, computed = self.reused(run.nfe)[1:], self.computed(run, step)
        if self.extrapolated_steps is not None:
            extrapolated = self.extrapolated_steps
        line = Mix((1 + self.weight, -self.weight), of="used")
        along = {
            block
            for block in range(run.shape.num_blocks)
            if step in extrapolated and not any(computed[site] for site in run.shape.sites if site.block == block)
        }
        return Plan(
            {
                site: Decision(ALL if fresh else NONE, line if site.block in along else HELD)
                for site, fresh in computed.items()
            }
        )

    def lacks(self, artefacts: Artefacts) -> str | None:
        """The router, where it decides."""
        if self.base == "fora" or "router" in artefacts.tables:
            return None
        return "a router: a row of learning_to_cache lends its own, if artefacts_from names it"
