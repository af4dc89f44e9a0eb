"""A denoiser seen as the engine sees every model: blocks made of gated parts over tokens.

An adapter calls the sub-modules of a diffusers model one by one, in the order of its own forward, so computing
everything is bit-identical to calling the model. What differs between families (`dit`, `pixart`, `open_sora_plan`) is
what a row is conditioned on, how latents become tokens and back, and who attends to whom.

Conditioning goes through three hands. A *prompt* says what the rows shall show: class labels [R], or a `Text`. Once per
run `prepare` turns it into a *context*, which holds all that does not depend on the timestep. At every step `condition`
adds the timestep; what comes out only the adapter reads.
"""

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tcbench.models.specs import ModelSpec
from tcbench.shapes import Kind
from tcbench.tensors.groups import Groups

MAP_ELEMENTS = 1 << 26  # of an observed attention map, 256 MiB in float32

TransformerBlock = Any
"""diffusers' blocks, whose sub-modules depend on their arguments and so have no static types."""


@dataclass(frozen=True)
class Text:
    """Captions as a text encoder left them.

    Attributes:
        states_RTC: float [R, T, C].
        mask_RT: bool [R, T], True where a token counts.
        negative: what guidance steers away from (one row), for models that did not learn a null caption.
        pooled_RC: one vector a caption, float [R, C], for models that read one.
        guidance_scale: for models that were distilled to read it.
    """

    states_RTC: Tensor
    mask_RT: Tensor
    negative: "Text | None" = None
    pooled_RC: Tensor | None = None
    guidance_scale: float | None = None

    def __len__(self) -> int:
        return len(self.states_RTC)

    def __getitem__(self, index: Tensor | slice) -> "Text":
        pooled = None if self.pooled_RC is None else self.pooled_RC[index]
        return replace(self, states_RTC=self.states_RTC[index], mask_RT=self.mask_RT[index], pooled_RC=pooled)

    def followed_by(self, other: "Text") -> "Text":
        """The rows of both."""
        states = torch.cat([self.states_RTC, other.states_RTC])
        pooled = None
        if self.pooled_RC is not None and other.pooled_RC is not None:
            pooled = torch.cat([self.pooled_RC, other.pooled_RC])
        return replace(self, states_RTC=states, mask_RT=torch.cat([self.mask_RT, other.mask_RT]), pooled_RC=pooled)

    def clone(self) -> "Text":
        """The same captions in memory of their own."""
        pooled = None if self.pooled_RC is None else self.pooled_RC.clone()
        return replace(self, states_RTC=self.states_RTC.clone(), mask_RT=self.mask_RT.clone(), pooled_RC=pooled)

    def copy_(self, other: "Text") -> None:
        """Become other captions of the same size, in the same memory; what guidance steers away from stays."""
        self.states_RTC.copy_(other.states_RTC)
        self.mask_RT.copy_(other.mask_RT)
        if self.pooled_RC is not None and other.pooled_RC is not None:
            self.pooled_RC.copy_(other.pooled_RC)

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> "Text":
        """The same captions on `device`, the states in `dtype`."""
        negative = self.negative and self.negative.to(device, dtype)
        pooled = None if self.pooled_RC is None else self.pooled_RC.to(device, dtype)
        return Text(self.states_RTC.to(device, dtype), self.mask_RT.to(device), negative, pooled, self.guidance_scale)


Prompt = Tensor | Text
"""What the rows of a batch shall show: class labels, int64 [R], or captions."""


Gated = Any
"""What `Adapter.modulation` says of a part: only the adapter, and the fused kernels of its family, read it."""


@dataclass(frozen=True)
class Modulation:
    """Shift and scale of a part's normalised input, and gate of its output, each [R, 1, D]."""

    shift: Tensor
    scale: Tensor
    gate: Tensor


def rows_of(gated: Gated, rows_K: Tensor | slice) -> Gated:
    """What modulation says of a part for some rows alone: every tensor in it has a line a row."""
    if isinstance(gated, Tensor):
        return gated[rows_K]
    if not is_dataclass(gated) or isinstance(gated, type):
        return gated
    return replace(gated, **{part.name: rows_of(getattr(gated, part.name), rows_K) for part in fields(gated)})


Linear = tuple[Tensor, Tensor]
"""Weight and bias."""


@dataclass(frozen=True)
class LinearLayers:
    """A block's linear layers as fused kernels take them, by part: the first, and the last one.

    Those of self-attention's queries, keys and values are stacked. `groups` as in `Adapter.groups`.
    """

    first: Mapping[str, Linear]
    last: Mapping[str, Linear]
    groups: Groups | None


class Adapter(ABC):
    """Block-wise access to a model. R rows, N tokens of the stream (any subset where noted by K), D width.

    Methods that compute some tokens take their places in the stream, `index_RK`; None means all tokens, in order. The
    stream begins with the text's tokens where a model attends to text and image jointly; they are in every subset.

    Attributes:
        blocks: those of the step at hand; they are the model's unless `on_full_steps` was called.
    """

    rotary: tuple[Tensor, Tensor] | None = None
    """(cos, sin) of every token, float32 [N, head_dim], if queries and keys are turned to their positions."""

    # not the keys and values of the text, which a run makes once, with and without refiners
    refiner_layers: ClassVar[str] = r"attn1\.(to_q|to_k|to_v|to_out\.0)|attn2\.(to_q|to_out\.0)|ff\.net\.(0\.proj|2)"
    """Pattern of a block's linear layers that LoRA adapts."""

    backend: Literal["torch"] = "torch"
    """It computes with torch's operations, which have gradients (`tcbench.kernels`)."""

    def __init__(self, model: Any, spec: ModelSpec) -> None:
        self.model, self.spec, self.shape = model, spec, spec.shape
        self.blocks: list[TransformerBlock] = self.blocks_of(model)
        self._by_step = self.blocks, self.blocks
        self._layers: WeakKeyDictionary[nn.Module, LinearLayers] = WeakKeyDictionary()

    def blocks_of(self, model: Any) -> list[TransformerBlock]:
        """A model's blocks in the order they run."""
        return list(model.transformer_blocks)

    def is_parallel(self, block: TransformerBlock) -> bool:
        """Whether a block's parts stand side by side (`BlockShape.parallel`)."""
        return False

    def unread(self) -> str:
        """The weights of a model of others that the adapter would leave out, in words; nothing if none."""
        return ""

    def kind(self, part: str) -> Kind:
        """The kind of the parts with this name."""
        return self.shape.kinds[part]

    def on_full_steps(self, plain: "Adapter") -> None:
        """Take the blocks of another adapter of the same model where everything is computed: LoRA on P-steps alone."""
        self._by_step = self._by_step[False], plain.blocks

    def begin_step(self, full: bool) -> None:
        """Called by the engine before it executes a plan; `full`: the plan computes everything."""
        self.blocks = self._by_step[full]

    def hold_matrices(self, dtype: torch.dtype) -> None:
        """Hold the matrices of a model in which none learns as products take them (`precision.mixed`): the same bits in
        less memory, and no copy for every product.

        Those of the first block stay, because a predictor starts as a copy of it and learns.
        """
        kept = {*self.blocks[0].modules()}
        for block in self.blocks[1:]:
            for module in block.modules():
                if isinstance(module, nn.Linear) and module not in kept:
                    module.to(dtype)

    @property
    def device(self) -> torch.device:
        """Where the model is. diffusers' own properties walk through all modules, which shows when asked every step."""
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """What the model computes in."""
        return next(self.model.parameters()).dtype

    # --- conditioning

    @abstractmethod
    def drop(self, prompt: Any, where_R: Tensor) -> Any:
        """The prompt with the rows where `where_R` (bool) made unconditional."""

    @abstractmethod
    def prepare(self, prompt: Any) -> Any:
        """The context of a run: what depends on the prompt alone."""

    @abstractmethod
    def condition(self, timestep_R: Tensor, context: Any) -> Any:
        """What conditions the rows at a step; a slice of it is of some rows.

        Args:
            timestep_R: of the context's rows; for several steps at once, those of one step after those of another.
        """

    @abstractmethod
    def plain(self, latent: Tensor, timestep_R: Tensor, prompt: Any) -> Tensor:
        """The model's own forward, [R, out_channels, ...]: for training, and what everything here is tested against."""

    def null(self, prompt: Prompt) -> Prompt:
        """As many unconditional rows as the prompt has."""
        device = prompt.device if isinstance(prompt, Tensor) else prompt.states_RTC.device
        return self.drop(prompt, torch.ones(len(prompt), dtype=torch.bool, device=device))

    def guided(self, prompt: Prompt) -> Prompt:
        """The rows of a guided batch: the prompt, then as many unconditional rows."""
        null = self.null(prompt)
        if isinstance(prompt, Text):
            assert isinstance(null, Text)
            return prompt.followed_by(null)
        assert isinstance(null, Tensor)
        return torch.cat([prompt, null])

    # --- the ends

    @abstractmethod
    def embed(self, latent: Tensor, context: Any) -> Tensor:
        """Tokens of the latents, [R, N, D]; behind those of the context's text, if they share the stream."""

    @abstractmethod
    def final_modulation(self, condition: Any) -> tuple[Tensor, Tensor]:
        """(shift, scale) of the normalised input of the final layer, each [R, 1, D]."""

    @abstractmethod
    def final_layer(self, h_RND: Tensor) -> Tensor:
        """The final linear layer and un-patching: [R, out_channels, ...]."""

    def unembed(self, x_RND: Tensor, condition: Any) -> Tensor:
        """The model's output: [R, out_channels, ...]."""
        shift, scale = self.final_modulation(condition)
        return self.final_layer(self.model.norm_out(x_RND) * (1 + scale) + shift)

    # --- a block

    @abstractmethod
    def modulation(self, block: TransformerBlock, condition: Any) -> Mapping[str, Gated]:
        """What the block's parts need besides tokens, in the order they run; per row, whatever the tokens."""

    @abstractmethod
    def norm(self, block: TransformerBlock, part: str) -> nn.Module:
        """The LayerNorm before a modulated part."""

    def groups(self, block: TransformerBlock) -> Groups | None:
        """The groups (`tcbench.tensors.groups`) that tokens of this block attend among; None where to all."""
        return None

    def copy_of_block(self, number: int) -> TransformerBlock:
        """A block with weights of its own, for a predictor to train; what the model's blocks share stays behind."""
        return copy.deepcopy(self.blocks[number])

    def part_input(self, block: TransformerBlock, part: str, x_RKD: Tensor, gated: Any) -> Tensor:
        """Normalised and modulated input of a part, token by token; cross-attention takes tokens as they are."""
        if self.kind(part) == "cross":
            return x_RKD
        return self.norm(block, part)(x_RKD) * (1 + gated.scale) + gated.shift

    def gate(self, gated: Gated, value_RKD: Tensor) -> Tensor:
        """A part's output as it joins the residual stream."""
        return gated.gate * value_RKD

    def gated_sum(self, x_RKD: Tensor, gated: Gated, value_RKD: Tensor) -> Tensor:
        """The stream behind a part, from the stream before it and the part's output."""
        return x_RKD + self.gate(gated, value_RKD)

    def queries(self, block: TransformerBlock, h_RKD: Tensor, index_RK: Tensor | None = None) -> Tensor:
        """Self-attention's queries of some tokens, [R, heads, K, head_dim]."""
        return self._heads(block.attn1.to_q(h_RKD))

    def keys_values(
        self, block: TransformerBlock, h_RKD: Tensor, index_RK: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Self-attention's keys and values of some tokens, each [R, heads, K, head_dim]."""
        return self._heads(block.attn1.to_k(h_RKD)), self._heads(block.attn1.to_v(h_RKD))

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
        """Self-attention from its queries on, projected: [R, K, D].

        Args:
            h_RKD: the part's input, for parts that also transform it token by token.
            index_RK: places of the queries' tokens.
            context_RC: places of the keys' tokens.
        """
        mixed = F.scaled_dot_product_attention(queries, keys, values)
        return block.attn1.to_out[0](mixed.transpose(1, 2).flatten(2))

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
        """A parallel block (`BlockShape.parallel`) from its attention's queries on, by the projection that joins its
        parts, before its gate: [R, K, D]; arguments as `mix`."""
        raise NotImplementedError(f"{type(self).__name__}: a family with parallel blocks says how its parts are joined")

    def attention_received(self, block: TransformerBlock, queries: Tensor, keys: Tensor) -> Tensor:
        """Column sums of self-attention's head-mean map over all tokens, float32 [R, N]: ToCa's s1, not normalised.

        A second pass beside the fused attention, whose output it leaves as it is.
        """
        received = queries.new_zeros(queries.shape[0], keys.shape[2], dtype=torch.float32)
        for weights_RQN in attention_maps(queries, keys):
            received += weights_RQN.sum(dim=1)
        return received

    def text_queries(self, block: TransformerBlock, h_RKD: Tensor) -> Tensor:
        """Cross-attention's queries of some tokens, [R, heads, K, head_dim]."""
        return self._heads(block.attn2.to_q(h_RKD))

    def cross(self, block: TransformerBlock, queries: Tensor, part: Any) -> Tensor:
        """Cross-attention over the text from its queries on, projected: [R, K, D]."""
        mixed = F.scaled_dot_product_attention(queries, part.keys, part.values, part.bias)
        return block.attn2.to_out[0](mixed.transpose(1, 2).flatten(2))

    def attention_entropy(self, queries: Tensor, part: Any) -> Tensor:
        """Entropy of every token's head-mean cross-attention over the text, in nats, float32 [R, K]: ToCa's s2."""
        maps = attention_maps(queries, part.keys, part.bias)
        return torch.cat([torch.special.entr(weights_RKT).sum(dim=2) for weights_RKT in maps], dim=1)

    def pointwise(self, block: TransformerBlock, h_RKD: Tensor) -> Tensor:
        """The MLP, token by token."""
        return block.ff(h_RKD)

    def part(self, block: TransformerBlock, part: str, x_RND: Tensor, gated: Any) -> Tensor:
        """A whole part for all tokens, before its gate: [R, N, D]."""
        h = self.part_input(block, part, x_RND, gated)
        match self.kind(part):
            case "mix":
                return self.mix(block, h, self.queries(block, h), *self.keys_values(block, h))
            case "cross":
                return self.cross(block, self.text_queries(block, h), gated)
            case "pointwise":
                return self.pointwise(block, h)

    def block(self, module: TransformerBlock, x_RND: Tensor, condition: Any) -> Tensor:
        """A whole block for all tokens: [R, N, D]."""
        x, parts = x_RND, self.modulation(module, condition)
        if self.is_parallel(module):
            part, gated = next((part, gated) for part, gated in parts.items() if self.kind(part) == "mix")
            h = self.part_input(module, part, x, gated)
            joined = self.joined(module, h, self.queries(module, h), *self.keys_values(module, h))
            return self.gated_sum(x, gated, joined)
        for part, gated in parts.items():
            x = self.gated_sum(x, gated, self.part(module, part, x, gated))
        return x

    # --- for what is faster than the model's own layers

    compiles: ClassVar[bool] = False
    """Whether torch compiles the parts of this family (`tcbench.engine.compiled`)."""

    @property
    def fuses(self) -> bool:
        """Whether `linear_layers` and `patches` serve this family (`tcbench.engine.fused`)."""
        return False

    def linear_layers(self, block: TransformerBlock) -> LinearLayers:
        """A block's linear layers; stacked once, because a block's weights do not change while it samples."""
        if block not in self._layers:
            attention, text, mlp = block.attn1, block.attn2, block.ff.net
            parts = (attention.to_q, attention.to_k, attention.to_v)
            stacked = torch.cat([part.weight for part in parts]), torch.cat([part.bias for part in parts])
            first, last = {"mlp": mlp[0].proj}, {"attn": attention.to_out[0], "mlp": mlp[2]}
            if text is not None:
                first["cross"], last["cross"] = text.to_q, text.to_out[0]
            self._layers[block] = LinearLayers(
                first={"attn": stacked} | {part: (layer.weight, layer.bias) for part, layer in first.items()},
                last={part: (layer.weight, layer.bias) for part, layer in last.items()},
                groups=self.groups(block),
            )
        return self._layers[block]

    def patches(self) -> tuple[Linear, Tensor | None]:
        """The patch embedding as a linear layer, and the positions added to it, if any."""
        embedding = self.model.pos_embed
        return (embedding.proj.weight.flatten(1), embedding.proj.bias), embedding.pos_embed

    def _heads(self, x_RKD: Tensor) -> Tensor:
        return x_RKD.unflatten(2, (self.spec.num_heads, -1)).transpose(1, 2)


def attention_maps(queries: Tensor, keys: Tensor, bias: Tensor | None = None) -> Iterator[Tensor]:
    """Head-mean attention maps, float32 [R, q, C], of chunks of queries: at most `MAP_ELEMENTS` exist at a time."""
    rows, heads, _, head_dim = queries.shape
    for chunk in queries.split(max(1, MAP_ELEMENTS // (rows * heads * keys.shape[2])), dim=2):
        scores = chunk * head_dim**-0.5 @ keys.transpose(2, 3)
        scores = scores if bias is None else scores + bias
        yield scores.softmax(dim=3, dtype=torch.float32).mean(dim=1)


@dataclass(frozen=True)
class Family:
    """How one family's networks are built, started, recognised and seen.

    Attributes:
        adapter: (network, spec) -> the adapter.
        skeleton: the network with its parameters on meta and its buffers computed, in eval mode.
        initial_value: (name, shape, generator, zero_init) -> a parameter's start, where the generator is.
        to_diffusers: (state, path) -> the state dict in the layout that is saved, whichever known layout it came in.
    """

    adapter: Callable[[Any, Any], Adapter]
    skeleton: Callable[[Any], nn.Module]
    initial_value: Callable[[str, torch.Size, torch.Generator, bool], Tensor]
    to_diffusers: Callable[[dict[str, Tensor], Path], dict[str, Tensor]]
