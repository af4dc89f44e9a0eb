"""Wan 2.1 (Wan Team 2025): text-to-video, 3-D rotary positions, normed cross-attention, trained by flow matching.

The network is diffusers' `WanTransformer3DModel`, which computes norms, gates and modulation in float32 whatever its
dtype, and so does the adapter. Captions are padded with zeros, and padding is looked at as any token. Guidance has a
pass for each half, with caches and plans of its own.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from torch import Tensor, nn

from tcbench.errors import UserError
from tcbench.models.adapter import Adapter, Family, Gated, Modulation, Text, TransformerBlock
from tcbench.models.flux import initial_value
from tcbench.models.layers import turn_pairs
from tcbench.models.specs import FREQUENCIES, WanSpec
from tcbench.models.text_adapter import Cross


@dataclass(frozen=True)
class WanContext:
    """Projected captions, and their keys and values by block."""

    text_RTD: Tensor
    keys_values: Mapping[TransformerBlock, tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class WanCondition:
    """Modulation of all blocks, float32 [R, 6, D], timestep embedding [R, D], and the captions."""

    modulation_R6D: Tensor
    timestep_RD: Tensor
    context: WanContext

    def __getitem__(self, rows: slice) -> "WanCondition":
        return WanCondition(self.modulation_R6D[rows], self.timestep_RD[rows], self.context)


class WanAdapter(Adapter):
    """Block-wise access to a Wan 2.1."""

    spec: WanSpec
    compiles = True
    refiner_layers = r"attn1\.(to_q|to_k|to_v|to_out\.0)|attn2\.(to_q|to_out\.0)|ffn\.net\.(0\.proj|2)"

    def __init__(self, model: WanTransformer3DModel, spec: WanSpec) -> None:
        super().__init__(model, spec)
        cos, sin = (table[0, :, 0] for table in model.rope(torch.empty(1, *spec.latent_shape, device="meta")))
        self.rotary = cos, sin

    def blocks_of(self, model: Any) -> list[TransformerBlock]:
        """A model's blocks in the order they run."""
        return list(model.blocks)

    @property
    def dtype(self) -> torch.dtype:
        """What the model computes in; norms and modulation stay in float32."""
        return self.model.patch_embedding.weight.dtype

    # --- conditioning

    def drop(self, prompt: Text, where_R: Tensor) -> Text:
        """Captions, some of them replaced by the prompts' negative caption.

        Raises:
            UserError: the prompts bring no negative one.
        """
        prompt, where = prompt.to(self.device, self.dtype), where_R.to(self.device)[:, None]
        if prompt.negative is None:
            raise UserError(f"{self.spec.name}: guidance needs a negative prompt; encode one with the prompts")
        states = torch.where(where[..., None], prompt.negative.states_RTC, prompt.states_RTC)
        return replace(prompt, states_RTC=states, mask_RT=torch.where(where, prompt.negative.mask_RT, prompt.mask_RT))

    def prepare(self, prompt: Text) -> WanContext:
        """Project the captions and make their keys and values for every block."""
        text = self.model.condition_embedder.text_embedder(prompt.to(self.device, self.dtype).states_RTC)
        keys_values = {}
        for block, on_full_steps in zip(*self._by_step, strict=True):  # LoRA leaves keys and values of the text alone
            keys_values[block] = keys_values[on_full_steps] = self._text_keys_values(block, text)
        return WanContext(text, keys_values)

    def condition(self, timestep_R: Tensor, context: WanContext) -> WanCondition:
        """Embedding and modulation, shared by all blocks."""
        embedder = self.model.condition_embedder
        frequencies = embedder.timesteps_proj(timestep_R).to(next(embedder.time_embedder.parameters()).dtype)
        timestep = embedder.time_embedder(frequencies).to(self.dtype)
        modulation = embedder.time_proj(embedder.act_fn(timestep)).unflatten(1, (6, -1))
        return WanCondition(modulation.float(), timestep, context)

    def plain(self, latent: Tensor, timestep_R: Tensor, prompt: Text) -> Tensor:
        """The model's own forward: [R, out_channels, F, H, W]."""
        return self.model(latent, timestep_R, prompt.states_RTC).sample

    # --- the ends

    def embed(self, latent: Tensor, context: WanContext) -> Tensor:
        """Patches of all frames, [R, N, D]."""
        return self.model.patch_embedding(latent).flatten(2).transpose(1, 2).contiguous()

    def final_modulation(self, condition: WanCondition) -> tuple[Tensor, Tensor]:
        """(shift, scale) before the final layer."""
        shift, scale = (self.model.scale_shift_table + condition.timestep_RD[:, None]).chunk(2, dim=1)
        return shift, scale

    def unembed(self, x_RND: Tensor, condition: WanCondition) -> Tensor:
        """The model's output: [R, out_channels, F, H, W]."""
        shift, scale = self.final_modulation(condition)
        return self.final_layer((self.model.norm_out(x_RND.float()) * (1 + scale) + shift).type_as(x_RND))

    def final_layer(self, h_RND: Tensor) -> Tensor:
        """The final linear layer and un-patching: [R, out_channels, F, H, W]."""
        patch = self.spec.patch_size
        x = self.model.proj_out(h_RND).unflatten(2, (patch, patch, -1))
        x = x.unflatten(1, (self.spec.sample_frames, *self.spec.grid))  # [R, F, h, w, p, q, C]
        return x.permute(0, 6, 1, 2, 4, 3, 5).flatten(5).flatten(3, 4)

    # --- a block

    def modulation(self, block: TransformerBlock, condition: WanCondition) -> dict[str, Gated]:
        """Shift, scale and gate of self-attention and MLP, and the text for cross-attention."""
        parts = (block.scale_shift_table + condition.modulation_R6D).chunk(6, dim=1)
        context = condition.context
        keys, values = context.keys_values.get(block) or self._text_keys_values(block, context.text_RTD)
        return {"attn": Modulation(*parts[:3]), "cross": Cross(keys, values, None), "mlp": Modulation(*parts[3:])}

    def norm(self, block: TransformerBlock, part: str) -> nn.Module:
        """The LayerNorm before a part."""
        return {"attn": block.norm1, "cross": block.norm2, "mlp": block.norm3}[part]

    def part_input(self, block: TransformerBlock, part: str, x_RKD: Tensor, gated: Any) -> Tensor:
        """Normalised input of a part, modulated but before cross-attention."""
        h = self.norm(block, part)(x_RKD.float())
        return (h if part == "cross" else h * (1 + gated.scale) + gated.shift).type_as(x_RKD)

    def gated_sum(self, x_RKD: Tensor, gated: Gated, value_RKD: Tensor) -> Tensor:
        """The stream behind a part, added in float32."""
        return super().gated_sum(x_RKD, gated, value_RKD).type_as(x_RKD)

    def queries(self, block: TransformerBlock, h_RKD: Tensor, index_RK: Tensor | None = None) -> Tensor:
        """Self-attention's queries of some tokens, turned to their positions."""
        return self._turned(self._heads(block.attn1.norm_q(block.attn1.to_q(h_RKD))), index_RK)

    def keys_values(
        self, block: TransformerBlock, h_RKD: Tensor, index_RK: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Self-attention's keys, turned to their positions, and values of some tokens."""
        keys = self._heads(block.attn1.norm_k(block.attn1.to_k(h_RKD)))
        return self._turned(keys, index_RK), self._heads(block.attn1.to_v(h_RKD))

    def text_queries(self, block: TransformerBlock, h_RKD: Tensor) -> Tensor:
        """Cross-attention's queries of some tokens."""
        return self._heads(block.attn2.norm_q(block.attn2.to_q(h_RKD)))

    def pointwise(self, block: TransformerBlock, h_RKD: Tensor) -> Tensor:
        """The MLP, token by token."""
        return block.ffn(h_RKD)

    def _text_keys_values(self, block: TransformerBlock, text_RTD: Tensor) -> tuple[Tensor, Tensor]:
        keys = block.attn2.norm_k(block.attn2.to_k(text_RTD))
        return self._heads(keys), self._heads(block.attn2.to_v(text_RTD))

    def _turned(self, x: Tensor, index_RK: Tensor | None) -> Tensor:
        """Heads turned to the positions of their tokens, [R, heads, K, head_dim]."""
        assert self.rotary is not None
        return turn_pairs(x, self.rotary, index_RK)


# --- the network


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


def _to_diffusers(state: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    return state


FAMILY = Family(WanAdapter, _skeleton, initial_value, _to_diffusers)
