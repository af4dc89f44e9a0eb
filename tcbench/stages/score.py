"""Score a row's samples: quality with the jackknife's replicates, per-step deviations from the uncached row.

Products are of float32 numbers in full (`products("fp32")`), so that a score does not depend on the card.
"""

import hashlib
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from tcbench import stats
from tcbench.config.suite import Entry, Suite
from tcbench.data import to_uint8
from tcbench.data.images import list_images
from tcbench.errors import UserError
from tcbench.metrics.adm import read_moments, read_reference_images
from tcbench.metrics.catalogue import IMAGENET, METRICS, find_extractor
from tcbench.metrics.deviation import trajectory_mae
from tcbench.metrics.extractors import Extractor, Features, make_extractor
from tcbench.metrics.frechet import real_floor
from tcbench.metrics.images import Images
from tcbench.metrics.samples import Real, Samples, odd_images
from tcbench.metrics.scoring import score_row
from tcbench.metrics.seed_noise import seed_noise
from tcbench.precision import products
from tcbench.record.executed import PlanRecord
from tcbench.record.files import digest, kept_tensors, shortened, write_tensors
from tcbench.record.identity import content_digest
from tcbench.record.provenance import collect
from tcbench.record.records import FLOOR, SCORE, TRAINED, Manifest
from tcbench.record.score import Score, ScoreProvenance
from tcbench.record.shards import read_manifest, read_shards, samples_digest, shard_files
from tcbench.record.sources import source_digest
from tcbench.record.yardstick import SEED_NOISE, Yardstick
from tcbench.stages.images import device_of, image_side
from tcbench.stages.readings import Scorers, load_scorers, pair_scorers, read_samples

_DECODED = 256  # images decoded at a time


@products("fp32")
def score_rows(entries: Sequence[Entry], missing: bool = False) -> None:
    """Write results/<suite>/scores/<row>.json for the rows, from their samples and those of their uncached rows.

    Args:
        entries: rows of one suite or its ablations, which share extractor, scorers and real images.
        missing: keep scores that are there of the same samples, settings and code; their files count as new.
    """
    for entry in (scored := [entry for entry in entries if missing and _is_scored(entry)]):
        entry.scores.touch()  # or Snakemake would find it older than the samples of other rows
    if not (entries := [entry for entry in entries if entry not in scored]):
        return
    suite = entries[0].suite
    networks = load_networks(suite)
    real, scorers = load_real(suite, networks), load_scorers(suite)
    for entry in entries:
        started = time.time()
        SCORE.write(entry.scores, _score(entry, networks, scorers, real, started))


def _is_scored(entry: Entry) -> bool:
    """Whether a row's score is there, whole, and what scoring again would make.

    Raises:
        UserError: samples are missing or damaged.
    """
    key = _key(entry)
    if key is None or not entry.scores.exists():
        return False
    try:
        return SCORE.read(entry.scores, entry.name).get("key") == key
    except UserError:
        return False


def _key(entry: Entry) -> str | None:
    """Identifies what a score depends on; None where files outside of the suite's results are among it, which would
    have to be read."""
    suite = entry.suite
    outside = suite.scoring.real or suite.scoring.extractor_weights or suite.data.folder
    if outside or any("reading" in METRICS[metric].needs for metric in suite.scoring.metrics):
        return None
    for samples in dict.fromkeys((entry.samples, entry.reference.samples)):
        list(shard_files(samples))
    of_samples = [read_manifest(samples) for samples in (entry.samples, entry.reference.samples)]
    return digest(
        {
            "settings": entry.settings("score"),
            "label": entry.label,
            "samples": [{name: manifest[name] for name in ("shards", "options", "samples")} for manifest in of_samples],  # type: ignore[literal-required]
            "marks": marks_of_training(entry),
            "code": source_digest("score", data=suite.data.name),
        }
    )


@products("fp32")
def measure_floor(suite: Suite) -> None:
    """Write scores/floor.json: the metrics of real subsets as large as a row's sample set, against all real images.

    Where there are no more real images than that, the file says so.
    """
    networks = Networks(load_networks(suite).own)
    real = load_real(suite, networks).features
    floor: dict[str, Any]
    if networks.own is None:
        floor = {"not_run": "no metric compares with real images"}
    elif len(real) <= suite.samples.count:
        floor = {"not_run": f"needs more than the {len(real)} real images that there are"}
    else:
        classes = classes_of_real(suite)
        floor = real_floor(real, suite.samples.count, suite.scoring.floor_draws, suite.samples.seed, classes)
    FLOOR.write(suite.folder / "scores" / "floor.json", {"suite": suite.suite, **floor})


@products("fp32")
def measure_seed_noise(suite: Suite) -> None:
    """Write scores/seed-noise.json, the distance of two uncached runs of different noise, from samples of the uncached
    rows."""
    started = time.time()
    networks, rows = load_networks(suite), dict[str, Yardstick]()
    real, scorers = load_real(suite, networks), load_scorers(suite)
    for entry in suite.references:
        manifest, tensors, images = read_images(entry)
        samples = _samples(entry, manifest, tensors, images, networks, scorers)
        if captions := manifest.get("captions"):
            numbers = {caption: number for number, caption in enumerate(captions)}
            samples = replace(samples, labels=torch.tensor([numbers[caption] for caption in captions]))
        groups = stats.batches(len(samples), suite.jackknife_size)
        partners, quality = seed_noise(samples, real, groups, suite.scoring.metrics, pair_scorers(scorers))
        rows[entry.name] = {
            "nfe": entry.nfe,
            "guidance_scale": entry.guidance_scale,
            "samples": len(samples),
            "groups": len(groups),
            "extractor": suite.scoring.extractor,
            "matched": partners.matched,
            "quality": quality,
        }
    provenance = collect(suite.model_dump(mode="json"), [suite.samples.seed], started)
    SEED_NOISE.write(
        suite.folder / "scores" / "seed-noise.json", {"suite": suite.suite, "rows": rows, "provenance": provenance}
    )


@dataclass(frozen=True)
class Networks:
    """What turns images into features.

    Attributes:
        own: the suite's extractor; None where no metric looks at its features.
        imagenet: that of a second opinion, likewise.
    """

    own: Extractor | None
    imagenet: Extractor | None = None


def load_networks(suite: Suite) -> Networks:
    """Those that the suite's metrics look through."""
    scoring, device = suite.scoring, device_of(suite).type
    own = make_extractor(scoring.extractor, scoring.extractor_weights, device=device) if scoring.extractor else None
    second = any("imagenet" in METRICS[metric].needs for metric in scoring.metrics)
    return Networks(own, make_extractor(IMAGENET, device=device) if second else None)


def _extractor_read(suite: Suite) -> dict[str, str]:
    """Identifies the extractor's weights, where they do not ship, as provenance keeps it."""
    weights = suite.scoring.extractor_weights
    return {"extractor": content_digest(weights)} if weights and weights.is_file() else {}


def identity_of(extractor: Extractor, suite: Suite) -> list[str | None]:
    """What features depend on besides the images: the network, its file where it does not ship, and the code."""
    read = _extractor_read(suite).get("extractor") if extractor.name == suite.scoring.extractor else None
    return [extractor.name, read, source_digest("score", data=suite.data.name)]


def load_real(suite: Suite, networks: Networks) -> Real:
    """The real images' side of the metrics; their features are kept on disk.

    Raises:
        UserError: the real images are missing or damaged.
    """
    folder, real, own, imagenet = suite.folder, suite.scoring.real, suite.scoring.extractor, None
    if networks.imagenet:
        imagenet = Real(_real_features(suite, networks.imagenet, folder / "real-features-imagenet.safetensors"))
    if networks.own is None or own is None:
        return Real(Features.none(0), imagenet=imagenet)
    features = _real_features(suite, networks.own, folder / "real-features.safetensors")
    moments = None
    if real and real.suffix == ".npz":
        pooled, spatial = read_moments(real, features.pooled.shape[-1], features.spatial.shape[-1])
        moments = pooled.to(networks.own.device), spatial.to(networks.own.device)
    return Real(features, moments, imagenet, find_extractor(own).kid_kernel)


def _real_features(suite: Suite, extractor: Extractor, path: Path) -> Features:
    """Of the real images, or of those in ADM's reference batch."""
    if (real := suite.scoring.real) is None:
        images = to_uint8(suite.source.images().images)
        key = digest([hashlib.sha256(images.numpy().tobytes()).hexdigest(), identity_of(extractor, suite)])
        return _kept(path, key, extractor.device, lambda: extractor.extract(images))
    if real.suffix == ".npz":
        key = digest([content_digest(real), identity_of(extractor, suite)])
        return _kept(path, key, extractor.device, lambda: extractor.extract(read_reference_images(real)))
    side, listing = image_side(suite), list_images(real, suite.captions_of_real)
    key = digest([listing.digest, side, identity_of(extractor, suite)])
    parts = map(extractor.extract, listing.decoded(side, _DECODED))  # an iterator: read only if they are made
    return _kept(path, key, extractor.device, lambda: Features.joined(parts))


def classes_of_real(suite: Suite) -> Sequence[int] | None:
    """The classes of the real images, where samples show classes in turn; None of others, or where none are known."""
    if suite.source.conditioning != "class" or suite.samples.labels == "drawn":
        return None
    real = suite.scoring.real
    if real is None:
        return suite.source.images().labels.tolist()
    return None if real.suffix == ".npz" else list_images(real).classes or None


def _kept(
    path: Path, key: str, device: torch.device, make: Callable[[], Features], count: int | None = None
) -> Features:
    """Features that are on disk under this key, undamaged and of `count` images, or are made and put there; on a
    device, where the metrics run: a Frechet distance or a neighbour takes a core far longer than a card."""
    if (stored := kept_tensors(path)) and stored[1].get("key") == key and Features.fit(stored[0], count):
        return Features(**stored[0]).to(device)
    features = make()
    write_tensors(path, dict(vars(features)), {"key": key})
    return features.to(device)


def read_images(entry: Entry) -> tuple[Manifest, dict[str, Tensor], Images]:
    """(a row's manifest, its small tensors over all shards, its images).

    Raises:
        UserError: as `read_shards`.
    """
    along = {"label": 0, "index": 0, "x0": 1, "xt": 1}
    parts = list(read_shards(entry.samples))
    tensors = {key: torch.cat([part[key] for part in parts], dim=dim) for key, dim in along.items()}
    images = Images([part["image"] for part in parts])
    return read_manifest(entry.samples, entry.sample_settings), tensors, images


def _score(entry: Entry, networks: Networks, scorers: Scorers, real: Real, started: float) -> Score:
    manifest, tensors, images = read_images(entry)
    samples = _samples(entry, manifest, tensors, images, networks, scorers)
    reference, uncached, trajectory = entry.reference, None, None
    if entry.name != reference.name:
        other_manifest, other, other_images = read_images(reference)
        uncached = _samples(reference, other_manifest, other, other_images, networks, scorers)
        trajectory = _trajectory(manifest, tensors, other)
    suite, row, plan = entry.suite, entry.row, PlanRecord.from_json(manifest["plan_of_first_batch"])
    marks = marks_of_training(entry)
    if samples.images is not None:
        less = uncached is not None and manifest["macs"]["per_sample"] < other_manifest["macs"]["per_sample"]
        marks += odd_images(samples.images, uncached.images if uncached is not None and less else None)
    for mark in marks:
        print(f"{entry.name}: {mark}", file=sys.stderr)
    groups = stats.batches(manifest["samples"], suite.jackknife_size)
    score: Score = {
        "row": entry.name,
        "suite": suite.suite,
        "method": row.method,
        "label": entry.label,
        "nfe": entry.nfe,
        "sampled_steps": manifest["sampled_steps"],
        "resolution": manifest["resolution"],
        **({"height": manifest["height"]} if "height" in manifest else {}),  # type: ignore[typeddict-item]
        "model": suite.model.name,
        "settings": manifest["options"],
        "i_steps": manifest["i_steps"],
        "plans": plans_digest(plan),
        "reference": reference.name,
        "samples": manifest["samples"],
        "samples_digest": samples_digest(manifest),
        "groups": len(groups),
        "group_sizes": [len(group) for group in groups],
        "control": row.control,
        "refiners": row.refiners,
        "target": row.target,
        "extractor": suite.scoring.extractor,
        "metrics_not_run": dict(samples.not_run),
        "quality": score_row(samples, uncached, real, groups, suite.scoring.metrics, pair_scorers(scorers)),
        "macs": manifest["macs"],
        "macs_spread": [min(manifest["macs_per_batch"]), max(manifest["macs_per_batch"])],
        "cache_bytes": manifest["cache_bytes"],
        "guidance_scale": entry.guidance_scale,
        "tokens": manifest["tokens"],
        "plan": plan.to_lines(),
        "trajectory": trajectory,
        "marks": marks,
        "paper": row.paper.model_dump(by_alias=True, exclude_none=True) if row.paper else None,
        "provenance": cast(
            ScoreProvenance,
            collect(suite.model_dump(mode="json"), [suite.samples.seed], started, weights=_extractor_read(suite))
            | {"samples": manifest["provenance"]},
        ),
    }
    if key := _key(entry):
        score["key"] = key
    return score


def marks_of_training(entry: Entry) -> list[str]:
    """What the record of its training says against what a row samples with, so that its tables say it too."""
    if (source := entry.trained_as) is None:
        return []
    stages = TRAINED.read(source.trained / "artefacts.json", source.name, source.suite.suite)["stages"]
    return [f"{mark} (training of {source.name})" for stage in stages for mark in stage.get("marks", ())]


def plans_digest(plan: PlanRecord) -> str | None:
    """Identifies what a run computed and reused, by whole units; None if it chose tokens, which plans only count."""
    return digest(plan.to_json()) if plan.by_whole_units else None


def _samples(
    entry: Entry,
    manifest: Manifest,
    tensors: dict[str, Tensor],
    images: Images,
    networks: Networks,
    scorers: Scorers,
) -> Samples:
    """A row's samples with features, which are kept on disk because every row of an NFE needs the uncached row's."""
    seen = any({"images", "reading"} & METRICS[name].needs for name in entry.suite.scoring.metrics)

    def features(extractor: Extractor, path: Path) -> Features:
        key = digest([manifest["shards"], identity_of(extractor, entry.suite)])
        parts = (extractor.extract(to_uint8(part)) for part in images.parts)
        return _kept(path, key, extractor.device, lambda: Features.joined(parts), manifest["samples"])

    nothing = Features.none(manifest["samples"]).to(device_of(entry.suite))
    own = features(networks.own, entry.features) if networks.own else nothing
    second = entry.features.parent / "imagenet" / entry.features.name
    imagenet = features(networks.imagenet, second) if networks.imagenet else None
    read, not_run = read_samples(entry, manifest, tensors["label"], images, scorers)
    return Samples(own, tensors["label"], images if seen else None, read, not_run, imagenet)


def _trajectory(manifest: Manifest, tensors: dict[str, Tensor], reference: dict[str, Tensor]) -> dict[str, Any] | None:
    """Fig. 10's two deviations per step, mean and spread over samples; none if the steps have no counterparts."""
    if tensors["xt"].shape != reference["xt"].shape or not tensors["xt"].shape[1]:
        return None
    deviations = {name: trajectory_mae(tensors[name], reference[name]) for name in ("x0", "xt")}
    summary: dict[str, Any] = {"timesteps": manifest["timesteps"]}
    for name, mae_SB in deviations.items():
        summary[f"{name}_mae_mean"] = shortened(mae_SB.mean(1).tolist(), 6)
        summary[f"{name}_mae_std"] = shortened(mae_SB.std(1).tolist(), 6)
    return summary
