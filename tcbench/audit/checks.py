"""What the audit is made of: checks of single numbers and statements, and the sections that they stand in."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Verdict = Literal["reproduced", "conflicts", "cannot be derived"]
VERDICTS: tuple[Verdict, ...] = ("reproduced", "conflicts", "cannot be derived")


@dataclass(frozen=True)
class Check:
    """One reported number, or statement, and what follows from a rule or from the paper's other numbers.

    Attributes:
        where: the cell or sentence.
        reported, derived: as text; `derived` is empty if nothing follows.
        difference: derived over reported, less 1; None where that means nothing.
        verdict: whether the two agree; "cannot be derived" if no published rule gives the number.
        why: the rule that derives it, or the closest explanation.
    """

    where: str
    reported: str
    derived: str
    difference: float | None
    verdict: Verdict
    why: str


@dataclass(frozen=True)
class Section:
    """Checks of one kind, and the rule that they share."""

    title: str
    rule: str
    checks: Sequence[Check]

    def count(self, verdict: Verdict) -> int:
        """How many checks have this verdict."""
        return sum(check.verdict == verdict for check in self.checks)
