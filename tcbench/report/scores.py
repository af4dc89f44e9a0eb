"""Score files: reading, checking, and the one ratio that tables and figures share.

A score file is plain JSON, one per row of a suite: what was run (`method`, `nfe`, `settings`), its quality
with intervals, its paired differences to the uncached row, its MACs and the paper's numbers for the same cell.
A row that could not be run carries `"not_run": "<why>"` instead of `quality` and `macs`.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tcbench.errors import UserError
from tcbench.files import read_json

Row = dict[str, Any]

IDENTITY = (
    "row",
    "suite",
    "method",
    "label",
    "control",
    "model",
    "resolution",
    "nfe",
    "sampled_steps",
    "reference",
)
MEASURED = ("samples", "groups", "quality", "macs")


def read_rows(folder: Path, row_ids: Sequence[str]) -> list[Row]:
    """Read `folder/scores/<row>.json` for every row id, in the given (the suite's) order.

    Raises:
        UserError: a file is missing, malformed or lacks a field, or its reference row is not in the suite.
    """
    rows = []
    for row_id in row_ids:
        path = Path(folder) / "scores" / f"{row_id}.json"
        row = read_json(path)
        required = IDENTITY if row.get("not_run") else IDENTITY + MEASURED
        if absent := [field for field in required if field not in row]:
            raise UserError(f"{path}: field `{absent[0]}` is missing; delete the file and score the row again")
        rows.append(row)
    for row in rows:
        reference_of(row, rows)
    return rows


def name_of(row: Row) -> str:
    """What tables and legends call the row."""
    return row["label"] + (" (control)" if row["control"] else "")


def is_reference(row: Row) -> bool:
    """Whether the row is the uncached run that others at its NFE are compared with."""
    return row["reference"] in (None, row["row"])


def reference_of(row: Row, rows: Sequence[Row]) -> Row:
    """The uncached row at the same NFE; a reference row is its own.

    Raises:
        UserError: the named reference is not among `rows`.
    """
    if is_reference(row):
        return row
    for other in rows:
        if other["row"] == row["reference"]:
            return other
    raise UserError(f"row {row['row']}: its reference `{row['reference']}` is not in the suite; add it to the config")


def mac_ratio(row: Row, rows: Sequence[Row]) -> float | None:
    """MACs of the uncached row at the same NFE over this row's, overheads charged (the paper's "speedup").

    None if either row was not run.
    """
    reference = reference_of(row, rows)
    if row.get("not_run") or reference.get("not_run"):
        return None
    return reference["macs"]["per_sample"] / row["macs"]["per_sample"]


def target_macs(row: Row, rows: Sequence[Row]) -> int | None:
    """MACs of the row whose budget this one was solved for; None if it names none, or that one was not run.

    Raises:
        UserError: the target is not among `rows`.
    """
    if row.get("target") is None:
        return None
    for other in rows:
        if other["row"] == row["target"]:
            return None if other.get("not_run") else other["macs"]["per_sample"]
    raise UserError(f"row {row['row']}: its target `{row['target']}` is not in the suite; add it to the config")
