"""What stands before and behind published denoisers: text encoders, and autoencoders of Stable Diffusion's kind."""

import pickle
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from safetensors import SafetensorError
from sentencepiece import SentencePieceProcessor
from torch import Tensor
from transformers import AutoConfig, CLIPTextModel, CLIPTokenizer, MT5EncoderModel, T5EncoderModel, UMT5EncoderModel

from tcbench.data import has_nan, rounded
from tcbench.errors import UserError
from tcbench.models.adapter import Text
from tcbench.models.specs import FluxSpec, Padding, TextSpec, WanSpec
from tcbench.outside.foreign import refuse_stand_in
from tcbench.precision import Dtype, products, weights_dtype

ENCODERS: dict[str, Any] = {"t5": T5EncoderModel, "mt5": MT5EncoderModel, "umt5": UMT5EncoderModel}

_UNREADABLE = (OSError, ValueError, RuntimeError, EOFError, pickle.UnpicklingError, SafetensorError)
"""What readers of folders raise at files that are missing or damaged."""


def _check_downloaded(folder: Path) -> None:
    """Name what a clone without its large files leaves, which readers take for damage."""
    for path in (*weights_files(folder), *folder.glob("spiece.model")):
        refuse_stand_in(path, "weights or a vocabulary")


def _check_complete(folder: Path, loading: dict[str, Any]) -> None:
    """transformers and diffusers draw at random what a folder lacks, and only warn."""
    if lacking := sorted(loading["missing_keys"]):
        raise UserError(f"{folder}: its weights lack {lacking[0]}, which config.json describes; download it again")


def _reason(error: Exception) -> str:
    """The first sentence of a reader's message: further ones advise to load without safeguards."""
    return str(error).partition("\n")[0].partition(". ")[0]


class TextEncoder:
    """The encoder of a T5, mT5 or UMT5, from a folder as it is published.

    Captions are cut into pieces by sentencepiece itself: transformers' tokenizer of T5 takes a character that is no
    piece for unknown, where mT5's vocabulary has its bytes.

    Args:
        folder: config.json, spiece.model and weights, whole or in shards.
        tokens: captions are padded or cut to so many, their end included.
        padding: what becomes of padding (`TextSpec.padding`).
        pieces: where spiece.model is, if not in that folder.

    Raises:
        UserError: the folder lacks something, or holds another kind of model.
    """

    def __init__(
        self,
        folder: Path,
        tokens: int,
        device: torch.device | str,
        dtype: torch.dtype,
        padding: Padding = "masked",
        pieces: Path | None = None,
    ) -> None:
        self._padding, pieces = padding, pieces or folder
        _check_downloaded(folder)
        _check_downloaded(pieces)
        try:
            kind = AutoConfig.from_pretrained(folder, local_files_only=True).model_type
            if kind not in ENCODERS:
                raise UserError(
                    f"{folder}: a {kind}, not a T5, mT5 or UMT5; give the text encoder that the model was trained on"
                )
            self.pieces = SentencePieceProcessor(model_file=str(pieces / "spiece.model"))
            model, loading = ENCODERS[kind].from_pretrained(
                folder, local_files_only=True, dtype=dtype, output_loading_info=True
            )
        except _UNREADABLE as error:
            raise UserError(f"{folder}: no text encoder there ({_reason(error)}); download its whole folder") from error
        _check_complete(folder, loading)
        if self.pieces.vocab_size() > model.config.vocab_size:
            raise UserError(
                f"{pieces}: spiece.model has {self.pieces.vocab_size()} pieces, and the encoder knows "
                f"{model.config.vocab_size}; download both from one place"
            )
        self.model, self.tokens = model.eval().to(device), tokens

    @torch.no_grad()
    def __call__(self, captions: Sequence[str]) -> Text:
        """The last hidden states of captions."""
        ids_RT, mask_RT = (part.to(self.model.device) for part in self.tokenize(captions))
        looked_at = torch.ones_like(mask_RT) if self._padding == "encoded" else mask_RT
        states_RTC = self.model(input_ids=ids_RT, attention_mask=looked_at.long()).last_hidden_state
        return Text(states_RTC * mask_RT[..., None] if self._padding == "zeroed" else states_RTC, mask_RT)

    def tokenize(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """(ids int64 [n, T] of pieces, an end and padding; bool mask [n, T] of what is not padding)."""
        ids_RT = torch.full((len(captions), self.tokens), self.pieces.pad_id())
        mask_RT = torch.zeros_like(ids_RT, dtype=torch.bool)
        for row, pieces in enumerate(self.pieces.encode(list(captions))):
            ids = [*pieces[: self.tokens - 1], self.pieces.eos_id()]
            ids_RT[row, : len(ids)], mask_RT[row, : len(ids)] = torch.tensor(ids), True
        return ids_RT, mask_RT


class FluxTextEncoder:
    """FLUX.1's two: a T5 for the tokens, and CLIP's text model for a vector that sums the caption up.

    Args:
        folder: of the whole pipeline, with text_encoder, tokenizer (CLIP), text_encoder_2 and tokenizer_2 (T5).
        tokens, padding: as `TextEncoder`.

    Raises:
        UserError: a folder lacks something, or holds another kind of model.
    """

    def __init__(
        self, folder: Path, tokens: int, device: torch.device | str, dtype: torch.dtype, padding: Padding
    ) -> None:
        self._t5 = TextEncoder(folder / "text_encoder_2", tokens, device, dtype, padding, folder / "tokenizer_2")
        clip, words = folder / "text_encoder", folder / "tokenizer"
        _check_downloaded(clip)
        try:
            self._tokenizer = CLIPTokenizer.from_pretrained(words, local_files_only=True)
            loaded: Any = CLIPTextModel.from_pretrained(
                clip, local_files_only=True, dtype=dtype, output_loading_info=True
            )
        except _UNREADABLE as error:
            raise UserError(
                f"{folder}: no CLIP text model in text_encoder and tokenizer ({_reason(error)}); download both folders"
            ) from error
        model, loading = loaded
        _check_complete(clip, loading)
        self._clip = model.eval().to(device)

    @torch.no_grad()
    def __call__(self, captions: Sequence[str]) -> Text:
        """The last hidden states of captions by T5, and their vectors by CLIP."""
        words = self._tokenizer(
            list(captions), padding="max_length", truncation=True, max_length=77, return_tensors="pt"
        )
        pooled = self._clip(words.input_ids.to(self._clip.device)).pooler_output
        return replace(self._t5(captions), pooled_RC=pooled)


def load_reader(
    spec: TextSpec, folder: Path, device: torch.device | str, dtype: torch.dtype
) -> TextEncoder | FluxTextEncoder:
    """What reads captions for a model; of FLUX.1 and Wan, `folder` is that of the whole pipeline.

    Raises:
        UserError: the folder lacks something, or holds another kind of model.
    """
    match spec:
        case FluxSpec():
            return FluxTextEncoder(folder, spec.caption_tokens, device, dtype, spec.padding)
        case WanSpec():
            encoder, pieces = folder / "text_encoder", folder / "tokenizer"
            return TextEncoder(encoder, spec.caption_tokens, device, dtype, spec.padding, pieces)
    return TextEncoder(folder, spec.caption_tokens, device, dtype, spec.padding)


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


def load_autoencoder_of(kind: Any, folder: Path, device: torch.device | str, dtype: Dtype) -> Any:
    """An autoencoder of diffusers' class `kind` from a folder as diffusers saves it, in eval mode.

    Raises:
        UserError: the folder lacks something.
    """
    _check_downloaded(folder)
    try:
        vae, loading = kind.from_pretrained(
            folder, local_files_only=True, torch_dtype=weights_dtype(dtype), output_loading_info=True
        )
    except _UNREADABLE as error:
        raise UserError(f"{folder}: no autoencoder there ({_reason(error)}); download its whole folder") from error
    _check_complete(folder, loading)
    return vae.eval().to(device)


class Autoencoder:
    """Stable Diffusion's autoencoder or one of its kind (FLUX.1's), from a folder as diffusers saves it.

    Args:
        dtype: what it computes in.
        scale: what latents, less the shift that the folder's config may name, are multiplied by before the denoiser
            sees them (0.18215 for DiT and PixArt-alpha, 0.3611 for FLUX.1).

    Raises:
        UserError: the folder lacks something.
    """

    def __init__(self, folder: Path, scale: float, device: torch.device | str, dtype: Dtype = "fp32") -> None:
        vae = load_autoencoder_of(AutoencoderKL, folder, device, dtype)
        self.vae, self.scale, self.dtype = vae, scale, dtype
        self.shift = vae.config.shift_factor or 0.0
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
            pixels = part.to(self.vae.device).float() / 127.5 - 1
            with products(self.dtype):
                posterior = self.vae.encode(pixels.to(self.vae.dtype)).latent_dist
            drawn = posterior.mean.float() + posterior.std.float() * draw.to(self.vae.device)
            parts.append((drawn.cpu() - self.shift) * self.scale)
        return torch.cat(parts)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Images of scaled latents [n, 4, h, w], and which of them hold NaN; nothing waits for the device.

        Returns:
            uint8 [n, 3, H, W] and bool [n], on the autoencoder's device
        """
        parts, images, broken = (latents.to(self.vae.device) / self.scale + self.shift), [], []
        with products(self.dtype):
            for part in parts.split(_rows(latents.shape[-1] * self.factor)):
                decoded = self.vae.decode(part.to(self.vae.dtype)).sample.float()
                images.append(rounded(decoded))
                broken.append(has_nan(decoded))
        return torch.cat(images), torch.cat(broken)


def _rows(side: int) -> int:
    """Images of so many pixels on a side that go through the autoencoder at once: a megapixel in all."""
    return max(1, 2**20 // side**2)


def weights_files(folder: Path) -> list[Path]:
    """The files that transformers and diffusers read a folder's weights from: safetensors if there are such."""
    return sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
