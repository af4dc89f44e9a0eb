"""What numbers a network is computed in: a setting of the denoiser, of training and of the autoencoder.

16-bit ones are those of the network's weights and activations; latents, guidance, samplers' arithmetic and scores of
tokens are float32 whatever the network. Imports no torch by itself.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch

Dtype = Literal["bf16", "fp16", "tf32", "fp32"]
"""16-bit weights; or float32 weights with the factors of products rounded to TF32 by a GPU, or products in full."""


def weights_dtype(dtype: Dtype) -> "torch.dtype":
    """What weights are held in."""
    import torch

    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(dtype, torch.float32)


def set_products(dtype: Dtype) -> None:
    """From here on the process rounds the factors of float32 products and convolutions to TF32 if the dtype says so."""
    import torch

    torch.set_float32_matmul_precision("high" if dtype == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = dtype == "tf32"


@contextmanager
def products(dtype: Dtype) -> Iterator[None]:
    """As `set_products`, inside only."""
    import torch

    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    set_products(dtype)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


@contextmanager
def mixed(device: "torch.device", dtype: Dtype) -> Iterator[None]:
    """Products inside are of 16-bit copies of their factors if the dtype says so (torch's autocast).

    Copies are made anew for every product: of weights that learn inside, kept ones would be old.
    """
    import torch

    weights = weights_dtype(dtype)
    with torch.autocast(device.type, weights, enabled=weights != torch.float32, cache_enabled=False):
        yield
