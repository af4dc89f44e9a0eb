"""DiT seen as the engine sees every model: blocks made of gated branches over tokens.

The weights and layers are diffusers' `DiTTransformer2DModel` (built by `tcbench.models.specs`, which also brings it to
the reference's numerics). This adapter only calls its sub-modules one by one, in the order of
`BasicTransformerBlock.forward`, so computing everything is bit-identical to calling the model.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel
from torch import Tensor

from tcbench.method import Macs, ModelShape
from tcbench.models.specs import ModelSpec

MAP_ELEMENTS = 1 << 26  # of an observed attention map, 256 MiB in float32

DiTBlock = Any
"""diffusers' `BasicTransformerBlock`, whose sub-modules depend on its arguments and so have no static types."""


@dataclass(frozen=True)
class Modulation:
    """adaLN-Zero's shift, scale and gate of one branch, each [R, 1, D]."""

    shift: Tensor
    scale: Tensor
    gate: Tensor


def dit_shape(spec: ModelSpec) -> ModelShape:
    """The shape of a DiT from its spec alone, without building it."""
    width, tokens = spec.width, spec.num_tokens
    patch_in, patch_out = (channels * spec.patch_size**2 for channels in (spec.in_channels, spec.out_channels))
    return ModelShape(
        num_blocks=spec.num_blocks,
        num_tokens=tokens,
        width=width,
        grid=(spec.grid, spec.grid),
        modulation=Macs(6 * width**2),
        outer=Macs(
            # patch convolution, timestep MLP from 256 frequencies, final modulation, final linear
            matmul=patch_in * width * tokens + 256 * width + width**2 + 2 * width**2 + patch_out * width * tokens,
            norm_elements=width * tokens,
        ),
    )


class DiTAdapter:
    """Block-wise access to a DiT. R rows, N tokens (any subset where noted by K), D width."""

    def __init__(self, model: DiTTransformer2DModel, spec: ModelSpec) -> None:
        self.model, self.spec = model, spec
        self.shape = dit_shape(spec)
        self.blocks: list[DiTBlock] = list(model.transformer_blocks)

    def condition(self, timestep_R: Tensor, label_R: Tensor) -> Tensor:
        """Timestep plus label embedding, [R, D]; computed once because all blocks share one embedder."""
        return self.blocks[0].norm1.emb(timestep_R, label_R, hidden_dtype=self.model.dtype)

    def embed(self, latent: Tensor) -> Tensor:
        """Patches with positions, [R, N, D]."""
        return self.model.pos_embed(latent)

    def modulation(self, block: DiTBlock, condition_RD: Tensor) -> dict[str, Modulation]:
        """The block's modulation by branch; per row, so independent of how many tokens are computed."""
        parts = block.norm1.linear(block.norm1.silu(condition_RD))[:, None].chunk(6, dim=2)
        return {"attn": Modulation(*parts[:3]), "mlp": Modulation(*parts[3:])}

    def branch_input(self, block: DiTBlock, branch: str, x_RKD: Tensor, part: Modulation) -> Tensor:
        """Normalised and modulated input of a branch, token by token."""
        norm = block.norm1.norm if branch == "attn" else block.norm3
        return norm(x_RKD) * (1 + part.scale) + part.shift

    def keys_values(self, block: DiTBlock, h_RKD: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of some tokens, each [R, heads, K, head_dim]."""
        attention = block.attn1
        return self._heads(attention.to_k(h_RKD)), self._heads(attention.to_v(h_RKD))

    def attend(self, block: DiTBlock, h_RKD: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Attention of some tokens over the given keys and values, projected: [R, K, D]."""
        return self.mix(block, self.queries(block, h_RKD), keys, values)

    def queries(self, block: DiTBlock, h_RKD: Tensor) -> Tensor:
        """Queries of some tokens, [R, heads, K, head_dim]."""
        return self._heads(block.attn1.to_q(h_RKD))

    def mix(self, block: DiTBlock, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Attention from its queries on, projected: [R, K, D]."""
        mixed = F.scaled_dot_product_attention(queries, keys, values)
        return block.attn1.to_out[0](mixed.transpose(1, 2).flatten(2))

    def attention_received(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Column sums of the head-mean attention map, float32 [R, N]: ToCa's s1 before it is normalised.

        A second pass beside the fused attention, whose output it leaves as it is. Queries go through in chunks, so that
        no more than `MAP_ELEMENTS` of the map exist at a time.
        """
        rows, heads, _, head_dim = queries.shape
        received = queries.new_zeros(rows, keys.shape[2], dtype=torch.float32)
        for chunk in queries.split(max(1, MAP_ELEMENTS // (rows * heads * keys.shape[2])), dim=2):
            weights = (chunk * head_dim**-0.5 @ keys.transpose(2, 3)).softmax(dim=3, dtype=torch.float32)
            received += weights.mean(dim=1).sum(dim=1)
        return received

    def mlp(self, block: DiTBlock, h_RKD: Tensor) -> Tensor:
        """The MLP, token by token."""
        return block.ff(h_RKD)

    def branch(self, block: DiTBlock, branch: str, x_RND: Tensor, part: Modulation) -> Tensor:
        """A whole branch before its gate, the given tokens attending to each other: [R, N, D]."""
        h = self.branch_input(block, branch, x_RND, part)
        return self.mlp(block, h) if branch == "mlp" else self.attend(block, h, *self.keys_values(block, h))

    def unembed(self, x_RND: Tensor, condition_RD: Tensor) -> Tensor:
        """Final layer and un-patching: [R, out_channels, H, W]."""
        model, side, patch = self.model, self.spec.grid, self.spec.patch_size
        shift, scale = model.proj_out_1(F.silu(condition_RD)).chunk(2, dim=1)
        x = model.proj_out_2(model.norm_out(x_RND) * (1 + scale[:, None]) + shift[:, None])
        x = x.unflatten(2, (patch, patch, -1)).unflatten(1, (side, side))  # [R, h, w, p, q, C]
        return x.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)

    def _heads(self, x_RKD: Tensor) -> Tensor:
        return x_RKD.unflatten(2, (self.spec.num_heads, -1)).transpose(1, 2)
