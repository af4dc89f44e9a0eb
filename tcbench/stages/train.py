"""Train what a row's method declares."""

import time

from tcbench.artefacts import save_artefacts
from tcbench.config.suite import Entry
from tcbench.errors import UserError
from tcbench.record.provenance import collect
from tcbench.stages.conditioning import load_captions, load_examples
from tcbench.stages.ready import files_digests, load_adapter, sampler_settings
from tcbench.training.caching import train


def train_row(entry: Entry) -> None:
    """Write results/<suite>/trained/<row>/; its artefacts.json, written last, vouches for the other files."""
    suite, started = entry.suite, time.time()
    assert entry.trains, f"{entry.name} trains nothing"
    adapter, captions = load_adapter(suite, training=True), load_captions(suite, held_out=False)
    examples, settings = load_examples(suite, captions), sampler_settings(entry, training=True)
    try:
        artefacts, refiners, log = train(
            adapter, entry.method, entry.nfe, settings, examples, entry.training_seed, captions
        )
    except UserError as error:
        raise UserError(f"row {entry.name}: {error}") from error
    log |= {"row": entry.name, "settings": entry.training_settings, "read": files_digests(entry)}
    log["provenance"] = collect(suite.model_dump(mode="json"), [entry.training_seed], started, suite.dtypes)
    save_artefacts(entry.trained, artefacts, refiners, log)
