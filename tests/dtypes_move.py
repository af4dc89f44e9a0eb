"""What a dtype moves in samples and metrics, beside what another seed moves: the digits suite's model on one GPU.

    python -m tests.dtypes_move FOLDER               # on a GPU, minutes
    python -m tests.dtypes_move FOLDER --count 24    # on a CPU, hardly trained, to try the script

Rows are trained once, in float32, then sampled in every dtype and, in float32, with another seed. Printed, and written
to FOLDER/dtypes.json: for every row and setting, the mean absolute difference to the float32 samples of the same seed
or, of another seed, of the same index; which share of samples has a pixel that moved by more than 0.05, where
black is -1 and white 1; and the metrics.
"""

import argparse
import os
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from tcbench.config.load import load_suite
from tcbench.config.suite import Suite
from tcbench.record.files import write_json
from tcbench.record.provenance import collect
from tcbench.record.records import SCORE
from tcbench.record.shards import read_shards
from tcbench.stages.sample import sample_rows
from tcbench.stages.score import measure_floor, score_rows
from tcbench.stages.timing import machine
from tcbench.stages.train import train_row
from tests.suites import with_fields

DIGITS = Path(__file__).parent.parent / "config" / "digits.yaml"
ROWS = {
    "uncached": {"method": "uncached", "nfe": 20},
    "fora": {"method": "fora", "nfe": 20, "options": {"interval": 2}},
    "toca": {"method": "toca", "nfe": 20, "options": {"interval": 2, "fresh_ratio": 0.1}},
    "taylorseer": {"method": "taylorseer", "nfe": 20, "options": {"interval": 2, "order": 1}},
    "tokencache": {"method": "tokencache", "nfe": 20, "options": {"num_full_steps": 9, "beta": -4000}},
}
METRICS = ["fid", "sfid", "is", "precision", "recall", "mae"]
MOVED = 0.05


def settings(device: str) -> dict[str, dict[str, Any]]:
    """What differs from float32 and the first seed, by name; the first differs in nothing."""
    dtypes = ("tf32", "bf16", "fp16") if device == "cuda" else ("bf16", "fp16")
    changed = {dtype: {"model.dtype": dtype} for dtype in dtypes}
    return {"fp32": {}, **changed, "another seed": {"samples.seed": 1}, "a third seed": {"samples.seed": 2}}


def suite_in(folder: Path, changes: dict[str, Any], device: str, count: int) -> Suite:
    """The digits suite with these rows alone; the process moves to the folder, in which its results will be."""
    digits = yaml.safe_load(DIGITS.read_text())
    kept = {name: digits[name] for name in ("about", "data", "sampler", "training", "defaults")}
    base = kept | {
        "suite": "dtypes",
        "model": {"name": "digits-dit", "device": device, "dtype": "fp32"},
        "samples": {"count": count, "batch_size": min(count // 2, 100)},
        "scoring": {"extractor": "digits-cnn", "metrics": METRICS},
        "show": {"figure": {"nfe": 20}, "tables": {"table2": {"title": "Table II", "metrics": [*METRICS]}}},
        "rows": ROWS,
    }
    folder.mkdir(parents=True, exist_ok=True)
    os.chdir(folder)
    hurried = (
        {} if device == "cuda" else {f"defaults.tokencache.{kind}_iterations": 2 for kind in ("predictor", "refiner")}
    )
    config = with_fields(base, {"training.dtype": "fp32", **hurried, **changes})
    Path("dtypes.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    return load_suite("dtypes.yaml")


def images_of(suite: Suite, row: str) -> np.ndarray:
    """A row's images, of -1 to 1."""
    shards = read_shards(suite[row].samples, framework="np")
    return np.concatenate([shard["image"] for shard in shards])


def compared(images: np.ndarray, reference: np.ndarray) -> dict[str, float]:
    """Mean absolute difference of pixels, and the share of samples of which a pixel moved by more than `MOVED`."""
    difference = np.abs(images - reference)
    largest = difference.reshape(len(images), -1).max(axis=1)
    return {"mean_absolute": float(difference.mean()), "share_moved": float((largest > MOVED).mean())}


def main(folder: Path, count: int) -> None:
    """Train once; sample and score under every setting; compare with the first."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    found: dict[str, Any] = {"machine": machine(torch.device(device)), "samples": count, "rows": {}}
    found["provenance"] = collect({"rows": ROWS, "settings": settings(device)}, [0, 1, 2], time.time())
    first: dict[str, np.ndarray] = {}
    for name, changes in settings(device).items():
        suite = suite_in(folder / name.replace(" ", "-"), changes, device, count)
        if not first:
            trained = suite["tokencache"].trained.resolve()
            train_row(suite["tokencache"])
        else:
            shutil.copytree(trained, suite["tokencache"].trained)
        entries = [suite[row] for row in ROWS]
        sample_rows(entries)
        measure_floor(suite)
        score_rows(entries)
        for row, entry in zip(ROWS, entries, strict=True):
            images = images_of(suite, row)
            first.setdefault(row, images)
            metrics = {metric: quality["value"] for metric, quality in SCORE.read(entry.scores, row)["quality"].items()}
            found["rows"].setdefault(row, {})[name] = compared(images, first[row]) | metrics
            print(row, name, found["rows"][row][name], flush=True)
        write_json(folder / "dtypes.json", found)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--count", type=int, default=1000, help="samples a row")
    asked = parser.parse_args()
    main(asked.folder.resolve(), asked.count)
