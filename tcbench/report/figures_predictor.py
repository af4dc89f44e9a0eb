"""Figures of what caching rests on: token updates (Fig. 3), predicted scores (Fig. 8), tokens per block (Fig. 9b)."""

from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from tcbench.report.figures import LOOK
from tcbench.report.rows import Row, kept_shares

STEPS = "step (sampling order)"


def _heat(panel: Axes, values: np.ndarray, **keywords: Any) -> Any:
    """An image with whole numbers on both axes, light is low, so that it prints in grey."""
    image = panel.imshow(values, aspect="auto", interpolation="nearest", cmap="cividis", **keywords)
    panel.grid(False)
    for axis in (panel.xaxis, panel.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True))
    return image


def _by_block(panel: Axes, curves_SB: np.ndarray, **keywords: Any) -> None:
    """A curve per block, shaded from the first (dark) to the last; the ends are labelled."""
    from matplotlib import colormaps

    blocks = curves_SB.shape[1]
    for block in range(blocks):
        ends = block in (0, blocks - 1)
        panel.plot(
            keywords.get("x", np.arange(len(curves_SB))),
            curves_SB[:, block],
            color=colormaps["cividis"](0.9 * block / max(blocks - 1, 1)),
            linewidth=1.6 if ends else 0.9,
            linestyle="-" if block % 2 == 0 else "--",
            label=f"block {block}" if ends else None,
        )
    panel.legend(fontsize=7)
    panel.xaxis.set_major_locator(MaxNLocator(integer=True))


@rc_context(LOOK)
def figure_updates(updates: dict[str, Any], nfe: int, tokens: int) -> Figure:
    """The paper's Fig. 3: size of token updates over steps for some blocks, and their similarity from step to step.

    Args:
        updates: `updates` of a row's diagnostics.
        nfe: for the title.
        tokens: N; of many, sizes are of some, evenly spaced.
    """
    figure = Figure(figsize=(9.6, 6), layout="constrained")
    top, bottom = figure.subfigures(2, 1, squeeze=False)[:, 0]
    panels = top.subplots(1, len(updates["size"]), squeeze=False, sharey=True)[0]
    for panel, (block, size_SN) in zip(panels, updates["size"].items(), strict=True):
        image = _heat(panel, np.array(size_SN).T, extent=(-0.5, len(size_SN) - 0.5, tokens - 0.5, -0.5))
        panel.set(title=f"block {block}", xlabel=STEPS)
        top.colorbar(image, ax=panel, shrink=0.9)
    panels[0].set_ylabel("token (raster order)")
    top.suptitle(f"size of token updates |f|, one sample, uncached, NFE {nfe}", fontsize=10)
    left, right = bottom.subplots(1, 2)
    similarity_SL = np.array(updates["similarity"])
    steps = np.arange(1, len(similarity_SL) + 1)
    _by_block(left, similarity_SL, x=steps)
    left.set(xlabel=STEPS, ylabel="cosine similarity", title="updates at this step and the one before")
    image = _heat(
        right, similarity_SL.T, origin="lower", extent=(0.5, len(steps) + 0.5, -0.5, similarity_SL.shape[1] - 0.5)
    )
    right.set(xlabel=STEPS, ylabel="block")
    bottom.colorbar(image, ax=right, label="cosine similarity")
    return figure


@rc_context(LOOK)
def figure_predictor(alpha: dict[str, Any], scores: dict[str, Any], nfe: int, tokens: int) -> Figure:
    """The paper's Fig. 8 for one NFE: (a) tokens kept at r = .7, (b, c) scores per block, (d) batches, (e) blocks.

    Args:
        alpha: `alpha` of a row's diagnostics.
        scores: `scores` of its `artefacts.json`.
        nfe: for the title.
        tokens: N.
    """
    figure = Figure(figsize=(9.6, 8), layout="constrained")
    panels = figure.subplot_mosaic([["a", "b"], ["c", "d"], ["e", "e"]])
    kept_LN = np.zeros((len(alpha["kept_at_0.7"]["tokens"]), tokens))
    for block, index in enumerate(alpha["kept_at_0.7"]["tokens"]):
        kept_LN[block, index] = 1
    _heat(panels["a"], kept_LN, origin="lower", vmin=0, vmax=1)
    panels["a"].set(
        title=f"(a) tokens recomputed (bright) at r = 0.7, step {alpha['kept_at_0.7']['step']}",
        xlabel="token (raster order)",
        ylabel="block",
    )
    counts_LB = np.array(alpha["histogram_per_block"], dtype=float)
    share_LB = counts_LB / counts_LB.sum(1, keepdims=True)
    image = _heat(panels["b"], share_LB, origin="lower", extent=(0, 1, -0.5, len(share_LB) - 0.5))
    panels["b"].xaxis.set_major_locator(MaxNLocator(5))
    panels["b"].set(title="(b) distribution of scores in every block", xlabel="score α (1: recompute)", ylabel="block")
    figure.colorbar(image, ax=panels["b"], label="share of scores")
    edges = np.linspace(0, 1, share_LB.shape[1] + 1)
    for block, style in ((0, "-"), (len(share_LB) // 2, "--"), (len(share_LB) - 1, ":")):
        panels["c"].stairs(share_LB[block], edges, label=f"block {block}", linestyle=style, linewidth=1.5, color="0.1")
    panels["c"].set(title="(c) three blocks", xlabel="score α", ylabel="share of scores", yscale="log")
    panels["c"].legend(fontsize=7)
    for batch, (curve, style) in enumerate(zip(alpha["per_batch"], ("-", "--"), strict=True)):
        panels["d"].plot(curve, linestyle=style, color=("#D55E00", "0.2")[batch], label=f"batch {batch + 1}")
    panels["d"].set(title="(d) mean score of two batches", xlabel=STEPS, ylabel="mean score α", ylim=(0, 1))
    panels["d"].legend(fontsize=7)
    panels["d"].xaxis.set_major_locator(MaxNLocator(integer=True))
    _by_block(panels["e"], np.array(scores["per_block"]))
    panels["e"].set(title="(e) mean score of every block", xlabel=STEPS, ylabel="mean score α", ylim=(0, 1))
    figure.suptitle(f"Cache Predictor, NFE {nfe}", fontsize=10)
    return figure


@rc_context(LOOK)
def figure_allocation(row: Row) -> Figure:
    """The paper's Fig. 9(b): share of tokens that every block recomputes at every step, from the executed plan."""
    kept_SL = kept_shares(row)
    figure = Figure(figsize=(7.5, 3.4), layout="constrained")
    panel = figure.subplots()
    image = _heat(panel, kept_SL.T, origin="lower", vmin=0, vmax=1)
    panel.set(
        title=f"{row['label']}, NFE {row['nfe']}: tokens recomputed (bright columns: I-steps)",
        xlabel=STEPS,
        ylabel="block that may be cached",
    )
    figure.colorbar(image, label="share of tokens recomputed")
    return figure
