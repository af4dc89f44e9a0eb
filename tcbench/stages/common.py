"""What several stages need: the suite's model, and a row ready to sample."""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch

from tcbench.config import Suite
from tcbench.errors import UserError
from tcbench.files import read_json, sha256
from tcbench.method import Artefacts, Method
from tcbench.models.adapter import Adapter
from tcbench.models.specs import MODELS, build_transformer, load_transformer, make_adapter
from tcbench.models.weights import locate
from tcbench.sampling import SamplerSettings
from tcbench.training.caching import load_artefacts


@dataclass(frozen=True)
class ReadyRow:
    """A row with everything loaded."""

    method: Method
    nfe: int
    adapter: Adapter
    artefacts: Artefacts


def device_of(suite: Suite) -> torch.device:
    """The suite's device; raises UserError if it is not there."""
    if suite.device == "cuda" and not torch.cuda.is_available():
        raise UserError(f"suite {suite.suite}: device cuda, but this machine has no usable GPU; set device: cpu")
    return torch.device(suite.device)


def sampler_settings(suite: Suite) -> SamplerSettings:
    """What all rows share."""
    return SamplerSettings(suite.guidance.scale, suite.seed, suite.spacing, suite.solver)


def load_adapter(suite: Suite) -> Adapter:
    """The suite's model with its weights, on its device."""
    spec, device = MODELS[suite.model], device_of(suite)
    if suite.weights == "random":
        return make_adapter(build_transformer(spec, device=device, seed=suite.seed, zero_init=False), spec)
    return make_adapter(load_transformer(spec, suite.weights, device), spec)


@lru_cache
def weights_digest(model: str, weights: str | None) -> str:
    """Identifies the model's weights by content."""
    path = weights or MODELS[model].weights
    return "random" if weights == "random" or path is None else sha256(locate(path))


def artefacts_folder(suite: Suite, row: str) -> Path | None:
    """Where the artefacts that a row samples with are."""
    source = suite.trained_row(row)
    return suite.folder / "trained" / source if source else None


def files_digests(suite: Suite, row: str) -> dict[str, str]:
    """Digests of the files that training read for a row (an imported router), as far as they are still there."""
    source = suite.trained_row(row)
    files = suite.method(source).files() if source else ()
    return {name: sha256(Path(name)) for name in files if Path(name).exists()}


def ready_row(suite: Suite, row: str, adapter: Adapter) -> ReadyRow:
    """Load what a row needs; `adapter` is the plain model and stays untouched.

    Raises:
        UserError: an artefact is missing or damaged, or a file that it was made from has changed since.
    """
    folder = artefacts_folder(suite, row)
    if folder is None:
        return ReadyRow(suite.method(row), suite.rows[row].nfe, adapter, Artefacts())
    read = read_json(folder / "artefacts.json").get("read", {})
    for name, digest in files_digests(suite, row).items():
        if read.get(name) != digest:
            raise UserError(f"{name}: is not the file that {folder.name} was trained from; train that row again")
    artefacts, adapter = load_artefacts(folder, adapter)
    return ReadyRow(suite.method(row), suite.rows[row].nfe, adapter, artefacts)
