"""Rates of the speed suites and of the embedded suites, from results/reference; `python -m tcbench.forecast.recorded`.

Forecasts read what this writes, because results do not ship with a wheel. To be run after results are published.
"""

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

from tcbench.config.document import Document
from tcbench.config.load import validated
from tcbench.config.speed import SpeedSuite
from tcbench.forecast.rates import RECORDED, Rate, precision_of
from tcbench.forecast.training import PASSES, parameters
from tcbench.record.files import PROVENANCE, write_json
from tcbench.record.records import PUBLISHED, RUN, SCORE, TRAINED
from tcbench.record.score import score_files

REFERENCE = Path("results") / "reference"
CARDS = {"NVIDIA H200": "h200", "NVIDIA H100 80GB HBM3": "h100", "NVIDIA A100-SXM4-80GB": "a100"}
"""What torch calls the cards."""


def recorded(folder: Path = REFERENCE) -> list[Rate]:
    """Every rate that the committed results say."""
    rates: list[Rate] = []
    for suite in sorted(path.parent for path in folder.glob(f"*/{PROVENANCE}")):
        if (suite / "runs").exists():
            settings = PUBLISHED.read(suite / PROVENANCE)["suite"]
            timed = validated(Document(suite / PROVENANCE, settings), SpeedSuite)
            rates += [rate for path in sorted((suite / "runs").glob("*.json")) for rate in _timed(path, timed)]
        if (suite / "scores").exists():
            rates += _embedded(suite)
    return rates


def _timed(path: Path, suite: SpeedSuite) -> Iterator[Rate]:
    """Of a part of a speed suite: by method, the median of its rows and the most memory that one took.

    Rows with a label of their own are another setting than what the method is known by.
    """
    run = RUN.read(path)
    card, settings = CARDS.get(run["machine"]["device"]), suite.models[run["model"]].rows
    if card is None:
        return
    of: dict[str, Any] = {"card": card, "model": suite.network(run["model"]), "dtype": precision_of(run["dtype"])}
    of |= {"batch": run["batch_size"], "kind": "measured", "source": path.as_posix(), "nfe": run["nfe"]}
    weights = (2 if of["dtype"] == "16 bit" else 4) * parameters(of["model"])
    speeds, peaks = defaultdict[str, list[float]](list), defaultdict[str, list[float]](list)
    for row, timed in run["rows"].items():
        if "macs" in timed and not settings[row].label:
            method = settings[row].method
            speeds[method].append(timed["macs"]["per_sample"] * run["batch_size"] / timed["median_s"])
            peaks[method].append((timed["peak_bytes"] - weights) / run["batch_size"])
    full = median(speeds["uncached"])
    for what in ("step", "uncached runs") if run.get("executed") == "plain" else ("step",):  # training's path is plain
        yield Rate(what=what, value=float(f"{full:.4g}"), unit="MACs/s", **of)
    for method in speeds:
        if method != "uncached":
            share = float(f"{median(speeds[method]) / full:.3g}")
            yield Rate(what="efficiency", value=share, unit="", method=method, **of)
        peak = float(f"{max(peaks[method]):.3g}")
        yield Rate(what="sample memory", value=peak, unit="bytes", method=method, **of)


def _embedded(folder: Path) -> Iterator[Rate]:
    """Of a suite that runs on a CPU: by row for a method, by stage for training."""
    scores = [SCORE.read(path) for path in score_files(folder)]
    model = scores[0]["model"]
    provenance: dict[str, Any] = {**scores[0]["provenance"]}
    if provenance["gpu"]:
        return
    of: dict[str, Any] = {"card": "cpu", "model": model, "dtype": "fp32", "kind": "measured"}
    of["source"] = folder.as_posix()
    by_method: dict[str, list[float]] = {}
    for score in scores:
        seconds = score["provenance"]["samples"]["wall_s"]
        by_method.setdefault(score["method"], []).append(score["macs"]["per_sample"] * score["samples"] / seconds)
    full = median(by_method["uncached"])
    yield Rate(what="step", value=float(f"{full:.4g}"), unit="MACs/s", **of)
    for method, rates in sorted(by_method.items()):
        if method != "uncached":
            yield Rate(what="efficiency", value=float(f"{median(rates) / full:.3g}"), unit="", method=method, **of)
    took = median(score["provenance"]["wall_s"] for score in scores)
    yield Rate(what="score", value=took, unit="s", **of)
    speeds: dict[tuple[Any, int], list[float]] = {}
    for path in sorted(folder.glob("trained/*/artefacts.json")):
        for stage in TRAINED.read(path)["stages"]:
            if stage["kind"] in PASSES:
                key = stage["kind"], stage["batch_size"]
                speeds.setdefault(key, []).append(stage["iterations"] / stage["wall_s"])
    for (kind, batch), found in speeds.items():
        yield Rate(what=kind, value=float(f"{median(found):.3g}"), unit="iterations/s", batch=batch, **of)


def main() -> None:
    """Write recorded.json."""
    write_json(RECORDED, {"rates": [rate.model_dump(exclude_defaults=True) for rate in recorded()]})


if __name__ == "__main__":
    main()
