"""Figures of a suite: quality against cost, deviation per step (Fig. 10), gate statistics (Fig. 8)."""

import io
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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
from tcbench.report.rows import (
    Row,
    interval_of,
    is_reference,
    mac_ratio,
    macs_of,
    name_of,
    quality_of,
    size_of,
    was_run,
)
from tcbench.stats import Interval

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
# Further methods that ship; colours repeat, but neither a marker nor a dash does.
_COLORS = ("#882255", "#44AA99", "#999933", "#332288", "#AA4499", "#117733", "#661100", "#6699CC")
_MARKERS = (*("H", "8", (5, 0, 180)), *((points, 1, turn) for points, turn in (
    *((3, 0), (3, 180), (4, 0), (4, 45), (5, 0), (5, 180)), *((6, 0), (6, 30), (7, 0), (8, 0), (3, 90), (3, 270)),
)))  # fmt: skip
"""Polygons and stars of 3 to 8 points."""
STYLES |= {
    method: {"color": _COLORS[i % 8], "marker": _MARKERS[i], "linestyle": (0, (2 + i, 1 + i % 3, 1, 1 + i % 2))}
    for i, method in enumerate(
        (
            *("toca_tokens", "oracle_tokens", "seacache", "easycache", "first_block", "dbcache", "magcache"),
            *("harmonica", "goc", "hicache", "duca", "procache", "speca", "clusca", "lazydit"),
        )
    )
}
FALLBACK: list[Style] = [
    {"color": color, "marker": marker, "linestyle": (0, (1 + i, 2))}
    for i, (color, marker) in enumerate(
        (color, marker)
        for color in ("#0B5563", "#B5651D", "#5D3FD3", "#7B8B00")
        for marker in ("o", "s", "^", "D", "v")
    )
]
"""For methods of users, one by the method's name: it is the same in every figure, whatever else is drawn."""
_VARIANTS: dict[str, Style] = {
    "": {},
    "matched": {"fillstyle": "bottom", "linestyle": (0, (8, 2))},
    "published": {"fillstyle": "left", "linestyle": (0, (1, 1))},
    "other": {"fillstyle": "top", "linestyle": (0, (4, 1, 1, 1, 1, 1))},
}
"""How variants of a method are told apart, by what their label says behind the method's name."""
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
    """A style per row id, by method and label alone: another row changes none.

    Colour and marker are the method's. Its variants differ in the dash and in which half of the marker is filled.
    """
    return {row["row"]: style_of(row["method"], row["label"]) for row in rows}


def style_of(method: str, label: str) -> Style:
    """The style of a method's label."""
    _, _, says = label.partition(",")
    words = says.replace("(", " ").split()
    variant = "" if not says else next((word for word in words if word in _VARIANTS), "other")
    own = STYLES.get(method) or FALLBACK[zlib.crc32(method.encode()) % len(FALLBACK)]
    return own | _VARIANTS[variant]


def _side_by_side(ratios: Mapping[str, float]) -> dict[str, float]:
    """By what each of some costs is multiplied so that bars of nearly equal ones stand beside each other."""
    groups: list[list[str]] = []
    for name in sorted(ratios, key=lambda name: ratios[name]):
        if groups and ratios[name] / ratios[groups[-1][0]] < 1.03:
            groups[-1].append(name)
        else:
            groups.append([name])
    places = {name: (i - (len(group) - 1) / 2, len(group)) for group in groups for i, name in enumerate(group)}
    return {name: 1 + 0.03 * place * 2 / max(size, 2) for name, (place, size) in places.items()}


def _legend(figure: Figure, handles: dict[str, Any]) -> None:
    columns = int(figure.get_figwidth() // 2.7)  # inches that a long label takes
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=columns)


@rc_context(LOOK)
def figure_quality(rows: Sequence[Row], floor: dict[str, Any] | None = None) -> Figure:
    """FID and MAE to the uncached images, with 95 % intervals, against MAC ratio; a column of panels per NFE. A suite
    without FID has its first metric in that place.

    Points of one label at one NFE are joined in order of cost; points of equal cost are set side by side, by up to 3 %
    of it. Hollow markers are controls; the dotted line is the floor, the FID of a subset of the real images. A bar with
    an arrow below reaches down to 0, which the logarithmic axis has not.

    Raises:
        UserError: no row has both a quality and a MAC count.
    """
    ratios = {row["row"]: ratio for row in rows if (ratio := mac_ratio(row, rows)) is not None}
    rows_run = [row for row in rows if row["row"] in ratios]
    settings = list(dict.fromkeys((row["resolution"], row["nfe"]) for row in rows_run))
    if not settings:
        raise UserError("no row of the suite was run, so there is no quality to draw; score at least one row")
    measured = dict.fromkeys(metric for row in rows_run for metric in row["quality"])
    metrics = [*(["fid"] if "fid" in measured else [name for name in measured if name != "mae"][:1]), "mae"]
    figure = Figure(figsize=(max(3.1 * len(settings), 4.5), 3.1 * len(metrics)), layout="constrained")
    panels = figure.subplots(len(metrics), len(settings), squeeze=False, sharex="col")
    handles: dict[str, Any] = {}
    look_of = styles(rows)
    for (resolution, nfe), column in zip(settings, panels.T, strict=True):
        here = [row for row in rows_run if (row["resolution"], row["nfe"]) == (resolution, nfe)]
        beside_others = _side_by_side({row["row"]: ratios[row["row"]] for row in here})
        for panel, metric in zip(column, metrics, strict=True):
            drawn = [row for row in here if metric in row["quality"] and not (metric == "mae" and is_reference(row))]
            for label in dict.fromkeys(row["label"] for row in drawn):
                points = sorted((row for row in drawn if row["label"] == label), key=lambda row: ratios[row["row"]])
                x = [ratios[row["row"]] * beside_others[row["row"]] for row in points]
                style = look_of[points[0]["row"]] | ({"markerfacecolor": "none"} if points[0]["control"] else {})
                handles[name_of(points[0])] = _with_intervals(panel, x, points, metric, style)
            if METRICS[metric].better == "higher" or METRICS[metric].bounds[0] < 0:
                continue
            panel.set_yscale("log")  # a broken variant must not flatten the differences between the others
            panel.yaxis.set(
                major_locator=LogLocator(subs=(1, 2, 5)),
                major_formatter="{x:g}",
                minor_formatter=NullFormatter(),
            )
        column[0].set_title("{}×{}, NFE {}".format(*size_of(here[0]), nfe), fontsize=10)
        column[-1].set_xlabel("MAC ratio (uncached / this)")
    if floor and "fid" in metrics and "fid" in floor:
        lines = [panel.axhline(floor["fid"]["mean"], color="0.4", linestyle=":", linewidth=1) for panel in panels[0]]
        handles[f"floor: {floor['fid']['n']} real images"] = lines[0]
    for panel, metric in zip(panels[:, 0], metrics, strict=True):
        panel.set_ylabel(f"{METRICS[metric].axis} ({METRICS[metric].better} is better)")
    panels[-1, 0].set_ylabel("MAE to uncached (data in [-1, 1])")
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
    look_of = styles(rows)
    for panel, (key, title) in zip(
        figure.subplots(1, 2),
        (("x0", "visual space: predicted $x_0$"), ("xt", "trajectory space: $x_t$")),
        strict=True,
    ):
        for position, row in enumerate(drawn):
            path = row["trajectory"] or {}
            mean, std = np.array(path[f"{key}_mae_mean"]), np.array(path[f"{key}_mae_std"])
            style = look_of[row["row"]]
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
    size = "{}×{}".format(*size_of(drawn[0]))
    figure.suptitle(f"{size}, NFE {nfe}, mean ± standard deviation over samples", fontsize=10)
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
    lies off it. The first and the last point of a line say their CFG scale.
    """
    figure = Figure(figsize=(9.6, 4.4), layout="constrained")
    handles: dict[str, Any] = {}
    look_of = styles(rows)
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
                *zip(*points, strict=True), **look_of[line[0]["row"]], markersize=5, linewidth=1
            )
            for row, point in {line[0]["row"]: (line[0], points[0]), line[-1]["row"]: (line[-1], points[-1])}.values():
                panel.annotate(
                    f"{row['guidance_scale']:g}",
                    point,
                    (4, 4),
                    textcoords="offset points",
                    fontsize=6,
                    color=look_of[line[0]["row"]]["color"],
                )
        panel.set(xlabel=METRICS[x].axis, ylabel=METRICS[y].axis)
    figure.suptitle(f"NFE {rows[0]['nfe']}, numbers: CFG scale of a line's ends", fontsize=10)
    _legend(figure, handles)
    return figure


BROKEN = 20
"""A panel ends at so many times the uncached run's value: what is beyond is not there to be compared."""


@rc_context(LOOK)
def figure_rivals(
    methods: Mapping[str, Sequence[Row]], uncached: Row, seed_noise: Interval | None, metrics: Sequence[str] = ("mae",)
) -> Figure:
    """Distance to the uncached samples against MAC ratio, a line per method through the budgets that it reaches.

    Args:
        methods: rows that have the metrics by contender, in the order of their cost.
        uncached: what the ratios are to; its own value of another metric than the distance is a dashed line.
        seed_noise: what lies between two uncached runs, a dotted line in the panel of the distance.
        metrics: a panel for each.
    """
    figure = Figure(figsize=(9.6 if len(metrics) == 1 else 12.8, 6.4), layout="constrained")
    handles = dict[str, Any]()
    for metric, panel in zip(metrics, figure.subplots(1, len(metrics), squeeze=False)[0], strict=True):
        for rows in methods.values():
            label, ratios = rows[0]["label"], [macs_of(uncached) / macs_of(row) for row in rows]
            handles[label] = _with_intervals(panel, ratios, rows, metric, style_of(rows[0]["method"], label))
        panel.set(xscale="log", yscale="log", xlabel="MAC ratio (uncached / this)", ylabel=METRICS[metric].axis)
        if metric == "mae" and seed_noise:
            handles["seed noise"] = panel.axhline(seed_noise.value, color="0.4", linestyle=":", linewidth=1)
        elif own := interval_of(uncached, metric):
            handles["uncached"] = panel.axhline(own.value, color="0.4", linestyle="--", linewidth=1)
            drawn = [(row["label"], row["quality"][metric]["value"]) for rows in methods.values() for row in rows]
            if beyond := dict.fromkeys(label for label, value in drawn if value > BROKEN * own.value):
                panel.set_ylim(min(value for _, value in drawn) / 1.5, BROKEN * own.value)
                panel.set_title(f"beyond {BROKEN} times uncached: {', '.join(beyond)}", fontsize=8)
        panel.xaxis.set(
            major_locator=LogLocator(subs=(1, 1.5, 2, 3, 4, 6)),
            major_formatter="{x:g}",
            minor_formatter=NullFormatter(),
        )
        panel.yaxis.set(
            major_locator=LogLocator(subs=(1, 2, 5)), major_formatter="{x:g}", minor_formatter=NullFormatter()
        )
    figure.suptitle(f"NFE {uncached['nfe']}, 95 % intervals", fontsize=10)
    _legend(figure, handles)
    return figure


@dataclass(frozen=True)
class Search:
    """The trials of a searched row, distances in their order."""

    label: str
    method: str
    nfe: int
    distances: Sequence[float]


@rc_context(LOOK)
def figure_searches(searches: Sequence[Search]) -> Figure:
    """The smallest distance to the uncached samples so far against trials, a panel per NFE.

    Faint points are trials; a marker on the line says that one was better than all before it.
    """
    nfes = list(dict.fromkeys(search.nfe for search in searches))
    figure = Figure(figsize=(max(3.1 * len(nfes), 4.5), 4.2), layout="constrained")
    handles: dict[str, Any] = {}
    for nfe, panel in zip(nfes, figure.subplots(1, len(nfes), squeeze=False)[0], strict=True):
        for search in (search for search in searches if search.nfe == nfe):
            style, trials = style_of(search.method, search.label), np.arange(1, len(search.distances) + 1)
            best = np.minimum.accumulate(search.distances)
            better = [0, *(np.flatnonzero(np.diff(best)) + 1).tolist()]
            marker, color = style["marker"], style["color"]
            panel.scatter(trials, search.distances, s=10, marker=marker, color=color, alpha=0.3, linewidth=0)
            (handles[search.label],) = panel.plot(
                trials, best, **style, drawstyle="steps-post", markersize=5, linewidth=1.2, markevery=better
            )
        panel.set(yscale="log", title=f"NFE {nfe}", xlabel="trial")
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
        panel.yaxis.set(
            major_locator=LogLocator(subs=(1, 2, 5)), major_formatter="{x:g}", minor_formatter=NullFormatter()
        )
        if panel is figure.axes[0]:
            panel.set_ylabel("MAE to uncached, calibration noise")
    _legend(figure, handles)
    return figure


def _with_intervals(panel: Any, x: Sequence[float], rows: Sequence[Row], metric: str, style: Style) -> Any:
    """A metric of rows at x, joined, every point with its interval."""
    intervals = [interval for row in rows if (interval := interval_of(row, metric))]
    y = np.array([[each.value, each.low, each.high] for each in intervals])
    for place, low in zip(x, y[:, 1], strict=True):
        if low <= 0:
            at_the_bottom = panel.get_xaxis_transform()
            panel.plot(
                place, 0.015, marker=7, markersize=4, color=style["color"], transform=at_the_bottom, clip_on=False
            )
    return panel.errorbar(
        x, y[:, 0], yerr=np.abs(y[:, 1:] - y[:, :1]).T, **style, markersize=6, linewidth=1, elinewidth=0.8, capsize=2.5
    )


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
    with sealed(Path(folder) / f"{name}.svg", of) as temporary:
        figure.savefig(temporary, format="svg", metadata={"Date": None, "Creator": "tcbench"})
    figure.set_layout_engine(None)  # it is laid out, which takes as long as drawing it; any other draws it once more
    pixels = io.BytesIO()
    figure.savefig(pixels, format="png", dpi=150)
    with sealed(Path(folder) / f"{name}.png", of) as temporary, Image.open(pixels) as picture:
        picture.convert("RGB").quantize(256).save(temporary, format="PNG", optimize=True)
