"""Which denoisers exist, and the one place that builds, loads and saves them.

The network is diffusers' `DiTTransformer2DModel` brought to the numerics of the reference DiT (Peebles & Xie
2023, facebookresearch/DiT), from which the stock class differs in two silent ways: its sinusoid frequencies
(`downscale_freq_shift` 1 instead of 0) and the epsilon of the pre-MLP LayerNorm (1e-5 instead of 1e-6).
Its per-block timestep/label embedders, equal copies in every official conversion, are one shared module here.
"""

import math
from pathlib import Path
from typing import Literal

import torch
from accelerate import init_empty_weights
from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from tcbench.errors import UserError
from tcbench.files import write_tensors
from tcbench.models.weights import check_state, locate, read_state

_EMBEDDER = "transformer_blocks.0.norm1.emb"  # where the shared embedder lives in a state dict


class ModelSpec(BaseModel):
    """The shape of a denoiser, and where its trained weights are.

    Latents are [B, in_channels, sample_size, sample_size]; the output has `out_channels`, of which the first
    `in_channels` are eps and the rest, if any, the learned variance. The null label is `num_classes`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    family: Literal["dit"] = "dit"
    num_blocks: int = Field(gt=0)
    num_heads: int = Field(gt=0)
    head_dim: int = Field(gt=0)
    sample_size: int = Field(gt=0, description="side of the latent, in latent pixels")
    patch_size: int = Field(default=2, gt=0)
    in_channels: int = Field(gt=0)
    out_channels: int = Field(gt=0)
    num_classes: int = Field(gt=0)
    guided_channels: int = Field(gt=0, description="CFG acts on the first this-many channels of eps")
    norm_eps: float = Field(default=1e-6, gt=0)
    weights: str | None = Field(default=None, description="a file in the package's assets, or a user's path")

    @property
    def width(self) -> int:
        """Channels of a token."""
        return self.num_heads * self.head_dim

    @property
    def grid(self) -> int:
        """Tokens along one side."""
        return self.sample_size // self.patch_size

    @property
    def num_tokens(self) -> int:
        """Tokens of one sample."""
        return self.grid**2


def _dit_xl_2(resolution: int) -> ModelSpec:
    return ModelSpec(
        name=f"dit-xl-2-{resolution}",
        num_blocks=28,
        num_heads=16,
        head_dim=72,
        sample_size=resolution // 8,
        in_channels=4,
        out_channels=8,
        num_classes=1000,
        guided_channels=3,
    )


MODELS: dict[str, ModelSpec] = {
    spec.name: spec
    for spec in (
        ModelSpec(
            name="digits-dit",
            num_blocks=14,
            num_heads=4,
            head_dim=16,
            sample_size=16,
            in_channels=1,
            out_channels=1,
            num_classes=10,
            guided_channels=1,
            weights="digits/denoiser.safetensors",
        ),
        ModelSpec(
            name="tiny-dit",
            num_blocks=4,
            num_heads=4,
            head_dim=24,
            sample_size=16,
            in_channels=4,
            out_channels=8,
            num_classes=10,
            guided_channels=3,
        ),
        _dit_xl_2(256),
        _dit_xl_2(512),
    )
}
"""The known models by name."""


def build_transformer(
    spec: ModelSpec,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    seed: int | None = 0,
    zero_init: bool = True,
) -> DiTTransformer2DModel:
    """Build the denoiser with random weights, in eval mode.

    Args:
        spec: the model's shape.
        device: on "meta" nothing is allocated and no weight has a value.
        dtype: of parameters and buffers.
        seed: of the weights, drawn on the CPU so that they do not depend on `device`; None draws them from
            torch's global generator.
        zero_init: True gives the reference's initialisation, whose adaLN and output layers are zero, so an
            untrained model returns 0 whatever its blocks do. False draws every layer, and the output visibly
            depends on timestep, label and each block: for tests and for timing.

    Returns:
        model(x_BCHW, timestep_B, class_labels_B).sample -> [B, out_channels, H, W]
    """
    model = _skeleton(spec)
    if torch.device(device).type == "meta":
        return nn.Module.to(model, device="meta", dtype=dtype)
    generator = torch.default_generator if seed is None else torch.Generator().manual_seed(seed)
    state = {
        name: _initial_value(name, parameter.shape, generator, zero_init)
        for name, parameter in model.named_parameters()
    }
    return _fill(model, state, device, dtype)


def load_transformer(
    spec: ModelSpec,
    weights: Path | str | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> DiTTransformer2DModel:
    """Load a trained denoiser, in eval mode, from `weights` or else from `spec.weights`.

    Reads .safetensors, or .pt / .pth / .bin without executing anything in them, in diffusers' layout
    (embedder stored once or per block) or in the reference's.

    Raises:
        UserError: no weights are named, or the file is missing, truncated, lacks a tensor, holds an unknown
            one, or holds one of the wrong shape or with a value that is not finite.
    """
    weights = weights if weights is not None else spec.weights
    if weights is None:
        raise UserError(f"{spec.name}: this model ships without weights; give the path of a checkpoint as `weights`")
    path = locate(weights)
    state = read_state(path)
    if "x_embedder.proj.weight" in state:
        state = from_reference_layout(state)
    state = _without_copies(state, path)
    model = _skeleton(spec)
    check_state(state, model, spec.name, path)
    return _fill(model, state, device, dtype)


def save_transformer(model: nn.Module, path: Path | str, metadata: dict[str, str] | None = None) -> None:
    """Write the weights as safetensors in diffusers' layout, the shared embedder once (as block 0's)."""
    # named_parameters lists a shared parameter once, under its first name; state_dict would list every alias
    write_tensors(Path(path), {name: p.detach().cpu() for name, p in model.named_parameters()}, metadata)


_REFERENCE_NAMES = {
    "x_embedder.proj": "pos_embed.proj",
    "t_embedder.mlp.0": f"{_EMBEDDER}.timestep_embedder.linear_1",
    "t_embedder.mlp.2": f"{_EMBEDDER}.timestep_embedder.linear_2",
    "y_embedder.embedding_table": f"{_EMBEDDER}.class_embedder.embedding_table",
    "final_layer.adaLN_modulation.1": "proj_out_1",
    "final_layer.linear": "proj_out_2",
}
_REFERENCE_BLOCK_NAMES = {
    "adaLN_modulation.1": "norm1.linear",
    "attn.proj": "attn1.to_out.0",
    "mlp.fc1": "ff.net.0.proj",
    "mlp.fc2": "ff.net.2",
}


def from_reference_layout(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename a state dict of the reference DiT repository to diffusers' layout, embedder once, under block 0.

    `attn.qkv` is split in thirds. `pos_embed` is dropped: it is fixed, and diffusers recomputes it. Unknown
    names stay as they are, for the loader to report.
    """
    renamed: dict[str, Tensor] = {}
    for key, tensor in state.items():
        module, _, kind = key.rpartition(".")  # kind: weight or bias
        if module.startswith("blocks."):
            _, index, inner = module.split(".", 2)
            block = f"transformer_blocks.{index}"
            if inner == "attn.qkv":
                for name, part in zip("qkv", tensor.chunk(3), strict=True):
                    renamed[f"{block}.attn1.to_{name}.{kind}"] = part
            else:
                renamed[f"{block}.{_REFERENCE_BLOCK_NAMES.get(inner, inner)}.{kind}"] = tensor
        elif key != "pos_embed":
            renamed[f"{_REFERENCE_NAMES.get(module, module)}.{kind}"] = tensor
    return renamed


def _skeleton(spec: ModelSpec) -> DiTTransformer2DModel:
    """The network with its parameters on meta and its position embedding computed."""
    with init_empty_weights():
        model = DiTTransformer2DModel(
            num_attention_heads=spec.num_heads,
            attention_head_dim=spec.head_dim,
            in_channels=spec.in_channels,
            out_channels=spec.out_channels,
            num_layers=spec.num_blocks,
            attention_bias=True,
            sample_size=spec.sample_size,
            patch_size=spec.patch_size,
            activation_fn="gelu-approximate",
            num_embeds_ada_norm=spec.num_classes,
            norm_type="ada_norm_zero",
            norm_elementwise_affine=False,
            norm_eps=spec.norm_eps,
        )
    embedder = model.transformer_blocks[0].norm1.emb
    embedder.time_proj.downscale_freq_shift = 0
    # every block would drop labels independently; training drops them once, outside, to the null label
    embedder.class_embedder.dropout_prob = 0.0
    for block in model.transformer_blocks:
        block.norm1.emb = embedder
    return model.eval()


def _fill(
    model: DiTTransformer2DModel,
    state: dict[str, Tensor],
    device: torch.device | str,
    dtype: torch.dtype,
) -> DiTTransformer2DModel:
    # strict=False: the shared embedder's aliases are absent from `state`, which is complete otherwise
    model.load_state_dict(state, strict=False, assign=True)
    # not model.to: diffusers' override warns about keeping an empty list of modules in float32
    return nn.Module.to(model, device=device, dtype=dtype)


def _initial_value(name: str, shape: torch.Size, generator: torch.Generator, zero_init: bool) -> Tensor:
    """The reference's `initialize_weights`; without `zero_init`, every layer shows in the output."""

    def normal(std: float) -> Tensor:
        return torch.randn(shape, generator=generator) * std

    if name.startswith(("proj_out_1.", "proj_out_2.")) or ".norm1.linear." in name:
        return torch.zeros(shape) if zero_init else normal(0.05)
    if name.endswith("bias"):
        return torch.zeros(shape) if zero_init else normal(0.02)
    if "class_embedder" in name:
        return normal(0.02 if zero_init else 0.7)
    if "timestep_embedder" in name:
        return normal(0.02 if zero_init else 0.07)
    fan_out, fan_in = shape[0], math.prod(shape[1:])
    if ".attn1.to_" in name and ".to_out." not in name:
        fan_out *= 3  # the reference initialises q, k and v as one matrix
    bound = math.sqrt(6 / (fan_in + fan_out))  # Xavier uniform
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)


def _without_copies(state: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Keep one of the equal embedders of an official conversion, and drop its fixed position embedding."""
    kept: dict[str, Tensor] = {}
    for key, tensor in state.items():
        head, marker, tail = key.partition(".norm1.emb.")
        if not marker or head == "transformer_blocks.0":
            kept[key] = tensor
        elif not torch.equal(tensor, state.get(f"{_EMBEDDER}.{tail}", tensor.new_empty(0))):
            raise UserError(f"{path}: {key} differs from block 0's; only checkpoints with one embedder are supported")
    kept.pop("pos_embed.pos_embed", None)
    return kept
