"""TokenCache in a suite beside what costs as much: the comparison that decides, for summaries and pages."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from tcbench.metrics.catalogue import METRICS
from tcbench.report.results import Results
from tcbench.report.rows import Row, interval_of, mac_ratio, macs_off, matched, was_run

OURS = "tokencache"


@dataclass(frozen=True)
class Beside:
    """TokenCache in one suite, and what costs as much, at one NFE.

    Attributes:
        suite: its name.
        ours: TokenCache's row.
        ratio: its MAC ratio, predictor charged.
        rivals: of each other method the row whose knob was solved for TokenCache's MACs, else the row nearest in MACs;
            the nearest to the uncached samples first.
        selectors: the same of the controls: other choices of tokens in TokenCache's place.
        plain: TokenCache and these where all are without its LoRA, as far as there are such rows.
        table: the suite's first table, if it has any.
    """

    suite: str
    ours: Row
    ratio: float
    rivals: tuple[Row, ...]
    selectors: tuple[Row, ...]
    plain: tuple[Row, ...]
    table: str | None


def beside(results: Results, nfe: int | None = None) -> Beside | None:
    """What stands beside TokenCache in a suite at an NFE (default: that of its figures, or else the first one where
    another method costs as much); None if it stands alone, or was not run."""
    if nfe is None:
        nfes = dict.fromkeys([results.suite.show.figure.nfe, *(row["nfe"] for row in results.own_rows)])
        return next((found for nfe in nfes if (found := beside(results, nfe))), None)
    suite, rows = results.suite, results.own_rows
    run = [row for row in rows if row["nfe"] == nfe and was_run(row)]
    at = [row for row in run if row["refiners"] is True]
    ours = next((row for row in at if row["method"] == OURS and not row["control"]), None)
    ratio = mac_ratio(ours, rows) if ours else None
    if ours is None or ratio is None:
        return None

    def nearest(rows: list[Row], fits: Callable[[Row], bool]) -> tuple[Row, ...]:
        found: dict[str, Row] = {}
        for row in sorted(matched(ours, rows), key=lambda row: (row["target"] != ours["row"], macs_off(row, ours))):
            if fits(row) and row["method"] != "uncached" and distance_of(row) is not None:
                found.setdefault(row["method"], row)
        return tuple(sorted(found.values(), key=distance_of))  # type: ignore[arg-type]

    rivals = nearest(at, lambda row: not row["control"] and row["method"] != OURS)
    if not rivals:
        return None
    selectors = nearest(at, lambda row: row["control"])
    plain = nearest(run, lambda row: not row["refiners"] and (row["control"] or row["method"] == OURS))
    return Beside(suite.suite, ours, ratio, rivals, selectors, plain, next(iter(suite.tables), None))


def distance_of(row: Row) -> float | None:
    """MAE to the uncached samples; None if it was not measured."""
    return value_of(row, "mae")


def value_of(row: Row, metric: str) -> float | None:
    """A row's value of a metric; None if it was not measured."""
    interval = interval_of(row, metric)
    return None if interval is None else interval.value


def best_first(rows: Iterable[Row], metric: str) -> list[Row]:
    """The rows in which a metric was measured, the best first."""
    values = [(value, row) for row in rows if (value := value_of(row, metric)) is not None]
    return [row for _, row in sorted(values, key=lambda pair: -METRICS[metric].sign * pair[0])]


def in_order(rows: Iterable[Row], metric: str = "mae") -> str:
    """Methods with their values of a metric, the best first; TokenCache in bold (Markdown)."""
    return ", ".join(_named(row, metric) for row in best_first(rows, metric))


def _named(row: Row, metric: str) -> str:
    method = row["label"].partition(",")[0].removesuffix(" without LoRA")  # "FORA, matched" is FORA here: all are
    text = f"{method} {value_of(row, metric):.3g}"
    return f"**{text}**" if row["method"] == OURS else text
