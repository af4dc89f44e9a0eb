"""A family like FLUX.1-dev: text and image attend jointly, and the network reads the guidance scale.

The first blocks are double: text and image have weights of their own. In the single blocks after them attention and MLP
run side by side into one projection.

The network is diffusers' `FluxTransformer2DModel`. The stream is [text | image]; both have their places in it.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from accelerate import init_empty_weights
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
from pydantic import Field
from torch import Tensor, nn

from tcbench.guidance import GuidanceKind
from tcbench.models.adapter import Adapter, Family, Modulation, Text, TransformerBlock
from tcbench.models.specs import ImageSpec, TextSpec
from tcbench.shapes import BlockShape, Macs, ModelShape, PartShape, mlp, self_attention

FREQUENCIES = 256


class FluxSpec(ImageSpec, TextSpec):
    """A FLUX.1-dev; of its blocks the first `double_blocks` are double."""

    guidance_kind: ClassVar[GuidanceKind] = "distilled"

    family: Literal["flux"] = "flux"
    null_caption: bool = False
    double_blocks: int = Field(gt=0)
    pooled_channels: int = Field(gt=0)
    axes: tuple[int, int, int]

    @property
    def shape(self) -> ModelShape:
        """All that costing and planning need to know."""
        width = self.width
        double = BlockShape((self_attention(width), mlp(width, 4 * width)), modulation=Macs(2 * 6 * width**2))
        # a query, the MLP's first layer, and a projection of both
        side_by_side = Macs((1 + 4 + 5) * width**2, width)
        single = BlockShape(
            (PartShape("single", "mix", side_by_side, Macs(2 * width**2), attended=width),),
            modulation=Macs(3 * width**2),
        )
        ends = (self.in_channels + self.out_channels) * self.patch_size**2 * width * self.num_tokens
        # timestep, guidance and pooled caption have an MLP each; the last modulation has a linear layer
        conditioning = 2 * (FREQUENCIES * width + width**2) + self.pooled_channels * width + width**2 + 2 * width**2
        return ModelShape(
            blocks=(double,) * self.double_blocks + (single,) * (self.num_blocks - self.double_blocks),
            num_tokens=self.num_tokens,
            width=width,
            grid=self.grid,
            latent_shape=self.latent_shape,
            output_shape=(self.out_channels, *self.latent_shape[1:]),
            joint_text=self.caption_tokens,
            outer=Macs(ends + conditioning, width * self.num_tokens),
            once=Macs(self.caption_tokens * self.caption_channels * width),
        )


@dataclass(frozen=True)
class FluxContext:
    """Embedded captions [R, T, D], their pooled vectors [R, C] and the guidance scale by row."""

    text_RTD: Tensor
    pooled_RC: Tensor
    scale_R: Tensor


@dataclass(frozen=True)
class Joint:
    """Modulation of the text's tokens and of the image's."""

    text: Modulation
    image: Modulation


class FluxAdapter(Adapter):
    """Block-wise access to a FLUX."""

    spec: FluxSpec
    refiner_layers = r"attn\.(to_q|to_k|to_v|to_out\.0)|ff\.net\.(0\.proj|2)|proj_mlp|proj_out"

    def __init__(self, model: FluxTransformer2DModel, spec: FluxSpec) -> None:
        super().__init__(model, spec)
        rows, columns = spec.grid
        places = torch.cartesian_prod(torch.arange(1.0), torch.arange(float(rows)), torch.arange(float(columns)))
        self.text_places, self.image_places = torch.zeros(spec.caption_tokens, 3), places
        self.positions = model.pos_embed(torch.cat([self.text_places, places]))

    def blocks_of(self, model: Any) -> list[TransformerBlock]:
        return [*model.transformer_blocks, *model.single_transformer_blocks]

    def drop(self, prompt: Text, where_R: Tensor) -> Text:
        """Nothing is dropped: the model was distilled, and is trained on as it is."""
        return prompt

    def prepare(self, prompt: Text) -> FluxContext:
        prompt = prompt.to(self.device, self.dtype)
        assert prompt.pooled_RC is not None and prompt.guidance_scale is not None
        scale = torch.full((len(prompt),), prompt.guidance_scale, device=self.device, dtype=self.dtype)
        return FluxContext(self.model.context_embedder(prompt.states_RTC), prompt.pooled_RC, scale)

    def condition(self, timestep_R: Tensor, context: FluxContext) -> Tensor:
        """The embedding of timestep, guidance scale and pooled caption, [R, D]."""
        times = len(timestep_R) // len(context.scale_R)
        timestep = (timestep_R / 1000).to(self.dtype) * 1000  # the network takes sigma
        scale, pooled = context.scale_R.repeat(times) * 1000, context.pooled_RC.repeat(times, 1)
        return self.model.time_text_embed(timestep, scale, pooled)

    def plain(self, latent: Tensor, timestep_R: Tensor, prompt: Text) -> Tensor:
        packed = self.model(
            hidden_states=self._pack(latent),
            encoder_hidden_states=prompt.states_RTC,
            pooled_projections=prompt.pooled_RC,
            timestep=timestep_R / 1000,
            img_ids=self.image_places,
            txt_ids=self.text_places,
            guidance=torch.full((len(latent),), prompt.guidance_scale),
        ).sample
        return self._unpack(packed)

    def embed(self, latent: Tensor, context: FluxContext) -> Tensor:
        return torch.cat([context.text_RTD, self.model.x_embedder(self._pack(latent))], dim=1)

    def final_modulation(self, condition: Tensor) -> tuple[Tensor, Tensor]:
        scale, shift = self.model.norm_out.linear(self.model.norm_out.silu(condition))[:, None].chunk(2, dim=2)
        return shift, scale

    def unembed(self, x_RND: Tensor, condition: Tensor) -> Tensor:
        shift, scale = self.final_modulation(condition)
        image = x_RND[:, self.shape.joint_text :]
        return self.final_layer(self.model.norm_out.norm(image) * (1 + scale) + shift)

    def final_layer(self, h_RND: Tensor) -> Tensor:
        return self._unpack(self.model.proj_out(h_RND))

    def modulation(self, block: TransformerBlock, condition: Tensor) -> dict[str, Any]:
        if not _is_double(block):
            return {"single": Modulation(*_parts(block.norm, condition, 3))}
        image, text = _parts(block.norm1, condition, 6), _parts(block.norm1_context, condition, 6)
        return {
            "attn": Joint(Modulation(*text[:3]), Modulation(*image[:3])),
            "mlp": Joint(Modulation(*text[3:]), Modulation(*image[3:])),
        }

    def norm(self, block: TransformerBlock, part: str) -> nn.Module:
        return {"single": lambda: block.norm.norm, "attn": lambda: block.norm1.norm, "mlp": lambda: block.norm2}[part]()

    def part_input(self, block: TransformerBlock, part: str, x_RKD: Tensor, gated: Any) -> Tensor:
        if part == "single":
            return super().part_input(block, part, x_RKD, gated)
        text, image = self._split(x_RKD)
        of_text = block.norm1_context.norm if part == "attn" else block.norm2_context
        text = of_text(text) * (1 + gated.text.scale) + gated.text.shift
        return torch.cat([text, self.norm(block, part)(image) * (1 + gated.image.scale) + gated.image.shift], dim=1)

    def gate(self, gated: Any, value_RKD: Tensor) -> Tensor:
        if isinstance(gated, Modulation):
            return super().gate(gated, value_RKD)
        text, image = self._split(value_RKD)
        return torch.cat([gated.text.gate * text, gated.image.gate * image], dim=1)

    def queries(self, block: TransformerBlock, h_RKD: Tensor, index_RK: Tensor | None = None) -> Tensor:
        attn = block.attn
        if not _is_double(block):
            return self._rotate(attn.norm_q(self._heads(attn.to_q(h_RKD))), index_RK)
        text, image = self._split(h_RKD)
        text, image = attn.norm_added_q(self._heads(attn.add_q_proj(text))), attn.norm_q(self._heads(attn.to_q(image)))
        return self._rotate(torch.cat([text, image], dim=2), index_RK)

    def keys_values(
        self, block: TransformerBlock, h_RKD: Tensor, index_RK: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        attn = block.attn
        if not _is_double(block):
            keys, values = attn.norm_k(self._heads(attn.to_k(h_RKD))), self._heads(attn.to_v(h_RKD))
            return self._rotate(keys, index_RK), values
        text, image = self._split(h_RKD)
        keys = [attn.norm_added_k(self._heads(attn.add_k_proj(text))), attn.norm_k(self._heads(attn.to_k(image)))]
        values = [self._heads(attn.add_v_proj(text)), self._heads(attn.to_v(image))]
        return self._rotate(torch.cat(keys, dim=2), index_RK), torch.cat(values, dim=2)

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
        mixed = F.scaled_dot_product_attention(queries, keys, values).transpose(1, 2).flatten(2)
        if not _is_double(block):
            return block.proj_out(torch.cat([mixed, block.act_mlp(block.proj_mlp(h_RKD))], dim=2))
        text, image = self._split(mixed)
        image = block.attn.to_out[0](image.contiguous())
        return torch.cat([block.attn.to_add_out(text.contiguous()), image], dim=1)

    def pointwise(self, block: TransformerBlock, h_RKD: Tensor) -> Tensor:
        text, image = self._split(h_RKD)
        return torch.cat([block.ff_context(text), block.ff(image)], dim=1)

    def _split(self, x_RKD: Tensor) -> tuple[Tensor, Tensor]:
        """The text's tokens and the image's."""
        text = self.shape.joint_text
        return x_RKD[:, :text], x_RKD[:, text:]

    def _rotate(self, x: Tensor, index_RK: Tensor | None) -> Tensor:
        """Neighbouring channels turned to their tokens' positions, [R, heads, K, head_dim]."""
        tables = (table.to(x.device) for table in self.positions)
        cos, sin = (table if index_RK is None else table[index_RK][:, None] for table in tables)
        first, second = x.unflatten(-1, (-1, 2)).unbind(-1)
        turned = torch.stack([-second, first], dim=-1).flatten(-2)
        return (x.float() * cos + turned.float() * sin).to(x.dtype)

    def _pack(self, latent: Tensor) -> Tensor:
        """Patches as channels, [R, N, 4 C]."""
        patch = self.spec.patch_size
        x = latent.unflatten(3, (-1, patch)).unflatten(2, (-1, patch))  # [R, C, h, p, w, q]
        return x.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)

    def _unpack(self, x_RNC: Tensor) -> Tensor:
        patch = self.spec.patch_size
        x = x_RNC.unflatten(2, (-1, patch, patch)).unflatten(1, self.spec.grid)  # [R, h, w, C, p, q]
        return x.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)


def _is_double(block: TransformerBlock) -> bool:
    return hasattr(block, "norm1_context")


def _parts(norm: Any, condition: Tensor, count: int) -> tuple[Tensor, ...]:
    return norm.linear(norm.silu(condition))[:, None].chunk(count, dim=2)


def _skeleton(spec: FluxSpec) -> nn.Module:
    with init_empty_weights():
        return FluxTransformer2DModel(
            patch_size=1,
            in_channels=spec.in_channels * spec.patch_size**2,
            num_layers=spec.double_blocks,
            num_single_layers=spec.num_blocks - spec.double_blocks,
            attention_head_dim=spec.head_dim,
            num_attention_heads=spec.num_heads,
            joint_attention_dim=spec.caption_channels,
            pooled_projection_dim=spec.pooled_channels,
            guidance_embeds=True,
            axes_dims_rope=spec.axes,
        ).eval()


def _initial_value(name: str, shape: torch.Size, generator: torch.Generator, zero_init: bool) -> Tensor:
    if len(shape) == 1 and "norm_" in name:
        return 1 + 0.1 * torch.randn(shape, generator=generator)
    return torch.randn(shape, generator=generator) * (0.05 if len(shape) == 1 else shape[-1] ** -0.5)


FAMILY = Family(FluxAdapter, _skeleton, _initial_value, lambda state, path: state)

TINY_FLUX = FluxSpec(
    name="tiny-flux",
    num_blocks=3,
    double_blocks=1,
    num_heads=2,
    head_dim=24,
    sample_size=16,
    in_channels=4,
    out_channels=4,
    guided_channels=4,
    caption_channels=32,
    caption_tokens=6,
    pooled_channels=20,
    axes=(8, 8, 8),
)
