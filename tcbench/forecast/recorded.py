"""Rates of the speed suite and of the embedded suites, from results/reference; `python -m tcbench.forecast.recorded`.

Forecasts read what this writes, because results do not ship with a wheel. To be run after results are published.
"""

from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

from tcbench.forecast.rates import RECORDED, Rate, precision_of
from tcbench.forecast.training import PASSES
from tcbench.record.files import PROVENANCE, write_json
from tcbench.record.records import RUN, SCORE, TRAINED
from tcbench.record.score import score_files

REFERENCE = Path("results") / "reference"
CARDS = {"NVIDIA H200": "h200", "NVIDIA H100 80GB HBM3": "h100", "NVIDIA A100-SXM4-80GB": "a100"}
"""What torch calls the cards."""


def recorded(folder: Path = REFERENCE) -> list[Rate]:
    """Every rate that the committed results say."""
    rates = [rate for path in sorted(folder.glob("speed/runs/*.json")) for rate in _timed(path)]
    for suite in sorted(path.parent for path in folder.glob(f"*/{PROVENANCE}")):
        if (suite / "scores").exists():
            rates += _embedded(suite)
    return rates


def _timed(path: Path) -> Iterator[Rate]:
    """Of a part of the speed suite."""
    run = RUN.read(path)
    card = CARDS.get(run["machine"]["device"])
    if card is None:
        return
    of: dict[str, Any] = {"card": card, "model": run["model"], "dtype": precision_of(run["dtype"])}
    of |= {"batch": run["batch_size"], "kind": "measured", "source": path.as_posix()}
    macs = {
        row: timed["macs"]["per_sample"] * run["batch_size"] for row, timed in run["rows"].items() if "macs" in timed
    }
    rates = {row: total / run["rows"][row]["median_s"] for row, total in macs.items()}
    full = rates[f"nfe{run['nfe']}-uncached"]
    yield Rate(what="step", value=float(f"{full:.4g}"), unit="MACs/s", nfe=run["nfe"], **of)
    for row, rate in rates.items():
        method = _METHODS[row.partition("-")[2].rstrip("0123456789")]
        if method != "uncached":
            share = float(f"{rate / full:.3g}")
            yield Rate(what="efficiency", value=share, unit="", method=method, nfe=run["nfe"], **of)
        peak = float(f"{run['rows'][row]['peak_bytes'] / run['batch_size']:.3g}")
        yield Rate(what="sample memory", value=peak, unit="bytes", method=method, nfe=run["nfe"], **of)


_METHODS = {
    "uncached": "uncached", "steps": "fewer_steps", "fora": "fora", "l2c": "learning_to_cache", "toca": "toca",
    "tokencache": "tokencache",
}  # fmt: skip
"""By how the rows of config/speed.yaml are called."""


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
