"""Train what a row's method declares."""

import time

from tcbench.artefacts import save_artefacts
from tcbench.config.suite import Entry
from tcbench.record.provenance import collect
from tcbench.stages.conditioning import load_captions, load_examples
from tcbench.stages.ready import files_digests, load_adapter, sampler_settings
from tcbench.training.caching import train


def train_row(entry: Entry) -> None:
    """Write results/<suite>/trained/<row>/; its artefacts.json, written last, vouches for the other files."""
    suite, started = entry.suite, time.time()
    assert entry.trains, f"{entry.name} trains nothing"
    adapter, captions = load_adapter(suite), load_captions(suite, held_out=False)
    artefacts, refiners, log = train(
        adapter,
        entry.method,
        entry.nfe,
        sampler_settings(entry, training=True),
        load_examples(suite, captions),
        suite.training.seed,
        captions,
    )
    log |= {"row": entry.name, "settings": entry.training_settings, "read": files_digests(entry)}
    log["provenance"] = collect(suite.model_dump(mode="json"), [suite.training.seed], started)
    save_artefacts(entry.trained, artefacts, refiners, log)
