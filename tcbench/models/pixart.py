"""PixArt-alpha (Chen et al. 2023): text-to-image, cross-attention between self-attention and MLP, adaLN-single.

The network is diffusers' `PixArtTransformer2DModel`, which agrees with the reference (PixArt-alpha/PixArt-alpha) to the
bit, and the learned null caption that the reference guides away from and diffusers' conversion drops.

Cross-attention has no norm, no modulation and no gate, and its keys and values do not depend on the timestep: they are
made once per run, for every method alike.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from accelerate import init_empty_weights
from diffusers.models.transformers.pixart_transformer_2d import PixArtTransformer2DModel
from torch import Tensor, nn

from tcbench.errors import UserError
from tcbench.models.adapter import (
    Adapter,
    Family,
    Gated,
    Modulation,
    Text,
    TransformerBlock,
)
from tcbench.models.dit import unpatchify, xavier_uniform
from tcbench.models.specs import PixArtSpec, TextSpec

MASKED = -10000.0  # what diffusers adds to the attention scores of padding


@dataclass(frozen=True)
class Cross:
    """What a block's cross-attention looks at: keys, values [R, heads, T, head_dim] and score bias [R, 1, 1, T]."""

    keys: Tensor
    values: Tensor
    bias: Tensor
    gate: float = 1.0


@dataclass(frozen=True)
class TextContext:
    """What a run knows of its captions.

    Attributes:
        text_RTD: projected captions.
        bias: 0 where a text token counts, else `MASKED`, [R, 1, 1, T].
        keys_values: of the text, by block.
    """

    text_RTD: Tensor
    bias: Tensor
    keys_values: Mapping[TransformerBlock, tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class TextCondition:
    """adaLN-single's modulation [R, 6, D] and timestep embedding [R, D], and the captions."""

    modulation_R6D: Tensor
    timestep_RD: Tensor
    context: TextContext

    def __getitem__(self, rows: slice) -> "TextCondition":
        return TextCondition(self.modulation_R6D[rows], self.timestep_RD[rows], self.context)


class TextAdapter(Adapter):
    """What PixArt-alpha and Open-Sora-Plan share: captions, adaLN-single, cross-attention, the final layer."""

    spec: TextSpec
    fuses = True

    def drop(self, prompt: Text, where_R: Tensor) -> Text:
        """Captions, some of them replaced: by the learned null caption under the caption's own mask, as the reference
        does, or by the prompts' negative caption under its own.

        Raises:
            UserError: the model learned no null caption and the prompts bring no negative one.
        """
        prompt, where = prompt.to(self.device, self.dtype), where_R.to(self.device)
        if self.spec.null_caption:
            null, mask = self.model.null_caption, prompt.mask_RT
        elif prompt.negative is not None:
            null, mask = prompt.negative.states_RTC, prompt.negative.mask_RT
        else:
            raise UserError(f"{self.spec.name}: guidance needs a negative prompt; encode one with the prompts")
        states = torch.where(where[:, None, None], null, prompt.states_RTC)
        return replace(prompt, states_RTC=states, mask_RT=torch.where(where[:, None], mask, prompt.mask_RT))

    def prepare(self, prompt: Text) -> TextContext:
        """Project the captions and make their keys and values for every block."""
        prompt = prompt.to(self.device, self.dtype)
        text = self.model.caption_projection(prompt.states_RTC)
        bias = ((1 - prompt.mask_RT.to(text.dtype)) * MASKED)[:, None, None]
        keys_values = {}
        for block, on_full_steps in zip(*self._by_step, strict=True):  # LoRA leaves keys and values of the text alone
            keys_values[block] = keys_values[on_full_steps] = self._text_keys_values(block, text)
        return TextContext(text, bias, keys_values)

    def condition(self, timestep_R: Tensor, context: TextContext) -> TextCondition:
        """adaLN-single's output, shared by all blocks."""
        modulation, timestep = self.model.adaln_single(
            timestep_R, self._size(len(timestep_R)), batch_size=len(timestep_R), hidden_dtype=self.dtype
        )
        return TextCondition(modulation.unflatten(1, (6, -1)), timestep, context)

    def modulation(self, block: TransformerBlock, condition: TextCondition) -> dict[str, Gated]:
        """Shift, scale and gate of self-attention and MLP, and the text for cross-attention.

        A block that is not the model's own (a predictor's) has keys and values of its own made here.
        """
        parts = (block.scale_shift_table[None] + condition.modulation_R6D).chunk(6, dim=1)
        context = condition.context
        keys, values = context.keys_values.get(block) or self._text_keys_values(block, context.text_RTD)
        return {
            "attn": Modulation(*parts[:3]),
            "cross": Cross(keys, values, context.bias),
            "mlp": Modulation(*parts[3:]),
        }

    def norm(self, block: TransformerBlock, part: str) -> nn.Module:
        """The LayerNorm before a part."""
        return block.norm1 if part == "attn" else block.norm2

    def final_modulation(self, condition: TextCondition) -> tuple[Tensor, Tensor]:
        """(shift, scale) before the final layer."""
        shift, scale = (self.model.scale_shift_table[None] + condition.timestep_RD[:, None]).chunk(2, dim=1)
        return shift, scale

    def _text_keys_values(self, block: TransformerBlock, text_RTD: Tensor) -> tuple[Tensor, Tensor]:
        return self._heads(block.attn2.to_k(text_RTD)), self._heads(block.attn2.to_v(text_RTD))

    def _size(self, rows: int) -> dict[str, Tensor | None]:
        """What a sized model is told of the image."""
        return {"resolution": None, "aspect_ratio": None}


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


# --- the network


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


def add_null_caption(model: nn.Module, spec: TextSpec) -> None:
    """Give a model on meta the parameter `null_caption` [T, C], if its spec has one."""
    if spec.null_caption:
        empty = torch.empty(spec.caption_tokens, spec.caption_channels, device="meta")
        model.register_parameter("null_caption", nn.Parameter(empty))


def initial_value(name: str, shape: torch.Size, generator: torch.Generator, zero_init: bool) -> Tensor:
    """The reference's `initialize_weights`; without `zero_init`, every layer shows in the output."""

    def normal(std: float) -> Tensor:
        return torch.randn(shape, generator=generator) * std

    if name == "null_caption" or name.endswith("scale_shift_table"):
        return normal(shape[-1] ** -0.5)
    if name.startswith("proj_out.") or ".attn2.to_out." in name:
        return torch.zeros(shape) if zero_init else normal(0.1)
    if name.endswith("bias"):
        return torch.zeros(shape) if zero_init else normal(0.02)
    if name.startswith("adaln_single.") or (zero_init and name.startswith("caption_projection.")):
        return normal(0.02 if zero_init else 0.07)
    # the reference initialises queries, keys and values, or those of the text, as one matrix
    inner = name.rpartition(".to_")[2].partition(".")[0]
    matrices = {"q": 3, "k": 3, "v": 3} if ".attn1." in name else {"k": 2, "v": 2}
    # an untrained text attention is so even that rounding would rank tokens by it
    sharper = 4 if ".attn2." in name and inner in ("q", "k") and not zero_init else 1
    return sharper * xavier_uniform(shape, generator, matrices.get(inner, 1))


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
            _, index, inner = f"{module}.".split(".", 2)
            inner, block = inner.rstrip("."), f"transformer_blocks.{index}"
            if inner in _REFERENCE_STACKS:
                name, _, letters = _REFERENCE_STACKS[inner].partition(":")
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
