"""SpeCa: Accelerating Diffusion Transformers with Speculative Feature Caching (ACM MM 2025; Shenyi-Z/Cache4Diffusion).

After a full step every part's output is drafted with a Taylor polynomial, as in TaylorSeer. From a number of drafts on,
each draft is checked: the last block is also computed for real on the drafted stream, and how far the draft's output is
from it decides whether the *next* step is full; the draft itself is kept. The error is one for the whole batch, so
that its samples decide together; the authors sample one at a time. Its default is a mean of elementwise ratios, whose
small denominators make it noisy (float32 and float64 differ by a third at worst).
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from pydantic import Field, NonNegativeInt, PositiveInt

from tcbench.method import Look, Method, Run
from tcbench.plan import ALL, NONE, Forecast, Plan, every_unit
from tcbench.tensors.unseen import on_values

if TYPE_CHECKING:
    from torch import Tensor

LEAST_THRESHOLD = 0.01
TINY = 1e-10


class SpeCa(Method):
    """Draft by a Taylor forecast, and check drafts by computing their last block.

    Options (defaults: those of the script that makes samples for FIDs; the one that makes a picture has 0.1, 0.01, 2
    and 5):
        base_threshold: the error above which the step after a checked draft is full, at the start of sampling.
        decay: step k of S has the threshold base * decay ** ((k + 1) / S), but 0.01 at least.
        min_drafts: drafts in a row that are not checked.
        max_drafts: drafts in a row.
        order: of the forecast.
        metric: of the error: `relative_l1`, the default as released, and `relative_l2` are means of elementwise
            ratios, `l1` and `l2` are absolute, `cosine_similarity` is one minus the rows' mean cosine.
        first_steps: steps at the start that are drafted only right after a full one, 3 as released: full, draft, full.
    """

    name = "speca"
    label = "SpeCa"
    knob = "base_threshold"
    decides = "host"

    base_threshold: float = Field(0.3, ge=0, le=10)
    decay: float = Field(0.05, gt=0, le=1)
    min_drafts: NonNegativeInt = 3
    max_drafts: PositiveInt = 8
    order: NonNegativeInt = Field(4, le=8)
    metric: Literal["relative_l1", "relative_l2", "l1", "l2", "cosine_similarity"] = "relative_l1"
    first_steps: PositiveInt = 3

    def threshold(self, step: int, nfe: int) -> float:
        """The error of the draft before a step above which the step is full."""
        return max(self.base_threshold * self.decay ** ((step + 1) / nfe), LEAST_THRESHOLD)

    def error(self, compared: "Tensor") -> "Tensor":
        """How far a draft is from what was computed beside it, of both [R, 2, N, D]: one number for the batch."""
        return ERRORS[self.metric](compared[:, 0], compared[:, 1])

    def start(self, run: Run) -> "Drafts":
        """Drafts are counted in one run."""
        return Drafts(self)

    def outcomes(self, run: Run, step: int) -> tuple[Plan, ...]:
        """A full step, or a draft, checked or not."""
        return self.full(run), self.draft(run, checked=True), self.draft(run, checked=False)

    def full(self, run: Run) -> Plan:
        """Everything computed, and its quotients."""
        return every_unit(run.shape.sites, ALL, Forecast(self.order))

    def draft(self, run: Run, checked: bool) -> Plan:
        """Everything forecast."""
        plan = every_unit(run.shape.sites, NONE, Forecast(self.order))
        return Plan(plan.decisions, checks=(run.shape.num_blocks - 1,) if checked else ())


@dataclass
class Drafts:
    """One run's memory.

    Attributes:
        drafts: in a row, up to the last step; 0 after a full one.
        verified: whether the last step was checked.
        compared: what that check showed, [R, 2, N, D], once the step after it is planned.
    """

    method: SpeCa
    drafts: int = 0
    verified: bool = False
    compared: "Tensor | None" = None

    def plan(self, look: Look) -> Plan:
        """A full step where the drafts are too many or the last one too far off, else another draft."""
        method, run, last = self.method, look.run, look.run.shape.num_blocks - 1
        self.compared = look.checked(last) if self.verified else None
        if look.step == 0 or (self.drafts and self._is_due(look)):
            self.drafts, self.verified = 0, False
            return method.full(run)
        self.verified = self.drafts > 0 and self.drafts >= method.min_drafts
        self.drafts += 1
        return method.draft(run, self.verified)

    def _is_due(self, look: Look) -> bool:
        """Whether a full step follows a draft."""
        method = self.method
        if look.step < method.first_steps or self.drafts >= method.max_drafts:
            return True
        if self.compared is None:
            return False
        error = on_values(method.error, self.compared, shape=())
        return look.read(error) > method.threshold(look.step, look.run.nfe)


def _relative(draft: "Tensor", real: "Tensor") -> "Tensor":
    return (draft - real).abs() / (real.abs() + TINY)


def _cosine(draft: "Tensor", real: "Tensor") -> "Tensor":
    import torch

    return 1 - torch.nn.functional.cosine_similarity(draft.flatten(1), real.flatten(1)).mean()


ERRORS = {
    "relative_l1": lambda draft, real: _relative(draft, real).mean(),
    "relative_l2": lambda draft, real: _relative(draft, real).square().mean().sqrt(),
    "l1": lambda draft, real: (draft - real).abs().mean(),
    "l2": lambda draft, real: (draft - real).square().mean().sqrt(),
    "cosine_similarity": _cosine,
}
"""By name, of two streams [R, N, D]: one number for the batch."""
