"""Score files and all else that reports are made from: reading, checking, and the ratio that tables and figures share.

A score file is plain JSON, one per row of a suite (`tcbench.record.score`).
A row that could not be run carries `"not_run": "<why>"` instead of `quality` and `macs`.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tcbench.config.suite import TRAININGS, Suite
from tcbench.errors import UserError
from tcbench.record.executed import PlanRecord
from tcbench.record.files import read_json
from tcbench.record.score import Quality, Score
from tcbench.report.trainings import over_rows
from tcbench.stats import Interval

Row = Score

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


def name_of(row: Mapping[str, Any]) -> str:
    """What tables and legends call the row."""
    return row["label"] + (" (control)" if row["control"] else "")


def label_of(row: Row) -> str:
    """The row's name, with its number of steps where that is not the NFE."""
    return name_of(row) + (f", {row['sampled_steps']} steps" if row["sampled_steps"] != row["nfe"] else "")


def quality_of(row: Row, metric: str) -> Quality | None:
    """A row's number with its interval in a metric; None if the row or the metric was not run."""
    quality = row.get("quality", {}).get(metric)
    return quality if quality and "value" in quality else None


def paired_interval(row: Row, metric: str) -> Interval | None:
    """A row less its uncached reference in a metric, at equal noise; None if that was not scored."""
    paired = (row.get("paired") or {}).get(metric)
    if paired is None:
        return None
    return Interval(paired["difference"], paired["low"], paired["high"], paired["se"], row["groups"] - 1)


def is_reference(row: Mapping[str, Any]) -> bool:
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


@dataclass(frozen=True)
class Results:
    """Everything of a suite that reports are made from.

    Attributes:
        rows: the suite's rows, in its order.
        ablations: rows by ablation, references first; an ablation that was not run is absent.
        training: `artefacts.json` of every row that is trained.
        diagnostics: by row; empty if not run.
        latency, floor: their files; None if not run.
    """

    suite: Suite
    rows: list[Row]
    ablations: dict[str, list[Row]]
    training: dict[str, Any]
    diagnostics: dict[str, Any]
    latency: dict[str, Any] | None
    floor: dict[str, Any] | None

    @property
    def predictors(self) -> dict[str, Any]:
        """The part of `training` that made a predictor, whose `scores` the log describes."""
        return {row: log for row, log in self.training.items() if "scores" in log}

    def row(self, name: str) -> Row:
        """A row of the suite."""
        return next(row for row in self.rows if row["row"] == name)

    def variant(self, ablation: str, key: str) -> Row | None:
        """A row of an ablation by its key in the config; None if that was not run."""
        rows = self.ablations.get(ablation, [])
        return next((row for row in rows if row["row"] == f"{ablation}-{key}"), None)


PARTS = ("ablations", "training", "diagnostics", "latency", "floor")


def read_results(suite: Suite, folder: Path, parts: Collection[str] = PARTS) -> Results:
    """Read what there is below a suite's folder; the rows' scores are required, the rest is optional.

    Args:
        parts: what to read beside the rows; the others are left empty. While a workflow runs, what a job does not
            depend on may be half made: it must not read that.

    Raises:
        UserError: a score is missing or malformed.
    """

    def optional(part: str, name: str) -> Any:
        return read_json(folder / name) if part in parts and (folder / name).exists() else None

    def by_row(part: str, pattern: str, rows: Sequence[str]) -> dict[str, Any]:
        found = {row: optional(part, pattern.format(row)) for row in rows}
        return {row: content for row, content in found.items() if content is not None}

    ablations = {}
    for name, ablation in suite.ablation_suites.items():
        below = folder / "ablations" / name
        if "ablations" in parts and below.exists():
            ablations[name] = read_rows(below, ablation.own)
    return Results(
        suite=suite,
        rows=_with_repeats(suite, folder),
        ablations=ablations,
        training=by_row("training", "trained/{}/artefacts.json", suite.trained_rows),
        diagnostics=by_row("diagnostics", "diagnostics/{}.json", suite.predictor_rows),
        latency=optional("latency", "latency.json"),
        floor=optional("floor", "scores/floor.json"),
    )


def _with_repeats(suite: Suite, folder: Path) -> list[Row]:
    """The suite's rows; those of several training seeds hold the numbers of all of them."""
    rows = {row["row"]: row for row in read_rows(folder, list(suite.rows))}
    if not suite.repeats:
        return list(rows.values())
    own = suite.ablation_suites[TRAININGS].own
    again = {row["row"]: row for row in read_rows(folder / "ablations" / TRAININGS, own)}
    for name, repeats in suite.repeats.items():
        found = [again[repeat] for repeat in repeats]
        if not any(row.get("not_run") for row in (rows[name], *found)):
            rows[name] = over_rows(rows[name], found, rows[rows[name]["reference"]])
    return list(rows.values())


def kept_shares(row: Row) -> np.ndarray:
    """Share of tokens that every step recomputed in every unit of a row's plan, [S, units]."""
    return PlanRecord.from_lines(row["plan"]).kept_shares(row["tokens"])
