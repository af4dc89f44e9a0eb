"""The paper-audit page: every number that can be checked without weights, what it should be, and a verdict."""

from collections.abc import Sequence

import pandas as pd

from tcbench.audit.checks import VERDICTS, Section
from tcbench.report.table import Table

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
