"""The figures of a suite by name, each drawn from stored results: what it shows, in a caption and for who cannot see it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from tcbench.report import figures, figures_predictor, figures_samples
from tcbench.report.names import figure_names
from tcbench.report.scores import Results, Row, name_of
from tcbench.report.strips import read_strip


class Missing(Exception):
    """A figure's data are not among the results; the text says what is needed."""


@dataclass(frozen=True)
class Picture:
    """One figure.

    Attributes:
        place: the paper's figure it stands beside, or empty.
        caption: what it shows and how to read it; also its alternative text.
        draw: from the results and their folder; raises `Missing`.
    """

    place: str
    caption: str
    draw: Callable[[Results, Path], Figure]


def _quality(results: Results, folder: Path) -> Figure:
    return figures.figure_quality(results.rows, results.floor)


def _deviation(results: Results, folder: Path) -> Figure:
    return figures.figure_trajectory(results.rows, results.rows[0]["resolution"], results.suite.figure.nfe)


def _scores(results: Results, folder: Path) -> Figure:
    statistics: dict[str, dict[str, Any]] = {"alpha_bar": {}, "per_block": {}, "histogram": {}}
    i_steps = {}
    for name, log in _needed(results.training, "a trained predictor").items():
        nfe = str(results.row(name)["nfe"])
        for key in statistics:
            statistics[key][nfe] = log["scores"][key]
        i_steps[nfe] = results.row(name)["i_steps"]
    return figures.figure_alpha(statistics, i_steps)


def _diagnosed(results: Results, key: str) -> tuple[str, dict[str, Any]]:
    """(row, its diagnostics' part) at the figures' NFE."""
    for row, log in results.diagnostics.items():
        if results.row(row)["nfe"] == results.suite.figure.nfe and key in log:
            return row, log[key]
    raise Missing(f"diagnostics with `{key}` (tcbench diagnose)")


def _updates(results: Results, folder: Path) -> Figure:
    row, updates = _diagnosed(results, "updates")
    return figures_predictor.figure_updates(updates, results.row(row)["nfe"])


def _predictor(results: Results, folder: Path) -> Figure:
    row, alpha = _diagnosed(results, "alpha")
    height, width = _diagnosed(results, "updates")[1]["grid"]
    nfe = results.row(row)["nfe"]
    return figures_predictor.figure_predictor(alpha, results.training[row]["scores"], nfe, height * width)


def _cache_ratio(results: Results, folder: Path) -> Figure:
    rows = _needed(results.ablations.get("cache_ratio"), "the ablation `cache_ratio`")
    return figures.figure_cache_ratio([row for row in rows if row["method"] == "tokencache"])


def _allocation(results: Results, folder: Path) -> Figure:
    return figures_predictor.figure_allocation(
        _needed(results.variant("cache_ratio", "r0.7"), "the ablation `cache_ratio`")
    )


def _guidance(results: Results, folder: Path) -> Figure:
    return figures.figure_guidance(_needed(results.ablations.get("guidance"), "the ablation `guidance`"))


def at_figure_nfe(results: Results) -> list[Row]:
    """Rows at the figures' NFE, the uncached one first."""
    rows = [row for row in results.rows if row["nfe"] == results.suite.figure.nfe and not row.get("not_run")]
    return sorted(rows, key=lambda row: row["method"] != "uncached")


def _samples(results: Results, folder: Path) -> Figure:
    strips = _strips(at_figure_nfe(results), folder, "{}.png")
    return figures_samples.figure_samples([(name_of(row), lines[0]) for row, lines, _ in strips])


def _steps(results: Results, folder: Path) -> Figure:
    rows = [row for row in at_figure_nfe(results) if not row["control"] and row["sampled_steps"] == row["nfe"]]
    strips = _strips(rows, folder, "{}-steps.png")
    return figures_samples.figure_steps([(name_of(row), lines) for row, lines, _ in strips], strips[0][2])


def _strips(rows: Sequence[Row], folder: Path, name: str) -> list[tuple[Row, list[np.ndarray], list[str]]]:
    paths = {row["row"]: folder / "grids" / "strips" / name.format(row["row"]) for row in rows}
    if absent := [path.name for path in paths.values() if not path.exists()]:
        raise Missing(f"strips of samples ({absent[0]})")
    return [(row, *read_strip(paths[row["row"]])) for row in rows]


def _needed(value: Any, what: str) -> Any:
    if not value:
        raise Missing(what)
    return value


PICTURES: dict[str, Picture] = {
    "fig1b_quality": Picture(
        "Fig. 1(b)",
        "Quality against acceleration, one column per NFE: FID (top) and mean absolute difference to the uncached images "
        "(bottom) over the MAC ratio, every method with its 95 % interval. Hollow markers are controls.",
        _quality,
    ),
    "fig3_updates": Picture(
        "Fig. 3",
        "Token redundancy: size of every token's update over the steps of one uncached sample for three blocks (top), and "
        "cosine similarity of a block's updates at neighbouring steps (bottom).",
        _updates,
    ),
    "fig5_samples": Picture(
        "Figs. 5-7",
        "Samples of every method from the same noise, uncached first, and their absolute difference to the uncached ones.",
        _samples,
    ),
    "fig8_predictor": Picture(
        "Fig. 8",
        "The Cache Predictor: (a) tokens recomputed in each block at r = 0.7, (b, c) distribution of its scores by block, "
        "(d) mean score of two batches over steps, (e) mean score of every block over steps.",
        _predictor,
    ),
    "fig8e_scores": Picture(
        "Fig. 8(e)",
        "The predictor's scores at every NFE: mean over steps with the chosen I-steps (dotted), mean by block and step, and "
        "the distribution of all scores.",
        _scores,
    ),
    "fig9a_cache_ratio": Picture(
        "Fig. 9(a)",
        "FID, sFID and distance to the uncached samples against the global cache ratio, with 95 % intervals.",
        _cache_ratio,
    ),
    "fig9b_allocation": Picture(
        "Fig. 9(b)",
        "Share of tokens recomputed in each block at each step at r = 0.7, read from the executed plan.",
        _allocation,
    ),
    "fig10_deviation": Picture(
        "Fig. 10",
        "Deviation from the uncached run at every step, mean and standard deviation over samples: predicted x0 (left) and "
        "x_t (right).",
        _deviation,
    ),
    "fig11_steps": Picture(
        "Fig. 11",
        "Predicted x0 and x_t of one sample over timesteps, uncached first, then every method.",
        _steps,
    ),
    "guidance": Picture(
        "",
        "Guidance control: every method over a sweep of CFG scales, FID against precision (left) and recall against "
        "accuracy (right). A method on the uncached line has only shifted the guidance.",
        _guidance,
    ),
}


def draw(results: Results, folder: Path, name: str) -> Figure:
    """A figure by name.

    Raises:
        Missing: its data are not among the results.
    """
    return PICTURES[name].draw(results, folder)


def available(results: Results) -> list[str]:
    """Names of the suite's figures, in order."""
    return figure_names(results.suite)
