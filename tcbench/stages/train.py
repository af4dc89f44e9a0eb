"""Train what a row's method declares."""

import time

from tcbench.config import Suite
from tcbench.provenance import collect
from tcbench.stages.common import (
    artefacts_folder,
    files_digests,
    load_adapter,
    load_captions,
    load_examples,
    sampler_settings,
)
from tcbench.training.caching import save_artefacts, train


def train_row(suite: Suite, row: str) -> None:
    """Write results/<suite>/trained/<row>/; its artefacts.json, written last, vouches for the other files."""
    started = time.time()
    folder = artefacts_folder(suite, row)
    assert folder is not None, f"{row} trains nothing"
    adapter, captions = load_adapter(suite), load_captions(suite, held_out=False)
    artefacts, refiners, log = train(
        adapter,
        suite.method(row),
        suite.rows[row].nfe,
        sampler_settings(suite, row),
        load_examples(suite, captions),
        suite.training_seed,
        captions,
    )
    log |= {"row": row, "settings": suite.training_settings(row), "read": files_digests(suite, row)}
    log["provenance"] = collect(suite.model_dump(mode="json"), [suite.training_seed], started)
    save_artefacts(folder, artefacts, refiners, log)
