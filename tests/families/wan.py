"""A family like Wan 2.1: normed cross-attention, an MLP ratio that is no integer, guidance in two passes.

The network is diffusers' `WanTransformer3DModel`. One file holds all that the engine must know of a family.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from accelerate import init_empty_weights
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from pydantic import Field
from torch import Tensor, nn

from tcbench.guidance import GuidanceKind
from tcbench.models.adapter import Adapter, Family, Gated, Modulation, Text, TransformerBlock
from tcbench.models.specs import TextSpec, VideoSpec
from tcbench.models.text_adapter import Cross
from tcbench.shapes import BlockShape, Macs, ModelShape, cross_attention, mlp, self_attention

FREQUENCIES = 256


class WanSpec(VideoSpec, TextSpec):
    """A Wan; it learned no null caption."""

    guidance_kind: ClassVar[GuidanceKind] = "two_passes"

    family: Literal["wan"] = "wan"
    null_caption: bool = False
    mlp_width: int = Field(gt=0)

    @property
    def shape(self) -> ModelShape:
        """All that costing and planning need to know."""
        width, tokens, text = self.width, self.num_tokens, self.caption_tokens
        cross = cross_attention(width, text, normed=True)
        block = BlockShape((self_attention(width), cross, mlp(width, self.mlp_width)))
        ends = (self.in_channels + self.out_channels) * self.patch_size**2 * width * tokens
        return ModelShape(
            blocks=(block,) * self.num_blocks,
            num_tokens=tokens,
            width=width,
            grid=self.grid,
            latent_shape=self.latent_shape,
            output_shape=(self.out_channels, *self.latent_shape[1:]),
            frames=self.sample_frames,
            outer=Macs(ends + FREQUENCIES * width + width**2 + 6 * width**2, width * tokens),
            once=Macs(text * (self.caption_channels * width + width**2) + self.num_blocks * cross.text_macs),
        )


@dataclass(frozen=True)
class WanContext:
    """Projected captions, and their keys and values by block."""

    text_RTD: Tensor
    keys_values: Mapping[TransformerBlock, tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class WanCondition:
    """Modulation of all blocks [R, 6, D], timestep embedding [R, D], and the captions."""

    modulation_R6D: Tensor
    timestep_RD: Tensor
    context: WanContext


class WanAdapter(Adapter):
    """Block-wise access to a Wan."""

    spec: WanSpec
    refiner_layers = r"attn1\.(to_q|to_k|to_v|to_out\.0)|attn2\.(to_q|to_out\.0)|ffn\.net\.(0\.proj|2)"

    def __init__(self, model: WanTransformer3DModel, spec: WanSpec) -> None:
        super().__init__(model, spec)
        latent = torch.empty(1, *spec.latent_shape, device="meta")
        self.rotary = tuple(table[0, :, 0] for table in model.rope(latent))

    def blocks_of(self, model: Any) -> list[TransformerBlock]:
        return list(model.blocks)

    def drop(self, prompt: Text, where_R: Tensor) -> Text:
        assert prompt.negative is not None
        where = where_R[:, None, None].to(prompt.states_RTC.device)
        states = torch.where(where, prompt.negative.states_RTC, prompt.states_RTC)
        return Text(states, prompt.mask_RT, prompt.negative)

    def prepare(self, prompt: Text) -> WanContext:
        text = self.model.condition_embedder.text_embedder(prompt.to(self.device, self.dtype).states_RTC)
        keys_values = {}
        for block, on_full_steps in zip(*self._by_step, strict=True):
            keys_values[block] = keys_values[on_full_steps] = self._text_keys_values(block, text)
        return WanContext(text, keys_values)

    def condition(self, timestep_R: Tensor, context: WanContext) -> WanCondition:
        embedder = self.model.condition_embedder
        timestep = embedder.time_embedder(embedder.timesteps_proj(timestep_R).to(self.dtype))
        modulation = embedder.time_proj(embedder.act_fn(timestep)).unflatten(1, (6, -1))
        return WanCondition(modulation, timestep, context)

    def plain(self, latent: Tensor, timestep_R: Tensor, prompt: Text) -> Tensor:
        return self.model(latent, timestep_R, prompt.states_RTC).sample

    def embed(self, latent: Tensor, context: WanContext) -> Tensor:
        return self.model.patch_embedding(latent).flatten(2).transpose(1, 2).contiguous()

    def final_modulation(self, condition: WanCondition) -> tuple[Tensor, Tensor]:
        shift, scale = (self.model.scale_shift_table + condition.timestep_RD[:, None]).chunk(2, dim=1)
        return shift, scale

    def final_layer(self, h_RND: Tensor) -> Tensor:
        patch = self.spec.patch_size
        x = self.model.proj_out(h_RND).unflatten(2, (patch, patch, -1))
        x = x.unflatten(1, (self.spec.sample_frames, *self.spec.grid))  # [R, F, h, w, p, q, C]
        return x.permute(0, 6, 1, 2, 4, 3, 5).flatten(5).flatten(3, 4)

    def modulation(self, block: TransformerBlock, condition: WanCondition) -> dict[str, Gated]:
        parts = (block.scale_shift_table + condition.modulation_R6D).chunk(6, dim=1)
        context = condition.context
        keys, values = context.keys_values.get(block) or self._text_keys_values(block, context.text_RTD)
        return {"attn": Modulation(*parts[:3]), "cross": Cross(keys, values, None), "mlp": Modulation(*parts[3:])}

    def norm(self, block: TransformerBlock, part: str) -> nn.Module:
        return {"attn": block.norm1, "cross": block.norm2, "mlp": block.norm3}[part]

    def part_input(self, block: TransformerBlock, part: str, x_RKD: Tensor, gated: Any) -> Tensor:
        if part == "cross":
            return self.norm(block, part)(x_RKD)
        return super().part_input(block, part, x_RKD, gated)

    def queries(self, block: TransformerBlock, h_RKD: Tensor, index_RK: Tensor | None = None) -> Tensor:
        return self._rotate(self._heads(block.attn1.norm_q(block.attn1.to_q(h_RKD))), index_RK)

    def keys_values(
        self, block: TransformerBlock, h_RKD: Tensor, index_RK: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        keys = self._heads(block.attn1.norm_k(block.attn1.to_k(h_RKD)))
        return self._rotate(keys, index_RK), self._heads(block.attn1.to_v(h_RKD))

    def text_queries(self, block: TransformerBlock, h_RKD: Tensor) -> Tensor:
        return self._heads(block.attn2.norm_q(block.attn2.to_q(h_RKD)))

    def pointwise(self, block: TransformerBlock, h_RKD: Tensor) -> Tensor:
        return block.ffn(h_RKD)

    def _text_keys_values(self, block: TransformerBlock, text_RTD: Tensor) -> tuple[Tensor, Tensor]:
        keys = block.attn2.norm_k(block.attn2.to_k(text_RTD))
        return self._heads(keys), self._heads(block.attn2.to_v(text_RTD))

    def _rotate(self, x: Tensor, index_RK: Tensor | None) -> Tensor:
        """Neighbouring channels turned to their tokens' positions, [R, heads, K, head_dim]."""
        tables = (table.to(x.device) for table in self.rotary)
        cos, sin = (table if index_RK is None else table[index_RK][:, None] for table in tables)
        first, second = x.unflatten(-1, (-1, 2)).unbind(-1)
        cos, sin = cos[..., 0::2], sin[..., 1::2]
        return torch.stack([first * cos - second * sin, first * sin + second * cos], dim=-1).flatten(-2)


def _skeleton(spec: WanSpec) -> nn.Module:
    with init_empty_weights():
        return WanTransformer3DModel(
            patch_size=(1, spec.patch_size, spec.patch_size),
            num_attention_heads=spec.num_heads,
            attention_head_dim=spec.head_dim,
            in_channels=spec.in_channels,
            out_channels=spec.out_channels,
            text_dim=spec.caption_channels,
            freq_dim=FREQUENCIES,
            ffn_dim=spec.mlp_width,
            num_layers=spec.num_blocks,
            eps=spec.norm_eps,
        ).eval()


def _initial_value(name: str, shape: torch.Size, generator: torch.Generator, zero_init: bool) -> Tensor:
    if "norm" in name and name.endswith("weight"):
        return 1 + 0.1 * torch.randn(shape, generator=generator)
    return torch.randn(shape, generator=generator) * (0.05 if len(shape) == 1 else shape[-1] ** -0.5)


FAMILY = Family(WanAdapter, _skeleton, _initial_value, lambda state, path: state)

TINY_WAN = WanSpec(
    name="tiny-wan",
    num_blocks=3,
    num_heads=2,
    head_dim=24,
    sample_frames=2,
    sample_height=8,
    sample_width=8,
    in_channels=4,
    out_channels=4,
    guided_channels=4,
    caption_channels=32,
    caption_tokens=12,
    mlp_width=140,
)
