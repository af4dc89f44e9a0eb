"""`Blocks` with fused kernels: the same plans and caches, fewer passes over memory, nothing done twice.

For models whose blocks are self-attention and an MLP under adaLN (DiT). What differs from `PlainBlocks`, and why, each
measured in docs/speed.md:

- Modulation of all steps and blocks is made when the run starts: it depends on timestep and label alone.
- Patches are embedded by a product, which leaves them in the stream's order, instead of by a convolution.
- Queries, keys and values come from one product; the MLP's activation is applied inside its first product.
- A residual addition waits until the next branch reads the stream, and is then one pass with its LayerNorm; where only
  some tokens are read, it goes on waiting for the others.
- Recomputed tokens go through kernels that gather, multiply and scatter at once (`tcbench.kernels`), and whose number
  of rows is read on the device.

The stream, the caches and the gates are the model's dtype; sums inside a kernel are float32, so results differ from
`PlainBlocks` by rounding (tests/test_fused.py).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tcbench.cache import Cache
from tcbench.kernels import Chosen, available, rows
from tcbench.kernels.chosen import Path
from tcbench.kernels.stream import MAX_TERMS, Term, advance, gather, norm_rows
from tcbench.method import Run
from tcbench.models.adapter import Adapter, Modulation
from tcbench.models.dit import DiTAdapter, unpatchify
from tcbench.plan import All, Block, Branch, Decision, Nothing, Site, Tokens


def can_fuse(adapter: Adapter) -> bool:
    """Whether `FusedBlocks` serves this model where it is."""
    return isinstance(adapter, DiTAdapter) and available(adapter.model.device)


@dataclass(frozen=True)
class _Layers:
    """A block's linear layers as the kernels take them: (weight, bias), queries, keys and values stacked."""

    qkv: tuple[Tensor, Tensor]
    out: tuple[Tensor, Tensor]
    up: tuple[Tensor, Tensor]
    down: tuple[Tensor, Tensor]


_layers: WeakKeyDictionary[nn.Module, _Layers] = WeakKeyDictionary()


def _layers_of(module: Any) -> _Layers:
    """Stacked once per block; a block's weights do not change while it samples."""
    if module not in _layers:
        attention, up, down = module.attn1, module.ff.net[0].proj, module.ff.net[2]
        parts = (attention.to_q, attention.to_k, attention.to_v)
        stacked = torch.cat([part.weight for part in parts]), torch.cat([part.bias for part in parts])
        _layers[module] = _Layers(
            qkv=stacked,
            out=(attention.to_out[0].weight, attention.to_out[0].bias),
            up=(up.weight, up.bias),
            down=(down.weight, down.bias),
        )
    return _layers[module]


Parts = Mapping[str, Modulation]


class FusedBlocks:
    """`tcbench.engine.Blocks` with fused kernels, for sampling: a run begins with `prepare`, nothing has a gradient.

    Args:
        path: `torch` runs the kernels' references instead, on any device; for tests.
    """

    def __init__(self, adapter: Adapter, run: Run, cache: Cache, path: Path = "triton") -> None:
        if not isinstance(adapter, DiTAdapter):
            raise TypeError(f"{adapter.spec.name}: fused blocks are for models of self-attention and MLP under adaLN")
        self.adapter, self.run, self.cache, self.path = adapter, run, cache, path
        self._heads = adapter.spec.num_heads
        self._eps = adapter.spec.norm_eps
        self._timesteps = torch.tensor(run.timesteps, device=adapter.model.device)
        self._positions = adapter.model.pos_embed.pos_embed.to(adapter.model.dtype)
        self._qkv: dict[int, Tensor] = {}  # whose key and value parts the cache holds

    # --- a run

    def prepare(self, context: Tensor) -> None:
        """Make conditions and modulations of all steps; they depend on timesteps and labels alone."""
        adapter, steps = self.adapter, len(self.run.timesteps)
        timestep = self._timesteps.repeat_interleave(len(context))
        conditions = adapter.condition(timestep, context.repeat(steps))
        self._conditions = conditions.unflatten(0, (steps, -1))
        self._modulations = [adapter.modulation(module, conditions) for module in adapter.blocks]
        final = adapter.model.proj_out_1(F.silu(conditions)).chunk(2, dim=1)
        self._final = [part.unflatten(0, (steps, -1)) for part in final]

    def condition(self, step: int, context: Tensor) -> Tensor:
        """What conditions the rows at a step."""
        return self._conditions[step]

    # --- the stream

    def embed(self, latent: Tensor) -> Tensor:
        """Patches with positions, [R, N, D]."""
        patch, embedding = self.adapter.spec.patch_size, self.adapter.model.pos_embed
        patches = latent.unflatten(3, (-1, patch)).unflatten(2, (-1, patch))  # [R, C, h, p, w, q]
        patches = patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
        tokens = F.linear(patches, embedding.proj.weight.flatten(1), embedding.proj.bias)
        return tokens.add_(self._positions)

    def begin(self, step: int, x_RND: Tensor, condition: Tensor) -> None:
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

    def _advance(self, part: Modulation | None = None) -> Tensor:
        """Apply what waits: the stream or, with `part`, the next branch's input."""
        modulate = (_flat(part.shift), _flat(part.scale)) if part else None
        before = self._update[2] if self._update else None
        self._x, update, h = advance(
            self._x, self._terms, modulate=modulate, before_RND=before, eps=self._eps, path=self.path
        )
        self._terms = []
        if self._update and update is not None:
            unit, decision, _ = self._update
            self.cache.store(unit, update, self._step, decision.fill.order)
            self._update = None
        return self._x if h is None else h

    def _gather(self, part: Modulation, chosen: Chosen) -> tuple[Tensor, Tensor]:
        """The chosen tokens and their branch's input, compact [M, D]; what waits for other tokens goes on waiting."""
        if self._update:
            self._advance()
        modulate = _flat(part.shift), _flat(part.scale)
        return gather(self._x, self._terms, modulate, chosen, eps=self._eps, path=self.path)

    # --- units

    def whole(self, block: int, who: All | Nothing | Tokens, decision: Decision) -> None:
        """A block whose update is one unit."""
        unit, parts, layers = Block(block), self._parts(block), _layers_of(self.adapter.blocks[block])
        match who:
            case Nothing():
                self.add(self.cache.read(unit, decision.fill, self._step))
            case All():
                h = self._advance(parts["attn"])
                before = self._x
                self.add(self._attention(block, layers, h, decision), _flat(parts["attn"].gate))
                h = self._advance(parts["mlp"])
                self.add(self._mlp(layers, h), _flat(parts["mlp"].gate))
                self._update = unit, decision, before
            case Tokens():
                chosen = self._chosen(who)
                base, h = self._gather(parts["attn"], chosen)
                mixed = self._chosen_attention(block, layers, h, chosen, decision, parts["attn"])
                gates = _flat(parts["attn"].gate), _flat(parts["mlp"].gate)
                middle = rows.linear_residual(mixed, *layers.out, chosen, gates[0], base, path=self.path)
                modulate = _flat(parts["mlp"].shift), _flat(parts["mlp"].scale)
                h = norm_rows(middle, modulate, chosen, self._eps, path=self.path)
                h = rows.linear(h, *layers.up, chosen, "gelu", path=self.path)
                update = self.cache.read(unit, decision.fill, self._step)
                rows.linear_update(h, *layers.down, chosen, gates[1], base, middle, update, path=self.path)
                self.add(update)

    def branch(self, block: int, branch: Branch, who: All | Nothing | Tokens, decision: Decision | None) -> None:
        """One branch of a block."""
        site, part, layers = Site(block, branch), self._parts(block)[branch], _layers_of(self.adapter.blocks[block])
        match who:
            case Nothing():
                assert decision is not None
                value = self.cache.read(site, decision.fill, self._step)
            case All():
                h = self._advance(part)
                value = self._mlp(layers, h) if branch == "mlp" else self._attention(block, layers, h, decision)
                if decision:
                    self.cache.store(site, value, self._step, decision.fill.order)
            case Tokens():
                assert decision is not None
                chosen = self._chosen(who)
                _, h = self._gather(part, chosen)
                value = self.cache.read(site, decision.fill, self._step)
                if branch == "mlp":
                    h = rows.linear(h, *layers.up, chosen, "gelu", path=self.path)
                    rows.linear_scatter(h, *layers.down, chosen, value, path=self.path)
                else:
                    h = self._chosen_attention(block, layers, h, chosen, decision, part)
                    rows.linear_scatter(h, *layers.out, chosen, value, path=self.path)
        self.add(value, _flat(part.gate))

    def block(self, module: Any, x_RND: Tensor, condition: Tensor) -> Tensor:
        """A whole block beside the stream."""
        layers, parts = _layers_of(module), self.adapter.modulation(module, condition)
        x = x_RND.contiguous()
        terms: list[Term] = []
        for branch, part in parts.items():
            modulate = _flat(part.shift), _flat(part.scale)
            x, _, h = advance(x, terms, modulate=modulate, eps=self._eps, path=self.path)
            assert h is not None
            value = self._mlp(layers, h) if branch == "mlp" else self._attend(layers, h)[0]
            terms = [(value, _flat(part.gate))]
        return advance(x, terms, eps=self._eps, path=self.path)[0]

    def unembed(self, condition: Tensor) -> Tensor:
        """The model's output."""
        shift, scale = (part[self._step] for part in self._final)
        h = self._advance(Modulation(shift[:, None], scale[:, None], scale))
        spec = self.adapter.spec
        return unpatchify(self.adapter.model.proj_out_2(h), (spec.grid, spec.grid), spec.patch_size)

    # --- layers

    def _parts(self, block: int) -> Parts:
        """The block's modulation at this step."""
        here = slice(self._step * (count := self._conditions.shape[1]), (self._step + 1) * count)
        return {
            branch: Modulation(part.shift[here], part.scale[here], part.gate[here])
            for branch, part in self._modulations[block].items()
        }

    def _chosen(self, who: Tokens) -> Chosen:
        index, tokens = who.index_RK, self.run.shape.num_tokens
        if index.stride(1) != 1:
            index = index.contiguous()
        if who.used is None:
            return Chosen(index, _count(index.shape[1], index.device), tokens, index.shape[1])
        return Chosen(index, who.used, tokens, max(1, tokens // 8))

    def _attention(self, block: int, layers: _Layers, h_RND: Tensor, decision: Decision | None) -> Tensor:
        """Self-attention of all tokens before its gate; keys, values and attention received are stored as decided."""
        log_sums = None
        if decision and decision.observe == "attn":
            log_sums = h_RND.new_empty(len(h_RND), self._heads, h_RND.shape[1], dtype=torch.float32)
        value, qkv = self._attend(layers, h_RND, log_sums)
        queries, keys, values = qkv.chunk(3, dim=2)
        if decision and decision.keys == "cached":
            self._qkv[block] = qkv
            self.cache.store_keys_values(block, keys, values)
        if log_sums is not None:
            received = rows.attention_received(queries, keys, log_sums, self._heads, path=self.path)
            self.cache.store_attention(block, received)
        return value

    def _attend(self, layers: _Layers, h_RND: Tensor, log_sums_RHN: Tensor | None = None) -> tuple[Tensor, Tensor]:
        qkv = F.linear(h_RND, *layers.qkv)
        queries, keys, values = qkv.chunk(3, dim=2)
        mixed = rows.attention(queries, keys, values, self._heads, log_sums_RHN=log_sums_RHN, path=self.path)
        return F.linear(mixed, *layers.out), qkv

    def _chosen_attention(
        self, block: int, layers: _Layers, h_MD: Tensor, chosen: Chosen, decision: Decision, part: Modulation
    ) -> Tensor:
        """Self-attention of the chosen tokens up to its projection, compact [M, D]."""
        weight, bias = layers.qkv
        width = h_MD.shape[1]
        if decision.keys == "recomputed":
            modulate = _flat(part.shift), _flat(part.scale)
            stream = self.stream
            _, _, everything = advance(stream, [], modulate=modulate, eps=self._eps, path=self.path)
            assert everything is not None
            keys, values = F.linear(everything, weight[width:], bias[width:]).chunk(2, dim=2)
            queries = torch.empty_like(stream)
            rows.linear_scatter(h_MD, weight[:width], bias[:width], chosen, queries, path=self.path)
        else:
            if decision.keys == "cached" and block not in self._qkv:
                raise RuntimeError(
                    f"block {block}: cached keys are read before any were stored; the first step is full"
                )
            qkv = self._qkv[block] if decision.keys == "cached" else h_MD.new_empty(*self._x.shape[:2], 3 * width)
            rows.linear_scatter(h_MD, weight, bias, chosen, qkv, path=self.path)
            queries, keys, values = qkv.chunk(3, dim=2)
        among = decision.keys == "fresh"
        return rows.attention(queries, keys, values, self._heads, chosen, among, path=self.path)

    def _mlp(self, layers: _Layers, h_RND: Tensor) -> Tensor:
        """The MLP of all tokens."""
        weight, bias = layers.up
        if h_RND.is_cuda:
            # cuBLASLt applies the tanh approximation, DiT's, inside the product; on a CPU this call has the exact one
            h = torch._addmm_activation(bias, h_RND.flatten(0, 1), weight.t(), use_gelu=True).view(*h_RND.shape[:2], -1)
        else:
            h = F.gelu(F.linear(h_RND, weight, bias), approximate="tanh")
        return F.linear(h, *layers.down)


def _flat(part_R1D: Tensor) -> Tensor:
    """[R, D] of a modulation's part, as a view."""
    return part_R1D.squeeze(1)


_counts: dict[tuple[int, torch.device], Tensor] = {}


def _count(number: int, device: torch.device) -> Tensor:
    """A count known on the host, where the kernels read it."""
    if (number, device) not in _counts:
        _counts[number, device] = torch.tensor([number], dtype=torch.int32, device=device)
    return _counts[number, device]
