"""What scoring a row of 50 000 samples takes, metric by metric: seconds of what is shared by all subsets, and of these.

    python -m tests.score_times --out score-times.json         # on a GPU, in three minutes
    python -m tests.score_times --size toy                     # the same code on a CPU, in seconds

Features as large as Inception's, of 50 000 samples, as many uncached ones and 10 000 real images, are random numbers;
so are pairs of images, of which there are fewer. `tcbench/assets/forecast/rates.yaml` has the rates that are printed
last for what scoring does on a card.
"""

import argparse
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from tcbench.metrics.catalogue import EXTRACTORS, METRICS, ExtractorEntry, find_metric
from tcbench.metrics.extractors import Features
from tcbench.metrics.samples import Real, Reference, Samples
from tcbench.metrics.scoring import prepare
from tcbench.precision import products
from tcbench.record.files import write_json
from tcbench.record.provenance import collect
from tcbench.stats import batches, replicate

SIZES: dict[str, dict[str, int]] = {
    "full": {"samples": 50_000, "group": 2_000, "real": 10_000, "images": 2_048, "side": 256},
    "toy": {"samples": 40, "group": 10, "real": 20, "images": 40, "side": 16},
}
EXTRACTOR = {"full": "inception-v3-adm", "toy": "digits-cnn"}
OF_FEATURES = ("fid", "sfid", "kid", "is", "precision", "recall", "feature_mse", "fid_uncached")
OF_IMAGES = ("mae", "psnr", "ssim")


def random_features(count: int, network: ExtractorEntry, device: torch.device) -> Features:
    """Of so many images; not negative, as Inception's are."""
    sizes = (network.pooled, network.spatial, network.classes)
    return Features(*(torch.randn(count, size, device=device).relu() for size in sizes))


def sides(size: dict[str, int], network: ExtractorEntry, device: torch.device) -> tuple[Samples, Reference]:
    """A row without images, and what it is compared with."""
    torch.manual_seed(0)
    real = Real(random_features(size["real"], network, device))
    samples, uncached = (Samples(random_features(size["samples"], network, device)) for _ in range(2))
    return samples, Reference(real, uncached)


def with_images(size: dict[str, int], device: torch.device) -> tuple[Samples, Reference]:
    """Samples of which only images matter, bytes on the host."""
    count, side = size["images"], size["side"]
    rows = [
        Samples(
            Features.none(count).to(device), images=torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8)
        )
        for _ in range(2)
    ]
    return rows[0], Reference(Real(Features.none(0)), rows[1])


def timed(name: str, samples: Samples, reference: Reference, group: int) -> dict[str, Any]:
    """Seconds of a metric and its replicates, and the peak of the card."""
    on_card = samples.device.type == "cuda"
    if on_card:
        torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    statistic = prepare(find_metric(name), samples, reference)
    if on_card:
        torch.cuda.synchronize()
    shared = time.perf_counter() - started
    replicates = replicate(statistic, batches(len(samples), group))
    seconds = time.perf_counter() - started
    return {
        "metric": name,
        "samples": len(samples),
        "replicates": 1 + len(replicates.deleted),
        "shared_s": round(shared, 6),
        "replicates_s": round(seconds - shared, 6),
        "gpu_bytes": torch.cuda.max_memory_allocated() if on_card else 0,
    }


def rates(rows: list[dict[str, Any]], size: dict[str, int], network: ExtractorEntry) -> dict[str, float]:
    """As `tcbench.forecast` has them."""
    by_name = {row["metric"]: row for row in rows}
    samples, real, width = size["samples"], size["real"], network.pooled
    frechet = [row["shared_s"] + row["replicates_s"] for row in rows if METRICS[row["metric"]].moments == "pooled"]
    neighbours = by_name["precision"]["shared_s"] + by_name["recall"]["shared_s"]
    again = by_name["recall"]
    pixels = size["images"] * size["side"] ** 2
    return {
        "frechet, s": sum(frechet) / len(frechet) / by_name["fid"]["replicates"],
        "distances, MACs/s": samples * (samples + 2 * real) * width / neighbours,
        "kept, distances/s": samples * real * again["replicates"] / again["replicates_s"],
        "kernel, MACs/s": samples * (samples + real) * width / by_name["kid"]["shared_s"],
        "pairs, pixels/s": pixels * len(OF_IMAGES) / sum(by_name[name]["shared_s"] for name in OF_IMAGES),
    }


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Time everything; returns what was timed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="full")
    parser.add_argument("--out", type=Path, help="a JSON file")
    parsed = parser.parse_args(arguments)
    size, network, started = SIZES[parsed.size], EXTRACTORS[EXTRACTOR[parsed.size]], time.time()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with products("fp32"):
        samples, reference = sides(size, network, device)
        warm = torch.arange(min(64, len(samples)), device=device)
        few = replace(reference, uncached=reference.uncached and reference.uncached.taken(warm))
        for name in OF_FEATURES:  # libraries are loaded
            prepare(find_metric(name), samples.taken(warm), few)(warm.cpu().numpy())
        rows = [timed(name, samples, reference, size["group"]) for name in OF_FEATURES]
        images, uncached = with_images(size, device)
        rows += [timed(name, images, uncached, size["group"]) for name in OF_IMAGES]
    record = {"rows": rows, "rates": {name: float(f"{rate:.3g}") for name, rate in rates(rows, size, network).items()}}
    record["provenance"] = collect(size, [0], started)
    for row in rows:
        print(
            f"{row['metric']:14s}{row['shared_s']:9.3f} s {row['replicates_s']:9.3f} s {row['gpu_bytes'] / 1e9:6.1f} GB"
        )
    for name, rate in record["rates"].items():
        print(f"{name:20s} {rate:g}")
    if parsed.out:
        write_json(parsed.out, record)
    return record


if __name__ == "__main__":
    main()
