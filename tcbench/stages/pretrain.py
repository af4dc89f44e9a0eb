"""Make the shipped weights again from scratch: the embedded suite's denoiser and its feature extractor."""

from pathlib import Path
from typing import Any

from pydantic import ValidationError

from tcbench.config import Suite
from tcbench.data import load_images
from tcbench.errors import UserError
from tcbench.models.specs import MODELS
from tcbench.stages.common import device_of
from tcbench.training.base import PretrainRecipe, pretrain_denoiser
from tcbench.training.classifier import ClassifierRecipe, train_classifier


def pretrain(suite: Suite, what: str, out: Path, changes: dict[str, Any]) -> None:
    """Write <out>/<what>.safetensors and <out>/<what>-log.json; `changes` override the shipped ones' recipe.

    Raises:
        UserError: an unknown or impossible recipe field, or a loss that is not finite.
    """
    weights, log = out / f"{what}.safetensors", out / f"{what}-log.json"
    data, device = load_images(suite.data), device_of(suite)
    try:
        if what == "denoiser":
            pretrain_denoiser(MODELS[suite.model], data, PretrainRecipe(**changes), device, weights, log)
        else:
            train_classifier(data, ClassifierRecipe(**changes), device, weights, log)
    except ValidationError as error:
        problem = error.errors()[0]
        raise UserError(f"--set {'.'.join(map(str, problem['loc']))}: {problem['msg'].lower()}") from error
