"""Open-Sora-Plan v1.3 (Lin et al. 2024): text-to-video, 3D rotary positions, skiparse attention.

The network is diffusers' `AllegroTransformer3DModel`, whose names and numerics are those of Open-Sora-Plan v1.2 and
v1.3 (PKU-YuanGroup/Open-Sora-Plan), with v1.3's attention. Tokens are ordered frame, row, column. In all but the first
and last blocks a token attends to a quarter of all tokens: in even blocks to every fourth (`single skip`), in odd ones
to every fourth group of four (`group skip`).

Who attends to whom is a property of places, so a recomputed token keeps its group whatever the other tokens are: its
attention is masked. Masked products are computed and charged; a dense quarter would need equal counts per group.
"""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import init_empty_weights
from diffusers.models.embeddings import get_3d_rotary_pos_embed_allegro
from diffusers.models.transformers.transformer_allegro import AllegroTransformer3DModel
from torch import Tensor, nn

from tcbench.models.adapter import Family, Text, TransformerBlock, attention_maps
from tcbench.models.specs import SPARSE_GROUPS, OpenSoraPlanSpec
from tcbench.models.text_adapter import TextAdapter, TextContext, add_null_caption, initial_value
from tcbench.tensors.groups import Groups, group_of, join_groups, split_groups


def groups_of(block: int) -> Groups:
    """A sparse block's groups: every fourth token, or every fourth run of four."""
    return SPARSE_GROUPS, SPARSE_GROUPS if block % 2 else 1


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions on three axes (Su et al. 2021), a third of the channels each, as diffusers computes them.

    Args:
        x: [R, heads, K, head_dim].
        cos, sin: broadcastable to x.
    """
    first, second = x.unflatten(-1, (3, 2, -1)).unbind(-2)
    turned = torch.stack([-second, first], dim=-2).flatten(-3)
    return (x.float() * cos + turned.float() * sin).to(x.dtype)


class SkiparseAttention:
    """An attention processor for diffusers: rotary positions, then attention in groups; `block` None is dense."""

    def __init__(self, block: int | None) -> None:
        self.block = block

    def __call__(self, attn: Any, hidden_states: Tensor, image_rotary_emb: Any, **_: Any) -> Tensor:
        """Self-attention of all tokens, projected: [R, N, D]."""
        heads = [
            projection(hidden_states).unflatten(2, (attn.heads, -1)).transpose(1, 2)
            for projection in (attn.to_q, attn.to_k, attn.to_v)
        ]
        query, key = (_rotate(x, *image_rotary_emb) for x in heads[:2])
        return attn.to_out[0](attend_in_groups(query, key, heads[2], self.block).transpose(1, 2).flatten(2))


def attend_in_groups(queries: Tensor, keys: Tensor, values: Tensor, block: int | None) -> Tensor:
    """Attention of all tokens, [R, heads, N, head_dim], inside the groups of a sparse block; None: in one group."""
    if block is None:
        return F.scaled_dot_product_attention(queries, keys, values)
    queries, keys, values = (split_groups(x, groups_of(block), 2) for x in (queries, keys, values))
    return join_groups(F.scaled_dot_product_attention(queries, keys, values), groups_of(block), 2)


class OpenSoraPlanAdapter(TextAdapter):
    """Block-wise access to an Open-Sora-Plan."""

    spec: OpenSoraPlanSpec
    rotary: tuple[Tensor, Tensor]

    def __init__(self, model: AllegroTransformer3DModel, spec: OpenSoraPlanSpec) -> None:
        super().__init__(model, spec)
        self.rotary = rotary_positions(spec, self.device)

    def plain(self, latent: Tensor, timestep_R: Tensor, prompt: Text) -> Tensor:
        """The model's own forward: [R, out_channels, F, H, W]."""
        return self.model(
            latent,
            encoder_hidden_states=prompt.states_RTC,
            timestep=timestep_R,
            encoder_attention_mask=prompt.mask_RT,
            image_rotary_emb=self.rotary,
        ).sample

    def embed(self, latent: Tensor, context: TextContext) -> Tensor:
        """Patches of all frames, [R, N, D]."""
        patches = self.model.pos_embed(latent.transpose(1, 2).flatten(0, 1))
        return patches.unflatten(0, (len(latent), -1)).flatten(1, 2)

    def groups(self, block: TransformerBlock) -> Groups | None:
        """(count, stride) of a sparse block's groups."""
        number = block.attn1.processor.block
        return None if number is None else groups_of(number)

    def queries(self, block: TransformerBlock, h_RKD: Tensor, index_RK: Tensor | None = None) -> Tensor:
        """Self-attention's queries of some tokens, turned to their positions."""
        return _rotate(super().queries(block, h_RKD), *self._positions(index_RK))

    def keys_values(
        self, block: TransformerBlock, h_RKD: Tensor, index_RK: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Self-attention's keys, turned to their positions, and values of some tokens."""
        keys, values = super().keys_values(block, h_RKD)
        return _rotate(keys, *self._positions(index_RK)), values

    def mix(
        self,
        block: TransformerBlock,
        h_RKD: Tensor,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        index_RK: Tensor | None = None,
        context_RC: Tensor | None = None,
    ) -> Tensor:
        """Self-attention from its queries on: of all tokens group by group, of some with a mask."""
        sparse = block.attn1.processor.block
        if sparse is None or (index_RK is None and context_RC is None):
            mixed = attend_in_groups(queries, keys, values, sparse)
        else:
            everyone = torch.arange(self.shape.num_tokens, device=queries.device)[None]
            asking = group_of(everyone if index_RK is None else index_RK, groups_of(sparse))
            asked = group_of(everyone if context_RC is None else context_RC, groups_of(sparse))
            mask = (asking[:, :, None] == asked[:, None])[:, None]
            mixed = F.scaled_dot_product_attention(queries, keys, values, mask)
        return block.attn1.to_out[0](mixed.transpose(1, 2).flatten(2))

    def attention_received(self, block: TransformerBlock, queries: Tensor, keys: Tensor) -> Tensor:
        """Column sums of the head-mean map over all tokens, float32 [R, N]; in a sparse block from the own group."""
        sparse = block.attn1.processor.block
        if sparse is None:
            return super().attention_received(block, queries, keys)
        queries, keys = (split_groups(x, groups_of(sparse), 2) for x in (queries, keys))
        received = torch.stack([weights_RQN.sum(dim=1) for weights_RQN in attention_maps(queries, keys)]).sum(dim=0)
        return join_groups(received, groups_of(sparse), 1)

    def final_layer(self, h_RND: Tensor) -> Tensor:
        """The final linear layer and un-patching: [R, out_channels, F, H, W]."""
        patch = self.spec.patch_size
        x = self.model.proj_out(h_RND).unflatten(2, (patch, patch, -1))
        x = x.unflatten(1, (self.spec.sample_frames, *self.spec.grid))  # [R, F, h, w, p, q, C]
        return x.permute(0, 6, 1, 2, 4, 3, 5).flatten(5).flatten(3, 4)

    def _positions(self, index_RK: Tensor | None) -> tuple[Tensor, Tensor]:
        """(cos, sin) of some tokens, broadcastable to [R, heads, K, head_dim]."""
        if index_RK is None:
            return self.rotary
        cos, sin = (table[index_RK][:, None] for table in self.rotary)
        return cos, sin


def rotary_positions(spec: OpenSoraPlanSpec, device: torch.device | str) -> tuple[Tensor, Tensor]:
    """(cos, sin) of every token, float32 [N, head_dim]: frame, row and column have a third of the channels each."""
    axes = get_3d_rotary_pos_embed_allegro(
        spec.head_dim, ((0, 0), spec.grid), spec.grid, spec.sample_frames, device=torch.device("cpu")
    )[:3]
    places = torch.cartesian_prod(*(torch.arange(len(cos)) for cos, _ in axes)).unbind(1)
    tables = zip(*((cos[place], sin[place]) for (cos, sin), place in zip(axes, places, strict=True)), strict=True)
    cos, sin = (torch.cat(parts, dim=1).to(device) for parts in tables)
    return cos, sin


# --- the network


def _skeleton(spec: OpenSoraPlanSpec) -> nn.Module:
    with init_empty_weights():
        model = AllegroTransformer3DModel(
            patch_size=spec.patch_size,
            num_attention_heads=spec.num_heads,
            attention_head_dim=spec.head_dim,
            in_channels=spec.in_channels,
            out_channels=spec.out_channels,
            num_layers=spec.num_blocks,
            cross_attention_dim=spec.width,
            sample_height=spec.sample_height,
            sample_width=spec.sample_width,
            sample_frames=spec.sample_frames,
            norm_eps=spec.norm_eps,
            caption_channels=spec.caption_channels,
        )
    for number, block in enumerate(model.transformer_blocks):
        block.attn1.set_processor(SkiparseAttention(None if number in spec.dense_blocks else number))
    add_null_caption(model, spec)
    return model.eval()


def _to_diffusers(state: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    return state


FAMILY = Family(OpenSoraPlanAdapter, _skeleton, initial_value, _to_diffusers)
