"""What papers print for DiT-XL/2 on ImageNet at 256x256: the same cell of one method differs between them.

Typed once, in tcbench/assets/paper/published_dit_xl_2.csv; TokenCache's own rows are those of its Table II.
"""

import csv
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import pandas as pd

from tcbench.audit.paper import table
from tcbench.report.cells import NO_CELL, Record
from tcbench.report.table import Table

FILE = Path(__file__).parent.parent / "assets" / "paper" / "published_dit_xl_2.csv"
OURS = "TokenCache"
RENAMED = {"DiT-XL/2": "uncached"}
NUMBERS = {"fid": "FID", "sfid": "sFID", "is": "IS"}


@cache
def published() -> tuple[Record, ...]:
    """All rows, those of one method together, every cell as it is printed and empty where the paper has none."""
    with FILE.open(encoding="utf-8", newline="") as file:
        rows: list[Record] = list(csv.DictReader(file))
    for row in table(2):
        if row["resolution"] == "256":
            method, fewer = RENAMED.get(row["method"], row["method"]), row["sampled_steps"]
            cells = {
                "paper": OURS,
                "method": method,
                "setting": "",
                "steps": fewer,
                "unit": "TMACs",
                "read": "full text",
            }
            cells |= {"cost": row["tmacs"], "speedup": row["speedup"], "latency_s": f"{row['latency_s']} (batch of 8)"}
            rows.append(dict.fromkeys(rows[0], "") | cells | {name: row[name] for name in NUMBERS})
    methods = list(dict.fromkeys(row["method"] for row in rows))
    return tuple(sorted(rows, key=lambda row: (methods.index(row["method"]), -int(row["steps"] or 0), row["setting"])))


def published_table() -> Table:
    """The rows by method, with the papers that they are from."""
    rows = published()
    cells = [
        {
            "Paper": row["paper"],
            "Setting": row["setting"] or NO_CELL,
            "Steps": row["steps"] or NO_CELL,
            "Cost": f"{row['cost']} {row['unit']}" if row["cost"] else NO_CELL,
            "Speedup": row["speedup"] or NO_CELL,
            "Latency (s)": row["latency_s"] or NO_CELL,
            **{label: _number(row, name) for name, label in NUMBERS.items()},
            "Read in": row["read"],
        }
        for row in rows
    ]
    return Table(
        title="What papers print for DiT-XL/2 at 256x256",
        caption=" ".join(
            [
                "ImageNet, CFG 1.5, as printed, ± as in the paper. Speedup: of FLOPs or MACs, as the paper counts.",
                "TFLOPs: 2 for each MAC. Read in: the paper's full text, or notes of others on the paper, which are",
                "to be checked before they are cited.",
                f"FIDs of one cell in several papers: {'; '.join(_differing(rows))}.",
                _own_fora(rows),
            ]
        ),
        tidy=pd.DataFrame(rows),
        formatted=pd.DataFrame(cells),
        groups=[row["method"] for row in rows],
        text_columns=("Paper", "Setting", "Read in"),
    )


def _number(row: Record, name: str) -> str:
    spread = row.get(f"{name}_pm")
    return (f"{row[name]} ± {spread}" if spread else row[name]) or NO_CELL


def _differing(rows: Sequence[Record]) -> list[str]:
    """Method, setting and steps that several papers have, and their FIDs."""
    found: dict[tuple[str, str, str], dict[str, str]] = {}
    for row in rows:
        if row["setting"] or row["method"] == "uncached":
            found.setdefault((row["method"], row["setting"], row["steps"]), {})[row["paper"]] = row["fid"]
    return [
        f"{', '.join(filter(None, cell))} steps: {', '.join(sorted(papers.values(), key=float))}"
        for cell, papers in found.items()
        if len(papers) > 1
    ]


def _own_fora(rows: Sequence[Record]) -> str:
    """What TokenCache's paper prints for FORA."""
    own = [row for row in rows if (row["paper"], row["method"], row["steps"]) == (OURS, "FORA", "50")]
    return " ".join(f"{OURS}'s Table II has {row['fid']} for FORA at a speedup of {row['speedup']}." for row in own)
