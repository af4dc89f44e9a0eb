"""What stands before and behind a suite's denoiser: training images in files, the autoencoder, the device of both."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tcbench.config import Suite
from tcbench.data.images import Listing, list_images
from tcbench.errors import UserError
from tcbench.files import read_json
from tcbench.models.specs import MODELS, DiTSpec, TextSpec

if TYPE_CHECKING:
    from tcbench.models.pretrained import Autoencoder


def device_of(suite: Suite) -> torch.device:
    """The suite's device; raises UserError if it is not there."""
    if suite.device == "cuda" and not torch.cuda.is_available():
        raise UserError(f"suite {suite.suite}: device cuda, but this machine has no usable GPU; set device: cpu")
    return torch.device(suite.device)


def image_side(suite: Suite) -> int:
    """Pixels along a side of the suite's images; where the model denoises latents, by the autoencoder's config."""
    side = MODELS[suite.model].latent_shape[-1]
    if suite.latents is None:
        return side
    return side * 2 ** (len(read_json(suite.latents.folder / "config.json")["block_out_channels"]) - 1)


def load_decoder(suite: Suite) -> Callable[[Tensor], Tensor]:
    """What makes images of the suite's samples: nothing, where the model works on pixels.

    Raises:
        UserError: as `load_autoencoder`.
    """
    if suite.latents is None:
        return lambda samples: samples
    return load_autoencoder(suite).decode


def load_autoencoder(suite: Suite) -> "Autoencoder":
    """The autoencoder of `latents`.

    Raises:
        UserError: it is not there, not the model's, or not one that this package runs.
    """
    from tcbench.models.pretrained import Autoencoder  # slow to import, and most suites do without

    if suite.latents is None:
        raise UserError(f"suite {suite.suite}: latents: names no autoencoder; give its folder")
    if suite.latents.kind == "wf":
        raise UserError(
            f"suite {suite.suite}: latents.kind: WF-VAE is part of Open-Sora-Plan's own code and not run here; "
            "remove `latents` to sample latents, which no metric of videos reads"
        )
    autoencoder, spec = Autoencoder(suite.latents.folder, suite.latents.scale, device_of(suite)), MODELS[suite.model]
    if (channels := autoencoder.vae.config.latent_channels) != spec.in_channels:
        raise UserError(
            f"{suite.latents.folder}: latents of {channels} channels, and {spec.name} denoises {spec.in_channels}; "
            "give the autoencoder that the model was trained with"
        )
    return autoencoder


def list_training_images(suite: Suite) -> Listing:
    """The images that methods are trained on.

    Raises:
        UserError: there are none, or they do not show what the suite's model is conditioned on.
    """
    spec, training = MODELS[suite.model], suite.training
    if training is None:
        raise UserError(f"suite {suite.suite}: training: data {suite.data!r} bring no images to train on; name some")
    listing = list_images(training.folder, training.captions)
    if isinstance(spec, TextSpec) and not listing.captions:
        raise UserError(f"{training.folder}: {spec.name} reads captions; name their file in training.captions")
    if isinstance(spec, DiTSpec) and listing.num_classes != spec.num_classes:
        raise UserError(
            f"{training.folder}: holds folders of {listing.num_classes} classes, and {spec.name} knows "
            f"{spec.num_classes}; unpack it again, a folder per class"
        )
    return listing
