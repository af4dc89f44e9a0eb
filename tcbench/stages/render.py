"""Tables, grids and figures from what the other stages wrote; imports no torch."""

from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from tcbench.config import Suite
from tcbench.files import read_json
from tcbench.report.ablations import table_ablation
from tcbench.report.figures import figure_alpha, figure_quality, figure_trajectory, save
from tcbench.report.grids import grid, save_grid
from tcbench.report.scores import read_results, read_rows
from tcbench.report.tables import table1, table2, table_local_error
from tcbench.report.verdicts import verdict_table


def render_tables(suite: Suite, folder: Path) -> None:
    """Write tables/ below `folder`, from the scores and latency there."""
    rows = read_rows(folder, list(suite.rows))
    latency, floor = read_json(folder / "latency.json"), read_json(folder / "scores" / "floor.json")
    stands_for = (suite.stands_for.name, suite.stands_for.resolution) if suite.stands_for else None
    tables = {
        "table2": table2(rows, latency, floor, differs=suite.differs, guidance_scale=suite.guidance.scale),
    }
    if suite.predictor_rows:
        tables["table1"] = table1(rows, differs=suite.differs, stands_for=stands_for)
    for name, table in tables.items():
        table.write(folder / "tables", name)


def render_diagnostics(suite: Suite, folder: Path) -> None:
    """Write tables/local_error.* below `folder`, from the diagnostics there."""
    diagnostics = [read_json(folder / "diagnostics" / f"{row}.json") for row in suite.predictor_rows]
    nfe = {row: suite.rows[row].nfe for row in suite.predictor_rows}
    table = table_local_error(diagnostics, nfe, suite=suite.suite, differs=suite.differs)
    table.write(folder / "tables", "local_error")


def render_ablations(suite: Suite, folder: Path) -> None:
    """Write tables/ablation-<name>.* below `folder`, from the ablations' scores there."""
    for name, variants in suite.ablation_suites.items():
        rows = read_rows(folder / "ablations" / name, variants.own)
        table = table_ablation(
            suite.ablations[name], rows, variants.variants, suite=suite.suite, differs=suite.differs
        )
        table.write(folder / "tables", f"ablation-{name}")


def render_verdicts(suite: Suite, folder: Path) -> None:
    """Write tables/verdicts.* below `folder`, from everything there."""
    verdict_table(read_results(suite, folder)).write(folder / "tables", "verdicts")


def render_grids(suite: Suite, folder: Path) -> None:
    """Write grids/nfe<N>.png for every NFE, all rows at equal noise, and grids/<row>.png for every row."""
    for nfe in dict.fromkeys(row.nfe for row in suite.rows.values()):
        rows = [name for name, row in suite.rows.items() if row.nfe == nfe]
        first = {row: _first_images(folder / "samples" / row, suite.figure.columns) for row in rows}
        labels = [(suite.rows[row].label or type(suite.method(row)).label) + _knob(suite, row) for row in rows]
        save_grid(grid(list(first.values()), labels), folder / "grids" / f"nfe{nfe}.png")
        for row, label in zip(rows, labels, strict=True):
            save_grid(
                grid([first[suite.reference(row)], first[row]], ["uncached", label]), folder / "grids" / f"{row}.png"
            )


def _knob(suite: Suite, row: str) -> str:
    """The method's budget in words, where it is set."""
    method = suite.method(row)
    if not method.knob or not (value := getattr(method, method.knob)):
        return ""
    return f" ({method.knob.removeprefix('num_').replace('_', ' ')} {value})"


def _first_images(folder: Path, count: int) -> np.ndarray:
    """The first `count` samples of a row, or all if there are fewer: uint8 [n, H, W]."""
    images = np.empty((0,))
    for name in read_json(folder / "row.json")["shards"]:
        shard = load_file(folder / name)["image"][:, 0]
        images = np.concatenate([images, shard]) if len(images) else shard
        if len(images) >= count:
            break
    return ((images[:count].clip(-1, 1) + 1) * 127.5).round().astype(np.uint8)


def render_figures(suite: Suite, folder: Path) -> None:
    """Write figures/ below `folder`: quality against MAC ratio, deviation per step, the predictor's scores."""
    rows = read_rows(folder, list(suite.rows))
    out = folder / "figures"
    save(figure_quality(rows, read_json(folder / "scores" / "floor.json")), out, "quality")
    resolution = rows[0]["resolution"]
    save(figure_trajectory(rows, resolution, suite.figure.nfe), out, "trajectory")
    if suite.predictor_rows:
        statistics: dict[str, dict[str, Any]] = {"alpha_bar": {}, "per_block": {}, "histogram": {}}
        i_steps = {}
        for name in suite.predictor_rows:
            nfe = str(suite.rows[name].nfe)
            scores = read_json(folder / "trained" / name / "artefacts.json")["scores"]
            for key in statistics:
                statistics[key][nfe] = scores[key]
            i_steps[nfe] = next(row["i_steps"] for row in rows if row["row"] == name)
        save(figure_alpha(statistics, i_steps), out, "alpha")
