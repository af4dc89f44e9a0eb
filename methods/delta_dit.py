"""Delta-DiT: A Training-Free Acceleration Method Tailored for Diffusion Transformers (arXiv 2406.01125).

What a group of blocks adds to the stream is cached, its deviation, so that the current input still passes through.
Early steps, which settle outlines, compute the front blocks and hold the rear ones; late steps, which settle details,
do the reverse. No code was released: this follows the paper's rule.
"""

from pydantic import Field, PositiveInt, model_validator

from tcbench.method import Look, Method, Run
from tcbench.plan import ALL, NONE, Plan, Span, every_unit
from tcbench.schedule import Placement, StepList, check_one, stated_steps


class DeltaDiT(Method):
    """Hold the residual of the rear blocks early in sampling, of the front blocks late.

    Options:
        interval: every so many steps everything is computed; 2 and 3 are published.
        num_full_steps: instead of `interval`: this many full steps, spread evenly.
        full_steps: a list of them.
        placement: of the even spread (`tcbench.schedule.spread_evenly`).
        cached_share: of the blocks, the share that is held between full steps. The MACs printed for it on DiT-XL/2 at
            interval 3 (16.46 TFLOP of 23.74) are those of 13 of 28 blocks.
        boundary: the share of steps that count as early; the paper's value is not known. A full step's group is held
            until the next full step.
    """

    name = "delta_dit"
    label = "Delta-DiT"
    decides = "ahead"
    knob = "num_full_steps"

    interval: PositiveInt | None = None
    num_full_steps: PositiveInt | None = None
    full_steps: StepList | None = None
    placement: Placement = "start"
    cached_share: float = Field(0.46, gt=0, le=1)
    boundary: float = Field(0.5, ge=0, le=1)

    @model_validator(mode="after")
    def _one_schedule(self) -> "DeltaDiT":
        check_one(self)
        return self

    def i_steps(self, run: Run) -> tuple[int, ...]:
        """Full steps, in sampling order."""
        return stated_steps(self, run.nfe) or tuple(range(0, run.nfe, self.interval or 3))

    def plan(self, look: Look) -> Plan:
        """The group: computed and stored, or held; all other blocks are computed."""
        blocks, full = look.run.shape.num_blocks, self.i_steps(look.run)
        cached = min(max(1, round(self.cached_share * blocks)), blocks)
        early = max(step for step in full if step <= look.step) < self.boundary * look.run.nfe
        group = Span(blocks - cached, blocks) if early else Span(0, cached)
        return every_unit([group], ALL if look.step in full else NONE)
