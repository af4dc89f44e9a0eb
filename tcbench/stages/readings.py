"""Readings of a row's samples: the scorers that the suite's metrics name, loaded once, and what VBench left on disk."""

from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from tqdm import tqdm

from tcbench.config.suite import Entry, Suite
from tcbench.data import to_uint8
from tcbench.data.captions import decode
from tcbench.errors import NotRun, UserError
from tcbench.metrics.catalogue import METRICS, settings_of
from tcbench.metrics.images import Images
from tcbench.metrics.readings import Scorer
from tcbench.metrics.samples import PairScorer
from tcbench.metrics.vbench import table
from tcbench.record.files import digest, kept_tensors, write_tensors
from tcbench.record.identity import content_digests
from tcbench.record.records import Manifest
from tcbench.record.sources import source_digest
from tcbench.stages import vbench
from tcbench.stages.images import device_of

Scorers = dict[str, Scorer | PairScorer | NotRun]
_BATCH = 64


def load_scorers(suite: Suite) -> Scorers:
    """The scorers that the suite's metrics name; in the place of one whose weights are not there, why.

    Raises:
        UserError: weights that are there and not what they should be.
    """
    scorers: Scorers = {}
    for metric in [METRICS[name] for name in suite.scoring.metrics if METRICS[name].per_sample]:
        settings = dict(getattr(suite.scoring, metric.settings)) if metric.settings else {}
        try:
            scorers[metric.name] = metric.function()(**settings, device=device_of(suite).type)
        except NotRun as reason:
            scorers[metric.name] = reason
    return scorers


def pair_scorers(scorers: Scorers) -> dict[str, PairScorer]:
    """Those that compare a sample with the uncached one, which leaves no reading of the sample."""
    ready = {name: scorer for name, scorer in scorers.items() if METRICS[name].distance}
    return {name: cast(PairScorer, scorer) for name, scorer in ready.items() if not isinstance(scorer, NotRun)}


def read_samples(
    entry: Entry, manifest: Manifest, labels: Tensor, images: Images, scorers: Scorers
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(readings by metric, why there is none by metric) of a row; kept on disk because references are read often.

    Raises:
        UserError: a metric needs captions, and the row has none.
    """
    not_run = {name: str(reason) for name, reason in scorers.items() if isinstance(reason, NotRun)}
    ready = {name: scorer for name, scorer in scorers.items() if name not in not_run and not METRICS[name].distance}
    readings = _kept(entry, manifest, labels, images, ready) if ready else {}
    if "vbench" in entry.suite.scoring.metrics:
        try:
            results = vbench.readings(entry, manifest["shards"])
            readings["vbench"] = torch.from_numpy(table(results, manifest["samples"]))
        except NotRun as reason:
            not_run["vbench"] = str(reason)
    return readings, not_run


def _kept(
    entry: Entry, manifest: Manifest, labels: Tensor, images: Images, scorers: dict[str, Any]
) -> dict[str, Tensor]:
    path, suite = entry.readings, entry.suite
    settings = suite.scoring.model_dump(include=settings_of(suite.scoring.metrics), mode="json")
    code = source_digest("score", data=suite.data.name)
    key = digest([manifest["shards"], sorted(scorers), settings, _files_of(settings), code])
    if (stored := kept_tensors(path)) and stored[1].get("key") == key:
        counts = {name: len(values) if values.ndim else 0 for name, values in stored[0].items()}
        if counts == dict.fromkeys(scorers, manifest["samples"]):
            return stored[0]
    captions = captions_of(entry.name, manifest, labels)
    readings = {}
    for name, scorer in scorers.items():
        starts = tqdm(range(0, len(images), _BATCH), desc=f"{entry.name} {name}", delay=2, leave=False, disable=None)
        of_batch = (slice(start, start + _BATCH) for start in starts)
        parts = [scorer(to_uint8(images[rows]), captions[rows]) for rows in of_batch]
        readings[name] = torch.cat(parts)
    write_tensors(path, readings, {"key": key})
    return readings


def _files_of(settings: dict[str, dict[str, Any]]) -> dict[str, dict[str, str]]:
    """Digests of the files that the settings of scorers name, themselves or as their folder."""
    named = [Path(str(value)).expanduser() for fields in settings.values() for value in fields.values()]
    files = {str(path): sorted(path.iterdir()) if path.is_dir() else [path] for path in named if path.exists()}
    return {name: content_digests(path for path in paths if path.is_file()) for name, paths in files.items()}


def captions_of(row: str, manifest: Manifest, labels: Tensor) -> list[str]:
    """What the samples were generated for: the prompts in row.json, or the word ids of the embedded suites in words.

    Raises:
        UserError: the row is conditioned on classes.
    """
    if captions := manifest.get("captions"):
        return captions
    if labels.ndim != 2:
        raise UserError(f"row {row}: its samples have no captions; name no metrics that read captions")
    return decode(labels)
