"""What several stages need: the suite's model, and a row ready to sample."""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch

from tcbench.config import Suite
from tcbench.errors import UserError
from tcbench.files import sha256
from tcbench.method import Artefacts, Method, Run
from tcbench.models.adapter import Adapter
from tcbench.models.specs import MODELS, build_transformer, load_transformer, make_adapter
from tcbench.models.weights import locate
from tcbench.sampling import SamplerSettings, respaced_timesteps
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


def sampler_settings(suite: Suite, row: str) -> SamplerSettings:
    """What all rows share, and the row's CFG scale."""
    return SamplerSettings(suite.guidance_scale(row), suite.seed, suite.spacing, suite.solver)


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
    return suite.trained_folder(source) if source else None


def ready_row(suite: Suite, row: str, adapter: Adapter) -> ReadyRow:
    """Load what a row needs; `adapter` is the plain model and stays untouched.

    Raises:
        UserError: the artefacts come from a row of the same method that was trained with other options.
    """
    folder = artefacts_folder(suite, row)
    if folder is None:
        return ReadyRow(suite.method(row), suite.rows[row].nfe, adapter, Artefacts())
    _check_training(suite, row, adapter)
    artefacts, refined = load_artefacts(folder, adapter)
    return ReadyRow(suite.method(row), suite.rows[row].nfe, refined if suite.rows[row].refiners else adapter, artefacts)


def _check_training(suite: Suite, row: str, adapter: Adapter) -> None:
    """A variant that borrows artefacts must not change what they were trained with."""
    method, source = suite.method(row), suite.method(str(suite.trained_row(row)))
    run = Run(adapter.shape, respaced_timesteps(method.sampled_steps(suite.rows[row].nfe), suite.spacing), True,
              torch.arange(0))  # fmt: skip
    if type(method) is type(source) and method.training(run) != source.training(run):
        raise UserError(
            f"row {row}: its options change what {suite.trained_row(row)} was trained with; "
            "set `artefacts_from: null` so that it trains its own"
        )
