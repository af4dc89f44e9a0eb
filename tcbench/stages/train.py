"""Train what a row's method declares."""

import time
from functools import partial

import torch

from tcbench.artefacts import save_artefacts
from tcbench.config.suite import Entry
from tcbench.errors import UserError
from tcbench.outside.devices import lease, uses_gpus
from tcbench.record.files import digest, sha256
from tcbench.record.provenance import collect
from tcbench.record.sources import source_digest
from tcbench.stages.conditioning import load_captions, load_examples
from tcbench.stages.images import device_of
from tcbench.stages.ready import (
    files_digests,
    load_adapter,
    sampler_settings,
    text_encoder_digests,
    weights_digest,
    weights_read,
)
from tcbench.stages.timing import machine
from tcbench.training.caching import train
from tcbench.training.crew import ALONE, Crew, train_together
from tcbench.training.unfinished import Unfinished


def train_row(entry: Entry) -> None:
    """Write results/<suite>/trained/<row>/; its artefacts.json, written last, vouches for the other files.

    Raises:
        UserError: training fails, or there are fewer GPUs than `training_gpus`.
    """
    count, device = entry.suite.training_gpus, entry.suite.model.device
    if count == 1:
        _train(entry, ALONE)
        return
    if uses_gpus(device):
        lease(count)
    train_together(count, device == "cpu", partial(_train, entry))


def _train(entry: Entry, crew: Crew) -> None:
    """Train in this process, by itself or as one of several, of which the first writes."""
    suite, started = entry.suite, time.time()
    assert entry.trains, f"{entry.name} trains nothing"
    adapter, captions = load_adapter(suite, training=True), load_captions(suite, held_out=False)
    unfinished = Unfinished(suite.root / "unfinished" / entry.name, _key(entry), writes=crew.rank == 0)
    examples, settings = load_examples(suite, captions), sampler_settings(entry, training=True)
    try:
        artefacts, refiners, log = train(
            adapter,
            entry.method,
            entry.nfe,
            settings,
            examples,
            entry.training_seed,
            captions,
            suite.dtypes["training"],
            suite.training.checkpointed,
            unfinished,
            crew,
        )
    except UserError as error:
        raise UserError(f"row {entry.name}: {error}") from error
    if crew.rank:
        return
    log |= {"row": entry.name, "suite": suite.suite, "settings": entry.training_settings, "read": files_digests(entry)}
    config, seeds = suite.model_dump(mode="json"), [entry.training_seed]
    log["provenance"] = collect(config, seeds, started, suite.dtypes, unfinished.earlier, weights_read(suite))
    save_artefacts(entry.trained, artefacts, refiners, log)
    unfinished.remove()


def _key(entry: Entry) -> str:
    """Identifies everything that a row's training depends on, so that a killed one goes on as it began."""
    suite = entry.suite
    return digest(
        [
            entry.training_settings,
            *([suite.training_gpus] if suite.training_gpus > 1 else []),  # which round differently
            entry.training_seed,
            weights_digest(suite.model.name, suite.model.weights),
            text_encoder_digests(suite),
            sha256(suite.latents_index) if suite.latents_index.exists() else None,
            files_digests(entry),
            source_digest("train", entry.row.method, data=suite.data.name),
            machine(device_of(suite)),
            torch.__version__,
        ]
    )
