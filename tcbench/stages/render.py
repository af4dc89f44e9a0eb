"""Tables, grids and figures from what the other stages wrote; imports no torch."""

import sys
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import numpy as np
from tqdm import tqdm

from tcbench.config.suite import Entry, Suite
from tcbench.errors import UserError
from tcbench.record.files import copy_file, is_whole, write_text
from tcbench.record.shards import read_manifest, read_shards, samples_digest
from tcbench.record.videos import from_mp4, kept_frames, unpacked
from tcbench.report.grids import grid, save_grid
from tcbench.report.names import figure_names, picture_of, reported_names
from tcbench.report.page import report_page
from tcbench.report.published_table import published_table
from tcbench.report.results import all_searched_rows, read_results, read_rows
from tcbench.report.rivals_table import read_rivals, rivals_table
from tcbench.report.rows import Row, is_reference, mac_ratio, quality_of
from tcbench.report.strips import read_strip, strip_path, write_clips, write_strip
from tcbench.report.suite_tables import ablation_tables, diagnostic_tables, main_tables, verdict_tables
from tcbench.report.table import Table, is_published

STEPS_SHOWN = 8
TILE, CLIP = 64, 128  # pixels that a decoded video's frames are reduced to in a strip, and where they play


def gathered(suite: Suite) -> Path:
    """The folder that a suite is rendered in, with the records that it is rendered from: of a preview some lie
    elsewhere and are copied, those of its rows alone."""
    folder = suite.shown_in
    if suite.preview:
        read = [(suite.root, f"trained/{name}/artefacts.json") for name in suite.trained_rows]
        read += [(suite.root, f"searched/{name}.json") for name in all_searched_rows(suite)]
        if suite.preview.partial:
            read += [(suite.folder, f"scores/{name}.json") for name in (*suite.rows, "floor", "seed-noise")]
            read += [(suite.folder, f"diagnostics/{name}.json") for name in suite.predictor_rows]
            read += [(suite.folder, "latency.json")]
        for source, name in read:
            if (source / name).exists():
                copy_file(source / name, folder / name)
            else:
                (folder / name).unlink(missing_ok=True)
    return folder


def _write(suite: Suite, tables: dict[str, Table], folder: Path, overwrite: bool) -> dict[str, Table]:
    for name, table in tables.items():
        table.write(folder / "tables", name, suite.suite, overwrite)
    return tables


def render_tables(suite: Suite, folder: Path, overwrite: bool = True) -> dict[str, Table]:
    """Write tables/table<N>.* below `folder`, from the scores and latency there."""
    return _write(
        suite, main_tables(read_results(suite, folder, ("latency", "floor", "seed_noise"))), folder, overwrite
    )


def render_diagnostics(suite: Suite, folder: Path, overwrite: bool = True) -> dict[str, Table]:
    """Write tables/local_error.* below `folder`, from the diagnostics there."""
    return _write(suite, diagnostic_tables(read_results(suite, folder, ("diagnostics",))), folder, overwrite)


def render_ablations(suite: Suite, folder: Path, overwrite: bool = True) -> dict[str, Table]:
    """Write tables/ablation-<name>.* below `folder`, from the ablations' scores there."""
    return _write(suite, ablation_tables(read_results(suite, folder, ("ablations", "seed_noise"))), folder, overwrite)


def render_rivals(suite: Suite, folder: Path, overwrite: bool = True) -> dict[str, Table]:
    """Write tables/rivals.* and tables/rivals-papers.* below `folder`, from the rivals' records and scores there.

    Raises:
        UserError: the suite compares no rivals, or they were not run.
    """
    rivals = read_rivals(suite, folder)
    if rivals is None:
        raise UserError(
            f"suite {suite.suite}: no rivals were run; `tcbench run {suite.suite} rivals` runs those it names"
        )
    tables = {"rivals": rivals_table(suite, rivals), "rivals-papers": published_table()}
    return _write(suite, tables, folder, overwrite)


def render_verdicts(suite: Suite, folder: Path, overwrite: bool = True) -> dict[str, Table]:
    """Write tables/verdicts.* below `folder`, from everything there."""
    return _write(suite, verdict_tables(read_results(suite, folder)), folder, overwrite)


def render_strips(suite: Suite, folder: Path, results: Path) -> None:
    """Write grids/strips/ below `folder` from the samples below `results`: first samples of every row, as they play
    where only some of their frames are kept, and of some rows their steps."""
    for entry in suite.entries:
        samples = results / "samples" / entry.name
        manifest = read_manifest(samples, entry.sample_settings)
        of = folder, suite.suite, entry.name, samples_digest(manifest)
        write_strip(*of, [_first_images(samples, suite.show.figure.columns)])
        if suite.decodes_videos:
            clips = _first_clips(samples, suite.show.figure.columns, suite.vbench.fps)
            write_clips(*of, clips, suite.vbench.fps)
        if suite.samples.traced and entry.shows_steps:
            shard = next(read_shards(samples, "np"))
            steps = np.linspace(0, len(manifest["timesteps"]) - 1, min(STEPS_SHOWN, len(manifest["timesteps"]))).round()
            shown = [shard[name][steps.astype(int), 0, 0] for name in ("x0", "xt")]
            if suite.decodes_videos:  # a frame of each: of more, nothing would be seen
                shown = [videos[:, videos.shape[1] // 2] for videos in shown]
            labels = [f"{manifest['timesteps'][int(step)]:g}" for step in steps]
            write_strip(*of, [_tiles(each) for each in shown], labels, shows="steps")


def render_grids(suite: Suite, folder: Path, overwrite: bool = True) -> None:
    """Write grids/nfe<N>.png for every NFE, all rows at equal noise, from the strips below `folder`.

    Args:
        overwrite: also those that are published.
    """
    for nfe in dict.fromkeys(row.nfe for row in suite.rows.values()):
        if not overwrite and is_published(folder / "grids" / f"nfe{nfe}.png"):
            continue
        entries = [entry for entry in suite.entries if entry.nfe == nfe]
        if not any(strip_path(folder, entry.name).exists() for entry in entries):
            print(f"grids/nfe{nfe}.png: not drawn: needs strips of samples", file=sys.stderr)
            continue
        rows = read_rows(folder, [entry.name for entry in entries], suite.suite)
        first = [read_strip(folder, row)[0][0] for row in rows]
        labels = [entry.label + _knob(entry, row) for entry, row in zip(entries, rows, strict=True)]
        if not any(table.paper for table in suite.show.tables.values()):  # a picture to be read by itself
            labels = [label + _numbers(row, rows) for label, row in zip(labels, rows, strict=True)]
        picture = f"nfe{nfe}"
        save_grid(grid(first, labels), folder / "grids" / f"{picture}.png", picture_of(suite.suite, picture))


def _knob(entry: Entry, row: Row) -> str:
    """The method's budget in words, where it is set, as sampled: it may have been searched."""
    knob, settings = entry.method.knob, row.get("settings", {})
    if not knob or not (value := settings.get(knob)):
        return ""
    return f" ({knob.removeprefix('num_').replace('_', ' ')} {f'{value:.3g}' if isinstance(value, float) else value})"


def _numbers(row: Row, rows: Sequence[Row]) -> str:
    """What a row costs and how far it is from the uncached one, in words."""
    quality, saved = quality_of(row, "mae"), mac_ratio(row, rows)
    told = [f"MAC ratio {saved:.2f}" if saved else "", f"MAE {quality['value']:.2g}" if quality else ""]
    return "".join(f", {words}" for words in told if words and not is_reference(row))


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
    stay; of a video [n, T, H, W] or [n, T, H, W, 3] up to `KEPT` frames side by side, colours reduced to `TILE`."""
    colours = images.dtype == np.uint8
    if images.ndim == (5 if colours else 4):
        images = _reduced(images, TILE) if colours else images
        images = np.concatenate([images[:, frame] for frame in kept_frames(images.shape[1])], axis=2)
    if colours:
        return images
    return ((images.clip(-1, 1) + 1) * 127.5).round().astype(np.uint8)


def _first_clips(folder: Path, count: int, rate: int) -> list[np.ndarray]:
    """The first `count` samples of a row of decoded videos, or all if there are fewer, with all frames [T, H, W, 3]."""
    files = (file for tensors in read_shards(folder, "np") for file in unpacked(tensors, rate))
    return [_reduced(from_mp4(file), CLIP) for file in islice(files, count)]


def _reduced(images: np.ndarray, side: int) -> np.ndarray:
    """Bytes [..., H, W, 3], averaged over squares of pixels so that no side is longer; what fills no square goes."""
    *lead, height, width, colours = images.shape
    square = -(-max(height, width) // side)
    high, wide = height // square, width // square
    squares = images[..., : high * square, : wide * square, :].reshape(*lead, high, square, wide, square, colours)
    return squares.mean((-4, -2)).round().astype(np.uint8)


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
            figure = draw(results, folder, name)
            if suite.preview:
                figure.text(0, 1, suite.preview.says, va="bottom", weight="bold")
            save(figure, folder / "figures", name, picture_of(suite.suite, name))
            drawn.append(folder / "figures" / f"{name}.png")
        except Missing as missing:
            tqdm.write(f"{name}: not drawn: needs {missing}", file=sys.stderr)
    return drawn


def render_report(suite: Suite, folder: Path) -> None:
    """Write report.html below `folder`: everything there, in one page; draws the figures that lack or are damaged, and
    those that it draws for itself."""
    lacking = [
        name
        for name in figure_names(suite)
        if not is_whole(folder / "figures" / f"{name}.svg", picture_of(suite.suite, name))
    ]
    if lacking := [*lacking, *reported_names(suite, folder)]:
        render_figures(suite, folder, lacking)
    write_text(folder / "report.html", report_page(suite, folder))
