"""`Blocks` with fused kernels: the same plans and caches, fewer passes over memory, nothing done twice.

For models whose blocks are self-attention and an MLP under adaLN, with attention over a text between them or not. What
differs from `PlainBlocks`, and why, each measured in docs/speed.md:

- Modulation of all steps and blocks is made when the run starts: it depends on timestep and prompt alone.
- Patches are embedded by a product, which leaves them in the stream's order, instead of by a convolution.
- Queries, keys and values come from one product; the MLP's activation is applied inside its first product.
- A residual addition waits until the next part reads the stream, and is then one pass with its LayerNorm; where only
  some tokens are read, it goes on waiting for the others.
- Recomputed tokens go through kernels that gather, multiply and scatter at once (`tcbench.kernels`), and whose number
  of rows is read on the device.

Two things fall back to the model's own layers: the parts of which some *rows* are recomputed (`plain.part_of_rows`),
because the kernels gather as many tokens of every row, and self-attention of *merged* tokens where it knows positions
or groups (`merging.part_of_groups`). What stands before and behind them is fused as ever.

The stream, the caches and the gates are the model's dtype; sums inside a kernel are float32, so results differ from
`PlainBlocks` by rounding (tests/test_fused.py).
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from tcbench.engine.ahead import Ahead
from tcbench.engine.cache import Cache
from tcbench.engine.merging import merge, part_of_groups, unmerge
from tcbench.engine.plain import part_of_rows, value_norms
from tcbench.kernels import Chosen, available, rows
from tcbench.kernels.attention import SelfAttention
from tcbench.kernels.chosen import Backend, on_device
from tcbench.kernels.context import text_attention, text_entropy
from tcbench.kernels.stream import MAX_TERMS, Modulate, Term, advance, gather, norm_rows
from tcbench.method import Run
from tcbench.models.adapter import Adapter, Gated, LinearLayers, Modulation
from tcbench.models.text_adapter import Cross
from tcbench.plan import All, Block, Decision, Merged, Nothing, PlanError, Rows, Settled, Site, Tokens
from tcbench.record.executed import Execution


def can_fuse(adapter: Adapter) -> bool:
    """Whether `FusedBlocks` serves this model where it is."""
    return adapter.fuses and available(adapter.device)


class FusedBlocks:
    """`Blocks` with fused kernels, for sampling: a run begins with `prepare`, nothing has a gradient.

    Args:
        backend: `torch` runs the kernels' references instead, on any device; for tests.
    """

    execution: ClassVar[Execution] = "fused"
    counts_on_device: ClassVar[bool] = True

    def __init__(self, adapter: Adapter, run: Run, cache: Cache, backend: Backend = "triton") -> None:
        self.adapter, self.run, self.cache, self.backend = adapter, run, cache, backend
        self._attention = SelfAttention(adapter.spec.num_heads, adapter.rotary, backend)
        self._eps = {part: _eps_before(part, adapter) for part in adapter.shape.kinds}
        self._ahead = Ahead(adapter, run)
        rows = len(run.sample_index) * run.rows_per_sample
        self._ones = torch.ones(1, adapter.spec.width, device=adapter.device, dtype=adapter.dtype).expand(rows, -1)
        self._qkv: dict[int, Tensor] = {}  # whose key and value parts the cache holds

    # --- a run

    def prepare(self, context: Any) -> None:
        """Make what modulates all steps."""
        self._ahead.prepare(context)

    def condition(self, step: int, context: Any) -> Any:
        """What conditions the rows at a step."""
        return self._ahead.condition(step)

    # --- the stream

    def embed(self, latent: Tensor, context: Any) -> Tensor:
        """Patches, with positions if they are added to them, [R, N, D]."""
        patch, (layer, positions) = self.adapter.spec.patch_size, self.adapter.patches()
        patches = latent.unflatten(-1, (-1, patch)).unflatten(-3, (-1, patch))  # [R, C, ..., h, p, w, q]
        patches = patches.transpose(-3, -2).movedim(1, -3).flatten(-3).flatten(1, -2)
        tokens = F.linear(patches, *layer)
        return tokens if positions is None else tokens.add_(positions)

    def begin(self, step: int, x_RND: Tensor, condition: Any) -> None:
        """Start a step."""
        self._step, self._x = step, x_RND.contiguous()
        self._terms: list[Term] = []
        self._update: tuple[Block, Decision, Tensor] | None = None  # a block's, complete when the stream next advances

    @property
    def stream(self) -> Tensor:
        """The tokens so far, [R, N, D]."""
        if self._terms:
            self._advance()
        return self._x

    def add(self, value_RND: Tensor, gate_RD: Tensor | None = None) -> None:
        """Add to the stream, when it is next read."""
        if len(self._terms) == MAX_TERMS or self._update:
            self._advance()
        self._terms.append((value_RND, gate_RD))

    def replace(self, value_RND: Tensor) -> None:
        """Go on with another stream; a block's update that waits is stored first."""
        if self._update:
            self._advance()
        self._x, self._terms = value_RND.contiguous(), []

    def part_input(self, site: Site) -> Tensor:
        """The stream as a part takes it."""
        modulate = _modulate(self._parts(site.block)[site.part])
        return self._advance(modulate, self._eps[site.part]) if modulate else self.stream

    def _advance(self, modulate: Modulate | None = None, eps: float = 0.0) -> Tensor:
        """Apply what waits: the stream or, with `modulate`, the next part's input behind a LayerNorm of this `eps`."""
        before = self._update[2] if self._update else None
        self._x, update, h = advance(
            self._x, self._terms, modulate=modulate, before_RND=before, eps=eps, backend=self.backend
        )
        self._terms = []
        if self._update and update is not None:
            unit, decision, _ = self._update
            self.cache.store(unit, update, self._step, decision.fill)
            self._update = None
        return self._x if h is None else h

    def _gather(self, part: str, gated: Gated, chosen: Chosen) -> tuple[Tensor, Tensor]:
        """The chosen tokens and their part's input, compact [M, D]; what waits for other tokens goes on waiting."""
        if self._update:
            self._advance()
        return gather(self._x, self._terms, _modulate(gated), chosen, eps=self._eps[part], backend=self.backend)

    # --- units

    def whole(self, block: int, who: All | Nothing | Tokens, decision: Decision | None) -> None:
        """A block whose update is one unit."""
        assert decision is not None, "no model that it serves has parallel blocks"
        unit, parts, layers = Block(block), self._parts(block), self._layers(block)
        match who:
            case Nothing():
                self.add(self.cache.read(unit, decision.fill, self._step))
            case All():
                before = None
                for part, gated in parts.items():
                    value = self._everyone(block, part, gated, decision)
                    before = self._x if before is None else before  # the first part has applied what waited
                    self.add(value, _gate(gated))
                assert before is not None
                self._update = unit, decision, before
            case Tokens():
                chosen = self._chosen(who)
                base, h = self._gather("attn", parts["attn"], chosen)
                tokens = base
                for part, gated in parts.items():
                    if part != "attn":
                        modulate = _modulate(gated)
                        h = (
                            norm_rows(tokens, modulate, chosen, self._eps[part], backend=self.backend)
                            if modulate
                            else tokens
                        )
                    h = self._few(block, part, h, chosen, gated, decision)
                    gate = self._ones if (gate := _gate(gated)) is None else gate
                    if part != "mlp":
                        tokens = rows.linear_residual(h, *layers.last[part], chosen, gate, tokens, backend=self.backend)
                    else:
                        last, stored = layers.last[part], self.cache.value(unit)
                        rows.linear_update(h, *last, chosen, gate, base, tokens, stored, backend=self.backend)
                        self.add(self.cache.read(unit, decision.fill, self._step))

    def part(self, site: Site, who: Settled, decision: Decision | None) -> None:
        """One part of a block."""
        block, part = site.block, site.part
        gated = self._parts(block)[part]
        match who:
            case Nothing():
                assert decision is not None
                value = self.cache.read(site, decision.fill, self._step)
            case All():
                value = self._everyone(block, part, gated, decision)
                if decision:
                    self.cache.store(site, value, self._step, decision.fill)
            case Merged():
                value = self._merged(site, who, gated)
            case Rows():
                assert decision is not None
                rows_K = on_device(tuple(who.index), self.stream.device).long()
                fresh = part_of_rows(self.adapter, site, rows_K, self.stream, gated)
                self.cache.refresh_rows(site, rows_K, fresh)
                value = self.cache.read(site, decision.fill, self._step)
            case Tokens():
                assert decision is not None
                chosen, last = self._chosen(who), self._layers(block).last[part]
                _, h = self._gather(part, gated, chosen)
                h = self._few(block, part, h, chosen, gated, decision)
                rows.linear_scatter(h, *last, chosen, self.cache.value(site), backend=self.backend)
                if decision.spread and decision.spread.ratio:
                    self.cache.spread(site, who.index_RK, decision.spread)
                value = self.cache.read(site, decision.fill, self._step)
        self.add(value, _gate(gated))

    def block(self, module: Any, x_RND: Tensor, condition: Any) -> Tensor:
        """A whole block beside the stream."""
        layers, x = self.adapter.linear_layers(module), x_RND.contiguous()
        terms: list[Term] = []
        for part, gated in self.adapter.modulation(module, condition).items():
            x, _, h = advance(x, terms, modulate=_modulate(gated), eps=self._eps[part], backend=self.backend)
            h, _, _ = self._all(layers, part, x if h is None else h, gated)
            terms = [(F.linear(h, *layers.last[part]), _gate(gated))]
        return advance(x, terms, backend=self.backend)[0]

    def unembed(self, condition: Any) -> Tensor:
        """The model's output."""
        shift, scale = (whole.squeeze(1) for whole in self._ahead.final(self._step))
        return self.adapter.final_layer(self._advance((shift, scale), self.adapter.model.norm_out.eps))

    # --- layers

    def _layers(self, block: int) -> LinearLayers:
        return self.adapter.linear_layers(self.adapter.blocks[block])

    def _parts(self, block: int) -> Mapping[str, Gated]:
        """What the block's parts need at this step."""
        return self._ahead.modulation(self._step, block)

    def _chosen(self, who: Tokens) -> Chosen:
        index, tokens = who.index_RK, self.run.shape.num_tokens
        if index.stride(1) != 1:
            index = index.contiguous()
        if who.used is None:
            return Chosen(index, on_device((index.shape[1],), index.device), tokens, index.shape[1])
        return Chosen(index, who.used, tokens, max(1, tokens // 8))

    def _everyone(self, block: int, part: str, gated: Gated, decision: Decision | None) -> Tensor:
        """A part of all tokens before its gate, [R, N, D]; what it shows is stored as decided."""
        layers, modulate = self._layers(block), _modulate(gated)
        h = self._advance(modulate, self._eps[part]) if modulate else self.stream
        h, first, seen_RN = self._all(layers, part, h, gated, decision is not None and decision.observe == part)
        if decision and decision.keys == "cached" and part == "attn":
            _, keys, values = first.chunk(3, dim=2)
            self._qkv[block] = first
            self.cache.store_keys_values(block, keys, values)
        if decision and decision.observe == "values" and part == "attn":
            heads = first.chunk(3, dim=2)[2].unflatten(2, (self.adapter.spec.num_heads, -1))
            self.cache.store_value_norms(block, value_norms(heads.transpose(1, 2)))
        if seen_RN is not None and part == "attn":
            self.cache.store_attention(block, seen_RN)
        elif seen_RN is not None:
            self.cache.store_entropy(block, seen_RN, None)
        return F.linear(h, *layers.last[part])

    def _all(
        self, layers: LinearLayers, part: str, h_RND: Tensor, gated: Gated, observed: bool = False
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """A part of all tokens from its input up to its last layer.

        Returns:
            that, what the first layer gave, and what was observed of its attention, [R, N]
        """
        if part == "mlp":
            h = _widen(h_RND, *layers.first[part])
            return h, h, None
        if isinstance(gated, Cross):
            assert gated.bias is not None, "a family whose text has no mask is not fused"
            queries, entropy_RN = F.linear(h_RND, *layers.first[part]), None
            if observed:
                entropy_RN = torch.empty(queries.shape[:2], device=queries.device)
                text_entropy(queries, gated.keys, gated.bias, entropy_RN, backend=self.backend)
            mixed = text_attention(queries, gated.keys, gated.values, gated.bias, backend=self.backend)
            return mixed, queries, entropy_RN
        stacked = self._attention.project(h_RND, layers.first[part])
        mixed, received_RN = self._attention.everyone(stacked, layers.groups, observed)
        return mixed, stacked, received_RN

    def _merged(self, site: Site, who: Merged, gated: Gated) -> Tensor:
        """A part of merged tokens for all of them before its gate, [R, N, D]."""
        layers, h = self._layers(site.block), self.part_input(site)
        if site.part == "attn" and (layers.groups is not None or self._attention.rotary is not None):
            return part_of_groups(self.adapter, site, who, h, gated)
        few, _, _ = self._all(layers, site.part, merge(h, who), gated)
        return unmerge(F.linear(few, *layers.last[site.part]), who)

    def _few(self, block: int, part: str, h_MD: Tensor, chosen: Chosen, gated: Gated, decision: Decision) -> Tensor:
        """A part of the chosen tokens from its input up to its last layer, compact [M, C]."""
        first = self._layers(block).first[part]
        if part == "attn":
            return self._few_attending(block, h_MD, chosen, gated, decision)
        if part == "mlp":
            return rows.linear(h_MD, *first, chosen, "gelu", backend=self.backend)
        assert isinstance(gated, Cross) and gated.bias is not None
        queries = rows.linear(h_MD, *first, chosen, backend=self.backend)
        if decision.observe == "cross":
            stored_RN = self.cache.attention_entropy(block)
            text_entropy(queries, gated.keys, gated.bias, stored_RN, chosen, backend=self.backend)
        return text_attention(queries, gated.keys, gated.values, gated.bias, chosen, backend=self.backend)

    def _few_attending(self, block: int, h_MD: Tensor, chosen: Chosen, gated: Gated, decision: Decision) -> Tensor:
        """Self-attention of the chosen tokens up to its projection, compact [M, D]; keys as decided."""
        attention, layers = self._attention, self._layers(block)
        weight, bias = qkv = layers.first["attn"]
        width = h_MD.shape[1]
        if decision.keys == "recomputed":
            stream = self.stream
            _, _, everything = advance(
                stream, [], modulate=_modulate(gated), eps=self._eps["attn"], backend=self.backend
            )
            assert everything is not None
            keys, values = attention.project(everything, (weight[width:], bias[width:])).chunk(2, dim=2)
            queries = torch.empty_like(stream)
            attention.project_chosen(h_MD, (weight[:width], bias[:width]), chosen, queries)
        else:
            if decision.keys == "cached" and block not in self._qkv:
                raise PlanError(f"block {block}: cached keys are read before any were stored; the first step is full")
            stacked = self._qkv[block] if decision.keys == "cached" else h_MD.new_empty(*self._x.shape[:2], 3 * width)
            attention.project_chosen(h_MD, qkv, chosen, stacked)
            queries, keys, values = stacked.chunk(3, dim=2)
        return attention.of_chosen(queries, keys, values, layers.groups, chosen, decision.keys == "fresh")


def _eps_before(part: str, adapter: Adapter) -> float:
    """Of the LayerNorm before a part, if there is one; in diffusers' own DiT they differ."""
    norm: Any = None if adapter.kind(part) == "cross" else adapter.norm(adapter.blocks[0], part)
    return norm.eps if norm else 0.0


def _widen(h_RND: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The MLP's first layer with its activation."""
    if h_RND.is_cuda:
        # cuBLASLt applies the tanh approximation, the models', inside the product; on a CPU this call has the exact one
        h = torch._addmm_activation(bias, h_RND.flatten(0, 1), weight.t(), use_gelu=True)
        return h.view(*h_RND.shape[:2], -1)
    return F.gelu(F.linear(h_RND, weight, bias), approximate="tanh")


def _modulate(gated: Gated) -> Modulate | None:
    """Shift and scale of a part's normalised input as the kernels take them, if it has any."""
    return (gated.shift.squeeze(1), gated.scale.squeeze(1)) if isinstance(gated, Modulation) else None


def _gate(gated: Gated) -> Tensor | None:
    """A part's gate as the kernels take it, if it has one."""
    return gated.gate.squeeze(1) if isinstance(gated.gate, Tensor) else None
