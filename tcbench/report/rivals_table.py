"""The table of rivals: methods side by side at a few MAC budgets, each compared with fewer steps at the same one."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from tcbench.config.suite import BASELINE, Suite
from tcbench.metrics.catalogue import METRICS
from tcbench.record.records import SCORE
from tcbench.record.rivals import RIVAL, AtBudget, Rival
from tcbench.record.yardstick import SEED_NOISE, Yardstick
from tcbench.report.cells import (
    NO_CELL,
    Marks,
    Record,
    difference_record,
    difference_text,
    interval_text,
    mac_unit,
    mark_of,
    marks,
    marks_explained,
    table_title,
)
from tcbench.report.compare import compare, margins
from tcbench.report.rows import Row, interval_of, macs_of, reference_of, remarks
from tcbench.report.table import Table
from tcbench.report.yardstick import MATCHED, UNMATCHED, interval

KIB = 1 << 10


@dataclass(frozen=True)
class Rivals:
    """What was run of a table of rivals.

    Attributes:
        records: by method, in the config's order.
        rows: score rows, the uncached one first.
        yardstick: what lies between two uncached runs.
    """

    records: Mapping[str, Rival]
    rows: Sequence[Row]
    yardstick: Yardstick

    def row(self, at: AtBudget) -> Row | None:
        """The row at a budget, if a setting reaches it."""
        return next((row for row in self.rows if row["row"] == at["row"]), None)

    def at(self, method: str, ratio: float) -> AtBudget:
        """A method at a budget."""
        return next(at for at in self.records[method]["budgets"] if at["ratio"] == ratio)


def read_rivals(suite: Suite, folder: Path) -> Rivals | None:
    """What is there below a suite's folder; None if the suite compares no rivals, or they were not run.

    Raises:
        UserError: a file is missing or damaged.
    """
    if suite.rivals is None or suite.rival_suite is None or not (folder / "rivals").exists():
        return None
    records = {name: RIVAL.read(folder / "rivals" / f"{name}.json") for name in suite.rivals.methods}
    scores = folder / "ablations" / suite.rival_suite.ablation / "scores"
    (reference,) = (entry.name for entry in suite.rival_suite.references)
    names = [reference, *(at["row"] for record in records.values() for at in record["budgets"] if at["row"])]
    rows = [SCORE.read(scores / f"{name}.json", name) for name in names]
    return Rivals(records, rows, SEED_NOISE.read(scores / "seed-noise.json")["rows"][reference])


def rivals_table(suite: Suite, rivals: Rivals) -> Table:
    """Quality, MACs and memory of every method at every budget; what reaches none says what comes nearest."""
    config = suite.rivals
    assert config is not None
    rows, batch = rivals.rows, suite.samples.batch_size
    allowed = margins(rows)
    compared = []
    for ratio in config.ratios:
        base = rivals.row(rivals.at(BASELINE, ratio))
        for method in rivals.records:
            row = rivals.row(rivals.at(method, ratio))
            if row and base and row is not base:
                compared += [compare(row, base, metric, allowed) for metric in config.metrics]
    found = marks([each for each in compared if each], [row["row"] for row in rows])
    unit = mac_unit(max(map(macs_of, rows)))
    records, cells, groups = [], [], []

    def add(group: str, record: Record, cell: dict[str, str]) -> None:
        records.append({"suite": suite.suite, "nfe": config.nfe} | record)
        cells.append(cell)
        groups.append(group)

    uncached = reference_of(rows[0], rows)
    whole = f"Uncached, NFE {config.nfe}"
    add(whole, *_line(uncached, None, config.metrics, found, uncached, unit.macs, unit.name, batch, suite))
    add(whole, *_yardstick(rivals.yardstick, config.metrics, list(cells[0])))
    for ratio in config.ratios:
        heading = f"{ratio:g} times fewer MACs"
        for method, record in rivals.records.items():
            at = rivals.at(method, ratio)
            row = rivals.row(at)
            if row:
                line = _line(row, at, config.metrics, found, uncached, unit.macs, unit.name, batch, suite)
            else:
                line = _unreached(record, at, macs_of(uncached), list(cells[0]))
            add(heading, *line)
    return Table(
        title=table_title("Rivals at equal MACs", suite.suite, suite.about.differs),
        caption=_caption(suite, rivals, found, unit.name),
        tidy=pd.DataFrame(records).convert_dtypes(),
        formatted=pd.DataFrame(cells),
        groups=groups,
        text_columns=("Method", "Setting"),
    )


def _line(
    row: Row,
    at: AtBudget | None,
    metrics: Sequence[str],
    found: Marks,
    uncached: Row,
    unit: float,
    unit_name: str,
    batch: int,
    suite: Suite,
) -> tuple[Record, dict[str, str]]:
    """A row that was run, as the CSV and the page have it."""
    macs, memory = macs_of(row), row["cache_bytes"] / batch
    record: Record = {"method": row["method"], "label": row["label"], "row": row["row"], "samples": row["samples"]}
    record |= {"ratio": at and at["ratio"], "options": at and _said(at["options"])}
    record |= {
        "macs_per_sample": macs,
        "macs_matched": at and at["macs"],
        "target_macs": at and at["target_macs"],
        "mac_ratio": macs_of(uncached) / macs,
        "cache_bytes_per_sample": memory,
    }
    cell = {
        "Method": row["label"],
        "Setting": _said(at["options"]) if at else "",
        "MAC ratio": f"{macs_of(uncached) / macs:.2f}",
        unit_name: f"{macs / unit:.4g}",
        "off budget": f"{macs / at['target_macs'] - 1:+.1%}" if at else NO_CELL,
        "cache (KiB)": f"{memory / KIB:.4g}",
    }
    for metric in metrics:
        number = interval_of(row, metric)
        record |= {f"{metric}{end}": number and getattr(number, key) for end, key in _ENDS}
        record |= difference_record(metric, found.get((row["row"], metric)))
        same = row is uncached and METRICS[metric].distance
        text = "reference" if same else row["metrics_not_run"].get(metric, "not scored")
        if number:
            text = f"{interval_text(number.value, number.low, number.high)} {mark_of(row, metric, found)}".rstrip()
        cell[METRICS[metric].label] = text
    return record, cell


_ENDS = (("", "value"), ("_low", "low"), ("_high", "high"))


def _yardstick(yardstick: Yardstick, metrics: Sequence[str], columns: Sequence[str]) -> tuple[Record, dict[str, str]]:
    """Two uncached runs of different noise."""
    label = "Uncached, other noise"
    record: Record = {"method": "yardstick", "label": label, "samples": yardstick["samples"]}
    cell = dict.fromkeys(columns, NO_CELL) | {"Method": label}
    for metric in metrics:
        if number := interval(yardstick, metric):
            record |= {f"{metric}{end}": getattr(number, key) for end, key in _ENDS}
            cell[METRICS[metric].label] = difference_text(number)
    return record, cell


def _unreached(rival: Rival, at: AtBudget, uncached: int, columns: Sequence[str]) -> tuple[Record, dict[str, str]]:
    """A budget that no setting reaches."""
    nearest, setting = uncached / at["macs"], _said(at["options"])
    record: Record = {"method": rival["method"], "label": rival["label"], "ratio": at["ratio"], "options": setting}
    record |= {"macs_matched": at["macs"], "target_macs": at["target_macs"]}
    cell = dict.fromkeys(columns, NO_CELL)
    return record, cell | {
        "Method": rival["label"],
        "Setting": f"not reached: nearest {setting}",
        "MAC ratio": f"({nearest:.2f})",
        "off budget": f"{at['macs'] / at['target_macs'] - 1:+.1%}",
    }


def _said(options: Mapping[str, Any]) -> str:
    """Options as a reader sets them; those that were taken back are left out."""
    given = {name: value for name, value in options.items() if value is not None}
    return ", ".join(f"{name} {f'{value:.4g}' if isinstance(value, float) else value}" for name, value in given.items())


def _caption(suite: Suite, rivals: Rivals, found: Marks, unit: str) -> str:
    config, rows = suite.rivals, rivals.rows
    assert config is not None
    first = rows[0]
    measured = [
        record["label"] for record in rivals.records.values() if record["budgets"][0]["counted"] != "shapes"
    ]
    lines = [
        f"{first['samples']} samples per row in {first['groups']} batches, CFG scale {first['guidance_scale']:g}; value "
        "[95 % interval], delete-one-batch jackknife.",
        f"Setting: the knob as solved for the budget, the uncached run's MACs at NFE {config.nfe} over the ratio, all that "
        "a method computes for itself included, and what else was changed to reach it. MAC ratio and off budget: of the "
        f"run itself. A row is there if its setting was within {config.near:.0%} when it was matched.",
    ]
    if measured:
        lines.append(
            f"MACs of {', '.join(measured)} depend on the sample; matched on a calibration batch that no evaluated sample "
            "is in."
        )
    lines += [
        "Marks compare with fewer steps at the same budget, paired on noise and labels.",
        marks_explained(rows, config.metrics, found),
        f"Uncached, other noise: what lies between two uncached runs of different noise ("
        f"{MATCHED if rivals.yardstick['matched'] else UNMATCHED}).",
        "Whatever is trained was trained once. Cache: what is held between steps, per sample, both CFG halves, as sampled.",
        f"{unit}: per sample, both CFG halves. {NO_CELL}: no such cell.",
        *remarks(rows),
    ]
    return " ".join(lines)
