"""FLUX.1 (Black Forest Labs 2024): text-to-image, text and image attend jointly, trained by flow matching.

The network is diffusers' `FluxTransformer2DModel`. The stream is [text | image], and both have their places in it. In
the first, double blocks text and image have weights of their own and meet in attention. The single blocks after them
are parallel (`BlockShape.parallel`): attention and MLP take the same input and go through one projection, of which
either has its columns. dev was distilled to read the guidance scale; schnell reads none.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import init_empty_weights
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
from torch import Tensor, nn

from tcbench.models.adapter import Adapter, Family, Modulation, Text, TransformerBlock
from tcbench.models.layers import turn_pairs
from tcbench.models.specs import FluxSpec


@dataclass(frozen=True)
class FluxContext:
    """Embedded captions [R, T, D], their pooled vectors [R, C] and, if it is read, the guidance scale by row."""

    text_RTD: Tensor
    pooled_RC: Tensor
    scale_R: Tensor | None


@dataclass(frozen=True)
class Joint:
    """Modulation of the text's tokens and of the image's."""

    text: Modulation
    image: Modulation


class FluxAdapter(Adapter):
    """Block-wise access to a FLUX.1."""

    spec: FluxSpec
    compiles = True
    refiner_layers = r"attn\.(to_q|to_k|to_v|to_out\.0)|ff\.net\.(0\.proj|2)|proj_mlp|proj_out"

    def __init__(self, model: FluxTransformer2DModel, spec: FluxSpec) -> None:
        super().__init__(model, spec)
        self.places = token_places(spec, self.device)
        self.rotary = model.pos_embed(torch.cat(self.places))

    def blocks_of(self, model: Any) -> list[TransformerBlock]:
        """The double blocks, then the single ones."""
        return [*model.transformer_blocks, *model.single_transformer_blocks]

    def is_parallel(self, block: TransformerBlock) -> bool:
        """The single blocks are."""
        return not _is_double(block)

    # --- conditioning

    def drop(self, prompt: Text, where_R: Tensor) -> Text:
        """Nothing is dropped: the network was distilled to guide itself, and is trained on as it is."""
        return prompt

    def prepare(self, prompt: Text) -> FluxContext:
        """Embed the captions."""
        prompt, scale = prompt.to(self.device, self.dtype), None
        assert prompt.pooled_RC is not None
        if self.spec.reads_guidance:
            assert prompt.guidance_scale is not None
            scale = torch.full((len(prompt),), prompt.guidance_scale, device=self.device, dtype=self.dtype)
        return FluxContext(self.model.context_embedder(prompt.states_RTC), prompt.pooled_RC, scale)

    def condition(self, timestep_R: Tensor, context: FluxContext) -> Tensor:
        """The embedding of timestep, guidance scale and pooled caption, [R, D]."""
        times = len(timestep_R) // len(context.pooled_RC)
        timestep = timestep_R.to(self.dtype) / 1000 * 1000  # the network is shown sigma, in its own dtype
        pooled = context.pooled_RC.repeat(times, 1)
        if context.scale_R is None:
            return self.model.time_text_embed(timestep, pooled)
        return self.model.time_text_embed(timestep, context.scale_R.repeat(times) * 1000, pooled)

    def plain(self, latent: Tensor, timestep_R: Tensor, prompt: Text) -> Tensor:
        """The model's own forward: [R, out_channels, H, W]."""
        text_places, image_places = self.places
        guidance = None
        if self.spec.reads_guidance:
            assert prompt.guidance_scale is not None
            guidance = torch.full((len(latent),), prompt.guidance_scale, device=self.device)
        packed = self.model(
            hidden_states=pack(latent, self.spec.patch_size),
            encoder_hidden_states=prompt.states_RTC,
            pooled_projections=prompt.pooled_RC,
            timestep=timestep_R.to(self.dtype) / 1000,
            img_ids=image_places,
            txt_ids=text_places,
            guidance=guidance,
        ).sample
        return unpack(packed, self.spec)

    # --- the ends

    def embed(self, latent: Tensor, context: FluxContext) -> Tensor:
        """The text's tokens and those of the latents, [R, T + N, D]."""
        return torch.cat([context.text_RTD, self.model.x_embedder(pack(latent, self.spec.patch_size))], dim=1)

    def final_modulation(self, condition: Tensor) -> tuple[Tensor, Tensor]:
        """(shift, scale) before the final layer."""
        scale, shift = _parts(self.model.norm_out, condition, 2)
        return shift, scale

    def unembed(self, x_RND: Tensor, condition: Tensor) -> Tensor:
        """The model's output, of the image's tokens: [R, out_channels, H, W]."""
        shift, scale = self.final_modulation(condition)
        image = x_RND[:, self.shape.joint_text :]
        return self.final_layer(self.model.norm_out.norm(image) * (1 + scale) + shift)

    def final_layer(self, h_RND: Tensor) -> Tensor:
        """The final linear layer and un-patching: [R, out_channels, H, W]."""
        return unpack(self.model.proj_out(h_RND), self.spec)

    # --- a block

    def modulation(self, block: TransformerBlock, condition: Tensor) -> dict[str, Modulation | Joint]:
        """Shift, scale, gate by part: in double blocks of text and image apart, in single ones alike in both parts."""
        if not _is_double(block):
            shared = Modulation(*_parts(block.norm, condition, 3))
            return {"attn": shared, "mlp": shared}
        image, text = _parts(block.norm1, condition, 6), _parts(block.norm1_context, condition, 6)
        return {
            "attn": Joint(Modulation(*text[:3]), Modulation(*image[:3])),
            "mlp": Joint(Modulation(*text[3:]), Modulation(*image[3:])),
        }

    def norm(self, block: TransformerBlock, part: str) -> nn.Module:
        """The LayerNorm before a part, of the image's tokens where the text has its own."""
        if not _is_double(block):
            return block.norm.norm
        return block.norm1.norm if part == "attn" else block.norm2

    def part_input(self, block: TransformerBlock, part: str, x_RKD: Tensor, gated: Any) -> Tensor:
        """Normalised and modulated input of a part."""
        if not _is_double(block):
            return super().part_input(block, part, x_RKD, gated)
        text, image = self._split(x_RKD)
        of_text = block.norm1_context.norm if part == "attn" else block.norm2_context
        text = of_text(text) * (1 + gated.text.scale) + gated.text.shift
        return torch.cat([text, self.norm(block, part)(image) * (1 + gated.image.scale) + gated.image.shift], dim=1)

    def gate(self, gated: Any, value_RKD: Tensor) -> Tensor:
        """A part's output as it joins the residual stream."""
        if isinstance(gated, Modulation):
            return super().gate(gated, value_RKD)
        text, image = self._split(value_RKD)
        return torch.cat([gated.text.gate * text, gated.image.gate * image], dim=1)

    def queries(self, block: TransformerBlock, h_RKD: Tensor, index_RK: Tensor | None = None) -> Tensor:
        """Self-attention's queries of some tokens, turned to their positions."""
        attn = block.attn
        if not _is_double(block):
            return self._turned(self._normed(attn.norm_q, attn.to_q(h_RKD)), index_RK)
        text, image = self._apart(h_RKD)
        text = self._normed(attn.norm_added_q, attn.add_q_proj(text))
        return self._turned(torch.cat([text, self._normed(attn.norm_q, attn.to_q(image))], dim=2), index_RK)

    def keys_values(
        self, block: TransformerBlock, h_RKD: Tensor, index_RK: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Self-attention's keys, turned to their positions, and values of some tokens."""
        attn = block.attn
        if not _is_double(block):
            return self._turned(self._normed(attn.norm_k, attn.to_k(h_RKD)), index_RK), self._heads(attn.to_v(h_RKD))
        text, image = self._apart(h_RKD)
        of_text = self._normed(attn.norm_added_k, attn.add_k_proj(text))
        keys = [of_text, self._normed(attn.norm_k, attn.to_k(image))]
        values = [self._heads(attn.add_v_proj(text)), self._heads(attn.to_v(image))]
        return self._turned(torch.cat(keys, dim=2), index_RK), torch.cat(values, dim=2)

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
        """Self-attention from its queries on, projected; in a single block by its columns of the projection."""
        mixed = _attend(queries, keys, values)
        if not _is_double(block):
            return F.linear(mixed, block.proj_out.weight[:, : self.spec.width])
        text, image = self._apart(mixed)
        return torch.cat([block.attn.to_add_out(text), block.attn.to_out[0](image)], dim=1)

    def pointwise(self, block: TransformerBlock, h_RKD: Tensor) -> Tensor:
        """The MLP, token by token; in a single block by its columns of the projection, and with all of its bias."""
        if not _is_double(block):
            hidden = block.act_mlp(block.proj_mlp(h_RKD))
            return F.linear(hidden, block.proj_out.weight[:, self.spec.width :], block.proj_out.bias)
        text, image = self._apart(h_RKD)
        return torch.cat([block.ff_context(text), block.ff(image)], dim=1)

    def joined(
        self,
        block: TransformerBlock,
        h_RKD: Tensor,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        index_RK: Tensor | None = None,
        context_RC: Tensor | None = None,
    ) -> Tensor:
        """A single block's attention and MLP through their one projection."""
        hidden = block.act_mlp(block.proj_mlp(h_RKD))
        return block.proj_out(torch.cat([_attend(queries, keys, values), hidden], dim=2))

    def _split(self, x_RKD: Tensor) -> tuple[Tensor, Tensor]:
        """The text's tokens and the image's."""
        text = self.shape.joint_text
        return x_RKD[:, :text], x_RKD[:, text:]

    def _apart(self, x_RKD: Tensor) -> tuple[Tensor, Tensor]:
        """The same for linear layers, which round once more where their input is a view and has 16 bit."""
        text, image = self._split(x_RKD)
        return text.contiguous(), image.contiguous()

    def _normed(self, norm: nn.Module, x_RKD: Tensor) -> Tensor:
        """Heads that are normed one by one, [R, heads, K, head_dim]."""
        return norm(x_RKD.unflatten(2, (self.spec.num_heads, -1))).transpose(1, 2)

    def _turned(self, x: Tensor, index_RK: Tensor | None) -> Tensor:
        """Heads turned to the positions of their tokens, [R, heads, K, head_dim]."""
        assert self.rotary is not None
        return turn_pairs(x, self.rotary, index_RK)


def token_places(spec: FluxSpec, device: torch.device | str) -> tuple[Tensor, Tensor]:
    """Positions on three axes of the text's tokens, which all have the same, and of the image's: float32 [K, 3]."""
    rows, columns = (torch.arange(float(side), device=device) for side in spec.grid)
    image = torch.cartesian_prod(torch.zeros(1, device=device), rows, columns)
    return torch.zeros(spec.caption_tokens, 3, device=device), image


def pack(latent: Tensor, patch: int) -> Tensor:
    """Patches of latents [R, C, H, W] as the channels of tokens, [R, N, C patch^2]."""
    x = latent.unflatten(3, (-1, patch)).unflatten(2, (-1, patch))  # [R, C, h, p, w, q]
    return x.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def unpack(x_RNC: Tensor, spec: FluxSpec) -> Tensor:
    """Latents [R, C, H, W] of tokens that hold a patch each."""
    patch = spec.patch_size
    x = x_RNC.unflatten(2, (-1, patch, patch)).unflatten(1, spec.grid)  # [R, h, w, C, p, q]
    return x.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)


def _attend(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(queries, keys, values).transpose(1, 2).flatten(2)


def _is_double(block: TransformerBlock) -> bool:
    return hasattr(block, "norm1_context")


def _parts(norm: Any, condition: Tensor, count: int) -> tuple[Tensor, ...]:
    return norm.linear(norm.silu(condition))[:, None].chunk(count, dim=2)


# --- the network


def _skeleton(spec: FluxSpec) -> nn.Module:
    with init_empty_weights():
        return FluxTransformer2DModel(
            patch_size=1,
            in_channels=spec.in_channels * spec.patch_size**2,
            out_channels=spec.out_channels * spec.patch_size**2,
            num_layers=spec.double_blocks,
            num_single_layers=spec.num_blocks - spec.double_blocks,
            attention_head_dim=spec.head_dim,
            num_attention_heads=spec.num_heads,
            joint_attention_dim=spec.caption_channels,
            pooled_projection_dim=spec.pooled_channels,
            guidance_embeds=spec.reads_guidance,
            axes_dims_rope=spec.axes,
        ).eval()


def initial_value(name: str, shape: torch.Size, generator: torch.Generator, zero_init: bool) -> Tensor:
    """Every layer shows in the output; neither FLUX.1's nor Wan's own initialisation was published."""
    normal = torch.randn(shape, generator=generator, device=generator.device)
    if len(shape) == 1 and name.endswith("weight"):  # of a norm
        return 1 + 0.1 * normal
    return normal * (0.05 if len(shape) == 1 else shape[1:].numel() ** -0.5)


def _to_diffusers(state: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    return state


FAMILY = Family(FluxAdapter, _skeleton, initial_value, _to_diffusers)
