"""Text of a table's cells: numbers with their intervals, and the marks that say how they compare."""

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

from tcbench.metrics.catalogue import METRICS
from tcbench.report.compare import LEVEL, MARGIN_RULE, Comparison, decide_in_families, too_few
from tcbench.report.rows import Row
from tcbench.stats import Interval

MILLION = 1e6
NO_CELL = "—"  # the paper, or the floor, has no such number
Record = dict[str, Any]
Marks = dict[tuple[str, str], Comparison]


class MacUnit(NamedTuple):
    """What MACs are counted in: its name, and how many it is."""

    name: str
    macs: float


MAC_UNITS = (MacUnit("TMACs", 1e12), MacUnit("GMACs", 1e9), MacUnit("MMACs", 1e6))


def mac_unit(largest: float) -> MacUnit:
    """The unit of a table whose largest number of MACs is given: the largest that leaves it at least 1."""
    return next((unit for unit in MAC_UNITS if largest >= unit.macs), MAC_UNITS[-1])


def ratio(numerator: float | None, denominator: float | None) -> float | None:
    """A ratio of two numbers; None where either is."""
    return None if numerator is None or denominator is None else numerator / denominator


def decimals(number: float, significant: int) -> int:
    """Decimals that show `number` to so many significant digits; none for numbers too large to need any."""
    magnitude = math.floor(math.log10(abs(number))) if number else 0
    return max(0, significant - 1 - magnitude)


def interval_text(value: float, low: float, high: float) -> str:
    """`value [low, high]`: half the interval to two significant digits (five decimals at most), the rest to match.
    Millions have a power of ten, one for all three."""
    half, largest = (high - low) / 2, max(abs(value), abs(low), abs(high))
    power = math.floor(math.log10(largest)) if largest >= MILLION else 0
    scale, suffix = 10.0**power, f"e{power}" if power else ""
    shown = min(5, decimals(half / scale, 2) if half > 0 else decimals(value / scale, 4))
    shown_of = [f"{number / scale:.{shown}f}{suffix}" for number in (value, low, high)]
    return f"{shown_of[0]} [{shown_of[1]}, {shown_of[2]}]"


def difference_text(difference: Interval) -> str:
    """A difference with its interval."""
    return interval_text(difference.value, difference.low, difference.high)


def spread_text(value: float, spread: float) -> str:
    """`value ± spread`: the spread to two significant digits, the value to match; of next to nothing, powers of ten."""
    shown = decimals(spread, 2)
    return f"{value:.2g} ± {spread:.2g}" if shown > 7 else f"{value:.{shown}f} ± {spread:.{shown}f}"


def difference_record(metric: str, found: Comparison | None) -> Record:
    """A comparison as a CSV has it: the difference, its interval, both adjusted p-values, the margin and the mark."""
    return {
        f"{metric}_difference": found and found.interval.value,
        f"{metric}_difference_low": found and found.interval.low,
        f"{metric}_difference_high": found and found.interval.high,
        f"{metric}_p_holm": found and found.p,
        f"{metric}_p_equivalent_holm": found and found.p_equivalent,
        f"{metric}_margin": found and found.margin,
        f"{metric}_mark": found and found.outcome,
    }


UNUSABLE = "unusable"
"""The mark of a number that is not tested, for lack of samples."""


def marks(comparisons: Sequence[Comparison], own: Collection[str]) -> Marks:
    """By row and metric, the comparisons of a table, corrected in families (`tcbench.report.compare`).

    Args:
        own: the rows that the suite's tables list.
    """
    return {(found.row, found.metric): found for found in decide_in_families(comparisons, own)}


def mark_of(row: Row, metric: str, marks: Marks) -> str:
    """What stands behind a number: how it compares, or that it cannot; empty if it is not compared."""
    if too_few([row], [metric]):
        return UNUSABLE
    found = marks.get((row["row"], metric))
    return found.outcome if found else ""


def marks_explained(rows: Sequence[Row], metrics: Sequence[str], marks: Marks) -> str:
    """The part of a caption that says how marks are read, with every margin that they use."""
    lines = [
        f"better, worse: different at {LEVEL * 100:g} %, corrected over the rows of one metric and NFE (Holm). "
        "equivalent: shown, likewise, to differ by less than the margin. ?: not decided."
    ]
    shown = {row["row"] for row in rows}
    compared = {(METRICS[each.metric].label, each.nfe): each.margin for each in marks.values() if each.row in shown}
    by_label: dict[str, list[str]] = {}
    without: dict[str, list[int]] = {}
    for (label, nfe), margin in compared.items():
        if margin is None:
            without.setdefault(label, []).append(nfe)
        else:
            by_label.setdefault(label, []).append(f"{margin:.2g} at NFE {nfe}")
    if by_label:
        told = (f"{label} {' and '.join(margins)}" for label, margins in by_label.items())
        lines.append(f"Margins ({MARGIN_RULE}): {', '.join(told)}.")
    if without:
        labels: dict[tuple[int, ...], list[str]] = {}
        for label, nfes in without.items():
            labels.setdefault(tuple(nfes), []).append(label)
        where = (f"{', '.join(those)} at NFE {' and '.join(map(str, nfes))}" for nfes, those in labels.items())
        lines.append(
            f"No margin, so nothing equivalent, where the fewest steps lose nothing that shows: {'; '.join(where)}."
        )
    if needed := too_few(rows, metrics):
        lines.append(f"{UNUSABLE}: not tested, for want of {needed}.")
    if any(METRICS[metric].moments and not too_few(rows, [metric]) for metric in metrics):
        lines.append("Frechet distances are printed as they are and compared with their bias taken out (jackknife).")
    return " ".join(lines)


def table_title(name: str, suite: str, differs: str) -> str:
    """A table's title; `differs` says how the suite differs from the paper's setting, if it does."""
    return f"{name} on suite `{suite}`" + (f" ({differs})" if differs else "")


LISTED = 8
"""Numbers of a list at most that a cell shows whole."""


def options_text(options: Mapping[str, Any], *, whole: bool = True) -> str:
    """Options as a reader sets them; those that were taken back are left out.

    Args:
        whole: else long lists, as those of a number for every step, show how they begin and end.
    """

    def text(value: Any) -> str:
        if isinstance(value, float):
            return f"{value:.4g}"
        if isinstance(value, list) and len(value) > LISTED and not whole:
            return f"[{', '.join(map(str, value[: LISTED - 2]))}, … {value[-1]}] of {len(value)}"
        return str(value)

    return ", ".join(f"{name} {text(value)}" for name, value in options.items() if value is not None)
