"""Make the shipped weights again from scratch: an embedded suite's denoiser and the networks of its metrics."""

from functools import partial
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from tcbench.config.suite import Suite
from tcbench.errors import UserError
from tcbench.metrics.catalogue import EXTRACTORS
from tcbench.models.specs import MODELS
from tcbench.outside.devices import lease, uses_gpus
from tcbench.registry import data_names, data_source
from tcbench.stages.images import device_of
from tcbench.training.base import PretrainRecipe, Target, pretrain_denoiser
from tcbench.training.classifier import ClassifierRecipe, train_classifier
from tcbench.training.clip import ClipRecipe, train_clip
from tcbench.training.crew import ALONE, Crew, train_together
from tcbench.training.reader import ReaderRecipe, train_reader


def pretrain(suite: Suite, what: str, out: Path, changes: dict[str, Any], gpus: int = 1) -> None:
    """Write <out>/<what>.safetensors and <out>/<what>-log.json; `changes` override the shipped ones' recipe.

    Args:
        gpus: GPUs, or processes on the CPU, that share every batch of the denoiser's training.

    Raises:
        UserError: an unknown or impossible recipe field, several GPUs for a small network, fewer GPUs than that, or a
            loss that is not finite.
    """
    if gpus < 1:
        raise UserError(f"--gpus {gpus}: give a number from 1")
    if gpus == 1:
        _pretrain(suite, what, out, changes, ALONE)
        return
    if what != "denoiser":
        raise UserError(f"--gpus {gpus}: a {what} trains on one; leave it out")
    if uses_gpus(suite.model.device):
        lease(gpus)
    train_together(gpus, suite.model.device == "cpu", partial(_pretrain, suite, what, out, changes))


def _pretrain(suite: Suite, what: str, out: Path, changes: dict[str, Any], crew: Crew) -> None:
    weights, log = out / f"{what}.safetensors", out / f"{what}-log.json"
    device = device_of(suite)
    try:
        if what == "denoiser":
            recipe = PretrainRecipe(**_recipe(suite, what) | changes)
            data = suite.source.parts(recipe.examples)
            target: Target = "v" if suite.sampler.solver == "euler_ancestral" else "eps"
            pretrain_denoiser(MODELS[suite.model.name], *data, target, recipe, device, weights, log, crew=crew)
        elif what == "reader":
            train_reader(ReaderRecipe(**changes), device, weights, log)
        elif what == "clip":
            train_clip(ClipRecipe(**changes), device, weights, log)
        else:
            classifier = ClassifierRecipe(**_recipe(suite, what) | changes)
            network = EXTRACTORS[str(suite.scoring.extractor)].network().NETWORK
            train_classifier(suite.source.images(), classifier, device, weights, log, network)
    except ValidationError as error:
        problem = error.errors()[0]
        raise UserError(f"--set {'.'.join(map(str, problem['loc']))}: {problem['msg'].lower()}") from error


def _recipe(suite: Suite, what: str) -> dict[str, Any]:
    """In which the data set's recipe differs from the defaults."""
    if what not in (recipes := suite.source.recipes):
        known = [name for name in data_names() if what in data_source(name).recipes]
        raise UserError(
            f"suite {suite.suite}: data {suite.data.name!r} have no {what} to train; known: {', '.join(known)}"
        )
    return dict(recipes[what])
