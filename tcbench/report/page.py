"""The report: one self-contained HTML page of a suite, opening from disk with no network.

Everything in it is a number, a picture or a command from the suite's results; pictures are data URIs, and the script
only sorts tables, filters verdicts and flips samples, so that without it the page still shows everything.
"""

import base64
import io
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image

from tcbench.config.suite import Suite
from tcbench.record.files import is_whole
from tcbench.report.beside import OURS, beside, in_order
from tcbench.report.claims import MECHANISM
from tcbench.report.evidence import evidence
from tcbench.report.findings import CONTROL, NOT_DECIDED, NOT_REPRODUCED, NOT_TESTED, REPRODUCED
from tcbench.report.names import PICTURES, REPORTED, Picture, figure_names, picture_of, reported_names
from tcbench.report.published_table import published_table
from tcbench.report.results import Results, read_results
from tcbench.report.rivals_table import read_rivals, rivals_table
from tcbench.report.rows import Row, label_of, uncached_first, was_run
from tcbench.report.searches_table import searches_table
from tcbench.report.strips import animated, read_strip, strip_path
from tcbench.report.suite_tables import all_tables
from tcbench.report.table import Table, template

PAPER = "https://arxiv.org/abs/2409.18523"
SYMBOLS = {REPRODUCED: "✓", NOT_REPRODUCED: "✗", NOT_DECIDED: "?", NOT_TESTED: "–"}
SYMBOLS |= {CONTROL[verdict]: symbol for verdict, symbol in SYMBOLS.items() if verdict != NOT_TESTED}


def report_page(suite: Suite, folder: Path) -> str:
    """The page of everything below a suite's folder; what is not there is said to be not run."""
    results = read_results(suite, folder)
    tables = all_tables(results)
    verdicts = tables.pop("verdicts")
    counts = {verdict: int((verdicts.tidy["verdict"] == verdict).sum()) for verdict in SYMBOLS}
    return template("report.html.j2").render(
        suite=suite,
        paper=PAPER,
        in_short=_in_short(results),
        verdicts=verdicts,
        tested=suite.about.stands_for is not None,
        counts=counts,
        by_kind=counts_by_kind(verdicts.tidy),
        symbols=SYMBOLS,
        tables=tables,
        rivals=_rivals(suite, folder),
        figures=[_figure(suite, folder, name, PICTURES[name]) for name in figure_names(suite)],
        reported={name: _figure(suite, folder, name, REPORTED[name]) for name in reported_names(suite, folder)},
        samples=_samples(results, folder),
        evidence=_evidence(results),
        searches=searches_table(results),
        provenance=_provenance(results),
        commands=_commands(suite),
        not_run=[ablation for ablation in suite.ablations if ablation not in results.ablations],
        zip=zip,
        numbers=itertools.count(1),
        next=next,
    )


STRIP_RATE = 4
"""Frames a second of a strip that plays."""


def counts_by_kind(verdicts: pd.DataFrame) -> dict[str, dict[str, int]]:
    """How often each verdict came out, of main claims and of mechanism claims; controls are left out."""
    counts: dict[str, dict[str, int]] = {}
    for kind, of_kind in (
        ("main", ~verdicts["topic"].isin(MECHANISM)),
        ("mechanism", verdicts["topic"].isin(MECHANISM)),
    ):
        said = verdicts["verdict"][of_kind]
        counts[kind] = {
            word: int((said == word).sum()) for word in (REPRODUCED, NOT_REPRODUCED, NOT_DECIDED, NOT_TESTED)
        }
    return counts


def _in_short(results: Results) -> list[str]:
    """What a reader should know first: who is nearest to the uncached samples at TokenCache's MACs."""
    it = beside(results)
    if it is None:
        return []
    at = f"At TokenCache's MACs ({it.ours['nfe']} steps, MAC ratio {it.ratio:.2f}, {it.ours['samples']} samples)"
    lines = [f"{at}, distance to the uncached samples, the nearest first: {in_order([*it.rivals, it.ours])}."]
    if it.selectors:
        lines.append(f"Other choices of tokens in its place, at the same MACs: {in_order([*it.selectors, it.ours])}.")
    return [line.replace("**", "") for line in lines]


def _uri(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def _png(pixels: np.ndarray) -> str:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG", optimize=True)
    return _uri(buffer.getvalue(), "png")


def _rivals(suite: Suite, folder: Path) -> dict[str, Table]:
    """The tables of rivals, of those that were run; empty if none was."""
    rivals = read_rivals(suite, folder, partial=True)
    return {"rivals": rivals_table(suite, rivals), "rivals-papers": published_table()} if rivals else {}


def _figure(suite: Suite, folder: Path, name: str, picture: Picture) -> dict[str, str]:
    """A figure; one that was not drawn, or is damaged, has no source."""
    path = folder / "figures" / f"{name}.svg"
    source = _uri(path.read_bytes(), "svg+xml") if is_whole(path, picture_of(suite.suite, name)) else ""
    kind = "lines" if picture.lines else "images"
    return {"name": name, "place": picture.place, "caption": picture.caption, "source": source, "kind": kind}


def _samples(results: Results, folder: Path) -> list[dict[str, Any]]:
    """By NFE, the strip of every row, its difference to the uncached one, and of videos what plays."""
    groups = []
    for nfe in dict.fromkeys(row["nfe"] for row in results.rows):
        rows = uncached_first([row for row in results.rows if row["nfe"] == nfe and was_run(row)])
        if not rows or not all(strip_path(folder, row["row"]).exists() for row in rows):
            continue
        tiles = [read_strip(folder, row)[0][0] for row in rows]
        wide = tiles[0].shape[2] / tiles[0].shape[1]  # a video's frames lie side by side
        frames = round(wide / results.suite.proportions)
        strips = [
            {
                "label": label_of(row),
                "image": _png(np.concatenate(list(own), axis=1)),
                "difference": _png(255 - np.concatenate(list(_difference(own, tiles[0])), axis=1)),
                "plays": _uri(_playing(folder, row, own, frames), "webp") if frames > 1 else "",
            }
            for row, own in zip(rows, tiles, strict=True)
        ]
        methods = [row["method"] for row in rows]
        first = methods.index(OURS) if OURS in methods else min(1, len(methods) - 1)
        group = {"nfe": nfe, "count": len(tiles[0]), "wide": wide, "narrow": wide / frames, "first": first}
        groups.append(group | {"rows": strips, "data": json.dumps(strips)})
    return groups


def _playing(folder: Path, row: Row, tiles: np.ndarray, frames: int) -> bytes:
    """A row's clips, or where there are none the frames of its strip one after the other, as a WebP."""
    if is_whole(clips := strip_path(folder, row["row"], "clips"), {"suite": row["suite"], "row": row["row"]}):
        return clips.read_bytes()
    wide = np.concatenate(list(tiles), axis=1).reshape(tiles.shape[1], len(tiles), frames, -1, *tiles.shape[3:])
    return animated(np.moveaxis(wide, 2, 0).reshape(frames, tiles.shape[1], -1, *tiles.shape[3:]), STRIP_RATE, True)


def _difference(tiles: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """|difference|, four times enlarged, as bytes."""
    return (4 * np.abs(tiles.astype(int) - reference)).clip(0, 255).astype(np.uint8)


def _evidence(results: Results) -> list[dict[str, Any]]:
    """The evidence with every row's plan as a picture."""
    methods = evidence(results)
    for row in (row for method in methods for row in method["rows"]):
        row["plan"] = "" if row["kept"] is None else _png(_shaded(row["kept"]))
    return methods


def _shaded(kept_SU: np.ndarray) -> np.ndarray:
    """Units upwards, steps to the right; dark is recomputed, light is reused."""
    return np.flipud((245 - 215 * kept_SU.T).round().astype(np.uint8))


def _provenance(results: Results) -> dict[str, str]:
    """Where the numbers come from: one value per field, or all there are."""
    records: list[Any] = [row["provenance"] for row in results.rows if was_run(row)]
    records += [record["samples"] for record in records if "samples" in record]

    def several(*keys: str) -> str:
        values = []
        for record in records:
            for key in keys:
                record = record.get(key) if isinstance(record, dict) else None
            values.append(str(record))
        return ", ".join(sorted(set(values))) or "unknown"

    packages = records[0].get("packages", {}) if records else {}
    weights = {f"{kind} {digest}" for record in records for kind, digest in record.get("weights", {}).items()}
    return {
        "commit": several("git", "commit"),
        "uncommitted changes": several("git", "dirty"),
        "config digest": several("config_digest"),
        "weights": ", ".join(sorted(weights)) or "not recorded",
        "seeds": several("seeds"),
        "packages": ", ".join(f"{name} {version}" for name, version in packages.items()),
        "python": several("python"),
        "platform": several("platform"),
        "processor": several("cpu", "model"),
        "gpu": several("gpu"),
        "sampling and scoring": f"{sum(record.get('wall_s', 0) for record in records):.0f} s in all",
        "finished": max((record.get("finished_utc", "") for record in records), default="unknown"),
    }


def _commands(suite: Suite) -> dict[str, str]:
    """How to make each piece again."""
    name = suite.suite
    first = next(iter(suite.rows))
    commands = {
        "everything": f"tcbench run {name} all",
        "tables": f"tcbench run {name} tables",
        "figures": f"tcbench run {name} figures",
        "ablations": f"tcbench run {name} ablations",
        "samples of one row": f"tcbench sample {name} --rows {first} && tcbench score {name} --rows {first}",
        "one figure": f"tcbench figures {name} fig1b_quality",
        "verdicts, from stored scores": f"tcbench verdicts {name}",
        "this page, from stored results": f"tcbench report {name}",
        "the committed results, without torch": f"tcbench report {name} --results results/reference/{name}",
    }
    if suite.trained_rows:
        commands["training of one row"] = f"tcbench train {name} --row {suite.trained_rows[0]}"
    return commands
