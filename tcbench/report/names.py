"""Which figures a suite has, by name, and what they show: what the workflow promises, and captions for every reader.

Imports nothing heavy, because the workflow asks.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tcbench.config.suite import Suite


@dataclass(frozen=True)
class Picture:
    """One figure.

    Attributes:
        place: the paper's figure it stands beside, or empty.
        caption: what it shows and how to read it; also its alternative text.
        applies: whether a suite has it.
        lines: whether it is lines on white, which a dark page may turn over; pictures and shades stay as they are.
        below: the folder of a suite's results that it is drawn from, if it is one alone.
    """

    place: str
    caption: str
    applies: Callable[[Suite], bool]
    lines: bool = False
    below: str = ""


def picture_of(suite: str, name: str) -> dict[str, str]:
    """What a grid or a figure says it is of (`tcbench.record.files.sealed`)."""
    return {"suite": suite, "picture": name}


def _figure_row(suite: Suite) -> bool:
    return suite.show.figure.nfe in {suite.rows[row].nfe for row in suite.predictor_rows}


def _ratios(suite: Suite) -> dict[str, Any]:
    return suite.ablations["cache_ratio"].rows if "cache_ratio" in suite.ablations else {}


PICTURES: dict[str, Picture] = {
    "fig1b_quality": Picture(
        "Fig. 1(b)",
        "Quality against acceleration, a column per NFE: FID (top) and mean absolute difference to the uncached images "
        "(bottom) over the MAC ratio, every method with its 95 % interval; what costs the same stands side by side. "
        "Hollow markers are controls, half-filled ones variants of a method.",
        lambda suite: True,
        lines=True,
    ),
    "fig3_updates": Picture(
        "Fig. 3",
        "Token redundancy: size of every token's update over the steps of one uncached sample for three blocks (top), "
        "and cosine similarity of a block's updates at neighbouring steps (bottom).",
        _figure_row,
    ),
    "fig5_samples": Picture(
        "Figs. 5-7",
        "Samples of every method from the same noise, uncached first, and their absolute difference to uncached.",
        lambda suite: True,
    ),
    "fig8_predictor": Picture(
        "Fig. 8",
        "The Cache Predictor: (a) tokens recomputed in each block at r = 0.7, (b, c) distribution of its scores by "
        "block, (d) mean score of two batches over steps, (e) mean score of every block over steps.",
        _figure_row,
    ),
    "fig8e_scores": Picture(
        "Fig. 8(e)",
        "The predictor's scores at every NFE: mean over steps with the chosen I-steps (dotted), mean by block and "
        "step, and the distribution of all scores.",
        lambda suite: bool(suite.predictor_rows),
    ),
    "fig9a_cache_ratio": Picture(
        "Fig. 9(a)",
        "FID, sFID and distance to the uncached samples against the global cache ratio, with 95 % intervals.",
        lambda suite: len(_ratios(suite)) > 1,
        lines=True,
    ),
    "fig9b_allocation": Picture(
        "Fig. 9(b)",
        "Share of tokens recomputed in each block at each step at r = 0.7, read from the executed plan.",
        lambda suite: "r0.7" in _ratios(suite),
    ),
    "fig10_deviation": Picture(
        "Fig. 10",
        "Deviation from the uncached run at every step, mean and standard deviation over samples: predicted x0 (left) "
        "and x_t (right).",
        lambda suite: suite.samples.traced > 0,
        lines=True,
    ),
    "fig11_steps": Picture(
        "Fig. 11",
        "Predicted x0 and x_t of one sample over timesteps, uncached first, then every method.",
        lambda suite: suite.samples.traced > 0,
    ),
    "guidance": Picture(
        "",
        "Guidance control: every method over a sweep of CFG scales, FID against precision (left) and recall against "
        "accuracy (right). A method on the uncached line has only shifted the guidance.",
        lambda suite: "guidance" in suite.ablations,
        lines=True,
    ),
}


REPORTED: dict[str, Picture] = {
    "rivals_frontier": Picture(
        "",
        "Rivals: distance to the uncached samples over the MAC ratio, before it FID where there are samples enough; "
        "every method at the budgets that it reaches, with 95 % intervals; nearer to the lower right is better. The "
        "dotted line is the seed noise, what lies between two uncached runs of different noise; the dashed one is the "
        "uncached run.",
        lambda suite: suite.rivals is not None,
        lines=True,
        below="rivals",
    ),
    "searches": Picture(
        "",
        "Searches: after every trial the smallest distance to the uncached samples of the same calibration noise until "
        "then; points are trials. All rows may spend as many; a search of full steps begins with the row's own list.",
        lambda suite: True,
        lines=True,
        below="searched",
    ),
}
"""Figures that the report draws for itself, anew of as much as is there, and shows beside their tables. No target
promises them, because what they show is run by a target of its own, or in part."""


def reported_names(suite: Suite, folder: Path) -> list[str]:
    """Names of the figures that the report draws for itself, of what is below a suite's folder."""
    return [name for name, picture in REPORTED.items() if picture.applies(suite) and (folder / picture.below).exists()]


def figure_names(suite: Suite) -> list[str]:
    """Names of the suite's figures; those that stand beside one of the paper's begin with its number."""
    return [name for name, picture in PICTURES.items() if picture.applies(suite)]
