"""What models that read captions share: the encoded text, cross-attention to it, and how their weights start."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from tcbench.errors import UserError
from tcbench.models.adapter import (
    Adapter,
    Gated,
    Modulation,
    Text,
    TransformerBlock,
)
from tcbench.models.layers import xavier_uniform
from tcbench.models.specs import TextSpec

MASKED = -10000.0  # what diffusers adds to the attention scores of padding


@dataclass(frozen=True)
class Cross:
    """What a block's cross-attention looks at: keys, values [R, heads, T, head_dim], any score bias [R, 1, 1, T]."""

    keys: Tensor
    values: Tensor
    bias: Tensor | None
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


def add_null_caption(model: nn.Module, spec: TextSpec) -> None:
    """Give a model on meta the parameter `null_caption` [T, C], if its spec has one."""
    if spec.null_caption:
        empty = torch.empty(spec.caption_tokens, spec.caption_channels, device="meta")
        model.register_parameter("null_caption", nn.Parameter(empty))


def initial_value(name: str, shape: torch.Size, generator: torch.Generator, zero_init: bool) -> Tensor:
    """The reference's `initialize_weights`; without `zero_init`, every layer shows in the output."""

    def normal(std: float) -> Tensor:
        return torch.randn(shape, generator=generator, device=generator.device) * std

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
