"""A denoiser seen as the engine sees every model: blocks made of gated branches over tokens.

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
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tcbench.groups import Groups
from tcbench.models.specs import ModelSpec

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
    """

    states_RTC: Tensor
    mask_RT: Tensor
    negative: "Text | None" = None

    def __len__(self) -> int:
        return len(self.states_RTC)

    def __getitem__(self, index: Tensor | slice) -> "Text":
        return Text(self.states_RTC[index], self.mask_RT[index], self.negative)

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> "Text":
        """The same captions on `device`, the states in `dtype`."""
        negative = self.negative and self.negative.to(device, dtype)
        return Text(self.states_RTC.to(device, dtype), self.mask_RT.to(device), negative)


Prompt = Tensor | Text
"""What the rows of a batch shall show: class labels, int64 [R], or captions."""


class Gated(Protocol):
    """What `Adapter.modulation` says of a branch; all but the gate is between the adapter and itself."""

    @property
    def gate(self) -> Tensor | float:
        """What the branch's output is multiplied by before it joins the residual stream."""


@dataclass(frozen=True)
class Modulation:
    """Shift and scale of a branch's normalised input, and gate of its output, each [R, 1, D]."""

    shift: Tensor
    scale: Tensor
    gate: Tensor

    def __getitem__(self, rows: slice) -> "Modulation":
        return Modulation(self.shift[rows], self.scale[rows], self.gate[rows])


class Adapter(ABC):
    """Block-wise access to a model. R rows, N tokens (any subset where noted by K), D width.

    Methods that compute some tokens take their places, `index_RK`; None means all tokens, in order.

    Attributes:
        blocks: those of the step at hand; they are the model's unless `on_full_steps` was called.
    """

    rotary: tuple[Tensor, Tensor] | None = None
    """(cos, sin) of every token, float32 [N, head_dim], if queries and keys are turned to their positions."""

    path: Literal["torch"] = "torch"
    """It computes with torch's operations, which have gradients (`tcbench.kernels`)."""

    def __init__(self, model: Any, spec: ModelSpec) -> None:
        self.model, self.spec, self.shape = model, spec, spec.shape
        self.blocks: list[TransformerBlock] = list(model.transformer_blocks)
        self._by_step = self.blocks, self.blocks

    def on_full_steps(self, plain: "Adapter") -> None:
        """Take the blocks of another adapter of the same model where everything is computed: LoRA on P-steps alone."""
        self._by_step = self._by_step[False], plain.blocks

    def begin_step(self, full: bool) -> None:
        """Called by the engine before it executes a plan; `full`: the plan computes everything."""
        self.blocks = self._by_step[full]

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

    def guided(self, prompt: Prompt) -> Prompt:
        """The rows of a guided batch: the prompt, then as many unconditional rows."""
        device = prompt.device if isinstance(prompt, Tensor) else prompt.states_RTC.device
        null = self.drop(prompt, torch.ones(len(prompt), dtype=torch.bool, device=device))
        if isinstance(prompt, Tensor):
            return torch.cat([prompt, null])
        states = torch.cat([prompt.states_RTC, null.states_RTC])
        return Text(states, torch.cat([prompt.mask_RT, null.mask_RT]), prompt.negative)

    # --- the ends

    @abstractmethod
    def embed(self, latent: Tensor) -> Tensor:
        """Tokens of the latents, [R, N, D]."""

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
        """What the block's branches need besides tokens, in the order they run; per row, whatever the tokens."""

    @abstractmethod
    def norm(self, block: TransformerBlock, branch: str) -> nn.Module:
        """The LayerNorm before a modulated branch."""

    def groups(self, block: TransformerBlock) -> Groups | None:
        """The groups (`tcbench.groups`) that tokens of this block attend among; None where to all."""
        return None

    def copy_of_block(self, number: int) -> TransformerBlock:
        """A block with weights of its own, for a predictor to train; what the model's blocks share stays behind."""
        return copy.deepcopy(self.blocks[number])

    def branch_input(self, block: TransformerBlock, branch: str, x_RKD: Tensor, part: Any) -> Tensor:
        """Normalised and modulated input of a branch, token by token; cross-attention takes tokens as they are."""
        return x_RKD if branch == "cross" else self.norm(block, branch)(x_RKD) * (1 + part.scale) + part.shift

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
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        index_RK: Tensor | None = None,
        context_RC: Tensor | None = None,
    ) -> Tensor:
        """Self-attention from its queries on, projected: [R, K, D].

        Args:
            index_RK: places of the queries' tokens.
            context_RC: places of the keys' tokens.
        """
        mixed = F.scaled_dot_product_attention(queries, keys, values)
        return block.attn1.to_out[0](mixed.transpose(1, 2).flatten(2))

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

    def mlp(self, block: TransformerBlock, h_RKD: Tensor) -> Tensor:
        """The MLP, token by token."""
        return block.ff(h_RKD)

    def branch(self, block: TransformerBlock, branch: str, x_RND: Tensor, part: Any) -> Tensor:
        """A whole branch for all tokens, before its gate: [R, N, D]."""
        h = self.branch_input(block, branch, x_RND, part)
        match branch:
            case "attn":
                return self.mix(block, self.queries(block, h), *self.keys_values(block, h))
            case "cross":
                return self.cross(block, self.text_queries(block, h), part)
        return self.mlp(block, h)

    def block(self, module: TransformerBlock, x_RND: Tensor, condition: Any) -> Tensor:
        """A whole block for all tokens: [R, N, D]."""
        x = x_RND
        for branch, part in self.modulation(module, condition).items():
            x = x + part.gate * self.branch(module, branch, x, part)
        return x

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
        initial_value: (name, shape, generator, zero_init) -> a parameter's start.
        to_diffusers: (state, path) -> the state dict in the layout that is saved, whichever known layout it came in.
    """

    adapter: Callable[[Any, Any], Adapter]
    skeleton: Callable[[Any], nn.Module]
    initial_value: Callable[[str, torch.Size, torch.Generator, bool], Tensor]
    to_diffusers: Callable[[dict[str, Tensor], Path], dict[str, Tensor]]
