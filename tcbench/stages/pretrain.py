"""Make the shipped weights again from scratch: an embedded suite's denoiser and the networks of its metrics."""

from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from tcbench.config import Suite
from tcbench.data import DataName, Dataset, load_images, split
from tcbench.data.captioned import compose
from tcbench.errors import UserError
from tcbench.models.specs import MODELS
from tcbench.stages.common import device_of
from tcbench.training.base import RECIPES, PretrainRecipe, Target, pretrain_denoiser
from tcbench.training.classifier import CLASSIFIERS, ClassifierRecipe, train_classifier
from tcbench.training.clip import ClipRecipe, train_clip
from tcbench.training.reader import ReaderRecipe, train_reader

Recipe = TypeVar("Recipe")


def pretrain(suite: Suite, what: str, out: Path, changes: dict[str, Any]) -> None:
    """Write <out>/<what>.safetensors and <out>/<what>-log.json; `changes` override the shipped ones' recipe.

    Raises:
        UserError: an unknown or impossible recipe field, or a loss that is not finite.
    """
    weights, log = out / f"{what}.safetensors", out / f"{what}-log.json"
    device = device_of(suite)
    try:
        if what == "denoiser":
            recipe = PretrainRecipe(**_of(suite, RECIPES, what).model_dump() | changes)
            data = _parts(suite.data, recipe.examples)
            target: Target = "v" if suite.solver == "euler_ancestral" else "eps"
            pretrain_denoiser(MODELS[suite.model], *data, target, recipe, device, weights, log)
        elif what == "reader":
            train_reader(ReaderRecipe(**changes), device, weights, log)
        elif what == "clip":
            train_clip(ClipRecipe(**changes), device, weights, log)
        else:
            network, shipped = _of(suite, CLASSIFIERS, what)
            classifier = ClassifierRecipe(**shipped.model_dump() | changes)
            train_classifier(load_images(suite.data), classifier, device, weights, log, network)
    except ValidationError as error:
        problem = error.errors()[0]
        raise UserError(f"--set {'.'.join(map(str, problem['loc']))}: {problem['msg'].lower()}") from error


def _of(suite: Suite, recipes: dict[str, Recipe], what: str) -> Recipe:
    if suite.data not in recipes:
        raise UserError(
            f"suite {suite.suite}: data {suite.data!r} have no {what} to train; known: {', '.join(recipes)}"
        )
    return recipes[suite.data]


def _parts(name: DataName, examples: int) -> tuple[Dataset, Dataset]:
    """(what a denoiser trains on, what is held out of it)."""
    if name == "digits":
        return split(load_images(name))
    if name in ("scenes", "moving"):
        return compose(name, range(examples), held_out=False), compose(name, range(512), held_out=True)
    return load_images(name), load_images(name, held_out=True)[:512]
