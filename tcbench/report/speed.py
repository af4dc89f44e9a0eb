"""The speed suite's tables and figure: MACs saved against time saved."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import rc_context
from matplotlib.figure import Figure

from tcbench.config.speed import Part, SpeedSuite, parts
from tcbench.errors import UserError
from tcbench.record.records import PROFILE, RUN, Kind, Run
from tcbench.registry import method_class
from tcbench.report.cells import NO_CELL, Record, ratio
from tcbench.report.figures import LOOK, save, styles
from tcbench.report.names import picture_of
from tcbench.report.table import Table, is_published

PAPER_BATCH = 8  # the paper's latency is of batches of 8
HOST_READS = (
    "Host reads: numbers of a run that the host waits for because the method decides by them; where there are graphs, "
    "they cut its steps into several. What the method is told instead is drawn (tcbench/budget/untrained.py), because "
    "on random weights a threshold would not have the MACs of its budget. "
)
CACHE = "Cache memory: what the method keeps of a batch between steps, at the end of a run. "
UNCAPTURED = "Without graphs, because the host reads how many tokens each block computes: {}. "
HELD_UP = 1.3
"""A run that took so many times what its steps take one by one waited for something that is not the method's."""
WAS_HELD_UP = (
    "† The run took {:.1f} times what its steps take one by one: something else held it up, and no figure has it. "
)
EXECUTION = {
    "plain": ", by the model's own layers, without graphs",
    "compiled": ", by the model's own layers, compiled",
    "fused": "",
    None: "",
}


def render_speed(suite: SpeedSuite, folder: Path, overwrite: bool = True) -> dict[str, Table]:
    """Write tables/{speed,peers,profile}.* and figures/speed.* below `folder` from the timings there.

    Args:
        overwrite: also what is published.

    Returns:
        the tables by name; those of which nothing was timed are left out.

    Raises:
        UserError: nothing at all was timed.
    """
    lines, peers, profiles = read_lines(suite, folder), read_peers(folder), read_profiles(folder)
    tables = {"speed": speed_table(lines, suite, read_machines(folder))}
    if peers:
        tables["peers"] = peer_table(peers, suite)
    if profiles:
        tables["profile"] = profile_table(profiles, suite)
    for name, table in tables.items():
        commits = read_commits(folder / ("runs" if name == "speed" else name))
        tables[name] = replace(table, caption=f"{table.caption} {commits}")
        tables[name].write(folder / "tables", name, suite.suite, overwrite)
    if overwrite or not is_published(folder / "figures" / "speed.png"):
        save(figure_speed(lines), folder / "figures", "speed", picture_of(suite.suite, "speed"))
    return tables


def read_lines(suite: SpeedSuite, folder: Path) -> list[Record]:
    """One record per row and setting, in the config's order; what was not timed says why in `not_run`.

    A part that was not timed, and has no cell of the paper to show, is one record of its uncached row.
    """
    lines = []
    for part in parts(suite):
        model, path = suite.models[part.model], folder / "runs" / f"{part.name}.json"
        run = _read_run(path, part) if path.exists() else None
        timed, executed = (run["rows"], run.get("executed", "fused")) if run else ({}, None)
        command = f"tcbench bench --model {part.model} --dtype {part.dtype} --batch-size {part.batch_size}"
        why = f"needs {model.needs}" if model.needs else f"needs `{command} --nfe {part.nfe}`"
        rows = [row for row, settings in model.rows.items() if settings.nfe == part.nfe]
        if run is None and not any(model.rows[row].paper for row in rows):
            unrun = _line(suite, part, model.reference(part.nfe), {"not_run": why}, {})
            lines.append(unrun | {"label": f"all {len(rows)} rows", "executed": None})
            continue
        for row in rows:
            record = timed.get(row, {"not_run": why})
            lines.append(_line(suite, part, row, record, timed) | {"executed": executed})
    return lines


def _read_run(path: Path, part: Part) -> Run:
    """The timings of a part; those of another say so themselves."""
    run = RUN.read(path)
    for what in ("model", "dtype", "batch_size", "nfe"):
        if run[what] != getattr(part, what):  # type: ignore[literal-required]
            raise UserError(f"{path}: is of {what} {run[what]}, not {getattr(part, what)}; run `{RUN.command}`")  # type: ignore[literal-required]
    return run


def _line(suite: SpeedSuite, part: Any, row: str, record: Record, others: dict[str, Record]) -> Record:
    model = suite.models[part.model]
    settings, reference = model.rows[row], model.reference(part.nfe)
    paper, paper_reference = settings.paper, model.rows[reference].paper
    base = others.get(reference, {})
    macs, latency = record.get("macs", {}).get("per_sample"), record.get("median_s")
    kinds = record.get("steps", {})
    full, partial = kinds.get("full", {}), kinds.get("partial", {})
    mac_ratio = ratio(base.get("macs", {}).get("per_sample"), macs)
    latency_ratio = ratio(base.get("median_s"), latency)
    paper_latency = paper.latency_s if paper and part.batch_size == PAPER_BATCH else None
    paper_ratio = ratio(paper_reference.latency_s if paper_reference else None, paper_latency)
    paper_macs = paper.speedup if paper else None
    return {
        "model": part.model,
        "stands_for": model.stands_for.name,
        "resolution": model.stands_for.resolution,
        "dtype": part.dtype,
        "batch_size": part.batch_size,
        "nfe": part.nfe,
        "row": row,
        "method": settings.method,
        "label": settings.label or method_class(settings.method).label,
        "not_run": record.get("not_run"),
        "sampled_steps": record.get("sampled_steps"),
        "full_steps": full.get("count"),
        "host_reads": record.get("host_reads"),
        "captured": record.get("captured"),
        "macs_per_sample": macs,
        "macs_without_overheads": record.get("macs", {}).get("per_sample_without_overheads"),
        "mac_ratio": mac_ratio,
        "latency_s": latency,
        "latency_min_s": record.get("min_s"),
        "latency_max_s": record.get("max_s"),
        "latency_by_steps": ratio(latency, sum(record.get("step_s", ())) or None),
        "latency_per_image_s": ratio(latency, part.batch_size),
        "latency_ratio": latency_ratio,
        "efficiency": ratio(latency_ratio, mac_ratio),
        "full_step_s": full.get("median_s"),
        "partial_step_s": partial.get("median_s"),
        "partial_time_share": ratio(partial.get("median_s"), full.get("median_s")),
        "partial_mac_share": ratio(partial.get("macs"), full.get("macs")),
        "peak_bytes": record.get("peak_bytes"),
        "cache_bytes": record.get("cache_bytes"),
        "paper_tmacs": paper.tmacs if paper else None,
        "paper_mac_ratio": paper_macs,
        "paper_latency_s": paper_latency,
        "paper_latency_ratio": paper_ratio,
        "paper_efficiency": ratio(paper_ratio, paper_macs),
    }


def read_peers(folder: Path) -> list[Record]:
    """The records of all settings at which peers were timed."""
    return [dict(RUN.read(path)) for path in sorted((folder / "peers").glob("*.json"))]


def read_profiles(folder: Path) -> list[Record]:
    """The records of all profiled rows."""
    return [dict(PROFILE.read(path)) for path in sorted((folder / "profile").glob("*.json"))]


def read_machines(folder: Path) -> list[str]:
    """The machines that runs were timed on, in words."""
    machines = [RUN.read(path)["machine"] for path in sorted((folder / "runs").glob("*.json"))]
    return list(dict.fromkeys(", ".join(f"{key} {value}" for key, value in machine.items()) for machine in machines))


def read_commits(folder: Path) -> str:
    """The commits at which a folder's parts were timed, in words: a part is compared with itself alone."""
    parts_of: dict[str, list[str]] = {}
    kind: Kind[Any] = PROFILE if folder.name == "profile" else RUN
    for path in sorted(folder.glob("*.json")):
        parts_of.setdefault(kind.read(path)["provenance"]["git"]["commit"][:8], []).append(path.stem)
    most, *others = sorted(parts_of, key=lambda commit: -len(parts_of[commit]))
    rest = "".join(f"; at {commit}: {', '.join(parts_of[commit])}" for commit in others)
    return f"Timed at commit {most}{rest}."


def _setting(record: Record) -> str:
    return f"{record['dtype']}, batch {record['batch_size']}"


def _setting_cells(record: Record) -> dict[str, str]:
    columns = {"Model": "model", "dtype": "dtype", "Batch": "batch_size", "NFE": "nfe"}
    return {column: str(record[field]) for column, field in columns.items()}


def _cell(value: float | None, form: str, scale: float = 1, absent: str = NO_CELL) -> str:
    return absent if value is None else format(value * scale, form)


def _seconds(record: Record, median: str = "latency_s", low: str = "latency_min_s", high: str = "latency_max_s") -> str:
    return f"{record[median]:.4g} ({record[low]:.4g}–{record[high]:.4g})"


def _uncaptured(lines: Sequence[Record]) -> str:
    """Which rows of compiled layers run without graphs, and why."""
    compiled = [line for line in lines if line["executed"] == "compiled" and not line["not_run"]]
    rows = dict.fromkeys(line["label"] for line in compiled if not line["captured"])
    return UNCAPTURED.format(", ".join(rows)) if rows else ""


def was_held_up(line: Record) -> bool:
    """Whether the run took much longer than its steps, timed one by one, do."""
    return (line["latency_by_steps"] or 0) > HELD_UP


def _held_up(lines: Sequence[Record]) -> str:
    most = max((line["latency_by_steps"] for line in lines if was_held_up(line)), default=None)
    return WAS_HELD_UP.format(most) if most else ""


def speed_table(lines: Sequence[Record], suite: SpeedSuite, machines: Sequence[str]) -> Table:
    """MACs, latency, their ratios and wall-clock efficiency of every row, the paper's numbers beside them.

    Args:
        lines: of `read_lines`.
        machines: of `read_machines`.

    Raises:
        UserError: no row was timed.
    """
    if all(line["not_run"] for line in lines):
        raise UserError(f"suite {suite.suite}: nothing was timed; run `tcbench bench` first")
    unit, scale = ("TMACs", 1e-12) if max(line["macs_per_sample"] or 0 for line in lines) >= 1e11 else ("MMACs", 1e-6)
    on_host = any(line["host_reads"] for line in lines)
    cached = any(line["cache_bytes"] is not None for line in lines)
    cells = []
    for line in lines:
        absent = "not run" if line["not_run"] else NO_CELL
        cells.append(
            {
                **_setting_cells(line),
                "Method": line["label"] + (f" (not run: {line['not_run']})" if line["not_run"] else ""),
                "Sampled steps": _cell(line["sampled_steps"], "d", 1, absent),
                "Full steps": _cell(line["full_steps"], "d", 1, absent),
                **({"Host reads": _cell(line["host_reads"], "d", 1, absent)} if on_host else {}),
                unit: _cell(line["macs_per_sample"], ".4g", scale, absent),
                "paper TMACs": _cell(line["paper_tmacs"], ".2f"),
                "MAC ratio": _cell(line["mac_ratio"], ".2f", 1, absent),
                "paper MAC ratio": _cell(line["paper_mac_ratio"], ".2f"),
                "Latency (s)": absent if line["latency_s"] is None else _seconds(line) + "†" * was_held_up(line),
                "Latency per image (s)": _cell(line["latency_per_image_s"], ".3g", 1, absent),
                "paper latency (s)": _cell(line["paper_latency_s"], ".2f"),
                "Latency ratio": _cell(line["latency_ratio"], ".2f", 1, absent),
                "paper latency ratio": _cell(line["paper_latency_ratio"], ".2f"),
                "Efficiency": _cell(line["efficiency"], ".2f", 1, absent),
                "paper efficiency": _cell(line["paper_efficiency"], ".2f"),
                "Full step (ms)": _cell(line["full_step_s"], ".3g", 1e3, absent),
                "P-step (ms)": _cell(line["partial_step_s"], ".3g", 1e3, absent),
                "P-step time share": _cell(line["partial_time_share"], ".1%", 1, absent),
                "P-step MAC share": _cell(line["partial_mac_share"], ".1%", 1, absent),
                "Peak memory (GiB)": _cell(line["peak_bytes"], ".2f", 2**-30, absent),
                **({"Cache memory (GiB)": _cell(line["cache_bytes"], ".3g", 2**-30, absent)} if cached else {}),
            }
        )
    paper = any(row.paper for model in suite.models.values() for row in model.rows.values())
    paper_latency = f"; the paper's is of a batch of {PAPER_BATCH} on its own GPU" if paper else ""
    paper_macs = "The paper's TFLOPs are TMACs. " if paper else ""
    if not paper:
        cells = [{column: cell for column, cell in row.items() if "paper" not in column} for row in cells]
    protocol = suite.protocol
    caption = (
        f"{unit}: multiply-accumulates of the transformer per sample, both CFG halves, all that a method computes. "
        f"{paper_macs}MAC ratio and latency ratio: uncached at the same NFE / this. "
        "Efficiency: latency ratio / MAC ratio; 1 means that time fell as far as MACs did. "
        f"Latency: median (min–max) of {protocol.repeats} runs of a batch from noise to latents, no decoder, "
        f"{protocol.warmup} warm-up, rows interleaved{paper_latency}. "
        "P-step: median of all steps that are not full, and its share of a full step. "
        "Peak memory: weights, and what preparing and running the row alone adds. "
        f"{CACHE if cached else ''}"
        "Weights are random and stand-ins take the place of trained parts (tcbench/budget/untrained.py), so token "
        "choices are those of the method without skill. "
        f"{HOST_READS if on_host else ''}"
        f"{_uncaptured(lines)}{_held_up(lines)}"
        f"Timed on: {'; '.join(machines)}. {NO_CELL}: no such cell."
    )
    return Table(
        title=f"Wall-clock time on suite `{suite.suite}` ({suite.description})",
        caption=caption,
        tidy=pd.DataFrame(lines).convert_dtypes(),
        formatted=pd.DataFrame(cells),
        groups=[
            f"{line['stands_for']} {line['resolution']}×{line['resolution']}, {_setting(line)}, NFE {line['nfe']}"
            + EXECUTION[line["executed"]]
            for line in lines
        ],
        text_columns=("Model", "dtype", "Method"),
    )


def peer_table(records: Sequence[Record], suite: SpeedSuite) -> Table:
    """Other implementations of the uncached model, and their own caching, beside ours.

    Args:
        records: of `read_peers`.
    """
    lines, cells = [], []
    for record in records:
        base: Record = record["rows"].get("tcbench", {})
        for name, row in record["rows"].items():
            latency, macs = row.get("median_s"), row.get("macs_per_sample")
            line = {key: record[key] for key in ("model", "dtype", "batch_size", "nfe")}
            line |= {
                "peer": name,
                "label": row["label"],
                "not_run": row.get("not_run"),
                "macs_per_sample": macs,
                "latency_s": latency,
                "latency_min_s": row.get("min_s"),
                "latency_max_s": row.get("max_s"),
                "step_s": ratio(latency, record["nfe"]),
                "mac_ratio": ratio(base.get("macs_per_sample"), macs),
                "latency_ratio": ratio(base.get("median_s"), latency),
                "peak_bytes": row.get("peak_bytes"),
            }
            lines.append(line)
            absent = "not run" if line["not_run"] else NO_CELL
            cells.append(
                {
                    **_setting_cells(line),
                    "Implementation": row["label"] + (f" (not run: {line['not_run']})" if line["not_run"] else ""),
                    "Latency (s)": absent if latency is None else _seconds(line),
                    "Mean step (ms)": _cell(line["step_s"], ".3g", 1e3, absent),
                    "GMACs": _cell(macs, ".5g", 1e-9, absent),
                    "MAC ratio": _cell(line["mac_ratio"], ".2f", 1, absent),
                    "Latency ratio": _cell(line["latency_ratio"], ".2f", 1, absent),
                    "Peak memory (GiB)": _cell(line["peak_bytes"], ".2f", 2**-30, absent),
                }
            )
    return Table(
        title=f"Peers on suite `{suite.suite}`",
        caption="The same weights, noise and sampler. Ratios: tcbench's uncached run / this, so above 1 is faster or "
        "cheaper than it. MACs of peers are half of what torch's FLOP counter sees, per sample. The floor's latency is "
        "that of the products alone. Data-dependent caches run on a fixed schedule, because on random weights their "
        f"thresholds mean nothing. {NO_CELL}: no such number.",
        tidy=pd.DataFrame(lines).convert_dtypes(),
        formatted=pd.DataFrame(cells),
        groups=[f"{line['model']}, {_setting(line)}, {line['nfe']} steps" for line in lines],
        text_columns=("Model", "dtype", "Implementation"),
    )


def profile_table(records: Sequence[Record], suite: SpeedSuite) -> Table:
    """Where the time of a full step and of a P-step goes, by class of kernel.

    Args:
        records: of `read_profiles`.
    """
    lines, cells, groups = [], [], []
    for record in records:
        for kind, step in record["steps"].items():
            classes = {name: dict(spent) for name, spent in step["classes"].items()}
            if step["span_s"] is not None:
                classes["gaps between kernels"] = {"time_s": step["span_s"] - step["busy_s"], "launches": None}
            whole = step["span_s"] or step["busy_s"]
            for name, spent in classes.items():
                line = {key: record[key] for key in ("model", "dtype", "batch_size", "nfe", "row")}
                line |= {"step": kind, "class": name, **spent, "share": spent["time_s"] / whole}
                lines.append(line)
                cells.append(
                    {
                        **_setting_cells(line),
                        "Step": f"{record['row']}, {kind} step {step['index']}",
                        "Kernels": name,
                        "Time (µs)": _cell(spent["time_s"], ".1f", 1e6),
                        "Share": _cell(line["share"], ".1%"),
                        "Launches": _cell(spent["launches"], "d"),
                    }
                )
                groups.append(f"{record['row']}, {record['model']}, {_setting(record)}: {kind} step {step['index']}")
    return Table(
        title=f"Where the time goes on suite `{suite.suite}`",
        caption="Kernel time of one step by class of kernel (torch.profiler); gaps: the step's span without a kernel. "
        "On a CPU: self time of operators, without a span. full: everything computed; partial: a P-step.",
        tidy=pd.DataFrame(lines).convert_dtypes(),
        formatted=pd.DataFrame(cells),
        groups=groups,
        text_columns=("Model", "dtype", "Step", "Kernels"),
    )


@rc_context(LOOK)
def figure_speed(lines: Sequence[Record]) -> Figure:
    """Latency ratio against MAC ratio; on the diagonal time falls as far as MACs do. Hollow: the paper's cells.

    One panel per model, dtype and batch size that was timed, without rows that were held up.

    Raises:
        UserError: nothing was timed.
    """
    timed = [
        line
        for line in lines
        if line["mac_ratio"] is not None and line["method"] != "uncached" and not was_held_up(line)
    ]
    if not timed:
        raise UserError("no row was timed beside an uncached one, so there is no ratio to draw; run `tcbench bench`")
    panels = list(dict.fromkeys((line["model"], line["dtype"], line["batch_size"]) for line in timed))
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(max(4.5, 3.4 * columns), 3.6 * rows + 0.6), layout="constrained")
    axes = np.atleast_1d(figure.subplots(rows, columns, squeeze=False).ravel())
    style_of = styles(list({line["row"]: line for line in timed}.values()))
    handles: dict[str, Any] = {}
    for panel, (model, dtype, batch_size) in zip(axes, panels, strict=False):
        key = (model, dtype, batch_size)
        here = [line for line in timed if (line["model"], line["dtype"], line["batch_size"]) == key]
        limit = 1.08 * max(max(line["mac_ratio"], line["latency_ratio"], line["paper_mac_ratio"] or 0) for line in here)
        panel.plot([0, limit], [0, limit], color="#999999", linewidth=0.8, zorder=0)
        for line in here:
            style = {name: value for name, value in style_of[line["row"]].items() if name != "linestyle"}
            (point,) = panel.plot(line["mac_ratio"], line["latency_ratio"], linestyle="none", **style)
            handles[line["label"]] = point
            if line["paper_latency_ratio"] is not None and line["paper_mac_ratio"] is not None:
                panel.plot(
                    line["paper_mac_ratio"],
                    line["paper_latency_ratio"],
                    linestyle="none",
                    markerfacecolor="none",
                    alpha=0.6,
                    **style,
                )
        panel.set(xlim=(0.9, limit), ylim=(min(0.9, *(line["latency_ratio"] for line in here)) - 0.05, limit))
        panel.set_title(f"{model}, {dtype}, batch {batch_size}")
        panel.set(xlabel="MAC ratio", ylabel="latency ratio")
    for panel in axes[len(panels) :]:
        panel.set_axis_off()
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=int(figure.get_figwidth() // 1.8))
    return figure
