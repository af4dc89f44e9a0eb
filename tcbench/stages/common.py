"""What several stages need: the suite's model, and a row ready to sample."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tcbench.assets import locate
from tcbench.borrowing import check_training
from tcbench.config import Suite
from tcbench.data import Dataset
from tcbench.data.captioned import Captioned
from tcbench.data.images import Latents, Listing
from tcbench.data.source import PromptSet
from tcbench.data.videos import VideoListing, list_media
from tcbench.errors import UserError
from tcbench.files import read_json, sha256
from tcbench.method import Artefacts, Method
from tcbench.models.adapter import Adapter, Text
from tcbench.models.networks import build_transformer, load_transformer, make_adapter
from tcbench.models.specs import MODELS, DiTSpec, TextSpec
from tcbench.models.text import CHANNELS, build_text_encoder, encode_text, load_text_encoder, text_encoder_beside
from tcbench.sampling import SamplerSettings
from tcbench.training.caching import load_artefacts

if TYPE_CHECKING:
    from tcbench.models.pretrained import Autoencoder
    from tcbench.models.wf_vae import VideoAutoencoder


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
    """The suite's model with its weights, on its device; from here on products are of the suite's precision."""
    spec, device = MODELS[suite.model], device_of(suite)
    torch.set_float32_matmul_precision("high" if suite.tf32 and device.type == "cuda" else "highest")
    if suite.weights == "random":
        return make_adapter(build_transformer(spec, device=device, seed=suite.seed, zero_init=False), spec)
    return make_adapter(load_transformer(spec, suite.weights, device), spec)


class Captions:
    """What the samples of a captioned suite shall show, by index; called, as its text encoder reads it.

    Args:
        suite: whose data are captioned.
        held_out: the captions that evaluated samples are generated for, or such as models and methods are trained on.

    Raises:
        UserError: the suite's model does not read these captions.
    """

    def __init__(self, suite: Suite, *, held_out: bool) -> None:
        spec, source = MODELS[suite.model], suite.source
        reads = isinstance(spec, TextSpec) and spec.caption_channels == CHANNELS
        if not reads or not isinstance(source, Captioned):
            raise UserError(f"suite {suite.suite}: model {suite.model} does not read the captions of data {suite.data}")
        self.source = source
        self.seed, self.held_out = suite.seed, held_out
        if suite.weights == "random":
            self.encoder = build_text_encoder(suite.seed, device_of(suite))
        else:
            weights = text_encoder_beside(locate(suite.weights or str(spec.weights)))
            self.encoder = load_text_encoder(weights, device_of(suite))

    def words(self, index: Tensor) -> Tensor:
        """Word ids of the captions of samples, int64 [n, LENGTH]."""
        return self.source.captions(index, self.held_out, self.seed)

    @torch.no_grad()
    def read(self, words: Tensor) -> Text:
        """Captions for the denoiser, from their word ids."""
        return Text(*encode_text(self.encoder, words.to(self.encoder.device)))

    def __call__(self, index: Tensor) -> Text:
        """The captions of samples for the denoiser."""
        return self.read(self.words(index))


class PromptedCaptions:
    """The prompts of a published set, by sample; called, as a pretrained text encoder reads them.

    Args:
        suite: whose data are prompts.
        held_out: the prompts that evaluated samples are generated for, or the captions of training images.

    Raises:
        UserError: the suite names no text encoder, or its model reads no captions.
    """

    def __init__(self, suite: Suite, *, held_out: bool) -> None:
        from tcbench.models.pretrained import TextEncoder  # slow to import, and most suites do without

        spec, source, device = MODELS[suite.model], suite.source, device_of(suite)
        if not isinstance(spec, TextSpec) or not isinstance(source, PromptSet) or suite.text_encoder is None:
            raise UserError(f"suite {suite.suite}: prompts need a model that reads captions and its text_encoder")
        self.settings, self.held_out = suite.prompts, held_out
        if held_out or not suite.training:
            self.prompts = source.prompts(suite.prompts.file)
        else:
            self.prompts = list_training_images(suite).captions
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.encoder = TextEncoder(suite.text_encoder, spec.caption_tokens, device, dtype)
        negative = self.settings.negative
        self.negative = None if negative is None else self.encoder([negative])

    def words(self, index: Tensor) -> Tensor:
        """Numbers of the samples' prompts, int64 [n]."""
        return index // self.settings.per_prompt % len(self.prompts)

    def read(self, prompts: Sequence[str]) -> Text:
        """Prompts for the denoiser."""
        from tcbench.models.pretrained import clean_captions

        if self.settings.clean is True or (self.settings.clean == "training" and not self.held_out):
            prompts = clean_captions(prompts)
        elif self.settings.lowercase:
            prompts = [prompt.lower() for prompt in prompts]
        template = self.settings.template if self.held_out else "{}"
        return replace(self.encoder([template.format(x) for x in prompts]), negative=self.negative)

    def __call__(self, index: Tensor) -> Text:
        """The captions of samples for the denoiser."""
        return self.read([self.prompts[number] for number in self.words(index).tolist()])


@dataclass(frozen=True)
class Unread:
    """Captions that the text encoder reads when they are drawn: of a large data set their states fill no disk."""

    captions: Sequence[str]
    read: Callable[[Sequence[str]], Text]

    def __len__(self) -> int:
        return len(self.captions)

    def __getitem__(self, index: Tensor) -> Text:
        return self.read([self.captions[number] for number in index.tolist()])


def load_captions(suite: Suite, *, held_out: bool = True) -> Captions | PromptedCaptions | None:
    """The suite's captions; None where samples are conditioned on classes."""
    if suite.source.conditioning == "class":
        return None
    return (PromptedCaptions if isinstance(suite.source, PromptSet) else Captions)(suite, held_out=held_out)


def image_side(suite: Suite) -> int:
    """Pixels along a side of the suite's images; where the model denoises latents, by the autoencoder's config."""
    side = MODELS[suite.model].latent_shape[-1]
    if suite.latents is None:
        return side
    if suite.latents.kind == "wf":
        from tcbench.models.wf_vae import SPACE

        return side * SPACE
    return side * 2 ** (len(read_json(suite.latents.folder / "config.json")["block_out_channels"]) - 1)


def load_decoder(suite: Suite) -> Callable[[Tensor], Tensor]:
    """What makes images of the suite's samples: nothing, where the model works on pixels.

    Raises:
        UserError: as `load_autoencoder`.
    """
    if suite.latents is None:
        return lambda samples: samples
    return load_autoencoder(suite).decode


def load_autoencoder(suite: Suite) -> "Autoencoder | VideoAutoencoder":
    """The autoencoder of `latents`.

    Raises:
        UserError: it is not there, or not the model's.
    """
    from tcbench.models.pretrained import Autoencoder  # slow to import, and most suites do without
    from tcbench.models.wf_vae import VideoAutoencoder

    if suite.latents is None:
        raise UserError(f"suite {suite.suite}: latents: names no autoencoder; give its folder")
    folder, spec, device = suite.latents.folder, MODELS[suite.model], device_of(suite)
    kind = "wf" if len(spec.latent_shape) == 4 else "sd"
    if suite.latents.kind != kind:
        raise UserError(f"suite {suite.suite}: latents.kind: {spec.name} was trained with kind {kind!r}; write that")
    autoencoder = VideoAutoencoder(folder, device) if kind == "wf" else Autoencoder(folder, suite.latents.scale, device)
    if autoencoder.channels != spec.in_channels:
        raise UserError(
            f"{folder}: latents of {autoencoder.channels} channels, and {spec.name} denoises {spec.in_channels}; "
            "give the autoencoder that the model was trained with"
        )
    return autoencoder


def autoencoder_digests(suite: Suite) -> dict[str, str]:
    """Identifies what is read of the autoencoder's folder, by content; empty where the model works on pixels."""
    if suite.latents is None:
        return {}
    from tcbench.models.pretrained import weights_files
    from tcbench.models.wf_vae import WEIGHTS

    folder = suite.latents.folder
    weights = [folder / WEIGHTS] if suite.latents.kind == "wf" else weights_files(folder)
    return {file.name: sha256(file) for file in (folder / "config.json", *weights) if file.exists()}


def list_training_images(suite: Suite) -> Listing | VideoListing:
    """The images or videos that methods are trained on.

    Raises:
        UserError: there are none, or they do not show what the suite's model is conditioned on.
    """
    spec, training = MODELS[suite.model], suite.training
    if training is None:
        raise UserError(f"suite {suite.suite}: training: data {suite.data!r} bring no images to train on; name some")
    listing = list_media(training.folder, training.captions, training.frames_per_second)
    if isinstance(spec, TextSpec) and not listing.captions:
        raise UserError(f"{training.folder}: {spec.name} reads captions; name their file in training.captions")
    if isinstance(spec, DiTSpec) and listing.num_classes != spec.num_classes:
        raise UserError(
            f"{training.folder}: holds folders of {listing.num_classes} classes, and {spec.name} knows "
            f"{spec.num_classes}; unpack it again, a folder per class"
        )
    return listing


def load_examples(suite: Suite, captions: Captions | PromptedCaptions | None) -> Dataset:
    """What methods are trained on, with captions as the denoiser reads them.

    Raises:
        UserError: there is nothing to train on, or it is not encoded.
    """
    if suite.source.brings_images:
        data = suite.source.images()
        return data if captions is None else Dataset(data.images, captions.read(data.labels).to("cpu"))
    listing, index = list_training_images(suite), read_json(suite.latents_index)
    latents = Latents([Path(index["folder"]) / name for name in index["shards"]])
    left_out = index["left_out"]
    if index["settings"]["images"] != listing.digest or len(latents) + len(left_out) != len(listing):
        raise UserError(f"{suite.latents_index}: is of other images than `training`; run `tcbench encode` again")
    if isinstance(captions, PromptedCaptions):
        shown = [caption for number, caption in enumerate(listing.captions) if str(number) not in left_out]
        return Dataset(latents, Unread(shown, captions.read))
    return Dataset(latents, torch.tensor(listing.classes))


@lru_cache
def weights_digest(model: str, weights: str | None) -> str:
    """Identifies the model's weights, and those of the text encoder beside them, by content."""
    path = weights or MODELS[model].weights
    if weights == "random" or path is None:
        return "random"
    file = locate(path)
    files = sorted(file.glob("*.safetensors")) if file.is_dir() else [file, text_encoder_beside(file)]
    return "+".join(sha256(file) for file in files if file.exists())


def artefacts_folder(suite: Suite, row: str) -> Path | None:
    """Where the artefacts that a row samples with are."""
    source = suite.trained_row(row)
    return suite.trained_folder(source) if source else None


def files_digests(suite: Suite, row: str) -> dict[str, str]:
    """Digests of the files that training read for a row (an imported router), as far as they are still there."""
    source = suite.trained_row(row)
    files = suite.method(source).files() if source else ()
    return {name: sha256(Path(name)) for name in files if Path(name).exists()}


def ready_row(suite: Suite, row: str, adapter: Adapter) -> ReadyRow:
    """Load what a row needs; `adapter` is the plain model and stays untouched.

    Raises:
        UserError: an artefact is missing or damaged, a file that it was made from has changed since, or the artefacts
            come from a row of the same method that was trained with other options.
    """
    folder = artefacts_folder(suite, row)
    if folder is None:
        return ReadyRow(suite.method(row), suite.rows[row].nfe, adapter, Artefacts())
    check_training(suite, row)
    read = read_json(folder / "artefacts.json").get("read", {})
    for name, digest in files_digests(suite, row).items():
        if read.get(name) != digest:
            raise UserError(f"{name}: is not the file that {folder.name} was trained from; train that row again")
    artefacts, refined = load_artefacts(folder, adapter)
    refiners = suite.rows[row].refiners
    if refiners == "p-steps" and refined is not adapter:
        refined.on_full_steps(adapter)
    return ReadyRow(suite.method(row), suite.rows[row].nfe, refined if refiners else adapter, artefacts)
