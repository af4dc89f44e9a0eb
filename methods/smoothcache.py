"""SmoothCache: A Universal Inference Acceleration Technique for Diffusion Transformers (arXiv 2411.10510).

A list for every component (all attentions, all MLPs) says at which steps its branches are computed; at the others the
last computed output is reused, through the current step's gate. The lists come from error curves of one uncached run,
the relative change of a component's outputs from step to later step, and a threshold.
"""

from functools import lru_cache

from pydantic import Field, PositiveInt

from tcbench.errors import UserError
from tcbench.method import Artefacts, Look, Method, Run, Table
from tcbench.plan import ALL, NONE, Decision, Plan, Site
from tcbench.trainable import CalibrateReuse, ImportSchedule, Trainable


class SmoothCache(Method):
    """Reuse a component's outputs for as long as their calibrated change stays below a threshold.

    Without curves or lists (nothing calibrated or imported: `tcbench macs`) the change is taken to be nothing: the
    floor of every threshold.

    Options:
        threshold: alpha, up to which an output is reused; published for DiT-XL/2 are 0.08, 0.18 and 0.22 at 50 steps,
            0.35 at 30 and 0.12 at 70.
        lookahead: over how many steps an output may be reused, 3 in all shipped lists.
        calibration_samples: of the uncached run; all of them and both halves of guided pairs make one norm.
        schedule: lists in the shipped format instead of calibration, JSON of ones and zeros in sampling order by
            component, {"attn": [1, 0, ...], "mlp": ...}; "attn-7" is block 7's own.
    """

    name = "smoothcache"
    label = "SmoothCache"
    knob = "threshold"
    decides = "ahead"
    trains = True

    threshold: float = Field(0.18, ge=0, le=2)
    lookahead: PositiveInt = 3
    calibration_samples: PositiveInt = 16
    schedule: str | None = None

    def recomputed(self, run: Run, step: int) -> dict[Site, bool]:
        """Whether each branch is computed at a step.

        Raises:
            UserError: the curves or lists were made for another model or number of steps.
        """
        sites, tables = run.shape.sites, run.artefacts.tables
        if lists := tables.get("schedule"):
            if len(lists) != run.nfe or len(lists[0]) != len(sites):
                raise self._other("lists", (len(lists), len(lists[0])), (run.nfe, len(sites)))
            return {site: step == 0 or bool(one) for site, one in zip(sites, lists[step], strict=True)}
        parts = tuple(run.shape.kinds)
        curves = tables.get("errors", ((0.0,) * run.nfe,) * (len(parts) * self.lookahead))
        if len(curves) != len(parts) * self.lookahead or len(curves[0]) != run.nfe:
            raise self._other("curves", (len(curves[0]), len(curves)), (run.nfe, len(parts) * self.lookahead))
        computed = {
            part: step in computed_steps(curves[self.lookahead * place : self.lookahead * (place + 1)], self.threshold)
            for place, part in enumerate(parts)
        }
        return {site: computed[site.part] for site in sites}

    def _other(self, what: str, there: tuple[int, int], wanted: tuple[int, int]) -> UserError:
        return UserError(
            f"smoothcache: the {what} are of {there[0]} steps and {there[1]} columns, the run needs {wanted[0]} and "
            f"{wanted[1]}; calibrate for this model, NFE and lookahead"
        )

    def i_steps(self, run: Run) -> tuple[int, ...]:
        """The steps at which all lists say so."""
        return tuple(step for step in range(run.nfe) if all(self.recomputed(run, step).values()))

    def plan(self, look: Look) -> Plan:
        """Every branch: computed and stored, or held."""
        recomputed = self.recomputed(look.run, look.step)
        return Plan({site: Decision(ALL if computed else NONE) for site, computed in recomputed.items()})

    def training(self, run: Run) -> tuple[Trainable, ...]:
        """The lists, or the curves that they are made from."""
        if self.schedule:
            return (ImportSchedule("schedule", self.schedule),)
        return (CalibrateReuse("errors", self.lookahead, self.calibration_samples),)

    def files(self) -> tuple[str, ...]:
        """The lists, if they are imported."""
        return (self.schedule,) if self.schedule else ()

    def lacks(self, artefacts: Artefacts) -> str | None:
        """The curves, unless they are there or lists are to be imported."""
        if self.schedule or {"errors", "schedule"} & artefacts.tables.keys():
            return None
        return "errors of reuse: a row of smoothcache calibrates them"


@lru_cache
def computed_steps(errors: Table, threshold: float) -> frozenset[int]:
    """The steps at which a component is computed, from its curves.

    From a computed step on, the largest lag whose error is within the threshold is reused over; the step after it is
    computed, and judged afresh: errors do not add up. The first and the last step are computed whatever was found.

    Args:
        errors: [lags, S], the error of reusing step i's output at i + lag.
    """
    steps, step = len(errors[0]), 0
    computed = {0, steps - 1}
    while step < steps:
        computed.add(step)
        within = [lag for lag, curve in enumerate(errors, start=1) if step + lag < steps and curve[step] <= threshold]
        step += max(within, default=0) + 1
    return frozenset(computed)
