"""The figures of a suite by name (`tcbench.report.names`), each drawn from stored results."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from tcbench.report import figures, figures_predictor, figures_samples
from tcbench.report.results import Results
from tcbench.report.rivals_table import read_rivals
from tcbench.report.rows import Row, label_of, name_of, quality_of, uncached_first, was_run
from tcbench.report.strips import Shows, read_strip, strip_path
from tcbench.report.yardstick import interval


class Missing(Exception):
    """A figure's data are not among the results; the text says what is needed."""


def _with_refiners(results: Results) -> list[Row]:
    """The suite's rows but those without LoRA, which Table VI has."""
    return [row for row in results.rows if row["refiners"] is True]


def _quality(results: Results, folder: Path) -> Figure:
    return figures.figure_quality(_with_refiners(results), results.floor)


def _deviation(results: Results, folder: Path) -> Figure:
    rows = _with_refiners(results)
    return figures.figure_trajectory(rows, rows[0]["resolution"], results.suite.show.figure.nfe)


def _scores(results: Results, folder: Path) -> Figure:
    statistics: dict[str, dict[str, Any]] = {"alpha_bar": {}, "per_block": {}, "histogram": {}}
    i_steps = {}
    for name, log in _needed(results.predictors, "a trained predictor").items():
        nfe = str(results.row(name)["nfe"])
        for key in statistics:
            statistics[key][nfe] = log["scores"][key]
        i_steps[nfe] = results.row(name)["i_steps"]
    return figures.figure_alpha(statistics, i_steps)


def _diagnosed(results: Results, key: str) -> tuple[str, dict[str, Any]]:
    """(row, its diagnostics' part) at the figures' NFE."""
    for row, log in results.diagnostics.items():
        if results.row(row)["nfe"] == results.suite.show.figure.nfe and key in log:
            return row, log[key]
    raise Missing(f"diagnostics with `{key}` (tcbench diagnose {results.suite.suite} --row ROW)")


def _updates(results: Results, folder: Path) -> Figure:
    row, updates = _diagnosed(results, "updates")
    return figures_predictor.figure_updates(updates, results.row(row)["nfe"], results.row(row)["tokens"])


def _predictor(results: Results, folder: Path) -> Figure:
    row, alpha = _diagnosed(results, "alpha")
    nfe, tokens = results.row(row)["nfe"], results.row(row)["tokens"]
    return figures_predictor.figure_predictor(alpha, results.training[row]["scores"], nfe, tokens)


def _cache_ratio(results: Results, folder: Path) -> Figure:
    rows = _ablation(results, "cache_ratio")
    return figures.figure_cache_ratio([row for row in rows if row["method"] == "tokencache"])


def _allocation(results: Results, folder: Path) -> Figure:
    return figures_predictor.figure_allocation(
        _needed(results.variant("cache_ratio", "r0.7"), _told(results, "cache_ratio"))
    )


def _guidance(results: Results, folder: Path) -> Figure:
    return figures.figure_guidance(_ablation(results, "guidance"))


def _rivals(results: Results, folder: Path) -> Figure:
    suite = results.suite
    rivals = _needed(read_rivals(suite, folder, partial=True), f"rivals (tcbench run {suite.suite} rivals)")
    methods = {name: [row for row in rows if quality_of(row, "mae")] for name, rows in rivals.by_method.items()}
    drawn = _needed({name: rows for name, rows in methods.items() if rows}, "rivals that were scored in `mae`")
    metrics = ("fid", "mae") if rivals.tell_fid else ("mae",)
    return figures.figure_rivals(drawn, rivals.uncached, interval(rivals.yardstick, "mae"), metrics)


def _searches(results: Results, folder: Path) -> Figure:
    searches = _needed(results.searched, f"rows that are searched (tcbench search {results.suite.suite} --row ROW)")
    return figures.figure_searches(
        [
            figures.Search(entry.label, entry.row.method, entry.nfe, [trial["deviation"] for trial in search["trials"]])
            for entry, search in ((results.suite.find(name), search) for name, search in searches.items())
        ]
    )


def at_figure_nfe(results: Results) -> list[Row]:
    """Rows at the figures' NFE, the uncached one first."""
    nfe = results.suite.show.figure.nfe
    return uncached_first([row for row in _with_refiners(results) if row["nfe"] == nfe and was_run(row)])


def _samples(results: Results, folder: Path) -> Figure:
    strips = _strips(at_figure_nfe(results), folder)
    return figures_samples.figure_samples([(label_of(row), lines[0]) for row, lines, _ in strips])


def _steps(results: Results, folder: Path) -> Figure:
    rows = [row for row in at_figure_nfe(results) if results.suite[row["row"]].shows_steps]
    strips = _strips(rows, folder, "steps")
    return figures_samples.figure_steps([(name_of(row), lines) for row, lines, _ in strips], strips[0][2])


def _strips(
    rows: Sequence[Row], folder: Path, shows: Shows = "samples"
) -> list[tuple[Row, list[np.ndarray], list[str]]]:
    paths = [strip_path(folder, row["row"], shows) for row in rows]
    if absent := [path.name for path in paths if not path.exists()]:
        raise Missing(f"strips of samples ({absent[0]})")
    return [(row, *read_strip(folder, row, shows)) for row in rows]


def _ablation(results: Results, name: str) -> list[Row]:
    return _needed(results.ablations.get(name), _told(results, name))  # type: ignore[no-any-return]


def _told(results: Results, name: str) -> str:
    return f"the ablation `{name}` (tcbench ablate {results.suite.suite} --name {name})"


def _needed(value: Any, what: str) -> Any:
    if not value:
        raise Missing(what)
    return value


DRAW: dict[str, Callable[[Results, Path], Figure]] = {
    "fig1b_quality": _quality,
    "fig3_updates": _updates,
    "fig5_samples": _samples,
    "fig8_predictor": _predictor,
    "fig8e_scores": _scores,
    "fig9a_cache_ratio": _cache_ratio,
    "fig9b_allocation": _allocation,
    "fig10_deviation": _deviation,
    "fig11_steps": _steps,
    "guidance": _guidance,
    "rivals_frontier": _rivals,
    "searches": _searches,
}


def draw(results: Results, folder: Path, name: str) -> Figure:
    """A figure by name.

    Raises:
        Missing: its data are not among the results.
    """
    return DRAW[name](results, folder)
