"""What stands before and behind a suite's denoiser: training files, the autoencoder, the device of both."""

from typing import TYPE_CHECKING

import torch
from pydantic import BaseModel

from tcbench.config.suite import Suite
from tcbench.data import Decode, has_nan
from tcbench.data.images import Listing
from tcbench.data.videos import VideoListing, list_media
from tcbench.errors import UserError
from tcbench.models.specs import MODELS, DiTSpec, TextSpec
from tcbench.outside.foreign import read_json_as
from tcbench.record.identity import content_digests
from tcbench.stages.device import leased_device

if TYPE_CHECKING:
    from tcbench.models.pretrained import Autoencoder
    from tcbench.models.wan_vae import WanAutoencoder
    from tcbench.models.wf_vae import VideoAutoencoder


def device_of(suite: Suite, alone: bool = False) -> torch.device:
    """The suite's device, as `leased_device`."""
    return leased_device(suite.suite, suite.model.device, alone)


def image_side(suite: Suite) -> int:
    """Pixels along the width of the suite's images; where the model denoises latents, by the autoencoder's config.

    Raises:
        UserError: the autoencoder's config is missing or something else.
    """
    side = MODELS[suite.model.name].latent_shape[-1]
    if suite.model.latents is None:
        return side
    if suite.model.latents.kind != "sd":
        from tcbench.models.wf_vae import SPACE  # Wan's is the same

        return side * SPACE
    config = read_json_as(suite.model.latents.folder / "config.json", _Config, "the config of an autoencoder")
    return side * 2 ** (len(config.block_out_channels) - 1)


def image_size(suite: Suite) -> tuple[int, int]:
    """(height, width) in pixels; errors as `image_side`."""
    rows, columns = MODELS[suite.model.name].latent_shape[-2:]
    width = image_side(suite)
    return width * rows // columns, width


class _Config(BaseModel):
    block_out_channels: list[int]


def load_decoder(suite: Suite) -> Decode:
    """What makes images of the suite's samples: nothing, where the model works on pixels.

    Raises:
        UserError: as `load_autoencoder`.
    """
    if suite.model.latents is None:
        return lambda samples: (samples, has_nan(samples))
    return load_autoencoder(suite).decode


def load_autoencoder(suite: Suite) -> "Autoencoder | VideoAutoencoder | WanAutoencoder":
    """The autoencoder of `model.latents`.

    Raises:
        UserError: it is not there, or not the model's.
    """
    from tcbench.models.pretrained import Autoencoder  # slow to import, and most suites do without
    from tcbench.models.wan_vae import WanAutoencoder
    from tcbench.models.wf_vae import VideoAutoencoder

    if suite.model.latents is None:
        raise UserError(f"suite {suite.suite}: model.latents: names no autoencoder; give its folder")
    folder, spec, device = suite.model.latents.folder, MODELS[suite.model.name], device_of(suite)
    if suite.model.latents.kind != spec.latents_kind:
        says = f"{spec.name} was trained with kind {spec.latents_kind!r}; write that"
        raise UserError(f"suite {suite.suite}: model.latents.kind: {says}")
    dtype = suite.sampling_dtypes["autoencoder"]
    autoencoder: Autoencoder | VideoAutoencoder | WanAutoencoder
    match spec.latents_kind:
        case "sd":
            autoencoder = Autoencoder(folder, suite.model.latents.scale, device, dtype)
        case "wf":
            autoencoder = VideoAutoencoder(folder, device, dtype)
        case "wan":
            autoencoder = WanAutoencoder(folder, device, dtype)
    if autoencoder.channels != spec.in_channels:
        raise UserError(
            f"{folder}: latents of {autoencoder.channels} channels, and {spec.name} denoises {spec.in_channels}; "
            "give the autoencoder that the model was trained with"
        )
    return autoencoder


def autoencoder_digests(suite: Suite) -> dict[str, str]:
    """Identifies what is read of the autoencoder's folder, by content; empty where the model works on pixels."""
    if suite.model.latents is None:
        return {}
    from tcbench.models.pretrained import weights_files
    from tcbench.models.wf_vae import WEIGHTS

    folder = suite.model.latents.folder
    weights = [folder / WEIGHTS] if suite.model.latents.kind == "wf" else weights_files(folder)
    return content_digests([folder / "config.json", *weights])


def list_training_images(suite: Suite) -> Listing | VideoListing:
    """The images or videos that methods are trained on.

    Raises:
        UserError: there are none, or they do not show what the suite's model is conditioned on.
    """
    spec, training = MODELS[suite.model.name], suite.training.images
    if training is None:
        raise UserError(
            f"suite {suite.suite}: training.images: data {suite.data.name!r} bring no images to train on; name some"
        )
    listing = list_media(training.folder, training.captions, training.frames_per_second, training.resize)
    if isinstance(spec, TextSpec) and not listing.captions:
        raise UserError(f"{training.folder}: {spec.name} reads captions; name their file in training.images.captions")
    if isinstance(spec, DiTSpec) and listing.num_classes != spec.num_classes:
        raise UserError(
            f"{training.folder}: holds folders of {listing.num_classes} classes, and {spec.name} knows "
            f"{spec.num_classes}; unpack it again, a folder per class"
        )
    return listing
