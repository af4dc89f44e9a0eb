"""What several stages need: the suite's model, and a row ready to sample."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from tcbench.config import PROMPT_SETS, Suite
from tcbench.data import Dataset, load_images
from tcbench.data.captioned import CaptionedName, captions
from tcbench.data.prompts import read_prompts
from tcbench.errors import UserError
from tcbench.files import read_json, sha256
from tcbench.method import Artefacts, Method, Run
from tcbench.models.adapter import Adapter, Text
from tcbench.models.pixart import TextSpec
from tcbench.models.specs import MODELS, build_transformer, load_transformer, make_adapter, shape_of
from tcbench.models.text import CHANNELS, build_text_encoder, encode_text, load_text_encoder, text_encoder_beside
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


class Captions:
    """What the samples of a captioned suite shall show, by index; called, as its text encoder reads it.

    Args:
        suite: whose data are captioned.
        held_out: the captions that evaluated samples are generated for, or such as models and methods are trained on.

    Raises:
        UserError: the suite's model does not read these captions.
    """

    def __init__(self, suite: Suite, *, held_out: bool) -> None:
        spec = MODELS[suite.model]
        if suite.data == "digits" or not isinstance(spec, TextSpec) or spec.caption_channels != CHANNELS:
            raise UserError(f"suite {suite.suite}: model {suite.model} does not read the captions of data {suite.data}")
        self.data: CaptionedName = suite.data
        self.seed, self.held_out = suite.seed, held_out
        if suite.weights == "random":
            self.encoder = build_text_encoder(suite.seed, device_of(suite))
        else:
            weights = text_encoder_beside(locate(suite.weights or str(spec.weights)))
            self.encoder = load_text_encoder(weights, device_of(suite))

    def words(self, index: Tensor) -> Tensor:
        """Word ids of the captions of samples, int64 [n, LENGTH]."""
        return captions(self.data, index, self.held_out, self.seed)

    @torch.no_grad()
    def read(self, words: Tensor) -> Text:
        """Captions for the denoiser, from their word ids."""
        return Text(*encode_text(self.encoder, words.to(self.encoder.device)))

    def __call__(self, index: Tensor) -> Text:
        """The captions of samples for the denoiser."""
        return self.read(self.words(index))


class PromptedCaptions:
    """The prompts of a published set, by sample; called, as a pretrained text encoder reads them.

    Raises:
        UserError: the suite names no text encoder, or its model reads no captions.
    """

    def __init__(self, suite: Suite) -> None:
        from tcbench.models.pretrained import TextEncoder  # slow to import, and most suites do without

        spec, device = MODELS[suite.model], device_of(suite)
        if not isinstance(spec, TextSpec) or suite.text_encoder is None:
            raise UserError(f"suite {suite.suite}: prompts need a model that reads captions and its text_encoder")
        self.settings, self.prompts = suite.prompts, read_prompts(suite.data, suite.prompts.file)
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.encoder = TextEncoder(suite.text_encoder, spec.caption_tokens, device, dtype)
        negative = self.settings.negative
        self.negative = None if negative is None else self.encoder([negative])

    def words(self, index: Tensor) -> Tensor:
        """Numbers of the samples' prompts, int64 [n]."""
        return index // self.settings.per_prompt % len(self.prompts)

    def __call__(self, index: Tensor) -> Text:
        """The captions of samples for the denoiser."""
        prompts = [self.prompts[number] for number in self.words(index).tolist()]
        prompts = [prompt.lower() for prompt in prompts] if self.settings.lowercase else prompts
        return replace(self.encoder([self.settings.template.format(x) for x in prompts]), negative=self.negative)


def load_captions(suite: Suite, *, held_out: bool = True) -> Captions | PromptedCaptions | None:
    """The suite's captions; None where samples are conditioned on classes."""
    if suite.data in PROMPT_SETS:
        return PromptedCaptions(suite)
    return None if suite.data == "digits" else Captions(suite, held_out=held_out)


def load_decoder(suite: Suite) -> Callable[[Tensor], Tensor]:
    """What makes images of the suite's samples: nothing, where the model works on pixels.

    Raises:
        UserError: the decoder is not there, or not one that this package runs.
    """
    if suite.latents is None:
        return lambda samples: samples
    if suite.latents.kind == "wf":
        raise UserError(
            f"suite {suite.suite}: latents.kind: WF-VAE is part of Open-Sora-Plan's own code and not run here; "
            "remove `latents` to sample latents, which no metric of videos reads"
        )
    from tcbench.models.pretrained import Decoder

    dtype = torch.bfloat16 if device_of(suite).type == "cuda" else torch.float32
    return Decoder(suite.latents.folder, suite.latents.scale, device_of(suite), dtype)


def load_examples(suite: Suite, captions: Captions | PromptedCaptions | None) -> Dataset:
    """What methods are trained on, with captions as the denoiser reads them.

    Raises:
        UserError: the suite's data are prompts alone.
    """
    if isinstance(captions, PromptedCaptions):
        raise UserError(f"suite {suite.suite}: data {suite.data!r} are prompts without images; nothing trains on them")
    data = load_images(suite.data)
    return data if captions is None else Dataset(data.images, captions.read(data.labels).to("cpu"))


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


def check_training(suite: Suite, row: str) -> None:
    """A row that borrows artefacts must not change what they were trained with; settled from shapes and options alone.

    Raises:
        UserError: it changes an option that its method reads in training.
    """
    source = suite.trained_row(row)
    if source in (None, row):
        return
    method, trained = suite.method(row), suite.method(source)
    timesteps = respaced_timesteps(suite.rows[source].nfe)
    run = Run(shape_of(MODELS[suite.model]), timesteps, True, torch.arange(0))
    if type(method) is type(trained) and method.training(run) != trained.training(run):
        raise UserError(
            f"row {row}: its options change what {source} was trained with; "
            "set `artefacts_from: null` so that it trains its own"
        )
