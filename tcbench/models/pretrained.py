"""What stands before and behind the denoisers of the paper: T5 text encoders and Stable Diffusion's decoder."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, MT5EncoderModel, T5EncoderModel

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


class Decoder:
    """Stable Diffusion's autoencoder, from a folder as diffusers saves it: latents to images.

    Args:
        scale: what latents were multiplied by before the denoiser saw them (0.18215 for DiT and PixArt-alpha).

    Raises:
        UserError: the folder lacks something.
    """

    def __init__(self, folder: Path, scale: float, device: torch.device | str, dtype: torch.dtype) -> None:
        try:
            vae = AutoencoderKL.from_pretrained(folder, local_files_only=True, torch_dtype=dtype)
        except (OSError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"{folder}: no decoder there ({reason}); download its whole folder") from error
        self.vae, self.scale = vae.eval().to(device), scale

    @torch.no_grad()
    def __call__(self, latents: Tensor) -> Tensor:
        """Images in [-1, 1], float32 [n, 3, 8 H, 8 W] on the CPU; one at a time, because they are large."""
        scaled = (latents / self.scale).to(self.vae.device, self.vae.dtype)
        return torch.cat([self.vae.decode(latent).sample.float().clamp(-1, 1).cpu() for latent in scaled.split(1)])
