"""Figures of samples: the same noise through every method with differences (Figs. 5-7), and over steps (Fig. 11)."""

from collections.abc import Sequence

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tcbench.report.figures import LOOK


def _line(panel: Axes, tiles_NHW: np.ndarray, **keywords: object) -> None:
    panel.imshow(np.concatenate(list(tiles_NHW), axis=1), interpolation="nearest", **keywords)  # type: ignore[arg-type]
    panel.set(xticks=[], yticks=[])
    panel.grid(False)
    for spine in panel.spines.values():
        spine.set_visible(False)


@rc_context(LOOK)
def figure_samples(samples: Sequence[tuple[str, np.ndarray]], columns: int = 8) -> Figure:
    """Samples of every method from the same noise, and how far each lies from the uncached one.

    Args:
        samples: (label, uint8 [n, H, W] or [n, H, W, 3]) per row, the uncached row first.
        columns: samples shown.
    """
    reference = samples[0][1][:columns].astype(float)
    figure = Figure(figsize=(10, 0.58 * len(samples) + 0.6), layout="constrained")
    panels = figure.subplots(len(samples), 2, squeeze=False)
    for (label, tiles), (left, right) in zip(samples, panels, strict=True):
        _line(left, tiles[:columns], cmap="gray", vmin=0, vmax=255)
        left.set_ylabel(label, rotation=0, ha="right", va="center", fontsize=8)
        difference = np.abs(tiles[:columns].astype(float) - reference)
        _line(right, difference if difference.ndim == 3 else difference.mean(-1), cmap="gray_r", vmin=0, vmax=64)
    panels[0, 0].set_title("samples, same noise in a column", fontsize=9)
    panels[0, 1].set_title("|difference| to uncached (black: ≥ ¼ of the range)", fontsize=9)
    return figure


@rc_context(LOOK)
def figure_steps(steps: Sequence[tuple[str, list[np.ndarray]]], labels: Sequence[str]) -> Figure:
    """The paper's Fig. 11: predicted x0 and x_t of one sample over timesteps, a pair of lines per method.

    Args:
        steps: (label, [x0 tiles, x_t tiles]) per row.
        labels: of the columns, e.g. timesteps.
    """
    figure = Figure(figsize=(10, 1.15 * len(steps) * 2 + 0.4), layout="constrained")
    panels = figure.subplots(2 * len(steps), 1, squeeze=False)[:, 0]
    for number, (label, lines) in enumerate(steps):
        for panel, tiles, name in zip(panels[2 * number :], lines, ("predicted $x_0$", "$x_t$"), strict=False):
            _line(panel, tiles, cmap="gray", vmin=0, vmax=255)
            panel.set_ylabel(f"{label}\n{name}".replace(", ", ",\n"), rotation=0, ha="right", va="center", fontsize=8)
    width = steps[0][1][0].shape[2]
    panels[-1].set_xticks([(column + 0.5) * width for column in range(len(labels))], labels)
    panels[-1].set_xlabel("timestep t (sampling runs left to right)")
    return figure
