"""Generate a row's samples, shard by shard; finished shards of the same settings and code are kept.

A row may be sampled in parts, ranges of its shards, by jobs that know nothing of each other: a sample is the same
whoever makes it. The row is done, and has its row.json, when all of its shards are there.
"""

import json
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from tcbench.artefacts import artefacts_digest
from tcbench.aside import Aside
from tcbench.batches import Batches, Finish, Row
from tcbench.config.suite import Entry, Suite
from tcbench.data import Decode
from tcbench.data.source import PromptSet
from tcbench.errors import UserError
from tcbench.record.files import digest, kept_tensors, peek, read_metadata, seal, write_tensors
from tcbench.record.provenance import collect
from tcbench.record.records import MANIFEST
from tcbench.record.shards import misshapen
from tcbench.record.sources import source_digest
from tcbench.record.spent import Spent
from tcbench.record.videos import packed
from tcbench.samplers import make_sampler
from tcbench.stages.conditioning import Shown, load_shown
from tcbench.stages.images import autoencoder_digests, image_size, load_decoder
from tcbench.stages.part import WHOLE, Part
from tcbench.stages.ready import (
    ReadyRow,
    files_digests,
    load_adapter,
    ready_row,
    recorded_options,
    sampled_method,
    sampler_settings,
    text_encoder_digests,
    weights_digest,
    weights_read,
)

SHARDS_WAITING = 2
"""Shards that may wait to be written while a GPU samples the next."""


def row_fingerprint(entry: Entry) -> str:
    """Identifies everything a row's samples depend on: settings, weights, text encoder, autoencoder, artefacts, code,
    torch, threads.

    How many they are and how many are traced is not among it: a shard's tensors show that.
    """
    suite, folder, settings = entry.suite, entry.artefacts, entry.sample_settings
    read = {"text_encoder": encoder} if (encoder := text_encoder_digests(suite)) else {}
    return digest(
        read
        | {
            "settings": settings | {"samples": suite.samples.model_dump(exclude={"count", "traced"})},
            "weights": weights_digest(suite.model.name, suite.model.weights),
            "autoencoder": autoencoder_digests(suite),
            "method": sampled_method(entry).model_dump(mode="json"),
            "artefacts": artefacts_digest(folder) if folder else None,
            "read": files_digests(entry),
            "code": source_digest("sample", entry.row.method, data=suite.data.name),
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
        }
    )


def shards(suite: Suite) -> list[range]:
    """Sample indices of every shard: whole batches, the last one perhaps short."""
    count, size = suite.samples.count, suite.samples.group_size
    return [range(start, min(start + size, count)) for start in range(0, count, size)]


def sample_rows(entries: Iterable[Entry], part: Part = WHOLE) -> None:
    """Write every shard that is not there whole, and the row.json, which lists them, of each row that has all.

    Args:
        entries: rows of one suite or its ablations, which share a model.
        part: of each row; its other shards are other jobs'.
    """
    adapter = shown = decode = None
    for entry in entries:
        suite, started, fingerprint = entry.suite, time.time(), row_fingerprint(entry)
        options = recorded_options(entry)
        spent, total = part.spent(entry.samples, fingerprint), len(shards(suite))
        # who asks for a whole row again may do so because a shard was found to be damaged
        again = entry.manifest.exists()
        missing = [
            number
            for number in part.shards(total)
            if not (_is_done(entry, number, fingerprint, again) or _take_over(entry, number, fingerprint))
        ]
        if len(missing) == total:
            spent.earlier = 0.0
        elif again:
            spent.earlier = _seconds_of(entry.manifest)
        if missing:
            entry.manifest.unlink(missing_ok=True)
            decode = decode or load_decoder(suite)
            adapter, shown = adapter or load_adapter(suite), shown or load_shown(suite)
            _sample_shards(entry, missing, fingerprint, ready_row(entry, adapter), shown, decode, spent)
        of_others = set(range(total)).difference(part.shards(total))
        if all(_is_done(entry, number, fingerprint, compare=False) for number in of_others):
            others = part.spent_by_others(entry.samples, fingerprint)
            earlier = spent.earlier + sum(others.values())
            _write_manifest(entry, options, started, len(missing) < total, earlier)
            for path in (spent.path, *others):
                path.unlink(missing_ok=True)


def _seconds_of(manifest: Path) -> float:
    """What a finished row took, as far as its record says so."""
    try:
        return MANIFEST.read(manifest)["provenance"].get("wall_s", 0.0)
    except UserError:
        return 0.0


def _sample_shards(
    entry: Entry,
    numbers: Sequence[int],
    fingerprint: str,
    ready: ReadyRow,
    shown: Shown | None,
    decode: Decode,
    spent: Spent,
) -> None:
    """Sample and write some shards of a row. What it holds on the device, captured steps and merged weights, is in use
    no more when it ends: the next row needs the room."""
    settings = sampler_settings(entry)
    row = Row(entry.name, ready.adapter, ready.method, ready.nfe, settings, ready.artefacts, shown)
    batches = Batches(row, decode)
    with Aside(SHARDS_WAITING if ready.adapter.device.type != "cpu" else 0) as aside:
        for number in tqdm(numbers, desc=f"sample {entry.name}", unit="shard", mininterval=1):
            sampled = [batches(*asked) for asked in _batches(entry.suite, number)]
            aside(_write_shard, entry, number, fingerprint, ready, shown, sampled, spent)


def _is_done(entry: Entry, number: int, fingerprint: str, compare: bool) -> bool:
    """Whether a shard is there with the traces wanted; `compare` its content with its digest, too.

    A run that is resumed looks at headers and indices alone: a file never has its final name before it is whole, and
    whoever reads samples compares them.
    """
    path = entry.shard(number)
    if compare:
        held = _held(entry.suite, number, path, fingerprint)
        return held is not None and held[0]["x0"].shape[1] == _traced(entry.suite, number)
    header = peek(path, "x0", values=["index"])
    if header is None or header.metadata.get("fingerprint") != fingerprint:
        return False
    if header.values["index"] != list(shards(entry.suite)[number]):
        return False
    return header.shapes["x0"][1] == _traced(entry.suite, number)


def _take_over(entry: Entry, number: int, fingerprint: str) -> bool:
    """Copy a shard of the row that this one begins like (`Entry.twin`), if it is there, with the traces wanted here."""
    twin, path, traced = entry.twin, entry.shard(number), _traced(entry.suite, number)
    held = twin and _held(entry.suite, number, entry.suite.root / "samples" / twin / path.name, fingerprint)
    if not held or held[0]["x0"].shape[1] < traced:
        return False
    tensors, metadata = held
    write_tensors(path, tensors | {name: tensors[name][:, :traced] for name in ("x0", "xt")}, metadata)
    return True


def _held(suite: Suite, number: int, path: Path, fingerprint: str) -> tuple[dict[str, Tensor], dict[str, str]] | None:
    """Tensors and metadata of a file, if it holds this shard, undamaged."""
    if kept := kept_tensors(path):
        tensors, metadata = kept
        ours = metadata.get("fingerprint") == fingerprint and not misshapen(tensors)
        if ours and tensors["index"].tolist() == list(shards(suite)[number]):
            return kept
    return None


def _traced(suite: Suite, number: int) -> int:
    """How many samples of a shard keep their trajectory."""
    indices = shards(suite)[number]
    return len(range(indices.start, min(indices.stop, suite.samples.traced)))


def _batches(suite: Suite, number: int) -> Iterator[tuple[Tensor, int]]:
    """(indices, how many of them keep their trajectory) of a shard's batches."""
    indices = shards(suite)[number]
    for start in range(indices.start, indices.stop, suite.samples.batch_size):
        index = torch.arange(start, min(start + suite.samples.batch_size, indices.stop))
        yield index, max(0, min(suite.samples.traced - start, len(index)))


def _write_shard(
    entry: Entry,
    number: int,
    fingerprint: str,
    ready: ReadyRow,
    shown: Shown | None,
    sampled: list[Finish],
    spent: Spent,
) -> None:
    """Wait for a shard's batches and write it."""
    suite, settings = entry.suite, sampler_settings(entry)
    indices = shards(suite)[number]
    batches = [finish() for finish in sampled]
    record = {
        "macs": [batch.macs for batch in batches],
        "plans": [batch.plans.to_json() for batch in batches],
        "i_steps": batches[0].plans.i_steps,
        "cache_bytes": max(batch.cache_bytes for batch in batches),
        "tokens": ready.adapter.shape.num_tokens,
        "timesteps": make_sampler(
            ready.adapter, ready.method.sampled_steps(ready.nfe), settings, torch.tensor(indices)
        ).timesteps,
    }
    write_tensors(
        entry.shard(number),
        {
            **_images(suite, torch.cat([batch.image for batch in batches])),
            "label": shown.words(torch.tensor(indices)) if shown else torch.cat([b.label for b in batches]),
            "index": torch.tensor(indices),
            "x0": torch.cat([batch.x0 for batch in batches], dim=1),
            "xt": torch.cat([batch.xt for batch in batches], dim=1),
        },
        {"fingerprint": fingerprint, "record": json.dumps(record)},
    )
    spent.keep()


def _images(suite: Suite, images: Tensor) -> dict[str, Tensor]:
    """What a shard keeps of images: all of them, and of decoded videos what `packed` does."""
    if not suite.decodes_videos:
        return {"image": images}
    return {name: torch.from_numpy(array) for name, array in packed(images.numpy(), suite.vbench.fps).items()}


def _write_manifest(entry: Entry, options: dict[str, Any], started: float, resumed: bool, earlier: float) -> None:
    """What later stages need to know of a row without opening its shards."""
    suite = entry.suite
    config, seeds = suite.model_dump(mode="json"), [suite.samples.seed]
    height, width = image_size(suite)
    paths = [entry.shard(number) for number in range(len(shards(suite)))]
    records = [json.loads(read_metadata(path)["record"]) for path in paths]
    macs = [batch for record in records for batch in record["macs"]]
    MANIFEST.write(
        entry.manifest,
        {
            "row": entry.name,
            "suite": suite.suite,
            "settings": entry.sample_settings,
            "options": options,
            "sampled_steps": entry.method.sampled_steps(entry.nfe),
            "timesteps": records[0]["timesteps"],
            "resolution": width,
            **({"height": height} if height != width else {}),
            "samples": suite.samples.count,
            "batch_size": suite.samples.batch_size,
            "i_steps": records[0]["i_steps"],
            "macs": _mean_macs(macs),
            "macs_per_batch": [batch["per_sample"] for batch in macs],
            "plan_of_first_batch": records[0]["plans"][0],
            "tokens": records[0]["tokens"],
            "cache_bytes": max(record["cache_bytes"] for record in records),
            "shards": {path.name: seal(path) for path in paths},
            **({"shards_in": os.path.relpath(paths[0].parent, entry.samples)} if suite.preview else {}),
            **({"captions": _captions(suite, suite.source)} if isinstance(suite.source, PromptSet) else {}),
            "resumed": resumed,
            "provenance": collect(config, seeds, started, suite.sampling_dtypes, earlier, weights_read(suite)),
        },
    )


def _captions(suite: Suite, source: PromptSet) -> list[str]:
    """The prompt of every sample."""
    prompts = source.prompts(suite.data.prompts.file)
    return [prompts[index // suite.data.prompts.per_prompt % len(prompts)] for index in range(suite.samples.count)]


def _mean_macs(macs: list[dict]) -> dict:
    """Mean over batches, whose token counts may differ, rounded to whole MACs."""
    keys = ("per_sample", "per_sample_without_overheads", "paper_rule")
    mean = {key: round(sum(batch[key] for batch in macs) / len(macs)) for key in keys}
    tags = {tag for batch in macs for tag in batch["by_tag"]}
    mean["by_tag"] = {
        tag: round(sum(batch["by_tag"].get(tag, 0) for batch in macs) / len(macs)) for tag in sorted(tags)
    }
    return mean
