"""The table of rivals: methods side by side at a few MAC budgets, each compared with fewer steps at the same one."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pandas as pd

from tcbench.config.suite import BASELINE, Suite
from tcbench.errors import UserError
from tcbench.metrics.catalogue import METRICS
from tcbench.record.records import SCORE
from tcbench.record.rivals import RIVAL, AtBudget, Rival
from tcbench.record.yardstick import SEED_NOISE, Yardstick
from tcbench.report.cells import (
    NO_CELL,
    MacUnit,
    Marks,
    Record,
    difference_record,
    difference_text,
    interval_text,
    mac_unit,
    mark_of,
    marks,
    marks_explained,
    options_text,
    table_title,
)
from tcbench.report.compare import compare, margins, too_few
from tcbench.report.rows import Row, interval_of, macs_of, reference_of, remarks
from tcbench.report.table import Table
from tcbench.report.yardstick import MATCHED, UNMATCHED, interval
from tcbench.stats import Interval

KIB = 1 << 10


@dataclass(frozen=True)
class Rivals:
    """What was run of a table of rivals.

    Attributes:
        records: by method, in the config's order.
        rows: score rows, the uncached one first.
        yardstick: what lies between two uncached runs.
        not_run: methods of the config that are not there.
    """

    records: Mapping[str, Rival]
    rows: Sequence[Row]
    yardstick: Yardstick
    not_run: Sequence[str] = ()

    def row(self, at: AtBudget) -> Row | None:
        """The row at a budget, if a setting reaches it."""
        return next((row for row in self.rows if row["row"] == at["row"]), None)

    def at(self, method: str, ratio: float) -> AtBudget:
        """A method at a budget."""
        return next(at for at in self.records[method]["budgets"] if at["ratio"] == ratio)

    def fewer_steps(self, ratio: float) -> Row | None:
        """Fewer steps at a budget, if that was run and reaches it."""
        return self.row(self.at(BASELINE, ratio)) if BASELINE in self.records else None

    @property
    def uncached(self) -> Row:
        """What ratios are to."""
        return reference_of(self.rows[0], self.rows)

    @property
    def tell_fid(self) -> bool:
        """Whether every row has a FID, of samples enough to compare by."""
        return all(interval_of(row, "fid") for row in self.rows) and not too_few(self.rows, ["fid"])

    @property
    def by_method(self) -> dict[str, list[Row]]:
        """The rows of every method that reaches a budget, the largest budget first."""
        found = {name: [self.row(at) for at in record["budgets"]] for name, record in self.records.items()}
        reached = {name: [row for row in rows if row] for name, rows in found.items()}
        return {name: sorted(rows, key=macs_of, reverse=True) for name, rows in reached.items() if rows}


def read_rivals(suite: Suite, folder: Path, partial: bool = False) -> Rivals | None:
    """What is there below a suite's folder; None if the suite compares no rivals, or they were not run.

    Args:
        partial: methods that were not run, or at other budgets, are left out; without it they are refused.

    Raises:
        UserError: a file is missing or damaged, or of other budgets.
    """
    if suite.rivals is None or suite.rival_suite is None or not (folder / "rivals").exists():
        return None
    scores = folder / "ablations" / suite.rival_suite.ablation / "scores"
    (reference,) = (entry.name for entry in suite.rival_suite.references)
    uncached, noise = scores / f"{reference}.json", scores / "seed-noise.json"
    if partial and not (uncached.exists() and noise.exists()):
        return None
    rows, records, not_run = [SCORE.read(uncached, reference)], dict[str, Rival](), list[str]()
    for name in suite.rivals.contenders:
        path = folder / "rivals" / f"{name}.json"
        if partial and not path.exists():
            not_run.append(name)
            continue
        record = RIVAL.read(path, suite=suite.suite)
        ratios = [at["ratio"] for at in record["budgets"]]
        found = {row: scores / f"{row}.json" for at in record["budgets"] if (row := at["row"])}
        if partial and (ratios != list(suite.rivals.ratios) or not all(each.exists() for each in found.values())):
            not_run.append(name)
            continue
        if ratios != list(suite.rivals.ratios):
            raise UserError(f"{path}: is of other ratios, {ratios}; run `tcbench run {suite.suite} rivals`")
        records[name] = record
        rows += [SCORE.read(each, row) for row, each in found.items()]
    if not records:
        return None
    return Rivals(records, rows, SEED_NOISE.read(noise, suite=suite.suite)["rows"][reference], not_run)


def rivals_table(suite: Suite, rivals: Rivals) -> Table:
    """Quality, MACs and memory of every method at every budget; what reaches none says what comes nearest."""
    assert suite.rivals is not None
    lines = _Lines(suite, rivals, suite.rivals.metrics)
    of_uncached = f"Uncached, NFE {suite.rivals.nfe}"
    printed = [(of_uncached, *lines.run(lines.uncached)), (of_uncached, *lines.yardstick())]
    for ratio in suite.rivals.ratios:
        for method in rivals.records:
            at = rivals.at(method, ratio)
            row = rivals.row(at)
            line = lines.run(row, at) if row else lines.unreached(rivals.records[method], at)
            printed.append((f"{ratio:g} times fewer MACs", *line))
    groups, records, cells = zip(*printed, strict=True)
    return Table(
        title=table_title("Rivals at equal MACs", suite.suite, suite.about.differs),
        caption=_caption(suite, rivals, lines),
        tidy=pd.DataFrame(records).convert_dtypes(),
        formatted=pd.DataFrame(cells).fillna(NO_CELL),
        groups=[*groups],
        text_columns=("Method", "Setting"),
    )


@dataclass(frozen=True)
class _Lines:
    """The lines of the table, each as the CSV and as the page has it."""

    suite: Suite
    rivals: Rivals
    metrics: Sequence[str]

    @property
    def uncached(self) -> Row:
        """What ratios are to."""
        return self.rivals.uncached

    @cached_property
    def unit(self) -> MacUnit:
        """Of MACs."""
        return mac_unit(macs_of(self.uncached))

    @cached_property
    def marks(self) -> Marks:
        """Every row against fewer steps at its budget."""
        rivals, allowed = self.rivals, margins(self.rivals.rows)
        found = []
        for record in rivals.records.values():
            for at in record["budgets"]:
                row, base = rivals.row(at), rivals.fewer_steps(at["ratio"])
                if row and base and row is not base:
                    found += [compare(row, base, metric, allowed) for metric in self.metrics]
        return marks([each for each in found if each], [row["row"] for row in rivals.rows])

    def run(self, row: Row, at: AtBudget | None = None) -> tuple[Record, dict[str, str]]:
        """A row that was run, at a budget or uncached."""
        macs, memory = macs_of(row), row["cache_bytes"] / min(self.suite.samples.batch_size, row["samples"])
        ratio = macs_of(self.uncached) / macs
        record = _identity(row["method"], row["label"], at)
        record |= {"row": row["row"], "samples": row["samples"], "macs_per_sample": macs, "mac_ratio": ratio}
        record |= {"cache_bytes_per_sample": memory}
        cell = {
            "Method": row["label"],
            "Setting": options_text(at["options"], whole=False) if at else NO_CELL,
            "MAC ratio": f"{ratio:.2f}",
            self.unit.name: f"{macs / self.unit.macs:.4g}",
            "off budget": f"{macs / at['target_macs'] - 1:+.1%}" if at else NO_CELL,
            "Cache (KiB)": f"{memory / KIB:.4g}",
        }
        for metric in self.metrics:
            number, found = interval_of(row, metric), self.marks.get((row["row"], metric))
            record |= _numbers(metric, number) | difference_record(metric, found)
            if number:
                text = f"{interval_text(number.value, number.low, number.high)} {mark_of(row, metric, self.marks)}"
            elif row is self.uncached and METRICS[metric].distance:
                text = "reference"
            else:
                text = f"not run: {row['metrics_not_run'].get(metric, 'not scored')}"
            cell[METRICS[metric].label] = text.rstrip()
        return record, cell

    def yardstick(self) -> tuple[Record, dict[str, str]]:
        """What lies between two uncached runs of different noise."""
        label, yardstick = "Uncached, other noise", self.rivals.yardstick
        record, cell = _identity("yardstick", label) | {"samples": yardstick["samples"]}, {"Method": label}
        for metric in self.metrics:
            if number := interval(yardstick, metric):
                record |= _numbers(metric, number)
                cell[METRICS[metric].label] = difference_text(number)
        return record, cell

    def unreached(self, rival: Rival, at: AtBudget) -> tuple[Record, dict[str, str]]:
        """A budget that no setting reaches, and what comes nearest."""
        return _identity(rival["method"], rival["label"], at), {
            "Method": rival["label"],
            "Setting": f"not reached; nearest: {options_text(at['options'], whole=False)}",
            "MAC ratio": f"({macs_of(self.uncached) / at['macs']:.2f})",
            "off budget": f"({at['macs'] / at['target_macs'] - 1:+.1%})",
        }


def _identity(method: str, label: str, at: AtBudget | None = None) -> Record:
    return {
        "method": method,
        "label": label,
        "ratio": at and at["ratio"],
        "setting": at and options_text(at["options"]),
        "target_macs": at and at["target_macs"],
        "macs_matched": at and at["macs"],
        "reached": at and at["row"] is not None,
    }


def _numbers(metric: str, number: Interval | None) -> Record:
    """A number and the ends of its interval."""
    ends = {"": "value", "_low": "low", "_high": "high"}
    return {f"{metric}{end}": number and getattr(number, name) for end, name in ends.items()}


def _caption(suite: Suite, rivals: Rivals, lines: _Lines) -> str:
    config, first = suite.rivals, lines.uncached
    assert config is not None
    measured = [record["label"] for record in rivals.records.values() if record["budgets"][0]["counted"] != "shapes"]
    told = [
        f"{first['samples']} samples per row in {first['groups']} batches, CFG scale {first['guidance_scale']:g};",
        "value [95 % interval], delete-one-batch jackknife.",
        f"Setting: the knob as solved for the budget, which is the uncached run's MACs at NFE {config.nfe} over the",
        "ratio, and what else was changed to reach it, long lists whole in the CSV; all that a method computes for",
        "itself is charged. MAC ratio and off budget are of the run itself. A row is there if the setting that was",
        "solved for it was within",
        f"{config.near:.0%} of the budget.",
    ]
    if measured:
        told.append(f"Where MACs depend on the sample, they were solved on calibration noise: {', '.join(measured)}.")
    plain = [row for row in rivals.rows if row["refiners"] is False and row["method"] not in config.without_refiners]
    if plain:
        labels = dict.fromkeys(row["label"] for row in plain)
        told.append(f"Without LoRA, which was trained for another method: {', '.join(labels)}.")
    if rivals.not_run:
        told.append(f"Not run yet: {', '.join(rivals.not_run)}.")
    told += [
        "Marks compare with fewer steps at the same budget, paired on noise and labels.",
        marks_explained(rivals.rows, lines.metrics, lines.marks),
        "Uncached, other noise: two uncached runs of different noise, "
        f"{MATCHED if rivals.yardstick['matched'] else UNMATCHED}.",
        "What is trained was trained once. Cache: what is held between steps, of one sample, both CFG halves.",
        f"{lines.unit.name}: per sample, both CFG halves. {NO_CELL}: no such cell.",
        *remarks(rivals.rows),
    ]
    return " ".join(told)
