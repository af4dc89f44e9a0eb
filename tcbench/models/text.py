"""The embedded suites' text encoder: a small T5, trained together with the denoiser that reads it."""

from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import T5Config, T5EncoderModel

from tcbench.data.captions import PAD, WORDS
from tcbench.models.weights import check_state, read_state
from tcbench.outside.places import locate

CHANNELS = 64
"""Of the states that the denoiser's captions come in."""


def build_text_encoder(seed: int = 0, device: torch.device | str = "cpu") -> T5EncoderModel:
    """Build the encoder, two layers of four heads, with random weights drawn on the CPU, in eval mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = T5Config(
            vocab_size=len(WORDS),
            d_model=CHANNELS,
            d_kv=16,
            d_ff=4 * CHANNELS,
            num_layers=2,
            num_heads=4,
            relative_attention_num_buckets=16,
            relative_attention_max_distance=16,
            dropout_rate=0.0,
            feed_forward_proj="gated-gelu",
            pad_token_id=PAD,
            use_cache=False,
        )
        model = T5EncoderModel(config).eval()
    return nn.Module.to(model, device)


def load_text_encoder(weights: Path | str, device: torch.device | str = "cpu") -> T5EncoderModel:
    """Load a trained encoder, in eval mode.

    Raises:
        UserError: the file is missing, truncated, or does not hold this network.
    """
    model, path = build_text_encoder(), locate(weights)
    state = read_state(path)
    check_state(state, model, "the captions' text encoder", path)
    model.load_state_dict(state, strict=False)  # the shared embedding is stored once
    return nn.Module.to(model, device)


def text_encoder_beside(weights: Path) -> Path:
    """Where the text encoder of a denoiser's file is."""
    return weights.with_name("text-encoder.safetensors")


def encode_text(encoder: T5EncoderModel, ids_NT: Tensor) -> tuple[Tensor, Tensor]:
    """(states [n, T, CHANNELS], bool mask [n, T] of what is not padding) of captions' word ids."""
    mask = ids_NT != PAD
    return encoder(input_ids=ids_NT, attention_mask=mask.long()).last_hidden_state, mask
