"""TeaCache: Timestep Embedding Tells: It's Time to Cache for Video Diffusion Model (arXiv 2411.19108).

The residual of the whole block stack is held while the accumulated change of the first block's modulated input stays
below a threshold. The change of a step is the relative L1 distance to the step before, through a polynomial that turns
it into the change of the last block's output. The polynomial is fitted for the model, as its authors describe: to the
changes of input and output at all steps of uncached runs. As in the released code the first and the last step are
always computed, and one decision holds for the whole batch.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from pydantic import Field, PositiveInt

from tcbench.errors import UserError
from tcbench.method import Look, Method, Run, Table, relative_change
from tcbench.plan import ALL, NONE, Plan, Span, every_unit
from tcbench.trainable import CalibrateChanges, Trainable

if TYPE_CHECKING:
    from torch import Tensor


class TeaCache(Method):
    """Hold the residual of all blocks while the modulated input moves little.

    Without changes to fit to (nothing calibrated or given: `tcbench macs`) the change is taken as it is.

    Options:
        threshold: the accumulated change at which a step is computed; published are 0.1 and 0.2 for video models, 0.25
            to 0.8 for FLUX.
        coefficients: of the polynomial, highest power first, instead of fitting it: those published for another model,
            or [1, 0], which takes the change as it is. None are published for DiT or PixArt-alpha.
        degree: of the fitted polynomial; 4 is published.
        calibration_samples: of the uncached run; 70 are published.
    """

    name = "teacache"
    label = "TeaCache"
    knob = "threshold"
    decides = "host"
    trains = True

    threshold: float = Field(0.2, ge=0, le=2)
    coefficients: tuple[float, ...] | None = Field(None, min_length=1)
    degree: int = Field(4, ge=1, le=10)
    calibration_samples: PositiveInt = 70

    def polynomial(self, run: Run) -> tuple[float, ...]:
        """The coefficients of a run, highest power first.

        Raises:
            UserError: the changes were measured at another number of steps, or are too few.
        """
        if self.coefficients:
            return self.coefficients
        changes = run.artefacts.tables.get("changes")
        if changes is None:
            return 1.0, 0.0
        if len(changes[0]) != run.nfe:
            raise UserError(
                f"teacache: the changes are of {len(changes[0])} steps, the run has {run.nfe}; calibrate for this NFE"
            )
        return fitted(changes, self.degree)

    def start(self, run: Run) -> "_Accumulation":
        """The accumulated change lives for one run."""
        return _Accumulation(self.threshold, self.polynomial(run))

    def outcomes(self, run: Run, step: int) -> tuple[Plan, ...]:
        """Everything, or nothing."""
        return whole_stack(run, computed=True), whole_stack(run, computed=False)

    def training(self, run: Run) -> tuple[Trainable, ...]:
        """The changes to fit to, unless the polynomial is given."""
        return () if self.coefficients else (CalibrateChanges("changes", self.calibration_samples),)


@lru_cache
def fitted(changes: Table, degree: int) -> tuple[float, ...]:
    """The polynomial of a degree, highest power first, that is nearest in least squares to what was seen.

    Args:
        changes: the inputs' by sample and step, and below them the outputs'; nothing is known of the first step.

    Raises:
        UserError: they do not determine it.
    """
    import numpy as np

    moved, output = np.array(changes)[:, 1:].reshape(2, -1)
    if len(np.unique(moved)) <= degree:
        raise UserError(
            f"teacache: a polynomial of degree {degree} needs more than {degree} different changes, and there are "
            f"{len(np.unique(moved))}; raise calibration_samples or lower degree"
        )
    return tuple(np.polynomial.Polynomial.fit(moved, output, degree).convert().coef[::-1].tolist())


def rescaled(change: float, coefficients: tuple[float, ...]) -> float:
    """A polynomial's value, by Horner's rule."""
    value = 0.0
    for coefficient in coefficients:
        value = value * change + coefficient
    return value


def whole_stack(run: Run, computed: bool) -> Plan:
    """All blocks as one unit."""
    return every_unit([Span(0, run.shape.num_blocks)], ALL if computed else NONE)


@dataclass
class _Accumulation:
    """One run's memory: the last step's signal, and the change since the last computed step."""

    threshold: float
    coefficients: tuple[float, ...]
    before: "Tensor | None" = None
    change: float = 0.0

    def plan(self, look: Look) -> Plan:
        """Everything at the ends of the run and where the change has grown to the threshold."""
        signal, before = look.modulated_input(), self.before
        at_an_end = before is None or look.step == look.run.nfe - 1
        if before is not None and not at_an_end:
            self.change += rescaled(look.read(relative_change(signal, before)), self.coefficients)
        self.before = signal
        computed = at_an_end or self.change >= self.threshold
        if computed:
            self.change = 0.0
        return whole_stack(look.run, computed)
