"""On a machine with two GPUs: are samples of two those of one, bit for bit, at what throughput? Ten minutes.

    python -m tests.two_gpus [FOLDER]

DiT-XL/2 and its autoencoder, with random weights, make two rows of 2400 images, once on one GPU and once in two parts,
by the commands that the workflow runs; `tcbench bench` times the same rows at the same batch and dtype. Printed, and
written to FOLDER/two-gpus.json: how many shards are equal, and samples a second of each job, from the shards after its
first three, in which kernels are compiled and steps captured; of one GPU beside what `bench` reports. With
TCBENCH_PRETEND_GPUS=2 the digits suite's model takes its place and nothing is timed, to try this script.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml

from tcbench.record.provenance import collect
from tcbench.rehearse.layouts import write_autoencoder
from tcbench.rehearse.sizes import FULL

ROOT = Path(__file__).parent.parent
BATCH, SHARDS, WARM = 100, 24, 3
ROWS = {
    "uncached": {"method": "uncached", "nfe": 50},
    "fora": {"method": "fora", "nfe": 50, "options": {"interval": 3}},
}


def config(autoencoder: Path) -> dict:
    """The suite that is sampled and decoded; nothing is scored."""
    pretended = bool(os.environ.get("TCBENCH_PRETEND_GPUS"))
    latents = {"kind": "sd", "folder": str(autoencoder), "scale": 0.18215, "dtype": "bf16"}
    real = {"name": "dit-xl-2-256", "weights": "random", "device": "cuda", "dtype": "bf16", "latents": latents}
    return {
        "suite": "two-gpus",
        "about": {"description": "random weights", "differs": "", "guidance_rule": "the paper's"},
        "model": {"name": "digits-dit"} if pretended else real,
        "data": {"name": "digits" if pretended else "imagenet"},
        "sampler": {"guidance_scale": 1.5},
        "samples": {"count": SHARDS * _batch(), "batch_size": _batch()},
        "scoring": {"metrics": ["mae"]},
        "show": {"figure": {"nfe": 50}, "tables": {"table2": {"title": "Table II", "metrics": ["mae"]}}},
        "jobs": "row",
        "rows": ROWS,
    }


def _batch() -> int:
    return 1 if os.environ.get("TCBENCH_PRETEND_GPUS") else BATCH


def speed_config() -> dict:
    """The same rows for `tcbench bench`."""
    return {
        "suite": "two-gpus-speed",
        "description": "what sampling is held against",
        "device": "cuda",
        "protocol": {"warmup": 1, "repeats": 3, "step_rounds": 1},
        "models": {
            "dit-xl-2-256": {
                "stands_for": {"name": "DiT-XL/2", "resolution": 256},
                "settings": [{"dtype": "bf16", "batch_size": BATCH}],
                "rows": {f"nfe50-{name}": row for name, row in ROWS.items()},
            }
        },
    }


def command_in(folder: Path, *arguments: str) -> subprocess.Popen:
    """A command of tcbench, started in that folder."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    command = [sys.executable, "-m", "tcbench", *arguments]
    return subprocess.Popen(command, cwd=folder, env={**os.environ, "PYTHONPATH": path})


def timed(folder: Path) -> dict[str, float]:
    """Samples a second by `tcbench bench`."""
    folder.mkdir(parents=True)
    (folder / "two-gpus-speed.yaml").write_text(yaml.safe_dump(speed_config(), sort_keys=False))
    assert command_in(folder, "bench", "--config", "two-gpus-speed.yaml").wait() == 0, "bench failed"
    (run,) = (folder / "results").rglob("runs/*.json")
    rows = json.loads(run.read_text())["rows"]
    return {name: BATCH / rows[f"nfe50-{name}"]["median_s"] for name in ROWS}


def sample(folder: Path, parts: int) -> dict:
    """Sample all rows, one after the other, in so many parts at once: (samples a second of every row, wall seconds)."""
    folder.mkdir(parents=True)
    (folder / "two-gpus.yaml").write_text(yaml.safe_dump(config(folder.parent / "autoencoder"), sort_keys=False))
    began = time.monotonic()
    jobs = [
        command_in(folder, "sample", "two-gpus.yaml", "--rows", *ROWS, "--part", f"{number}/{parts}")
        for number in range(1, parts + 1)
    ]
    assert all(job.wait() == 0 for job in jobs), "a job failed"
    wall = time.monotonic() - began
    rates = {}
    for row in ROWS:
        written = [path.stat().st_mtime_ns / 1e9 for path in sorted((folder / "results").rglob(f"{row}/shard-*"))]
        size = SHARDS // parts
        of_jobs = [written[start + WARM - 1 : start + size] for start in range(0, SHARDS, size)]
        rates[row] = sum(_batch() * (len(times) - 1) / (times[-1] - times[0]) for times in of_jobs)
    return {"samples_per_s": rates, "wall_s": wall}


def main(folder: Path) -> int:
    """Measure and print; 0 if every shard is equal."""
    began = time.time()
    if not os.environ.get("TCBENCH_PRETEND_GPUS"):
        write_autoencoder(folder / "autoencoder", FULL.autoencoder)
    one, two = sample(folder / "one", 1), sample(folder / "two", 2)
    shards = sorted(path.relative_to(folder / "one") for path in (folder / "one").rglob("shard-*"))
    equal = sum((folder / "one" / path).read_bytes() == (folder / "two" / path).read_bytes() for path in shards)
    ratio = {row: two["samples_per_s"][row] / one["samples_per_s"][row] for row in ROWS}
    found = {"shards": len(shards), "equal": equal, "throughput_ratio": ratio, "one": one, "two": two}
    if not os.environ.get("TCBENCH_PRETEND_GPUS"):
        found["bench_samples_per_s"] = bench = timed(folder / "bench")
        found["of_bench"] = {row: one["samples_per_s"][row] / bench[row] for row in ROWS}
    found["provenance"] = collect(config(folder / "autoencoder"), [0], began)
    (folder / "two-gpus.json").write_text(json.dumps(found, indent=1))
    print(json.dumps(found, indent=1))
    return int(equal != len(shards))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp(prefix="two-gpus-"))))
