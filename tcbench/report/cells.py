"""Text of a table's cells: numbers with their intervals, and the marks that say how they compare."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from tcbench.report.compare import Comparison, decide_together
from tcbench.stats import Interval

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
    """`value [low, high]`: half the interval to two significant digits (five decimals at most), the rest to match."""
    half = (high - low) / 2
    shown = min(5, decimals(half, 2) if half > 0 else decimals(value, 4))
    return f"{value:.{shown}f} [{low:.{shown}f}, {high:.{shown}f}]"


def difference_text(difference: Interval) -> str:
    """A difference with its interval."""
    return interval_text(difference.value, difference.low, difference.high)


def spread_text(value: float, spread: float) -> str:
    """`value ± spread`: the spread to two significant digits, the value to match."""
    shown = decimals(spread, 2)
    return f"{value:.{shown}f} ± {spread:.{shown}f}"


def marks(comparisons: Sequence[Comparison | None]) -> Marks:
    """By row and metric, the comparisons of a table, corrected together."""
    return {(found.row, found.metric): found for found in decide_together(comparisons)}


def marked(text: str, comparison: Comparison | None) -> str:
    """A cell with how it compares."""
    return f"{text} {comparison.outcome}" if comparison else text


def table_title(name: str, suite: str, differs: str) -> str:
    """A table's title; `differs` says how the suite differs from the paper's setting, if it does."""
    return f"{name} on suite `{suite}`" + (f" ({differs})" if differs else "")
