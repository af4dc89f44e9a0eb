"""Figures of a suite: quality against cost, deviation per step (Fig. 10), gate statistics (Fig. 8)."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter
from PIL import Image

from tcbench.errors import UserError
from tcbench.metrics.catalogue import METRICS
from tcbench.record.files import sealed
from tcbench.report.rows import Row, interval_of, is_reference, mac_ratio, name_of, quality_of, was_run

Style = dict[str, Any]

# Okabe-Ito colours; markers and dashes differ too, so that lines stay apart in greyscale.
STYLES: dict[str, Style] = {
    "uncached": {"color": "#000000", "marker": "*", "linestyle": "-"},
    "fewer_steps": {"color": "#333333", "marker": "o", "linestyle": (0, (6, 2))},
    "tokencache": {"color": "#D55E00", "marker": "s", "linestyle": "-"},
    "toca": {"color": "#0072B2", "marker": "^", "linestyle": "--"},
    "fora": {"color": "#009E73", "marker": "D", "linestyle": "-."},
    "learning_to_cache": {"color": "#CC79A7", "marker": "v", "linestyle": (0, (5, 1))},
    "delta_dit": {"color": "#8C6D31", "marker": "<", "linestyle": (0, (3, 1, 1, 1))},
    "taylorseer": {"color": "#56B4E9", "marker": ">", "linestyle": (0, (7, 2))},
    "teacache": {"color": "#6A51A3", "marker": "p", "linestyle": (0, (1, 1))},
    "smoothcache": {"color": "#E69F00", "marker": "h", "linestyle": (0, (4, 2, 1, 2, 1, 2))},
    "tome": {"color": "#A50F15", "marker": "d", "linestyle": ":"},
    "random_tokens": {"color": "#7F7F7F", "marker": "X", "linestyle": (0, (2, 2))},
    "no_tokens": {"color": "#A6A6A6", "marker": "P", "linestyle": (0, (1, 2))},
}
# For a method without a style, and for further variants of one that has it. Colours and markers cycle at different
# lengths, so that twenty in a row differ and neighbours differ in both.
_COLORS = ("#882255", "#44AA99", "#999933", "#332288")
_MARKERS = ((4, 1, 0), (3, 1, 0), "H", (4, 1, 45), (3, 1, 180))  # stars of 4 and 3 points
_DASHES = ((0, (6, 1, 2, 1)), (0, (1, 3)), (0, (9, 3)), (0, (3, 3)), (0, (8, 1, 1, 1)))
FALLBACK: list[Style] = [
    {"color": _COLORS[i % 4], "marker": _MARKERS[i % 5], "linestyle": _DASHES[i % 5]} for i in range(20)
]
FRONTIERS = (("precision", "fid"), ("accuracy", "recall"), ("alignment", "fid"))
LOOK: dict[Any, Any] = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "svg.hashsalt": "tcbench",  # element ids would otherwise be random
    "svg.fonttype": "none",  # text stays text: smaller, searched and selected
}


def styles(rows: Sequence[Mapping[str, Any]]) -> dict[str, Style]:
    """A style per row id, the same in every figure drawn from the same suite.

    At each resolution and NFE the first label of a method takes the method's style; other labels (variants, unknown
    methods) take a fallback, one per label.
    """
    chosen: dict[str, Style] = {}
    first: dict[tuple[int, int, str], str] = {}
    fallback: dict[str, Style] = {}
    for row in rows:
        method, label = row["method"], row["label"]
        if method in STYLES and first.setdefault((row["resolution"], row["nfe"], method), label) == label:
            chosen[row["row"]] = STYLES[method]
        else:
            chosen[row["row"]] = fallback.setdefault(label, FALLBACK[len(fallback) % len(FALLBACK)])
    return chosen


def _legend(figure: Figure, handles: dict[str, Any]) -> None:
    columns = int(figure.get_figwidth() // 2.7)  # inches that a long label takes
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=columns)


@rc_context(LOOK)
def figure_quality(rows: Sequence[Row], floor: dict[str, Any] | None = None) -> Figure:
    """FID and MAE to the uncached images, with 95 % intervals, against MAC ratio; a column of panels per NFE.

    Points of one label at one NFE are joined in order of cost. Hollow markers are controls; the dotted line
    is the floor, the FID of a subset of the real images.

    Raises:
        UserError: no row has both a quality and a MAC count.
    """
    ratios = {row["row"]: ratio for row in rows if (ratio := mac_ratio(row, rows)) is not None}
    rows_run = [row for row in rows if row["row"] in ratios]
    settings = list(dict.fromkeys((row["resolution"], row["nfe"]) for row in rows_run))
    if not settings:
        raise UserError("no row of the suite was run, so there is no quality to draw; score at least one row")
    figure = Figure(figsize=(max(3.1 * len(settings), 4.5), 6.2), layout="constrained")
    panels = figure.subplots(2, len(settings), squeeze=False, sharex="col")
    handles: dict[str, Any] = {}
    style_of = styles(rows)
    for (resolution, nfe), (top, bottom) in zip(settings, panels.T, strict=True):
        here = [row for row in rows_run if (row["resolution"], row["nfe"]) == (resolution, nfe)]
        for panel, metric in ((top, "fid"), (bottom, "mae")):
            drawn = [row for row in here if metric in row["quality"] and not (metric == "mae" and is_reference(row))]
            for label in dict.fromkeys(row["label"] for row in drawn):
                points = sorted((row for row in drawn if row["label"] == label), key=lambda row: ratios[row["row"]])
                x = [ratios[row["row"]] for row in points]
                style = style_of[points[0]["row"]] | ({"markerfacecolor": "none"} if points[0]["control"] else {})
                handles[name_of(points[0])] = _with_intervals(panel, x, points, metric, style)
            panel.set_yscale("log")  # a broken variant must not flatten the differences between the others
            panel.yaxis.set(
                major_locator=LogLocator(subs=(1, 2, 5)),
                major_formatter="{x:g}",
                minor_formatter=NullFormatter(),
            )
        if floor and "fid" in floor:
            top.axhline(floor["fid"]["mean"], color="0.4", linestyle=":", linewidth=1)
            top.annotate(
                f"floor, {floor['fid']['n']} real images",
                (0.98, floor["fid"]["mean"]),
                xycoords=("axes fraction", "data"),
                xytext=(0, 2),
                textcoords="offset points",
                ha="right",
                fontsize=7,
                color="0.3",
            )
        top.set_title(f"{resolution}×{resolution}, NFE {nfe}", fontsize=10)
        bottom.set_xlabel("MAC ratio (uncached / this)")
    panels[0, 0].set_ylabel("FID (lower is better)")
    panels[1, 0].set_ylabel("MAE to uncached (data in [-1, 1])")
    _legend(figure, handles)
    return figure


@rc_context(LOOK)
def figure_trajectory(rows: Sequence[Row], resolution: int, nfe: int) -> Figure:
    """The paper's Fig. 10: per-step deviation from the uncached run, mean ± std over samples, of x0 and x_t.

    Hollow markers are controls.

    Raises:
        UserError: no row at this resolution and NFE holds a trajectory.
    """
    here = [row for row in rows if (row["resolution"], row["nfe"]) == (resolution, nfe) and was_run(row)]
    drawn = [row for row in here if row["trajectory"]]
    if not drawn:
        raise UserError(f"no row at resolution {resolution}, NFE {nfe} holds a trajectory; record one when sampling")
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    handles: dict[str, Any] = {}
    style_of = styles(rows)
    for panel, (key, title) in zip(
        figure.subplots(1, 2),
        (("x0", "visual space: predicted $x_0$"), ("xt", "trajectory space: $x_t$")),
        strict=True,
    ):
        for position, row in enumerate(drawn):
            path = row["trajectory"] or {}
            mean, std = np.array(path[f"{key}_mae_mean"]), np.array(path[f"{key}_mae_std"])
            style = style_of[row["row"]]
            (handles[name_of(row)],) = panel.plot(
                path["timesteps"],
                mean,
                **style,
                markerfacecolor="none" if row["control"] else None,
                markersize=5,
                linewidth=1.2,
                markevery=(0.02 * (position % 6), 0.12),  # staggered, or close lines hide each other's markers
            )
            panel.fill_between(path["timesteps"], mean - std, mean + std, color=style["color"], alpha=0.12, linewidth=0)
        panel.set(
            title=title,
            xlabel="timestep t (sampling runs left to right)",
            ylabel="MAE to uncached (data in [-1, 1])",
        )
        panel.set_ylim(bottom=0)
        panel.invert_xaxis()
    figure.suptitle(f"{resolution}×{resolution}, NFE {nfe}, mean ± standard deviation over samples", fontsize=10)
    _legend(figure, handles)
    return figure


@rc_context(LOOK)
def figure_cache_ratio(rows: Sequence[Row]) -> Figure:
    """The paper's Fig. 9(a): FID, sFID and distance to the uncached samples against the global cache ratio."""
    rows = sorted(rows, key=lambda row: row["settings"]["cache_ratio"])
    ratios = [row["settings"]["cache_ratio"] for row in rows]
    figure = Figure(figsize=(9.6, 3.2), layout="constrained")
    metrics = [metric for metric in ("fid", "sfid", "mae") if all(quality_of(row, metric) for row in rows)]
    for panel, metric in zip(figure.subplots(1, len(metrics), squeeze=False)[0], metrics, strict=True):
        _with_intervals(panel, ratios, rows, metric, STYLES["tokencache"])
        panel.set(xlabel="cache ratio r (share of tokens reused)", ylabel=METRICS[metric].axis)
    figure.suptitle(f"TokenCache, NFE {rows[0]['nfe']}, 95 % intervals", fontsize=10)
    return figure


@rc_context(LOOK)
def figure_guidance(rows: Sequence[Row]) -> Figure:
    """Frontiers over CFG scales: FID against precision and recall against accuracy, a line per method.

    A method that only shifts the effective guidance moves along the uncached model's line; one that is better or worse
    lies off it. Labels at the points are CFG scales.
    """
    figure = Figure(figsize=(9.6, 4.4), layout="constrained")
    handles: dict[str, Any] = {}
    style_of = styles(rows)
    lines: dict[str, list[Row]] = {}
    for row in rows:
        lines.setdefault(row["label"], []).append(row)
    shown = [pair for pair in FRONTIERS if all(quality_of(row, metric) for row in rows for metric in pair)]
    if not shown:
        raise UserError(f"the guidance sweep has none of the metrics {FRONTIERS}; score it with one of these pairs")
    for panel, (x, y) in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown, strict=True):
        for label, line in lines.items():
            line = sorted(line, key=lambda row: row["guidance_scale"])
            points = [(row["quality"][x]["value"], row["quality"][y]["value"]) for row in line]
            (handles[label],) = panel.plot(
                *zip(*points, strict=True), **style_of[line[0]["row"]], markersize=5, linewidth=1
            )
            for row, point in zip(line, points, strict=True):
                panel.annotate(f"{row['guidance_scale']:g}", point, (3, 3), textcoords="offset points", fontsize=6)
        panel.set(xlabel=METRICS[x].axis, ylabel=METRICS[y].axis)
    figure.suptitle(f"NFE {rows[0]['nfe']}, numbers: CFG scale", fontsize=10)
    _legend(figure, handles)
    return figure


def _with_intervals(panel: Any, x: Sequence[float], rows: Sequence[Row], metric: str, style: Style) -> Any:
    """A metric of rows at x, joined, every point with its interval."""
    intervals = [interval for row in rows if (interval := interval_of(row, metric))]
    y = np.array([[each.value, each.low, each.high] for each in intervals])
    return panel.errorbar(x, y[:, 0], yerr=np.abs(y[:, 1:] - y[:, :1]).T, **style, markersize=6, linewidth=1, capsize=2)


@rc_context(LOOK)
def figure_alpha(statistics: dict[str, Any], i_steps: Mapping[str, Sequence[int]]) -> Figure:
    """Statistics of TokenCache's gate alpha, a column of panels per NFE (the paper's Fig. 8).

    Args:
        statistics: `alpha_bar`: {nfe: [S]}, the mean gate per step; `per_block`: {nfe: [S, L]}, the mean per
            step and block; `histogram`: {nfe: {"edges": [E + 1], "counts": [E]}}, over all tokens, blocks and
            steps. Keys are NFEs as strings, as JSON has them.
        i_steps: {nfe: I-steps}, drawn as vertical lines.
    """
    nfes = list(statistics["alpha_bar"])
    figure = Figure(figsize=(max(3.1 * len(nfes), 4.5), 7), layout="constrained")
    panels = figure.subplots(3, len(nfes), squeeze=False)
    for nfe, (line, heat, bars) in zip(nfes, panels.T, strict=True):
        alpha_bar = np.array(statistics["alpha_bar"][nfe])
        line.plot(alpha_bar, color=STYLES["tokencache"]["color"], linewidth=1.4)
        for panel, color in ((line, "0.5"), (heat, "white")):
            for step in i_steps[nfe]:
                panel.axvline(step, color=color, linewidth=0.7, linestyle=":")
            panel.set_xlabel("step (sampling order; dotted: I-steps)", fontsize=8)
            panel.set_xlim(-0.5, len(alpha_bar) - 0.5)
            panel.xaxis.set_major_locator(MaxNLocator(integer=True))
        line.set(title=f"NFE {nfe}", ylim=(0, 1))
        image = heat.imshow(
            np.array(statistics["per_block"][nfe]).T,
            vmin=0,
            vmax=1,
            aspect="auto",
            origin="lower",
            cmap="viridis",
        )
        heat.grid(False)
        heat.yaxis.set_major_locator(MaxNLocator(integer=True))
        counts = np.array(statistics["histogram"][nfe]["counts"])
        bars.stairs(counts / counts.sum(), statistics["histogram"][nfe]["edges"], fill=True, color="0.6")
        bars.set(xlabel="gate α (1: recompute)", xlim=(0, 1))
    figure.colorbar(image, ax=panels[1], label="mean gate α")
    for panel, label in zip(panels[:, 0], ("mean gate α", "block", "share of gates"), strict=True):
        panel.set_ylabel(label)
    return figure


@rc_context(LOOK)
def save(figure: Figure, folder: Path, name: str, of: Mapping[str, str]) -> None:
    """Write `folder/name.png` (150 dpi, 256 colours) and `folder/name.svg`, which say what they are `of`; the same
    figure gives the same bytes."""
    pixels = io.BytesIO()
    figure.savefig(pixels, format="png", dpi=150)
    with sealed(Path(folder) / f"{name}.png", of) as temporary, Image.open(pixels) as picture:
        picture.convert("RGB").quantize(256).save(temporary, format="PNG", optimize=True)
    with sealed(Path(folder) / f"{name}.svg", of) as temporary:
        figure.savefig(temporary, format="svg", metadata={"Date": None, "Creator": "tcbench"})
