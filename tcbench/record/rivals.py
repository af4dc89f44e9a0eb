"""rivals/<method>.json: which settings of a method meet the budgets of a table of rivals. Imports no torch."""

from typing import Any

from pydantic import PositiveFloat, PositiveInt
from typing_extensions import TypedDict

from tcbench.record.records import Kind, OfSuite
from tcbench.record.score import Provenance


class AtBudget(TypedDict):
    """A method at one budget.

    Keys:
        ratio: of the uncached run's MACs to the budget.
        target_macs: the budget, of one sample.
        row: which was sampled and scored; None, if no setting that was tried is near enough.
        options: what was changed in the method's options, knob included, for the nearest setting.
        macs: of that setting, as it was matched.
        counted: `shapes`, or how many calibration batches were run.
    """

    ratio: PositiveFloat
    target_macs: PositiveInt
    row: str | None
    options: dict[str, Any]
    macs: PositiveInt
    counted: str


class Rival(OfSuite):
    """A method at every budget; `label` is what tables call it."""

    method: str
    label: str
    budgets: list[AtBudget]
    provenance: Provenance


RIVAL = Kind(Rival, "tcbench rival SUITE --method METHOD")
