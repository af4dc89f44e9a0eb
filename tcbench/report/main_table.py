"""The paper's Tables II to VI: quality, MACs and latency of rows, our number and its interval beside the paper's."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import pandas as pd

from tcbench.config.fields import TABLE_2, PaperTable
from tcbench.metrics.catalogue import METRICS, paper_headings
from tcbench.record.yardstick import Yardstick
from tcbench.report.cells import (
    NO_CELL,
    MacUnit,
    Marks,
    Record,
    difference_record,
    interval_text,
    mac_unit,
    mark_of,
    marks,
    marks_explained,
    ratio,
    spread_text,
    table_title,
)
from tcbench.report.compare import against_references, margins
from tcbench.report.rows import (
    Row,
    interval_of,
    is_reference,
    mac_ratio,
    name_of,
    paper_of,
    reference_of,
    remarks,
    resolution_of,
    size_of,
    suite_of,
    target_macs,
    timings_of,
    was_run,
)
from tcbench.report.table import Table
from tcbench.report.yardstick import yardsticks_told

PAPER_QUALITY = paper_headings()
IDENTITY = ("row", "suite", "method", "label", "control", "model", "resolution", "nfe", "sampled_steps", "reference")
"""Fields of a row that the CSV begins with."""
Marked = Mapping[tuple[str, str], str]
"""The mark of a cell, by row and metric."""
FLOORED = ("fid", "sfid")
"""Metrics that a floor of real images is measured in."""
MARKED = "Marks compare with the uncached run at the same NFE, paired on noise and labels."
FLOOR_TOLD = "Floor: Frechet distance of random real subsets to all real images, mean ± standard deviation."
BALANCED = "Every class comes as often, which raises IS above{} that of classes drawn at random."
"""With pairs of one class fewer than by chance, samples are less alike among themselves than KID takes them to be."""
DRAWN = "Classes are drawn at random, as DiT's script does."


def main_table(
    rows: Sequence[Row],
    latency: dict[str, Any] | None,
    floor: dict[str, Any] | None,
    *,
    differs: str,
    guidance_scale: float,
    computes_halves: bool = True,
    labels: str = "balanced",
    table: PaperTable = TABLE_2,
    added: Collection[str] = (),
    seed_noise: Mapping[str, Yardstick] = MappingProxyType({}),
) -> Table:
    """One of the paper's Tables II to VI: quality, MACs and latency of rows, grouped by resolution and NFE.

    MAC ratio and latency ratio are two columns, because the paper's "speedup" is a ratio of MACs. A quality
    cell ends in how it compares with the uncached run (`tcbench.report.compare`).

    Args:
        rows: score rows in the suite's order (`results.read_rows`).
        latency: content of `latency.json`, seconds per batch; None if nothing was timed.
        floor: content of `floor.json`; None if it was not measured.
        differs: how the suite differs from the paper's setting, e.g. "not the paper's model or data"; empty
            for the paper's own setting.
        guidance_scale: the CFG scale of all rows.
        computes_halves: as `Suite` has it.
        labels: how the samples' classes are chosen, as the config has it.
        table: its name, its columns of quality, and which of the rows it has.
        added: rows that change nothing of the others (`Suite.added_rows`).
        seed_noise: yardsticks by uncached row.

    Raises:
        UserError: rows of several suites, or a reference row that is not among them.
    """
    suite = suite_of(rows)
    shown = _in_order(rows, table.rows)
    own = {row["row"]: row for row in rows if row["row"] not in added}
    found = marks(against_references(rows, table.metrics, margins([*own.values()])), own)
    columns = _columns(shown, table, latency)
    records = [_record(row, rows, columns, latency, found) for row in shown]
    marked = {(row["row"], metric): mark_of(row, metric, found) for row in shown for metric in table.metrics}
    cells = [_cells(record, columns, marked) for record in records]
    groups = ["{}×{}, NFE {}".format(*size_of(row), row["nfe"]) for row in shown]
    if columns.floored:
        floor_record, floor_cells = _floor(suite, floor, list(cells[0]))
        records, cells, groups = [*records, floor_record], [*cells, floor_cells], [*groups, "Real images"]
    if not table.paper:
        records, cells = ([_without_paper(line) for line in lines] for lines in (records, cells))
    explained = [f"{MARKED} {marks_explained(shown, table.metrics, found)}"] if any(marked.values()) else []
    if "is" in table.metrics:  # samples have classes
        and_kid = " and lowers KID below" if "kid" in table.metrics else ""
        explained.append(DRAWN if labels == "drawn" else BALANCED.format(and_kid))
    explained += filter(None, [yardsticks_told(seed_noise, shown, [*columns.printed, "mae"])])
    dashed = any(NO_CELL in line.values() for line in cells)
    caption = _caption(
        shown, columns, latency, differs, guidance_scale, computes_halves, explained, dashed, table.paper
    )
    return Table(
        title=table_title(table.title, suite, differs),
        caption=caption,
        tidy=pd.DataFrame(records).convert_dtypes(),
        formatted=pd.DataFrame(cells),
        groups=groups,
        text_columns=("Method",),
        lead=tuple(
            column
            for column in ("Method", "MAC ratio", "MAE to uncached", "FID", columns.latency)
            if column in cells[0]
        ),
    )


def _in_order(rows: Sequence[Row], names: Sequence[str]) -> list[Row]:
    """The named rows, or all, those of one resolution and NFE together."""
    by_name = {row["row"]: row for row in rows}
    shown = [by_name[name] for name in names or by_name]
    settings = list(dict.fromkeys((row["resolution"], row["nfe"]) for row in shown))
    return sorted(shown, key=lambda row: settings.index((row["resolution"], row["nfe"])))


@dataclass(frozen=True)
class _Columns:
    """The columns that depend on what the rows hold.

    Attributes:
        printed: metrics with a column of their own.
        stored: metrics in the CSV.
        paper: the paper's columns of quality.
        unit: of MACs.
        latency: heading of the latency.
        targets: whether any row was solved for another one's MACs.
        floored: whether a floor of real images lies under any of the metrics.
    """

    printed: tuple[str, ...]
    stored: tuple[str, ...]
    paper: tuple[str, ...]
    unit: MacUnit
    latency: str
    targets: bool
    floored: bool


def _columns(rows: Sequence[Row], table: PaperTable, latency: dict[str, Any] | None) -> _Columns:
    run = [row for row in rows if was_run(row)]
    cited = {*table.metrics, *(key for row in rows for key in paper_of(row))}
    stored = tuple(dict.fromkeys([*table.metrics, "mae", *(metric for row in run for metric in row["quality"])]))
    return _Columns(
        printed=table.metrics,
        stored=stored,
        paper=tuple(key for key in PAPER_QUALITY if key in cited),
        unit=mac_unit(max((row["macs"]["per_sample"] for row in run), default=0)),
        latency=f"Latency (s, batch {latency['protocol']['batch_size']})" if latency else "Latency (s)",
        targets=any(row["target"] for row in rows),
        floored=any(metric in FLOORED for metric in stored),
    )


# --- the CSV: one record per row, None where there is no number


def _record(row: Row, rows: Sequence[Row], columns: _Columns, latency: dict[str, Any] | None, marks: Marks) -> Record:
    fields: dict[str, Any] = {**row}
    record = {name: fields[name] for name in IDENTITY} | ({"height": fields["height"]} if "height" in row else {})
    record |= {name: fields.get(name) for name in ("not_run", "samples", "groups")}
    for metric in columns.stored:
        record |= _quality_record(row, metric, marks)
    record |= {f"paper_{metric}": paper_of(row).get(metric) for metric in columns.paper}
    record |= _macs_record(row, rows)
    record |= _latency_record(row, reference_of(row, rows), latency)
    return record | ({f"macs_{tag}": count for tag, count in row["macs"]["by_tag"].items()} if was_run(row) else {})


def _quality_record(row: Row, metric: str, marks: Marks) -> Record:
    interval, found = interval_of(row, metric), marks.get((row["row"], metric))
    record = {
        metric: interval and interval.value,
        f"{metric}_low": interval and interval.low,
        f"{metric}_high": interval and interval.high,
        f"{metric}_se": interval and interval.se,
    } | difference_record(metric, found)
    reason = row["metrics_not_run"].get(metric) if was_run(row) else None
    return record | ({f"{metric}_not_run": reason} if reason else {})


def _macs_record(row: Row, rows: Sequence[Row]) -> Record:
    macs = row["macs"] if was_run(row) else None
    low, high = row["macs_spread"] if was_run(row) else (None, None)
    target = target_macs(row, rows)
    return {
        "macs_per_sample": macs and macs["per_sample"],
        "macs_per_sample_low": low,
        "macs_per_sample_high": high,
        "macs_without_overheads": macs and macs["per_sample_without_overheads"],
        "macs_paper_rule": macs and macs["paper_rule"],
        "target": row["target"],
        "target_macs": target,
        "macs_over_target": ratio(macs and macs["per_sample"], target),
        "paper_tmacs": paper_of(row).get("tmacs"),
        "mac_ratio": mac_ratio(row, rows),
        "paper_mac_ratio": paper_of(row).get("speedup"),
    }


def _latency_record(row: Row, reference: Row, latency: dict[str, Any] | None) -> Record:
    timing, reference_timing = timings_of(row["row"], reference["row"], latency)
    paper, reference_paper = paper_of(row).get("latency_s"), paper_of(reference).get("latency_s")
    return {
        "latency_s": timing.get("median_s"),
        "latency_min_s": timing.get("min_s"),
        "latency_max_s": timing.get("max_s"),
        "paper_latency_s": paper,
        "latency_ratio": ratio(reference_timing.get("median_s"), timing.get("median_s")),
        "paper_latency_ratio": ratio(reference_paper, paper),
    }


# --- the printed lines: an empty cell says why, and a row that was not run says it beside its name


def _cells(record: Record, columns: _Columns, marked: Marked) -> dict[str, str]:
    cells = {
        "Method": name_of(record) + (f" (not run: {record['not_run']})" if record["not_run"] else ""),
        "Resolution": resolution_of(record),
        "NFE": str(record["nfe"]),
        "Sampled steps": str(record["sampled_steps"]),
    }
    for metric in columns.printed:
        cells[METRICS[metric].label] = _quality(record, metric, marked)
        if metric in columns.paper:
            cells[f"paper {PAPER_QUALITY[metric]}"] = _paper(record, metric)
    cells |= {f"paper {PAPER_QUALITY[key]}": _paper(record, key) for key in columns.paper if key not in columns.printed}
    cells["MAE to uncached"] = _quality(record, "mae", marked)
    return cells | _macs_cells(record, columns) | _latency_cells(record, columns)


def _ours(record: Record, number: float | None, form: str, why: str) -> str:
    """Our number; where there is none, `why`, unless the whole row was not run."""
    if number is not None:
        return format(number, form)
    return "not run" if record["not_run"] else f"not run: {why}"


def _paper(record: Record, key: str) -> str:
    number = record[f"paper_{key}"]
    return NO_CELL if number is None else f"{number:.2f}"


def _quality(record: Record, metric: str, marked: Marked) -> str:
    if is_reference(record) and METRICS[metric].distance:
        return "reference"
    if record[metric] is None:
        return _ours(record, None, "", record.get(f"{metric}_not_run", "not scored"))
    text = interval_text(record[metric], record[f"{metric}_low"], record[f"{metric}_high"])
    return f"{text} {marked.get((record['row'], metric), '')}".rstrip()


def _macs_cells(record: Record, columns: _Columns) -> dict[str, str]:
    unit = columns.unit.name

    def macs(key: str) -> str:
        return _ours(record, ratio(record[key], columns.unit.macs), ".4g", "not counted")

    cells = {unit: macs("macs_per_sample"), f"{unit} without overheads": macs("macs_without_overheads")}
    if columns.targets:
        off = record["macs_over_target"]
        missed = _ours(record, off and off - 1, "+.2%", "not counted")
        has_target = record["target"] is not None
        cells |= {
            f"target {unit}": macs("target_macs") if has_target else NO_CELL,
            "off target": missed if has_target else NO_CELL,
        }
    return cells | {
        "paper TMACs": _paper(record, "tmacs"),
        "MAC ratio": _ours(record, record["mac_ratio"], ".2f", "not counted"),
        "paper MAC ratio": _paper(record, "mac_ratio"),
    }


def _latency_cells(record: Record, columns: _Columns) -> dict[str, str]:
    median = _ours(record, record["latency_s"], ".3g", "not timed")
    low, high = record["latency_min_s"], record["latency_max_s"]
    return {
        columns.latency: median if low == high else f"{median} ({low:.3g}–{high:.3g})",  # one timing has no range
        "paper latency (s)": _paper(record, "latency_s"),
        "Latency ratio": _ours(record, record["latency_ratio"], ".2f", "not timed"),
        "paper latency ratio": _paper(record, "latency_ratio"),
    }


def _floor(suite: str, floor: dict[str, Any] | None, columns: Sequence[str]) -> tuple[Record, dict[str, str]]:
    """The floor's line: Frechet distance of real images to real images, mean ± std over random subsets."""
    cells = dict.fromkeys(columns, NO_CELL)
    if floor is None or "not_run" in floor:
        reason = floor["not_run"] if floor else "no floor was measured"
        label, numbers = f"Real subset, floor (not run: {reason})", {}
        cells |= {column: "not run" for column in ("FID", "sFID") if column in cells}
    else:
        label, numbers = f"Real subset of {floor['fid']['n']}, floor", {"samples": floor["fid"]["n"]}
        for metric, spread in ((metric, floor[metric]) for metric in FLOORED):
            numbers |= {metric: spread["mean"], f"{metric}_se": spread["std"]}
            if (column := METRICS[metric].label) in cells:
                cells[column] = spread_text(spread["mean"], spread["std"])
    record = {"row": "floor", "suite": suite, "method": "floor", "label": label, **numbers}
    return record, cells | {"Method": label}


def _without_paper(line: Record) -> Record:
    """A line without the paper's columns, of the CSV or printed."""
    return {column: value for column, value in line.items() if not column.startswith(("paper ", "paper_"))}


# --- the caption


def _caption(
    rows: Sequence[Row],
    columns: _Columns,
    latency: dict[str, Any] | None,
    differs: str,
    guidance_scale: float,
    computes_halves: bool,
    marks: Sequence[str],
    dashed: bool,
    paper: bool,
) -> str:
    run = [row for row in rows if was_run(row)]
    unit, halves = columns.unit.name, ", both CFG halves" if computes_halves else ""
    speedup = " (the paper's speedup)" if paper else ""
    lines = [
        "Quality: value [95 % interval], delete-one-batch jackknife over",
        f"{_several(row['groups'] for row in run)} batches, {_several(row['samples'] for row in run)} samples per row,",
        f"CFG scale {guidance_scale:g}.",
        *marks,
        "MAE: mean absolute difference to the uncached run's images at equal noise, pixels cut off to [-1, 1].",
        *([FLOOR_TOLD] if columns.floored else []),
        f"{unit}: multiply-accumulates of the transformer per sample{halves}, all that a method",
        "computes; without overheads: less what it spends on deciding.",
        *(["The paper's TFLOPs are TMACs."] if paper else []),
        f"MAC ratio: uncached at the same NFE / this{speedup}.",
        "Latency: median (min–max) per batch; latency ratio: uncached at the same NFE / this.",
    ]
    if repeated := [row for row in run if "trainings" in row]:
        which = "; ".join(_listed((f"at {row['nfe']} steps", row["label"]) for row in repeated))
        lines.append(
            f"Trained {_several(row['trainings'] for row in repeated)} times {which}. These rows are means over the "
            "trainings, their intervals and marks cover other trainings as well as other samples, and their MACs are "
            "those of the first."
        )
    if columns.targets:
        lines.append(f"target {unit}: of the row that a row's knob was solved for; off target: by how much it missed.")
        solved = _listed((f"Matched to {row['target']}", row["label"]) for row in rows if row["target"])
        lines += [f"{matched}." for matched in solved]
    lines += [
        f"{' and '.join(same)} (NFE {nfe}) have equal plans: everything is computed and reused alike."
        for nfe, same in _equal_plans(run)
    ]
    lines += remarks(run)
    if latency:
        details = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in latency["protocol"].items())
        lines.append(f"Latency protocol: {details}.")
    in_later = {name for session in (latency or {}).get("later", ()) for name in session["rows"]}
    if later := [row["row"] for row in run if row["row"] in in_later and row["row"] not in (latency or {})["rows"]]:
        lines.append(
            f"Timed later, beside the uncached row again, to which their latency ratio is: {', '.join(later)}."
        )
    if untimed := [row["row"] for row in run if not timings_of(row["row"], row["reference"], latency)[0]]:
        lines.append(f"Not timed (`tcbench latency {suite_of(rows)}`): {', '.join(untimed)}.")
    if dashed:
        lines.append(f"{NO_CELL}: no such cell.")
    if differs and columns.floored:
        lines.append("FID and sFID of this suite and of the paper compare in ranking only, not in value.")
    return " ".join(lines)


def _listed(pairs: Iterable[tuple[str, str]]) -> list[str]:
    """For each heading of (heading, label), the heading and all labels under it, which may hold commas."""
    under: dict[str, dict[str, None]] = {}
    for heading, label in pairs:
        under.setdefault(heading, {})[label] = None
    return [f"{heading}: {'; '.join(labels)}" for heading, labels in under.items()]


def _several(values: Iterable[int]) -> str:
    """The distinct values, as "8" or "8 or 16"."""
    return " or ".join(map(str, sorted({*values})))


def _equal_plans(rows: Sequence[Row]) -> list[tuple[int, list[str]]]:
    """NFE and labels of rows whose plans coincide, as Learning-to-Cache's and FORA's do if a router opens nothing."""
    groups: dict[tuple[int, str], list[str]] = {}
    for row in rows:
        if plans := row["plans"]:
            groups.setdefault((row["nfe"], plans), []).append(name_of(row))
    return [(nfe, labels) for (nfe, _), labels in groups.items() if len(labels) > 1]
