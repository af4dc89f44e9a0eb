"""The paper-audit page: every number that can be checked without weights, what it should be, and a verdict."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import pandas as pd

from tcbench.report.render import Table

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


_HEAD = """# What the paper's numbers say about each other

Every number of *Token Caching for Diffusion Transformer Acceleration* that can be checked without weights: against the
MAC ledger and the rules that methods published, against the paper's other tables, and the text against the tables. Made
by `tcbench audit`; nothing on this page is written by hand where it could be computed.

- **reproduced**: the derived value agrees within the tolerance that the section states.
- **conflicts**: a published rule, or another number of the paper, gives something else.
- **cannot be derived**: no published rule gives the number; the closest explanation is named.

Difference is derived over reported, less 1. The paper's "TFLOPs" are TMACs of one sample.
"""


def audit_page(sections: Sequence[Section]) -> str:
    """The page as Markdown; the same sections always give the same bytes."""
    counts = [[section.title, *(str(section.count(verdict)) for verdict in VERDICTS)] for section in sections]
    totals = [str(sum(section.count(verdict) for section in sections)) for verdict in VERDICTS]
    summary = _table("Verdicts", ("section", *VERDICTS), [*counts, ["all", *totals]], "", text=("section",))
    return "\n".join([_HEAD, summary, *(_section(section) for section in sections)])


def _section(section: Section) -> str:
    columns = ("where", "reported", "derived", "difference", "verdict", "why")
    lines = [
        [
            check.where,
            check.reported,
            check.derived or "—",
            "—" if check.difference is None else f"{round(check.difference, 4) + 0.0:+.2%}",  # no -0.00%
            check.verdict if check.verdict == "reproduced" else f"**{check.verdict}**",
            check.why,
        ]
        for check in section.checks
    ]
    return _table(section.title, columns, lines, section.rule, text=("where", "verdict", "why"))


def _table(title: str, columns: Sequence[str], lines: list[list[str]], caption: str, text: tuple[str, ...]) -> str:
    frame = pd.DataFrame(lines, columns=list(columns))
    return Table(title, caption, tidy=frame, formatted=frame, text_columns=text).markdown().rstrip() + "\n"
