"""What samples shall show, as the denoiser reads it: captions through their text encoder, and examples to train on."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from tcbench.config.suite import Suite
from tcbench.data import Dataset
from tcbench.data.captioned import Captioned
from tcbench.data.images import Latents
from tcbench.data.source import PromptSet
from tcbench.errors import UserError
from tcbench.models.adapter import Text
from tcbench.models.specs import MODELS, DiTSpec, TextSpec
from tcbench.models.text import CHANNELS, build_text_encoder, encode_text, load_text_encoder, text_encoder_beside
from tcbench.outside.places import locate
from tcbench.record.files import is_whole, seal
from tcbench.record.records import LATENTS
from tcbench.stages.images import device_of, list_training_images
from tcbench.tensors import draws

_LABELS = -2
"""The purpose of a drawn class: no step, whose numbers are keyed likewise, has it."""


class Captions:
    """What the samples of a captioned suite shall show, by index; called, as its text encoder reads it.

    Args:
        suite: whose data are captioned.
        held_out: the captions that evaluated samples are generated for, or such as models and methods are trained on.

    Raises:
        UserError: the suite's model does not read these captions.
    """

    def __init__(self, suite: Suite, *, held_out: bool) -> None:
        spec, source = MODELS[suite.model.name], suite.source
        reads = isinstance(spec, TextSpec) and spec.caption_channels == CHANNELS
        if not reads or not isinstance(source, Captioned):
            raise UserError(
                f"suite {suite.suite}: model {suite.model.name} does not read the captions of data {suite.data.name}"
            )
        self.source = source
        self.seed, self.held_out = (suite.samples if held_out else suite.training).seed, held_out
        if suite.model.weights == "random":
            self.encoder = build_text_encoder(suite.model.seed, device_of(suite))
        else:
            weights = text_encoder_beside(locate(suite.model.weights or str(spec.weights)))
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
        from tcbench.models.pretrained import load_reader  # slow to import, and most suites do without

        spec, source, device = MODELS[suite.model.name], suite.source, device_of(suite)
        if not isinstance(spec, TextSpec) or not isinstance(source, PromptSet) or suite.model.text_encoder is None:
            raise UserError(f"suite {suite.suite}: prompts need a model that reads captions and its text_encoder")
        self.settings, self.held_out = suite.data.prompts, held_out
        if held_out or not suite.training.images:
            self.prompts = source.prompts(suite.data.prompts.file)
        else:
            self.prompts = list_training_images(suite).captions
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.encoder = load_reader(spec, suite.model.text_encoder, device, dtype)
        negative = self.settings.negative
        self.negative = None if negative is None else self.encoder([negative])
        self.scale = suite.sampler.guidance_scale  # what a distilled model is trained with; sampling gives a row's own

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
        text = self.encoder([template.format(x) for x in prompts])
        return replace(text, negative=self.negative, guidance_scale=self.scale)

    def __call__(self, index: Tensor) -> Text:
        """The captions of samples for the denoiser."""
        return self.read([self.prompts[number] for number in self.words(index).tolist()])


@dataclass(frozen=True)
class DrawnLabels:
    """The classes of evaluated samples, drawn at random as DiT's sampling script does, each by (seed, sample) alone.

    Args:
        classes: how many there are.
        seed: of the samples.
    """

    classes: int
    seed: int

    def words(self, index: Tensor) -> Tensor:
        """Classes of samples, int64 [n]."""
        return (draws.uniform(self.seed, index, 1, _LABELS).squeeze(1) * self.classes).long()

    __call__ = words


Shown = Captions | PromptedCaptions | DrawnLabels
"""What samples show, by index."""


@dataclass(frozen=True)
class Unread:
    """Captions that the text encoder reads when they are drawn: of a large data set their states fill no disk."""

    captions: Sequence[str]
    read: Callable[[Sequence[str]], Text]

    def __len__(self) -> int:
        return len(self.captions)

    def __getitem__(self, index: Tensor) -> Text:
        return self.read([self.captions[number] for number in index.tolist()])


def load_shown(suite: Suite) -> Shown | None:
    """What evaluated samples show; None where that is classes in turn."""
    spec = MODELS[suite.model.name]
    if isinstance(spec, DiTSpec) and suite.samples.labels == "drawn":
        return DrawnLabels(spec.num_classes, suite.samples.seed)
    return load_captions(suite)


def load_captions(suite: Suite, *, held_out: bool = True) -> Captions | PromptedCaptions | None:
    """The suite's captions; None where samples are conditioned on classes."""
    if suite.source.conditioning == "class":
        return None
    return (PromptedCaptions if isinstance(suite.source, PromptSet) else Captions)(suite, held_out=held_out)


def load_examples(suite: Suite, captions: Captions | PromptedCaptions | None) -> Dataset:
    """What methods are trained on, with captions as the denoiser reads them.

    Raises:
        UserError: there is nothing to train on, or it is not encoded.
    """
    if suite.source.brings_images:
        data = suite.source.images()
        return data if captions is None else Dataset(data.images, captions.read(data.labels).to("cpu"))
    listing, index = list_training_images(suite), LATENTS.read(suite.latents_index)
    shards = {Path(index["folder"]) / name: digest for name, digest in index["shards"].items()}
    for path, digest in shards.items():
        if not is_whole(path) or seal(path) != digest:
            raise UserError(f"{path}: is not the shard that {suite.latents_index} lists; run `{LATENTS.command}`")
    latents = Latents([*shards])
    left_out = index["left_out"]
    if index["settings"]["images"] != listing.digest or len(latents) + len(left_out) != len(listing):
        raise UserError(f"{suite.latents_index}: is of other images than `training.images`; run `tcbench encode` again")
    if isinstance(captions, PromptedCaptions):
        shown = [caption for number, caption in enumerate(listing.captions) if str(number) not in left_out]
        return Dataset(latents, Unread(shown, captions.read))
    return Dataset(latents, torch.tensor(listing.classes))
