"""CLIP score: 100 times the cosine of an image's and its caption's embedding (Hessel et al., EMNLP 2021, without the
factor 2.5 and the clamp at 0, as the caching papers report it); a row's score is the mean over pairs.

Scores of different CLIP models do not compare, so the model is recorded with every score. ToCa and the papers after it
use OpenAI's ViT-L/14: `ViT-L-14-quickgelu` with weights `openai` here; plain `ViT-L-14` computes another activation.
"""

import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import open_clip
import torch
from PIL import Image
from torch import Tensor

from tcbench.data.captions import encode
from tcbench.errors import NotRun, UserError
from tcbench.metrics.readings import rgb
from tcbench.models.digits_clip import load_digits_clip
from tcbench.models.torchscript import is_torchscript, read_torchscript
from tcbench.outside.foreign import refuse_stand_in

_SIZES = ("input_resolution", "context_length", "vocab_size")
"""Numbers that OpenAI's files hold beside the weights."""


@dataclass(frozen=True)
class ClipScorer:
    """A CLIP model with its own preprocessing and tokenizer.

    Attributes:
        model: has `encode_image` and `encode_text`.
        preprocess: uint8 images [n, 1 or 3, H, W] to the model's input.
        tokenize: captions to word ids [n, context].
    """

    model: Any
    preprocess: Callable[[Tensor], Tensor]
    tokenize: Callable[[Sequence[str]], Tensor]

    @torch.no_grad()
    def __call__(self, images_BCHW: Tensor, captions: Sequence[str]) -> Tensor:
        """CLIP scores, float32 [B] on the CPU, of uint8 images and a caption each."""
        device = next(self.model.parameters()).device
        image = self.model.encode_image(self.preprocess(images_BCHW).to(device), normalize=True)
        text = self.model.encode_text(self.tokenize(captions).to(device), normalize=True)
        return 100 * (image * text).sum(1).float().cpu()


def load_clip(model: str, weights: str | None, device: torch.device | str = "cpu") -> ClipScorer:
    """Any model of open_clip.

    Args:
        model: its name there, or `local-dir:FOLDER` with open_clip_config.json and weights.
        weights: a tag of open_clip, which downloads it unless it is cached or HF_HUB_OFFLINE is set, or a file of
            weights, of which OpenAI's own are read without running the code in them; None with `local-dir:`.
        device: where to run.

    Raises:
        UserError: no such model, or a file that is not its weights.
        NotRun: the weights are not there.
    """
    folder = model.removeprefix("local-dir:")
    if folder == model and model not in open_clip.list_models():
        raise UserError(f"clip: model {model!r} is unknown to open_clip; see open_clip.list_models()")
    file = Path(weights or "").expanduser()
    if is_torchscript(file):
        return _scorer(*_load_openai(model, file, device))
    if file.is_file():
        refuse_stand_in(file, "weights of CLIP")
    try:
        network, _, transform = open_clip.create_model_and_transforms(
            model, pretrained=str(file) if file.is_file() else weights, device=device, require_pretrained=True
        )
        tokenize = open_clip.get_tokenizer(model)
    except (
        OSError,
        RuntimeError,
        ValueError,
        pickle.UnpicklingError,
    ) as error:  # open_clip wraps whatever its download raised
        if weights and "/" not in weights:
            raise NotRun(
                f"needs the CLIP weights {model}/{weights}: let open_clip download them, or give a file"
            ) from error
        reason = str(error).partition("\n")[0].partition(". ")[0]  # torch goes on to advise to load without safeguards
        raise NotRun(f"needs CLIP weights for {model} at {weights or folder} ({reason})") from error
    return _scorer(network, transform, tokenize)


def _load_openai(model: str, file: Path, device: torch.device | str) -> tuple[Any, Any, Any]:
    """(network, image transform, tokenizer) with the weights of OpenAI's own file."""
    config = open_clip.get_model_config(model) or {}
    if not config.get("quick_gelu"):
        raise UserError(f"clip: {file} was trained with QuickGELU, and model {model!r} is without; add `-quickgelu`")
    state = {name: tensor for name, tensor in read_torchscript(file).items() if name not in _SIZES}
    network = open_clip.CLIP(**config)
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        raise UserError(f"{file}: not the weights of {model} ({str(error).splitlines()[1].strip()})") from error
    transform = open_clip.image_transform(config["vision_cfg"]["image_size"], is_train=False)
    return network.to(device), transform, open_clip.get_tokenizer(model)


def _scorer(network: Any, transform: Any, tokenize: Any) -> ClipScorer:
    def preprocess(images: Tensor) -> Tensor:
        pictures = (Image.fromarray(image.permute(1, 2, 0).numpy()) for image in rgb(images))
        return torch.stack([transform(picture) for picture in pictures])

    return ClipScorer(network.requires_grad_(False).eval(), preprocess, tokenize)


def load_digits_clip_scorer(device: torch.device | str = "cpu") -> ClipScorer:
    """The CLIP of the embedded suite `scenes`, on its own images and closed vocabulary."""
    return ClipScorer(load_digits_clip().to(device), lambda images: rgb(images).float() / 127.5 - 1, encode)
