"""PixArt-alpha (Chen et al. 2023): text-to-image, cross-attention between self-attention and MLP, adaLN-single.

The network is diffusers' `PixArtTransformer2DModel`, which agrees with the reference (PixArt-alpha/PixArt-alpha) to the
bit, and the learned null caption that the reference guides away from and diffusers' conversion drops.

Cross-attention has no norm, no modulation and no gate, and its keys and values do not depend on the timestep: they are
made once per run, for every method alike.
"""

from pathlib import Path

import torch
from accelerate import init_empty_weights
from diffusers.models.transformers.pixart_transformer_2d import PixArtTransformer2DModel
from torch import Tensor, nn

from tcbench.errors import UserError
from tcbench.models.adapter import (
    Family,
    Text,
)
from tcbench.models.layers import unpatchify
from tcbench.models.specs import PixArtSpec
from tcbench.models.text_adapter import TextAdapter, TextContext, add_null_caption, initial_value
from tcbench.models.weights import divides


class PixArtAdapter(TextAdapter):
    """Block-wise access to a PixArt-alpha."""

    spec: PixArtSpec

    def plain(self, latent: Tensor, timestep_R: Tensor, prompt: Text) -> Tensor:
        """The model's own forward: [R, out_channels, H, W]."""
        return self.model(
            latent,
            encoder_hidden_states=prompt.states_RTC,
            timestep=timestep_R,
            added_cond_kwargs=self._size(len(latent)),
            encoder_attention_mask=prompt.mask_RT,
        ).sample

    def embed(self, latent: Tensor, context: TextContext) -> Tensor:
        """Patches with positions, [R, N, D]."""
        return self.model.pos_embed(latent)

    def final_layer(self, h_RND: Tensor) -> Tensor:
        """The final linear layer and un-patching: [R, out_channels, H, W]."""
        return unpatchify(self.model.proj_out(h_RND), self.spec.grid, self.spec.patch_size)

    def _size(self, rows: int) -> dict[str, Tensor | None]:
        if not self.spec.sized:
            return super()._size(rows)
        pixels = torch.full((rows, 2), 8.0 * self.spec.sample_size, device=self.device, dtype=self.dtype)
        return {"resolution": pixels, "aspect_ratio": pixels[:, :1] / pixels[:, 1:]}


def _skeleton(spec: PixArtSpec) -> nn.Module:
    with init_empty_weights():
        model = PixArtTransformer2DModel(
            num_attention_heads=spec.num_heads,
            attention_head_dim=spec.head_dim,
            in_channels=spec.in_channels,
            out_channels=spec.out_channels,
            num_layers=spec.num_blocks,
            cross_attention_dim=spec.width,
            sample_size=spec.sample_size,
            patch_size=spec.patch_size,
            norm_eps=spec.norm_eps,
            caption_channels=spec.caption_channels,
            use_additional_conditions=spec.sized,
        )
    add_null_caption(model, spec)
    return model.eval()


_REFERENCE_NAMES = {
    "x_embedder.proj": "pos_embed.proj",
    "t_embedder.mlp.0": "adaln_single.emb.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "adaln_single.emb.timestep_embedder.linear_2",
    "csize_embedder.mlp.0": "adaln_single.emb.resolution_embedder.linear_1",
    "csize_embedder.mlp.2": "adaln_single.emb.resolution_embedder.linear_2",
    "ar_embedder.mlp.0": "adaln_single.emb.aspect_ratio_embedder.linear_1",
    "ar_embedder.mlp.2": "adaln_single.emb.aspect_ratio_embedder.linear_2",
    "t_block.1": "adaln_single.linear",
    "y_embedder.y_proj.fc1": "caption_projection.linear_1",
    "y_embedder.y_proj.fc2": "caption_projection.linear_2",
    "final_layer.linear": "proj_out",
}
_REFERENCE_BLOCK_NAMES = {
    "attn.proj": "attn1.to_out.0",
    "cross_attn.q_linear": "attn2.to_q",
    "cross_attn.proj": "attn2.to_out.0",
    "mlp.fc1": "ff.net.0.proj",
    "mlp.fc2": "ff.net.2",
}
_REFERENCE_STACKS = {"attn.qkv": "attn1.to_{}:qkv", "cross_attn.kv_linear": "attn2.to_{}:kv"}


def from_reference_layout(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename a state dict of the PixArt-alpha repository to diffusers' layout, the null caption kept.

    `attn.qkv` and `cross_attn.kv_linear` are split. `pos_embed` is dropped: it is fixed, and diffusers recomputes it.
    Unknown names stay as they are, for the loader to report.
    """
    whole = {"y_embedder.y_embedding": "null_caption", "final_layer.scale_shift_table": "scale_shift_table"}
    renamed: dict[str, Tensor] = {}
    for key, tensor in state.items():
        module, _, kind = key.rpartition(".")  # kind: weight, bias or the name of a bare parameter
        if module.startswith("blocks."):
            index, _, inner = module.removeprefix("blocks.").partition(".")
            block = f"transformer_blocks.{index}"
            name, _, letters = _REFERENCE_STACKS.get(inner, "").partition(":")
            if letters and divides(tensor, len(letters)):
                for letter, part in zip(letters, tensor.chunk(len(letters)), strict=True):
                    renamed[f"{block}.{name.format(letter)}.{kind}"] = part
            else:
                names = [block, _REFERENCE_BLOCK_NAMES.get(inner, inner), kind]
                renamed[".".join(name for name in names if name)] = tensor
        elif key != "pos_embed":
            renamed[whole.get(key) or f"{_REFERENCE_NAMES.get(module, module)}.{kind}"] = tensor
    return renamed


def _to_diffusers(state: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    if "x_embedder.proj.weight" in state:
        return from_reference_layout(state)
    if "null_caption" not in state:
        raise UserError(
            f"{path}: lacks the learned null caption, which diffusers' conversion drops; "
            "give the .pth file of PixArt-alpha's own repository"
        )
    return {key: tensor for key, tensor in state.items() if key != "pos_embed.pos_embed"}


FAMILY = Family(PixArtAdapter, _skeleton, initial_value, _to_diffusers)
