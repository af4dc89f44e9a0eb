"""What stands before and behind the denoisers of the paper: T5 text encoders and Stable Diffusion's autoencoder."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, MT5EncoderModel, T5EncoderModel

from tcbench.data import to_uint8
from tcbench.errors import UserError
from tcbench.models.adapter import Text

ENCODERS: dict[str, Any] = {"t5": T5EncoderModel, "mt5": MT5EncoderModel}


class TextEncoder:
    """The encoder of a T5 or mT5, from a folder as transformers saves it.

    Args:
        folder: config, weights and tokenizer.
        tokens: captions are padded or cut to so many.

    Raises:
        UserError: the folder lacks something, or holds another kind of model.
    """

    def __init__(self, folder: Path, tokens: int, device: torch.device | str, dtype: torch.dtype) -> None:
        try:
            kind = AutoConfig.from_pretrained(folder, local_files_only=True).model_type
            if kind not in ENCODERS:
                raise UserError(
                    f"{folder}: a {kind}, not a T5 or mT5; give the text encoder that the model was trained on"
                )
            self.tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            self.model = ENCODERS[kind].from_pretrained(folder, local_files_only=True, dtype=dtype).eval().to(device)
        except (OSError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"{folder}: no text encoder there ({reason}); download its whole folder") from error
        self.tokens = tokens

    @torch.no_grad()
    def __call__(self, captions: Sequence[str]) -> Text:
        """The last hidden states of captions."""
        padded = self.tokenizer(
            list(captions), max_length=self.tokens, padding="max_length", truncation=True, return_tensors="pt"
        ).to(self.model.device)
        states = self.model(input_ids=padded["input_ids"], attention_mask=padded["attention_mask"]).last_hidden_state
        return Text(states, padded["attention_mask"].bool())


def clean_captions(captions: Sequence[str]) -> list[str]:
    """Captions as PixArt-alpha's text encoder reads them: lower case, without markup, addresses and odd punctuation.

    The rules are the reference's, as diffusers keeps them for its pipeline, which has no public name for them. They are
    applied twice, as in training.
    """
    import bs4  # noqa: F401  without these two diffusers only warns, and lowers the case
    import ftfy  # noqa: F401
    from diffusers.pipelines.pixart_alpha.pipeline_pixart_alpha import PixArtAlphaPipeline

    pipeline = object.__new__(PixArtAlphaPipeline)  # the rules look at no component of it
    return pipeline._text_preprocessing(list(captions), clean_caption=True)


class Autoencoder:
    """Stable Diffusion's autoencoder, from a folder as diffusers saves it, in float32: images to latents and back.

    Args:
        scale: what latents are multiplied by before the denoiser sees them (0.18215 for DiT and PixArt-alpha).

    Raises:
        UserError: the folder lacks something.
    """

    def __init__(self, folder: Path, scale: float, device: torch.device | str) -> None:
        try:
            vae = AutoencoderKL.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"{folder}: no autoencoder there ({reason}); download its whole folder") from error
        self.vae, self.scale = vae.eval().to(device), scale
        self.channels = vae.config.latent_channels
        self.factor = 2 ** (len(vae.config.block_out_channels) - 1)

    @torch.no_grad()
    def encode(self, images: Tensor, noise: Tensor) -> Tensor:
        """Scaled latents drawn from the posterior, float32 [n, 4, h, w] on the CPU.

        Args:
            images: uint8 [n, 3, H, W].
            noise: standard normal, [n, 4, h, w] with h = H / factor.
        """
        parts, rows = [], _rows(images.shape[-1])
        for part, draw in zip(images.split(rows), noise.split(rows), strict=True):
            posterior = self.vae.encode(part.to(self.vae.device).float() / 127.5 - 1).latent_dist
            parts.append((posterior.mean + posterior.std * draw.to(self.vae.device)).cpu() * self.scale)
        return torch.cat(parts)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Images of scaled latents [n, 4, h, w]: uint8 [n, 3, H, W] on the CPU."""
        parts = (latents / self.scale).split(_rows(latents.shape[-1] * self.factor))
        return torch.cat([to_uint8(self.vae.decode(part.to(self.vae.device)).sample).cpu() for part in parts])


def _rows(side: int) -> int:
    """Images of so many pixels on a side that go through the autoencoder at once: a megapixel in all."""
    return max(1, 2**20 // side**2)
