"""Rows and those that they stand beside: a row's names and numbers, its reference, and rows that cost as much."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tcbench.errors import UserError
from tcbench.metrics.catalogue import METRICS
from tcbench.metrics.inference import Sampled, value_interval
from tcbench.record.executed import PlanRecord
from tcbench.record.score import Quality, Score
from tcbench.stats import Interval, Replicates

Row = Score

MATCHED = 0.05
"""MACs within this share of each other are matched acceleration."""


def was_run(row: Row) -> bool:
    """Whether the row has numbers; one that could not be run says in `not_run` why."""
    return "not_run" not in row


def name_of(row: Mapping[str, Any]) -> str:
    """What tables and legends call the row."""
    return row["label"] + (" (control)" if row["control"] else "")


def label_of(row: Row) -> str:
    """The row's name, with its number of steps where that is not the NFE."""
    return name_of(row) + (f", {row['sampled_steps']} steps" if row["sampled_steps"] != row["nfe"] else "")


def size_of(row: Mapping[str, Any]) -> tuple[int, int]:
    """(height, width) of the row's images in pixels."""
    return row.get("height", row["resolution"]), row["resolution"]


def resolution_of(row: Mapping[str, Any]) -> str:
    """What tables say of it: the side of a square, or both."""
    height, width = size_of(row)
    return str(width) if height == width else f"{height}×{width}"


def remarks(rows: Sequence[Row]) -> list[str]:
    """A sentence for everything that is suspicious about rows, said once of all that have it."""
    marked: dict[str, list[Row]] = {}
    for row in rows:
        for mark in row.get("marks", ()):
            marked.setdefault(mark, []).append(row)
    return [f"{_whose(mark, having)}: {mark}." for mark, having in marked.items()]


def row_that_trained(mark: str) -> str | None:
    """The row whose training a mark is of, if it is of one (`tcbench.stages.score.marks_of_training`)."""
    found = re.fullmatch(r".* \(training of (.+)\)", mark)
    return found[1] if found else None


def _whose(mark: str, rows: Sequence[Row]) -> str:
    """The rows that have a mark: of a training, the row that trained, if it is among them, and how many share that."""
    source = row_that_trained(mark)
    if source is None or len(rows) == 1:
        return "; ".join(f"{name_of(row)} (NFE {row['nfe']})" for row in rows)
    if its_own := row_named(source, rows):
        others = len(rows) - 1
        share = "the row that shares" if others == 1 else f"the {others} rows that share"
        return f"{name_of(its_own)} (NFE {its_own['nfe']}) and {share} its training"
    return f"{len(rows)} rows that share a training"


def quality_of(row: Row, metric: str) -> Quality | None:
    """A row's number with its interval in a metric; None if the row or the metric was not run."""
    return row["quality"].get(metric) if was_run(row) else None


def sampled(row: Row) -> Sampled:
    """What a row's numbers rest on."""
    return Sampled(row["samples"], row["groups"], row["extractor"])


def interval_of(row: Row, metric: str) -> Interval | None:
    """A row's number with its interval in a metric, inside the metric's range; None as `quality_of`."""
    quality = quality_of(row, metric)
    if quality is None:
        return None
    several = replicates_of(row, metric) if "trainings" in quality else None
    dof = several.interval().dof if several else row["groups"] - 1
    return value_interval(METRICS[metric], quality["value"], quality["se"], sampled(row), dof)


def replicates_of(row: Row, metric: str) -> Replicates | None:
    """The stored jackknife replicates of a row's number; None if the row or the metric was not run."""
    quality = quality_of(row, metric)
    if quality is None or "deleted" not in quality:
        return None
    trainings = np.array(quality.get("trainings", ()), dtype=np.float64)
    return Replicates(quality["value"], np.array(quality["deleted"]), np.array(row["group_sizes"]), trainings)


def paper_of(row: Row) -> Mapping[str, float]:
    """The paper's numbers of the cell that the row stands beside; empty if the paper has none."""
    return row["paper"] or {}


def kept_shares(row: Row) -> np.ndarray:
    """Share of tokens that every step recomputed in every unit of a row's plan, [S, units]."""
    return PlanRecord.from_lines(row["plan"]).kept_shares(row["tokens"])


def suite_of(rows: Sequence[Row]) -> str:
    """The one suite that all rows belong to.

    Raises:
        UserError: there are several, or no rows.
    """
    suites = sorted({row["suite"] for row in rows})
    if len(suites) != 1:
        raise UserError(f"a table shows one suite, got rows of {suites or 'none'}; pass the rows of one suite")
    return suites[0]


def row_named(name: str | None, rows: Sequence[Row]) -> Row | None:
    """The row with this id, if there is one."""
    return next((row for row in rows if row["row"] == name), None)


def is_reference(row: Mapping[str, Any]) -> bool:
    """Whether the row is the uncached run that others at its NFE are compared with."""
    return row["reference"] == row["row"]


def reference_of(row: Row, rows: Sequence[Row]) -> Row:
    """The uncached row at the same NFE; a reference row is its own.

    Raises:
        UserError: the named reference is not among `rows`.
    """
    if is_reference(row):
        return row
    if reference := row_named(row["reference"], rows):
        return reference
    raise UserError(f"row {row['row']}: its reference `{row['reference']}` is not in the suite; add it to the config")


def uncached_first(rows: Sequence[Row]) -> list[Row]:
    """The rows in their order, uncached ones before all others."""
    return sorted(rows, key=lambda row: row["method"] != "uncached")


def macs_of(row: Row) -> int:
    """MACs of one sample, overheads charged."""
    return row["macs"]["per_sample"]


def mac_ratio(row: Row, rows: Sequence[Row]) -> float | None:
    """MACs of the uncached row at the same NFE over this row's, overheads charged (the paper's "speedup").

    None if either row was not run.
    """
    reference = reference_of(row, rows)
    return macs_of(reference) / macs_of(row) if was_run(row) and was_run(reference) else None


def target_macs(row: Row, rows: Sequence[Row]) -> int | None:
    """MACs of the row whose budget this one was solved for; None if it names none, or that one was not run.

    Raises:
        UserError: the target is not among `rows`.
    """
    if row["target"] is None:
        return None
    if target := row_named(row["target"], rows):
        return macs_of(target) if was_run(target) else None
    raise UserError(f"row {row['row']}: its target `{row['target']}` is not in the suite; add it to the config")


def macs_off(row: Row, other: Row) -> float:
    """By what share of the other's MACs those of a row miss them."""
    return abs(macs_of(row) / macs_of(other) - 1)


def matched(ours: Row, rows: Sequence[Row]) -> list[Row]:
    """Rows at the same NFE whose MACs match those of `ours`, itself included."""
    return [row for row in rows if row["nfe"] == ours["nfe"] and was_run(row) and macs_off(row, ours) <= MATCHED]


def fewer_steps_matched(ours: Row, rows: Sequence[Row]) -> Row | None:
    """The uncached model with as many steps as cost what `ours` does: of those that match, the nearest."""
    fewer = [row for row in matched(ours, rows) if row["method"] == "fewer_steps"]
    return min(fewer, key=lambda row: macs_off(row, ours), default=None)


def timings_of(
    row: str, reference: str, latency: Mapping[str, Any] | None
) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """(timing of a row, timing of its uncached row in the same session) of latency.json; empty where there is none."""
    for session in (latency, *latency.get("later", ())) if latency else ():
        if row in session["rows"]:
            return session["rows"][row], session["rows"].get(reference, {})
    return {}, {}
