"""MagCache: Fast Video Generation with Magnitude-Aware Cache (arXiv 2506.09045).

How the size of the stack's residual changes from step to step is nearly the same for all samples, so one uncached run
tells what skipping a step costs. The product of the ratios since the last computed step says how wrong the held
residual is by now; steps are skipped while the sum of these errors is small. For a number of steps the schedule is
fixed.
"""

from typing import Literal

from pydantic import Field, PositiveInt

from tcbench.method import Artefacts, Look, Method, Run
from tcbench.plan import ALL, NONE, Plan, Span, every_unit
from tcbench.trainable import CalibrateMagnitudes, Trainable


class MagCache(Method):
    """Hold the residual of all blocks while its calibrated size hardly changes.

    Without ratios (nothing calibrated or given: `tcbench macs`) the residual is taken never to change, which skips as
    many steps as the method ever does.

    Options:
        threshold: the summed error up to which steps are skipped; 0.06 is published and diffusers' default.
        max_continuous: skip so many steps in a row at most.
        retention: the share of first steps that are computed.
        rule: `diffusers` skips at a sum equal to the threshold and rounds the number of first steps, `authors` skips
            below it and cuts that number off.
        ratios: by step, instead of calibration; for another number of steps the nearest are taken.
        calibration_samples: of the uncached run.
    """

    name = "magcache"
    label = "MagCache"
    knob = "threshold"
    decides = "ahead"
    trains = True

    threshold: float = Field(0.06, ge=0, le=2)
    max_continuous: PositiveInt = 3
    retention: float = Field(0.2, ge=0, le=1)
    rule: Literal["diffusers", "authors"] = "diffusers"
    ratios: tuple[float, ...] | None = Field(None, min_length=1)
    calibration_samples: PositiveInt = 16

    def i_steps(self, run: Run) -> tuple[int, ...]:
        """Computed steps: the first ones, and every one at which the error would grow too large."""
        ratios = _nearest(self.ratios or run.artefacts.tables.get("ratios", ((1.0,),))[0], run.nfe)
        rounding = 0.5 if self.rule == "diffusers" else 0.0
        first = int(self.retention * run.nfe + rounding)
        steps, size, error, skipped = [], 1.0, 0.0, 0
        for step, ratio in enumerate(ratios):
            if step >= first:
                size, skipped = size * ratio, skipped + 1
                error += abs(1 - size)
                small = error <= self.threshold if self.rule == "diffusers" else error < self.threshold
                if step and small and skipped <= self.max_continuous:
                    continue
            steps.append(step)
            size, error, skipped = 1.0, 0.0, 0
        return tuple(steps)

    def plan(self, look: Look) -> Plan:
        """All blocks as one unit."""
        computed = look.step in self.i_steps(look.run)
        return every_unit([Span(0, look.run.shape.num_blocks)], ALL if computed else NONE)

    def training(self, run: Run) -> tuple[Trainable, ...]:
        """The ratios, unless they are given."""
        return () if self.ratios else (CalibrateMagnitudes("ratios", self.calibration_samples),)

    def lacks(self, artefacts: Artefacts) -> str | None:
        """The ratios, unless they are there."""
        if self.ratios or "ratios" in artefacts.tables:
            return None
        return "ratios of magnitudes: a row of magcache calibrates them"


def _nearest(ratios: tuple[float, ...], steps: int) -> tuple[float, ...]:
    """As many ratios as steps, the nearest of those there are; both lists begin and end together."""
    if steps == 1:
        return ratios[-1:]
    return tuple(ratios[round(step * (len(ratios) - 1) / (steps - 1))] for step in range(steps))
