"""What every training run shares: determinism, a schedule of the learning rate, and a record of its circumstances."""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel
from torch import Tensor

from tcbench.errors import UserError
from tcbench.record.files import write_json
from tcbench.record.identity import content_digest
from tcbench.trainable import Trainable


@contextmanager
def deterministic() -> Iterator[None]:
    """Make torch refuse operations whose result varies from run to run; restores the previous setting."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what cuBLAS needs for it, read at its first use
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def provenance(recipe: BaseModel, device: torch.device) -> dict[str, str]:
    """Metadata of trained weights: the recipe as JSON, the device, and the versions that made them."""
    on = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    versions = {name: version(name) for name in ("torch", "diffusers", "scikit-learn")}
    return {"recipe": recipe.model_dump_json(), "device": on, **versions}


def write_log(
    log: Path, weights: Sequence[Path], metadata: Mapping[str, str], recipe: BaseModel, history: Sequence[Any]
) -> None:
    """Write what a training of a network was: its metadata, its course, and the digest of what it left, which results
    that were made with it name, too."""
    digests = "+".join(content_digest(path) for path in weights if path.exists())
    write_json(log, {**metadata, "weights": digests, "recipe": recipe.model_dump(), "history": list(history)})


def require_finite(loss: float, iteration: int) -> None:
    """Stop a run that diverged; raises UserError."""
    if not loss < float("inf"):
        raise UserError(f"recipe: the loss is {loss} at iteration {iteration}; lower learning_rate")


def check_finite(loss: Tensor, stage: Trainable, iteration: int) -> None:
    """Stop a method's training stage that diverged; raises UserError."""
    if not loss.isfinite():
        raise UserError(
            f"{type(stage).__name__}: the loss became {loss.item()} at iteration {iteration}; "
            "lower the learning rate and train again"
        )
