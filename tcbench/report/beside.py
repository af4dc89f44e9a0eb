"""TokenCache in a suite beside what costs as much: the comparison that decides, for summaries and pages."""

from collections.abc import Iterable
from dataclasses import dataclass

from tcbench.report.results import Results
from tcbench.report.rows import Row, interval_of, mac_ratio, macs_off, matched, was_run

OURS = "tokencache"


@dataclass(frozen=True)
class Beside:
    """TokenCache in one suite, and what costs as much, at the NFE of the suite's figures.

    Attributes:
        suite: its name.
        ours: TokenCache's row.
        ratio: its MAC ratio, predictor charged.
        rivals: of each other method the row nearest in MACs, the nearest to the uncached samples first.
        selectors: the same of the controls: other choices of tokens in TokenCache's place.
        table: the suite's first table.
    """

    suite: str
    ours: Row
    ratio: float
    rivals: tuple[Row, ...]
    selectors: tuple[Row, ...]
    table: str


def beside(results: Results) -> Beside | None:
    """What stands beside TokenCache in a suite; None if it has no TokenCache row that was run at the figures' NFE."""
    suite, rows = results.suite, results.own_rows
    at = [row for row in rows if row["nfe"] == suite.show.figure.nfe and was_run(row) and row["refiners"] is True]
    ours = next((row for row in at if row["method"] == OURS and not row["control"]), None)
    ratio = mac_ratio(ours, rows) if ours else None
    if ours is None or ratio is None:
        return None

    def nearest(control: bool) -> tuple[Row, ...]:
        found: dict[str, Row] = {}
        for row in sorted(matched(ours, at), key=lambda row: macs_off(row, ours)):
            if row["control"] is control and row["method"] not in (OURS, "uncached") and distance_of(row) is not None:
                found.setdefault(row["method"], row)
        return tuple(sorted(found.values(), key=distance_of))  # type: ignore[arg-type]

    return Beside(suite.suite, ours, ratio, nearest(False), nearest(True), next(iter(suite.tables)))


def distance_of(row: Row) -> float | None:
    """MAE to the uncached samples; None if it was not measured."""
    interval = interval_of(row, "mae")
    return None if interval is None else interval.value


def in_order(rows: Iterable[Row]) -> str:
    """Methods with their distances, the nearest first; TokenCache in bold (Markdown)."""
    ordered = sorted(rows, key=distance_of)  # type: ignore[arg-type]
    return ", ".join(_named(row) for row in ordered)


def _named(row: Row) -> str:
    method = row["label"].partition(",")[0]  # "FORA, matched" is FORA here: all are
    text = f"{method} {distance_of(row):.3g}"
    return f"**{text}**" if row["method"] == OURS else text
