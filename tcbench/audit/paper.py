"""The paper's tables as printed, and the kinds of checks that can be made on them."""

import csv
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from tcbench.audit.checks import Check, Verdict

TOLERANCE = 0.01  # of a cell that a rule derives; rounding of the paper's digits stays far inside it
LATENCY_TOLERANCE = 0.05

PaperRow = dict[str, str]
TABLES = {
    1: "table1_hyperparameters",
    2: "table2_class_conditional",
    3: "table3_text_to_image_256",
    4: "table4_text_to_image_1024",
    5: "table5_text_to_video",
    6: "table6_cache_prediction",
    7: "table7_cache_ratio",
    8: "table8_timestep_schedule",
    9: "table9_lora_blocks",
}
COMPARISONS = (2, 3, 4, 5)  # the tables that compare methods
ROMAN = ("", "I", "II", "III", "IV", "V", "VI", "VII", "VIII", "IX")
HEADERS = {
    "is": "IS",
    "fid": "FID",
    "sfid": "sFID",
    "precision": "Precision",
    "recall": "Recall",
    "coco_fid": "COCO FID",
    "coco_clip": "COCO CLIP",
    "parti_clip": "PartiPrompts CLIP",
    "image_reward": "Image Reward",
    "tmacs": "TMACs",
    "speedup": "Speedup",
}


@cache
def table(number: int) -> tuple[PaperRow, ...]:
    """A table of the paper, every cell as it is printed."""
    path = Path(__file__).parent.parent / "assets" / "paper" / f"{TABLES[number]}.csv"
    with path.open(encoding="utf-8", newline="") as file:
        return tuple(csv.DictReader(file))


def find(number: int, **cells: str | int) -> PaperRow:
    """The one row of a table with these cells."""
    (row,) = [row for row in table(number) if all(row[key] == str(value) for key, value in cells.items())]
    return row


def settings(number: int) -> list[list[PaperRow]]:
    """The rows of a comparison by resolution and NFE; the uncached row comes first."""
    groups: dict[tuple[str | None, str], list[PaperRow]] = {}
    for row in table(number):
        groups.setdefault((row.get("resolution"), row["nfe"]), []).append(row)
    return list(groups.values())


def reference(number: int, row: PaperRow) -> PaperRow:
    """The uncached row that a row is compared with."""
    return next(group[0] for group in settings(number) if row in group)


def name(number: int, row: PaperRow) -> str:
    """How the page calls a row of a comparison."""
    steps = "" if row["sampled_steps"] == row["nfe"] else f"{row['sampled_steps']} of "
    resolution = f" {row['resolution']}" if "resolution" in row else ""
    return f"Table {ROMAN[number]}, {row['method']}{resolution}, {steps}{row['nfe']} steps"


def column(rows: Sequence[PaperRow], key: str) -> list[float]:
    """The numbers of a column."""
    return [float(row[key]) for row in rows]


def decimals(printed: str) -> int:
    """Digits after the point."""
    return len(printed.partition(".")[2])


def number(where: str, reported: str, derived: float, why: str, tolerance: float = TOLERANCE) -> Check:
    """A number against what a published rule, or the paper's other numbers, make it."""
    difference = derived / float(reported) - 1
    verdict: Verdict = "reproduced" if abs(difference) <= tolerance else "conflicts"
    return Check(where, reported, f"{derived:.{decimals(reported)}f}", difference, verdict, why)


def underived(where: str, reported: str, why: str, closest: float | None = None) -> Check:
    """A number that no published rule gives; `closest` is what the closest explanation gives."""
    if closest is None:
        return Check(where, reported, "", None, "cannot be derived", why)
    difference = closest / float(reported) - 1
    return Check(where, reported, f"{closest:.{decimals(reported)}f}", difference, "cannot be derived", why)


def statement(where: str, reported: str, found: str, holds: bool | None, why: str) -> Check:
    """A sentence against the numbers; `holds=None` if the paper gives nothing to test it with."""
    verdict: Verdict = "cannot be derived" if holds is None else "reproduced" if holds else "conflicts"
    return Check(where, reported, found, None, verdict, why)


def same(where: str, reported: str, other: str, why: str) -> Check:
    """Two prints of one number: equal up to the last digit of the coarser one."""
    unit = 10.0 ** -min(decimals(reported), decimals(other))
    verdict: Verdict = "reproduced" if abs(float(reported) - float(other)) < unit else "conflicts"
    return Check(where, reported, other, float(other) / float(reported) - 1, verdict, why)


def printed_ratio(where: str, reported: str, numerator: str, denominator: str, note: str = "") -> Check:
    """A printed ratio of two printed numbers."""
    (low, high), (top_low, top_high), (bottom_low, bottom_high) = map(_interval, (reported, numerator, denominator))
    holds = low <= top_high / bottom_low and top_low / bottom_high <= high
    ratio = float(numerator) / float(denominator)
    verdict: Verdict = "reproduced" if holds else "conflicts"
    why = f"{numerator} / {denominator}{note}"
    return Check(where, reported, f"{ratio:.{decimals(reported) + 1}f}", ratio / float(reported) - 1, verdict, why)


def _interval(printed: str) -> tuple[float, float]:
    """Where a number lies that was rounded or truncated to these digits."""
    unit = 10.0 ** -decimals(printed)
    return float(printed) - unit / 2, float(printed) + unit
