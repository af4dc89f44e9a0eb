"""DBCache, dual-block caching (cache-dit, github.com/vipshop/cache-dit): first-block caching with more to set.

The first blocks are always computed. If the residual they leave is close to that of the last computed step, the
residual of the blocks between is held, or forecast, and the last blocks are computed on what comes of it. One decision
holds for the whole batch.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from pydantic import Field, NonNegativeInt, PositiveInt

from tcbench.errors import UserError
from tcbench.method import Look, Method, Run, relative_change
from tcbench.plan import ALL, NONE, All, Decision, Deferred, Forecast, Nothing, Plan, Span

if TYPE_CHECKING:
    from torch import Tensor


class DBCache(Method):
    """Hold the residual of the blocks between while that of the first ones moves little.

    Options:
        threshold: a step is skipped if the relative change is below it; from 1 on without looking. 0.08 is the
            package's default; F1B0 at 0.08 and 0.2 are published for FLUX.
        first_blocks, last_blocks: how many are always computed (F and B); 8 and 0 by default.
        warmup_steps: so many first steps are full; the first one always is.
        max_cached: skip so many steps in a run at most; None: any number.
        max_continuous: how many steps may be skipped in a row; None: any number.
        counts: what `max_continuous` counts. `released` is the package's counter: the first skipped step of a run
            counts, later ones only if the step before was skipped too (the first such pair after a forced step for
            two), and computed steps do not reset it, so that several short rows use it up. `row`: as the name says.
        order: of a Taylor forecast of the residual (its calibrator); 0 holds it. As released, there is no difference
            quotient before the fourth step.
    """

    name = "dbcache"
    label = "DBCache"
    knob = "threshold"
    decides = "host"

    threshold: float = Field(0.08, ge=0, le=1)
    first_blocks: PositiveInt = 8
    last_blocks: NonNegativeInt = 0
    warmup_steps: NonNegativeInt = 8
    max_cached: NonNegativeInt | None = None
    max_continuous: PositiveInt | None = None
    counts: Literal["released", "row"] = "released"
    order: int = Field(0, ge=0, le=4)

    def between(self, run: Run) -> Span:
        """The blocks that may be skipped.

        Raises:
            UserError: there are none.
        """
        blocks = run.shape.num_blocks
        if self.first_blocks + self.last_blocks >= blocks:
            raise UserError(
                f"first_blocks, last_blocks: {self.first_blocks} and {self.last_blocks} of {blocks} leave no block to "
                "cache; give fewer"
            )
        return Span(self.first_blocks, blocks - self.last_blocks)

    def start(self, run: Run) -> "_Comparison":
        """The residual to compare with and the counters live for one run."""
        return _Comparison(self, self.between(run))


QUOTIENTS_FROM = 3  # the calibrator's state is made by its first update, and counts one step too few from then on


@dataclass
class _Comparison:
    """One run's memory.

    Attributes:
        residual: of the first blocks at the last step that was computed.
        cached, continuous: how many steps were skipped, and the counter of those in a row.
        last_cached: the last of them.
    """

    method: DBCache
    between: Span
    residual: "Tensor | None" = None
    cached: int = 0
    continuous: int = 0
    last_cached: int | None = None

    def plan(self, look: Look) -> Plan:
        """The first blocks, what they say of those between, and the last."""
        step, method = look.step, self.method

        def choose(stream: "Callable[[], Tensor]") -> All | Nothing:
            residual = stream() - look.latent()
            if self._may_skip(step) and self._is_close(look, residual):
                self._count(step)
                return NONE
            self.residual = residual
            return ALL

        who = Deferred(choose, like=ALL, least=ALL if step < self._first else NONE)
        fill = Forecast(method.order if step >= QUOTIENTS_FROM else 0)
        return Plan({self.between: Decision(who, fill)})

    @property
    def _first(self) -> int:
        """The first step that may be skipped: there is none before it to hold a residual of."""
        return max(1, self.method.warmup_steps)

    def _may_skip(self, step: int) -> bool:
        method = self.method
        if step < self._first:
            return False
        if method.max_cached is not None and self.cached >= method.max_cached:
            return False
        if method.max_continuous is not None and self._in_a_row(step) >= method.max_continuous:
            self.continuous = 0
            return False
        return True

    def _in_a_row(self, step: int) -> int:
        if self.method.counts == "row" and self.last_cached != step - 1:
            return 0
        return self.continuous

    def _is_close(self, look: Look, residual: "Tensor") -> bool:
        assert self.residual is not None, "the first step is computed"
        threshold = self.method.threshold
        return threshold >= 1 or look.read(relative_change(residual, self.residual)) < threshold

    def _count(self, step: int) -> None:
        if self.method.counts == "row":
            self.continuous = self._in_a_row(step) + 1
        elif self.last_cached is None:
            self.continuous = 1
        elif self.last_cached == step - 1:
            self.continuous += 1 if self.continuous else 2
        self.last_cached = step
        self.cached += 1
