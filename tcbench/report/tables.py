"""The paper's tables, our number and its interval beside the paper's number."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from tcbench.config.fields import PaperTable
from tcbench.config.suite import TABLE_2
from tcbench.errors import UserError
from tcbench.metrics.catalogue import METRICS, paper_headings
from tcbench.report.compare import Comparison, compare, decide_together
from tcbench.report.render import Table
from tcbench.report.scores import IDENTITY, Row, is_reference, mac_ratio, name_of, reference_of, target_macs

PAPER_QUALITY = paper_headings()
MAC_UNITS = (("TMACs", 1e12), ("GMACs", 1e9), ("MMACs", 1e6))

# Table I of the paper: (model, resolution, NFE) -> (#Full, beta).
PAPER_TABLE_1 = {
    ("DiT-XL/2", 256, 250): (50, -6000),
    ("DiT-XL/2", 256, 50): (12, -8000),
    ("DiT-XL/2", 256, 20): (9, -4000),
    ("DiT-XL/2", 256, 10): (6, -2000),
    ("DiT-XL/2", 512, 50): (21, -4000),
    ("DiT-XL/2", 512, 20): (10, -2000),
    ("Open-Sora-Plan", 256, 50): (18, -8000),
}

NO_CELL = "—"  # the paper, or the floor, has no such number
Record = dict[str, Any]
Marks = dict[tuple[str, str], Comparison]


def _decimals(number: float, significant: int) -> int:
    """Decimals that show `number` to so many significant digits; none for numbers too large to need any."""
    magnitude = math.floor(math.log10(abs(number))) if number else 0
    return max(0, significant - 1 - magnitude)


def interval_text(value: float, low: float | None, high: float | None) -> str:
    """`value [low, high]`: half the interval to two significant digits (five decimals at most), the rest to match."""
    if low is None or high is None:
        return f"{value:.4g} (no interval)"
    half = (high - low) / 2
    decimals = min(5, _decimals(half, 2) if half > 0 else _decimals(value, 4))
    return f"{value:.{decimals}f} [{low:.{decimals}f}, {high:.{decimals}f}]"


def _suite(rows: Sequence[Row]) -> str:
    """The one suite all rows belong to."""
    suites = sorted({row["suite"] for row in rows})
    if len(suites) != 1:
        raise UserError(f"a table shows one suite, got rows of {suites or 'none'}; pass the rows of one suite")
    return suites[0]


def _title(name: str, suite: str, differs: str) -> str:
    return f"{name} on suite `{suite}`" + (f" ({differs})" if differs else "")


def _several(rows: Sequence[Mapping[str, Any]], field: str) -> str:
    """The distinct values of a field over the rows that were run, as "8" or "8 or 16"."""
    return " or ".join(str(value) for value in sorted({row[field] for row in rows if not row.get("not_run")}))


def _ratio(numerator: float | None, denominator: float | None) -> float | None:
    return None if numerator is None or denominator is None else numerator / denominator


def marks(comparisons: Sequence[Comparison | None]) -> dict[tuple[str, str], Comparison]:
    """By row and metric, the comparisons of a table, corrected together."""
    return {(found.row, found.metric): found for found in decide_together(comparisons)}


def marked(text: str, comparison: Comparison | None) -> str:
    """A cell with how it compares."""
    return f"{text} {comparison.outcome}" if comparison else text


def _record(
    row: Row,
    rows: Sequence[Row],
    metrics: Sequence[str],
    papers: Sequence[str],
    latency: dict[str, Any] | None,
    marks: Marks,
) -> Record:
    """One line of the CSV; None where there is no number. `papers`: the paper's columns of quality."""
    timings = latency["rows"] if latency else {}
    reference = reference_of(row, rows)
    timing, reference_timing = timings.get(row["row"], {}), timings.get(reference["row"], {})
    paper, reference_paper = row.get("paper") or {}, reference.get("paper") or {}
    macs = row.get("macs", {})

    every: dict[str, Any] = dict(row)
    record = {name: every[name] for name in IDENTITY}
    record |= {name: every.get(name) for name in ("not_run", "samples", "groups")}
    for metric in metrics:
        quality = every.get("quality", {}).get(metric, {})
        paired = (every.get("paired") or {}).get(metric, {})
        record |= {
            metric: quality.get("value"),
            f"{metric}_low": quality.get("low"),
            f"{metric}_high": quality.get("high"),
            f"{metric}_se": quality.get("se"),
            f"{metric}_difference": paired.get("difference"),
            f"{metric}_difference_low": paired.get("low"),
            f"{metric}_difference_high": paired.get("high"),
            f"{metric}_p_holm": mark.p if (mark := marks.get((row["row"], metric))) else None,
        }
        if reason := row.get("metrics_not_run", {}).get(metric):
            record[f"{metric}_not_run"] = reason
    record |= {f"paper_{metric}": paper.get(metric) for metric in papers}
    record |= {
        "macs_per_sample": macs.get("per_sample"),
        "macs_per_sample_low": min(every.get("macs_spread") or [None]),
        "macs_per_sample_high": max(every.get("macs_spread") or [None]),
        "macs_without_overheads": macs.get("per_sample_without_overheads"),
        "macs_paper_rule": macs.get("paper_rule"),
        "target": row.get("target"),
        "target_macs": (target := target_macs(row, rows)),
        "macs_over_target": _ratio(macs.get("per_sample"), target),
        "paper_tmacs": paper.get("tmacs"),
        "mac_ratio": mac_ratio(row, rows),
        "paper_mac_ratio": paper.get("speedup"),
        "latency_s": timing.get("median_s"),
        "latency_min_s": timing.get("min_s"),
        "latency_max_s": timing.get("max_s"),
        "paper_latency_s": paper.get("latency_s"),
        "latency_ratio": _ratio(reference_timing.get("median_s"), timing.get("median_s")),
        "paper_latency_ratio": _ratio(reference_paper.get("latency_s"), paper.get("latency_s")),
    }
    return record | {f"macs_{tag}": count for tag, count in macs.get("by_tag", {}).items()}


def _cells(
    record: Record,
    metrics: Sequence[str],
    papers: Sequence[str],
    unit: tuple[str, float],
    latency_column: str,
    targets: bool,
    marks: Marks,
) -> dict[str, str]:
    """One printed line. An empty cell says why; a row not run says it beside its name.

    `targets`: whether any row of the table has one.
    """

    def ours(number: float | None, form: str, why: str) -> str:
        if number is not None:
            return format(number, form)
        return "not run" if record["not_run"] else f"not run: {why}"

    def paper(key: str) -> str:
        return NO_CELL if record[f"paper_{key}"] is None else f"{record[f'paper_{key}']:.2f}"

    def quality(metric: str) -> str:
        if record[metric] is None:
            return ours(None, "", record.get(f"{metric}_not_run", "not scored"))
        text = interval_text(record[metric], record[f"{metric}_low"], record[f"{metric}_high"])
        return marked(text, marks.get((record["row"], metric)))

    def macs(key: str) -> str:
        return ours(_ratio(record[key], unit[1]), ".4g", "not counted")

    def latency() -> str:
        median = ours(record["latency_s"], ".3g", "not timed")
        spread = " ({latency_min_s:.3g}–{latency_max_s:.3g})"
        return median if record["latency_s"] is None else median + spread.format(**record)

    def target() -> dict[str, str]:
        columns = (f"target {unit[0]}", "off target")
        if record["target"] is None:
            return dict.fromkeys(columns, NO_CELL)
        off = record["macs_over_target"]
        return dict(zip(columns, (macs("target_macs"), ours(off and off - 1, "+.2%", "not counted")), strict=True))

    cells = {
        "Method": name_of(record) + (f" (not run: {record['not_run']})" if record["not_run"] else ""),
        "Resolution": str(record["resolution"]),
        "NFE": str(record["nfe"]),
        "Sampled steps": str(record["sampled_steps"]),
    }
    for metric in metrics:
        cells[METRICS[metric].label] = quality(metric)
        if metric in papers:
            cells[f"paper {PAPER_QUALITY[metric]}"] = paper(metric)
    cells |= {f"paper {PAPER_QUALITY[key]}": paper(key) for key in papers if key not in metrics}
    return cells | {
        "MAE to uncached": "reference" if is_reference(record) else quality("mae"),
        unit[0]: macs("macs_per_sample"),
        f"{unit[0]} without overheads": macs("macs_without_overheads"),
        **(target() if targets else {}),
        "paper TMACs": paper("tmacs"),
        "MAC ratio": ours(record["mac_ratio"], ".2f", "not counted"),
        "paper MAC ratio": paper("mac_ratio"),
        latency_column: latency(),
        "paper latency (s)": paper("latency_s"),
        "Latency ratio": ours(record["latency_ratio"], ".2f", "not timed"),
        "paper latency ratio": paper("latency_ratio"),
    }


def _equal_plans(rows: Sequence[Row]) -> list[tuple[int, list[str]]]:
    """NFE and labels of rows whose plans coincide, as Learning-to-Cache's and FORA's do if a router opens nothing."""
    groups: dict[tuple[int, str], list[str]] = {}
    for row in rows:
        if plans := row.get("plans"):
            groups.setdefault((row["nfe"], plans), []).append(name_of(row))
    return [(nfe, labels) for (nfe, _), labels in groups.items() if len(labels) > 1]


def _floor(suite: str, floor: dict[str, Any] | None, columns: Sequence[str]) -> tuple[Record, dict[str, str]]:
    """The floor's line: Frechet distance of real images to real images, mean ± std over random subsets."""
    cells = dict.fromkeys(columns, NO_CELL)
    if floor is None or "not_run" in floor:
        reason = floor["not_run"] if floor else "no floor was measured"
        label, numbers = f"Real subset, floor (not run: {reason})", {}
        cells |= {column: "not run" for column in ("FID", "sFID") if column in cells}
    else:
        label, numbers = f"Real subset of {floor['fid']['n']}, floor", {"samples": floor["fid"]["n"]}
        for metric, spread in floor.items():
            numbers |= {metric: spread["mean"], f"{metric}_se": spread["std"]}
            decimals = _decimals(spread["std"], 2)
            if (column := METRICS[metric].label) in cells:
                cells[column] = f"{spread['mean']:.{decimals}f} ± {spread['std']:.{decimals}f}"
    record = {"row": "floor", "suite": suite, "method": "floor", "label": label, **numbers}
    return record, cells | {"Method": label}


def _without_paper(line: Record) -> Record:
    """A line without the paper's columns, of the CSV or printed."""
    return {column: value for column, value in line.items() if not column.startswith(("paper ", "paper_"))}


def main_table(
    rows: Sequence[Row],
    latency: dict[str, Any] | None,
    floor: dict[str, Any] | None,
    *,
    differs: str,
    guidance_scale: float,
    table: PaperTable = TABLE_2,
) -> Table:
    """One of the paper's Tables II to VI: quality, MACs and latency of rows, grouped by resolution and NFE.

    MAC ratio and latency ratio are two columns, because the paper's "speedup" is a ratio of MACs. A quality
    cell ends in `≈` if its paired difference to the uncached run is not distinguishable from 0, else in
    `better` or `worse`.

    Args:
        rows: score rows in the suite's order (`scores.read_rows`).
        latency: content of `latency.json`, seconds per batch; None if nothing was timed.
        floor: content of `floor.json`; None if it was not measured.
        differs: how the suite differs from the paper's setting, e.g. "not the paper's model or data"; empty
            for the paper's own setting.
        guidance_scale: the CFG scale of all rows.
        table: its name, its columns of quality, and which of the rows it has.

    Raises:
        UserError: rows of several suites, or a reference row that is not among them.
    """
    suite = _suite(rows)
    by_name = {row["row"]: row for row in rows}
    every, rows = rows, [by_name[name] for name in table.rows or by_name]
    settings = list(dict.fromkeys((row["resolution"], row["nfe"]) for row in rows))
    rows.sort(key=lambda row: settings.index((row["resolution"], row["nfe"])))
    metrics = list(dict.fromkeys([*table.metrics, "mae", *(m for row in rows for m in row.get("quality", {}))]))
    cited = {*table.metrics, *(key for row in rows for key in row.get("paper") or {})}
    papers = [key for key in PAPER_QUALITY if key in cited]
    beside = [(row, reference_of(row, every)) for row in rows if not is_reference(row) and row.get("paired")]
    found = marks(
        [compare(row, other, metric) for row, other in beside for metric in table.metrics if metric in row["paired"]]
    )
    records = [_record(row, every, metrics, papers, latency, found) for row in rows]

    largest = max(record["macs_per_sample"] or 0 for record in records)
    unit = next((unit for unit in MAC_UNITS if largest >= unit[1]), MAC_UNITS[-1])
    protocol = latency["protocol"] if latency else None
    latency_column = f"Latency (s, batch {protocol['batch_size']})" if protocol else "Latency (s)"
    targets = any(record["target"] for record in records)
    cells = [_cells(record, table.metrics, papers, unit, latency_column, targets, found) for record in records]
    floor_record, floor_cells = _floor(suite, floor, list(cells[0]))

    if not table.paper:
        records, cells = ([_without_paper(line) for line in lines] for lines in (records, cells))
        floor_cells = _without_paper(floor_cells)

    caption = [
        "Quality: value [95 % interval], delete-one-batch jackknife over",
        f"{_several(rows, 'groups')} batches, {_several(rows, 'samples')} samples per row,",
        f"CFG scale {guidance_scale:g}.",
        "Marks compare with the uncached run at the same NFE, paired on noise and labels:",
        f"≈ not distinguishable at 5 %, else better or worse, corrected (Holm) for the {len(found)} comparisons of the",
        "table; no mark: not paired.",
        "MAE: mean absolute difference to the uncached run's images at equal noise, pixels in [-1, 1].",
        "Floor: Frechet distance of random real subsets to all real images, mean ± standard deviation.",
        f"{unit[0]}: multiply-accumulates of the transformer per sample, both CFG halves, all that a method",
        "computes; without overheads: less what it spends on deciding. The paper's TFLOPs are TMACs.",
        "MAC ratio: uncached at the same NFE / this (the paper's speedup).",
        "Latency: median (min–max) per batch; latency ratio: uncached at the same NFE / this.",
    ]
    if several := {row["trainings"] for row in rows if "trainings" in row}:
        times = " or ".join(map(str, sorted(several)))
        caption.append(
            f"What is trained was trained {times} times: such rows are means over the trainings, their intervals and "
            "marks cover other trainings as well as other samples, and their MACs are those of the first."
        )
    if targets:
        pairs = dict.fromkeys((record["label"], record["target"]) for record in records if record["target"])
        caption.append(
            f"target {unit[0]}: of the row that a row's knob was solved for; off target: by how much it missed. "
            "Matched: " + "; ".join(f"{label} to {target}" for label, target in pairs) + "."
        )
    caption += [
        f"{' and '.join(same)} (NFE {nfe}) have equal plans: everything is computed and reused alike."
        for nfe, same in _equal_plans(rows)
    ]
    caption += [f"{name_of(row)} (NFE {row['nfe']}): {mark}." for row in rows for mark in row.get("marks", ())]
    if protocol:
        details = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in protocol.items())
        caption.append(f"Latency protocol: {details}.")
    caption.append(f"{NO_CELL}: no such cell.")
    if differs:
        caption.append("FID and sFID of this suite and of the paper compare in ranking only, not in value.")

    return Table(
        title=_title(table.title, suite, differs),
        caption=" ".join(caption),
        tidy=pd.DataFrame([*records, floor_record]).convert_dtypes(),
        formatted=pd.DataFrame([*cells, floor_cells]),
        groups=[
            *(f"{row['resolution']}×{row['resolution']}, NFE {row['nfe']}" for row in rows),
            "Real images",
        ],
        text_columns=("Method",),
    )


def table1(rows: Sequence[Row], *, differs: str, stands_for: tuple[str, int] | None = None) -> Table:
    """The paper's Table I: full steps and beta per model, resolution and NFE, and the chosen I-steps.

    Args:
        rows: score rows; those scheduled by a `beta` setting enter, and rows that share a schedule once.
        differs: as in `main_table`.
        stands_for: (model, resolution) of the paper whose line is printed beside ours; None: the row's own.

    Raises:
        UserError: no row is scheduled by `beta`, or rows belong to several suites.
    """
    suite = _suite(rows)
    lines = {}
    for row in rows:
        settings = row.get("settings", {})
        if settings.get("beta") is None or settings.get("schedule", "adaptive") != "adaptive":
            continue
        model, resolution = stands_for or (row["model"], row["resolution"])
        paper_full, paper_beta = PAPER_TABLE_1.get((model, resolution, row["nfe"]), (None, None))
        record = {
            "suite": suite,
            "model": row["model"],
            "resolution": row["resolution"],
            "nfe": row["nfe"],
            "num_full_steps": settings["num_full_steps"],
            "paper_num_full_steps": paper_full,
            "beta": settings["beta"],
            "paper_beta": paper_beta,
            "i_steps": " ".join(str(step) for step in row["i_steps"]),
            "paper_model": model,
            "paper_resolution": resolution,
        }
        lines[tuple(record.values())] = (
            record,
            {
                "Model": record["model"],
                "Resolution": str(record["resolution"]),
                "NFE": str(record["nfe"]),
                "#Full": str(record["num_full_steps"]),
                "paper #Full": NO_CELL if paper_full is None else str(paper_full),
                "β": f"{record['beta']:g}",
                "paper β": NO_CELL if paper_beta is None else str(paper_beta),
                "I-steps": record["i_steps"],
                "paper setting": f"{model}, {resolution}×{resolution}",
            },
        )
    if not lines:
        raise UserError(f"suite {suite}: Table I needs a row with settings.beta; add a TokenCache row to the config")
    records, cells = zip(*lines.values(), strict=True)
    return Table(
        title=_title("Table I", suite, differs),
        caption="#Full: number of full sampling steps, the first included. β: the exponent of Eq. (13). "
        f"I-steps: the steps it chose, counted from 0 in sampling order. {NO_CELL}: the paper has no such line.",
        tidy=pd.DataFrame(records).convert_dtypes(),
        formatted=pd.DataFrame(cells),
        text_columns=("Model", "I-steps", "paper setting"),
    )


def table_local_error(diagnostics: Sequence[dict[str, Any]], nfe: dict[str, int], *, suite: str, differs: str) -> Table:
    """One-step local error of token selectors at equal budgets; no table of the paper, but what its claim rests on.

    Args:
        diagnostics: contents of `diagnostics/<row>.json`.
        nfe: NFE by row.
        suite, differs: as in `main_table`.
    """
    records, cells, groups = [], [], []
    for diagnostic in diagnostics:
        none = diagnostic["cases"][0]["error"]
        for case in diagnostic["cases"]:
            records.append(
                {
                    "suite": suite,
                    "row": diagnostic["row"],
                    "nfe": nfe[diagnostic["row"]],
                    **{key: case.get(key) for key in ("selector", "allocation", "keys", "cache_ratio")},
                    "error": case["error"],
                    "standard_error": case["standard_error"],
                    "error_over_none": case["error"] / none,
                }
            )
        groups += [f"NFE {nfe[diagnostic['row']]}, {diagnostic['pairs']} pairs"] * len(diagnostic["cases"])
    for record in records:
        digits = _decimals(record["standard_error"], 2)
        cells.append(
            {
                "Selector": record["selector"],
                "Tokens per block": record["allocation"] or NO_CELL,
                "Keys": record["keys"] or NO_CELL,
                "Cache ratio": NO_CELL if record["cache_ratio"] is None else f"{record['cache_ratio']:g}",
                "Error ± s.e.": f"{record['error']:.{digits}f} ± {record['standard_error']:.{digits}f}",
                "over recomputing none": f"{record['error_over_none']:.2f}",
            }
        )
    return Table(
        title=_title("One-step local error of token selection", suite, differs),
        caption="Squared error of the last block's output against the uncached one, summed over tokens and channels, "
        "mean over pairs of neighbouring sampling steps; the cache is one step old and refiners run without LoRA. "
        "Keys: what recomputed tokens attend to. Tokens per block: shared out by the scores of the batch (Eq. 12) or "
        "uniformly. The oracle ranks tokens by the squared change of their update.",
        tidy=pd.DataFrame(records).convert_dtypes(),
        formatted=pd.DataFrame(cells),
        groups=groups,
        text_columns=("Selector", "Tokens per block", "Keys"),
    )
