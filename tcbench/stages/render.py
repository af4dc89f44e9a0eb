"""Tables, grids and figures from what the other stages wrote; imports no torch."""

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from tcbench.config.suite import Entry, Suite
from tcbench.record.files import is_whole, write_text
from tcbench.record.records import SCORE
from tcbench.record.shards import read_manifest, read_shards
from tcbench.report.grids import grid, save_grid
from tcbench.report.names import figure_names
from tcbench.report.page import report_page
from tcbench.report.results import read_results
from tcbench.report.strips import read_strip, write_strip
from tcbench.report.suite_tables import ablation_tables, diagnostic_tables, main_tables
from tcbench.report.table import Table, is_published
from tcbench.report.verdicts import verdict_table

STEPS_SHOWN = 8
FRAMES = 5  # of a video in a picture


def _write(tables: dict[str, Table], folder: Path, overwrite: bool) -> dict[str, Table]:
    for name, table in tables.items():
        table.write(folder / "tables", name, overwrite)
    return tables


def render_tables(suite: Suite, folder: Path, overwrite: bool = True) -> dict[str, Table]:
    """Write tables/table<N>.* below `folder`, from the scores and latency there."""
    return _write(main_tables(read_results(suite, folder, ("latency", "floor"))), folder, overwrite)


def render_diagnostics(suite: Suite, folder: Path, overwrite: bool = True) -> dict[str, Table]:
    """Write tables/local_error.* below `folder`, from the diagnostics there."""
    return _write(diagnostic_tables(read_results(suite, folder, ("diagnostics",))), folder, overwrite)


def render_ablations(suite: Suite, folder: Path, overwrite: bool = True) -> dict[str, Table]:
    """Write tables/ablation-<name>.* below `folder`, from the ablations' scores there."""
    return _write(ablation_tables(read_results(suite, folder, ("ablations",))), folder, overwrite)


def render_verdicts(suite: Suite, folder: Path, overwrite: bool = True) -> dict[str, Table]:
    """Write tables/verdicts.* below `folder`, from everything there."""
    return _write({"verdicts": verdict_table(read_results(suite, folder))}, folder, overwrite)


def render_strips(suite: Suite, folder: Path) -> None:
    """Write grids/strips/ below `folder` from the samples: first samples of every row, and of some their steps."""
    for entry in suite.entries:
        strip = folder / "grids" / "strips" / f"{entry.name}.png"
        samples = folder / "samples" / entry.name
        write_strip(strip, [_first_images(samples, suite.show.figure.columns)])
        if suite.samples.traced and entry.shows_steps:
            manifest, shard = read_manifest(samples), next(read_shards(samples, "np"))
            steps = np.linspace(0, len(manifest["timesteps"]) - 1, min(STEPS_SHOWN, len(manifest["timesteps"]))).round()
            lines = [_tiles(shard[name][steps.astype(int), 0, 0]) for name in ("x0", "xt")]
            labels = [str(manifest["timesteps"][int(step)]) for step in steps]
            write_strip(strip.with_stem(f"{entry.name}-steps"), lines, labels)


def render_grids(suite: Suite, folder: Path, overwrite: bool = True) -> None:
    """Write grids/nfe<N>.png for every NFE, all rows at equal noise, from the strips below `folder`.

    Args:
        overwrite: also those that are published.
    """
    for nfe in dict.fromkeys(row.nfe for row in suite.rows.values()):
        if not overwrite and is_published(folder / "grids" / f"nfe{nfe}.png"):
            continue
        entries = [entry for entry in suite.entries if entry.nfe == nfe]
        first = [read_strip(folder / "grids" / "strips" / f"{entry.name}.png")[0][0] for entry in entries]
        labels = [entry.label + _knob(entry, folder) for entry in entries]
        save_grid(grid(first, labels), folder / "grids" / f"nfe{nfe}.png")


def _knob(entry: Entry, folder: Path) -> str:
    """The method's budget in words, where it is set, as sampled: it may have been searched."""
    knob, settings = entry.method.knob, SCORE.read(folder / "scores" / f"{entry.name}.json").get("settings", {})
    if not knob or not (value := settings.get(knob)):
        return ""
    return f" ({knob.removeprefix('num_').replace('_', ' ')} {f'{value:.3g}' if isinstance(value, float) else value})"


def _first_images(folder: Path, count: int) -> np.ndarray:
    """The first `count` samples of a row, or all if there are fewer, as tiles."""
    images = np.empty((0,))
    for tensors in read_shards(folder, "np"):
        shard = tensors["image"]
        shard = np.moveaxis(shard, 1, -1) if shard.shape[1] == 3 else shard[:, 0]
        images = np.concatenate([images, shard]) if len(images) else shard
        if len(images) >= count:
            break
    return _tiles(images[:count])


def _tiles(images: np.ndarray) -> np.ndarray:
    """Bytes of grey pixels [n, H, W] in [-1, 1], beyond which they are clipped, or of uint8 colours [n, H, W, 3], which
    stay; of a video [n, T, H, W] or [n, T, H, W, 3] up to `FRAMES`, evenly spaced and side by side."""
    colours = images.dtype == np.uint8
    if images.ndim == (5 if colours else 4):
        shown = np.linspace(0, images.shape[1] - 1, min(FRAMES, images.shape[1])).round().astype(int)
        images = np.concatenate([images[:, frame] for frame in shown], axis=2)
    if colours:
        return images
    return ((images.clip(-1, 1) + 1) * 127.5).round().astype(np.uint8)


def render_figures(suite: Suite, folder: Path, names: Sequence[str] = ()) -> list[Path]:
    """Write figures/<name>.png and .svg below `folder`, all of the suite's or those named; says which lack data.

    Returns:
        the .png files.
    """
    from tcbench.report.figures import save  # matplotlib, which tables and the report do without
    from tcbench.report.gallery import Missing, draw

    results, drawn = read_results(suite, folder), []
    for name in names or figure_names(suite):
        try:
            save(draw(results, folder, name), folder / "figures", name)
            drawn.append(folder / "figures" / f"{name}.png")
        except Missing as missing:
            tqdm.write(f"{name}: not drawn: needs {missing}", file=sys.stderr)
    return drawn


def render_report(suite: Suite, folder: Path) -> None:
    """Write report.html below `folder`: everything there, in one page; draws the figures that lack or are damaged."""
    lacking = [name for name in figure_names(suite) if not is_whole(folder / "figures" / f"{name}.svg")]
    if lacking:
        render_figures(suite, folder, lacking)
    write_text(folder / "report.html", report_page(suite, folder))
