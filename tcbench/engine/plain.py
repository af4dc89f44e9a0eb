"""Units executed by the model's own layers; runs everywhere, and is what every other execution is held to."""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from tcbench.engine.cache import Cache, take_tokens
from tcbench.engine.merging import part_of_groups
from tcbench.method import Run
from tcbench.models.adapter import Adapter, Gated, rows_of
from tcbench.plan import All, Block, Decision, Merged, Nothing, Rows, Settled, Site, Tokens
from tcbench.record.executed import Execution


class PlainBlocks:
    """`Blocks` by the model's own layers, in the order of its own forward."""

    execution: ClassVar[Execution] = "plain"
    counts_on_device: ClassVar[bool] = False
    backend: Literal["torch"] = "torch"

    def __init__(self, adapter: Adapter, run: Run, cache: Cache) -> None:
        self.adapter, self.run, self.cache = adapter, run, cache

    def prepare(self, context: Any) -> None:
        """Nothing can be made ahead without changing the order of operations."""

    def condition(self, step: int, context: Any) -> Any:
        """What conditions the rows at a step."""
        rows = len(self.run.sample_index) * self.run.rows_per_sample
        timestep = torch.full((rows,), self.run.timesteps[step], device=self.adapter.device)
        return self.adapter.condition(timestep, context)

    def embed(self, latent: Tensor, context: Any) -> Tensor:
        """Tokens of the latents."""
        return self.adapter.embed(latent, context)

    def begin(self, step: int, x_RND: Tensor, condition: Any) -> None:
        """Start a step."""
        self.step, self.stream, self._condition = step, x_RND, condition
        self._modulated: tuple[int, Mapping[str, Gated]] = (-1, {})
        self._input: tuple[int, Tensor] | None = None  # a parallel block at hand, and the stream before its first part

    def add(self, value_RND: Tensor) -> None:
        """Add to the stream."""
        self.stream = self.stream + value_RND

    def replace(self, value_RND: Tensor) -> None:
        """Go on with another stream."""
        self.stream = value_RND

    def part_input(self, site: Site) -> Tensor:
        """The stream as a part takes it."""
        gated = self._modulation(site.block)[site.part]
        return self.adapter.part_input(self.adapter.blocks[site.block], site.part, self._taken(site), gated)

    def whole(self, block: int, who: All | Nothing | Tokens, decision: Decision | None) -> None:
        """A block whose update is one unit, or a parallel one that is left to be computed."""
        unit = Block(block)
        if isinstance(who, Tokens):
            who = who.settled()
        if isinstance(who, Nothing):
            assert decision is not None
            self.add(self.cache.read(unit, decision.fill, self.step))
            return
        index = self._places(who)
        before = after = self.stream if index is None else take_tokens(self.stream, index)
        joined = self.run.shape.blocks[block].parallel
        for name, gated in self._modulation(block).items():
            if joined and self.run.shape.kinds[name] != "mix":
                continue  # the projection behind attention has joined it
            value = self._compute(Site(block, name), after, gated, decision, index, joined)
            after = self.gated_sum(after, gated, value)
        if decision is None:
            self.stream = after
        elif index is None:
            self.cache.store(unit, after - before, self.step, decision.fill)
            self.stream = after
        else:
            self.cache.refresh(unit, index, after - before)
            self.add(self.cache.read(unit, decision.fill, self.step))

    def part(self, site: Site, who: Settled, decision: Decision | None) -> None:
        """One part of a block."""
        gated = self._modulation(site.block)[site.part]
        value = self._value(site, who, decision, self._taken(site), gated)
        self.stream = self.gated_sum(self.stream, gated, value)

    def block(self, module: Any, x_RND: Tensor, condition: Any) -> Tensor:
        """A whole block beside the stream."""
        return self.adapter.block(module, x_RND, condition)

    def unembed(self, condition: Any) -> Tensor:
        """The model's output."""
        return self.adapter.unembed(self.stream, condition)

    # --- what a subclass computes otherwise

    def everyone(
        self, module: Any, part: str, x_RND: Tensor, gated: Gated, joined: bool
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """A part of all tokens (`everyone`)."""
        return everyone(self.adapter, module, part, x_RND, gated, joined)

    def gated_sum(self, x_RKD: Tensor, gated: Gated, value_RKD: Tensor) -> Tensor:
        """The stream behind a part (`Adapter.gated_sum`)."""
        return self.adapter.gated_sum(x_RKD, gated, value_RKD)

    # --- parts

    def _taken(self, site: Site) -> Tensor:
        """The stream as it reaches a part: parallel ones take it as the first of them found it."""
        block = self.run.shape.blocks[site.block]
        if not block.parallel:
            return self.stream
        if self._input is None or self._input[0] != site.block:
            self._input = site.block, self.stream
        return self._input[1]

    def _modulation(self, block: int) -> Mapping[str, Gated]:
        if self._modulated[0] != block:
            self._modulated = block, self.adapter.modulation(self.adapter.blocks[block], self._condition)
        return self._modulated[1]

    def _places(self, who: All | Tokens) -> Tensor | None:
        """Where the recomputed tokens are in the stream, [R, K]; None means everywhere. Joint text is among them."""
        if isinstance(who, All):
            return None
        if not (text := self.run.shape.joint_text):
            return who.index_RK
        places = torch.arange(text, device=who.index_RK.device).expand(len(who.index_RK), -1)
        return torch.cat([places, who.index_RK + text], dim=1)

    def _value(self, site: Site, who: Settled, decision: Decision | None, x_RND: Tensor, gated: Gated) -> Tensor:
        """A part's output for all tokens of its input, before its gate."""
        if decision is None:
            return self._compute(site, x_RND, gated, None, None)
        match who.settled() if isinstance(who, Tokens) else who:
            case All():
                value = self._compute(site, x_RND, gated, decision, None)
                self.cache.store(site, value, self.step, decision.fill)
                return value
            case Merged() as merged:
                return part_of_groups(self.adapter, site, merged, self.part_input(site), gated)
            case Rows() as rows:
                rows_K = torch.tensor(rows.index, device=x_RND.device)
                self.cache.refresh_rows(site, rows_K, part_of_rows(self.adapter, site, rows_K, x_RND, gated))
            case Tokens() as tokens:
                index = self._places(tokens)
                assert index is not None
                value = self._compute(site, take_tokens(x_RND, index), gated, decision, index)
                self.cache.refresh(site, index, value)
                if decision.spread and decision.spread.ratio:
                    self.cache.spread(site, tokens.index_RK, decision.spread, self.run.shape.joint_text)
        return self.cache.read(site, decision.fill, self.step)

    def _compute(
        self,
        site: Site,
        x_RKD: Tensor,
        gated: Gated,
        decision: Decision | None,
        index_RK: Tensor | None,
        joined: bool = False,
    ) -> Tensor:
        """Compute a part for the tokens x_RKD (`index_RK` of the stream; None means all of them).

        `joined`: of a parallel block, attention and what stands beside it.
        """
        module = self.adapter.blocks[site.block]
        if index_RK is not None:
            return self._few(site, x_RKD, gated, decision, index_RK, joined)
        value, seen = self.everyone(module, site.part, x_RKD, gated, joined)
        if decision:
            self._store_seen(site, seen, gated, decision)
        return value

    def _store_seen(self, site: Site, seen: tuple[Tensor, ...], gated: Gated, decision: Decision) -> None:
        """Store what is decided to be seen of an attention of all tokens: `seen` is its queries, keys and values."""
        block, text = site.block, self.run.shape.joint_text
        match self.run.shape.kind(site), decision.observe:
            case "cross", "cross":
                self.cache.store_entropy(block, self.adapter.attention_entropy(seen[0], gated), None)
            case "mix", observed:
                queries, keys, values = seen
                if decision.keys == "cached":
                    self.cache.store_keys_values(block, keys, values)
                if observed == "attn":
                    received = self.adapter.attention_received(self.adapter.blocks[block], queries, keys)
                    self.cache.store_attention(block, received[:, text:])
                if observed == "values":
                    self.cache.store_value_norms(block, value_norms(values)[:, text:])

    def _few(
        self,
        site: Site,
        x_RKD: Tensor,
        gated: Gated,
        decision: Decision | None,
        index_RK: Tensor,
        joined: bool,
    ) -> Tensor:
        """Compute a part for some tokens, which attend to what is decided."""
        adapter, block, kind = self.adapter, site.block, self.run.shape.kind(site)
        module = adapter.blocks[block]
        h = adapter.part_input(module, site.part, x_RKD, gated)
        if kind == "pointwise":
            return adapter.pointwise(module, h)
        if kind == "cross":
            queries = adapter.text_queries(module, h)
            if decision and decision.observe == "cross":
                self.cache.store_entropy(block, adapter.attention_entropy(queries, gated), index_RK)
            return adapter.cross(module, queries, gated)
        policy = decision.keys if decision else "fresh"
        if policy == "recomputed":
            everything = adapter.part_input(module, site.part, self._taken(site), gated)
            keys, values = adapter.keys_values(module, everything)
        else:
            keys, values = adapter.keys_values(module, h, index_RK)
        if policy == "cached":
            keys, values = self.cache.refresh_keys_values(block, index_RK, keys, values)
        queries = adapter.queries(module, h, index_RK)
        mix = adapter.joined if joined else adapter.mix
        return mix(module, h, queries, keys, values, index_RK, index_RK if policy == "fresh" else None)


def everyone(
    adapter: Adapter, module: Any, part: str, x_RND: Tensor, gated: Gated, joined: bool
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """A part of all tokens from the stream that it takes.

    Args:
        joined: of a parallel block, attention and what stands beside it.

    Returns:
        its output before its gate, [R, N, D]; of self-attention the queries, keys and values, of cross-attention the
        queries
    """
    h = adapter.part_input(module, part, x_RND, gated)
    match adapter.kind(part):
        case "pointwise":
            return adapter.pointwise(module, h), ()
        case "cross":
            queries = adapter.text_queries(module, h)
            return adapter.cross(module, queries, gated), (queries,)
        case "mix":
            keys, values = adapter.keys_values(module, h)
            queries = adapter.queries(module, h)
            mix = adapter.joined if joined else adapter.mix
            return mix(module, h, queries, keys, values), (queries, keys, values)


def part_of_rows(adapter: Adapter, site: Site, rows_K: Tensor, x_RND: Tensor, gated: Gated) -> Tensor:
    """A part of all tokens of some rows, before its gate, by the model's own layers: [K, N, D]."""
    return adapter.part(adapter.blocks[site.block], site.part, x_RND[rows_K], rows_of(gated, rows_K))


def value_norms(values: Tensor) -> Tensor:
    """The mean over heads of the lengths of tokens' value vectors [R, heads, N, head_dim], float32 [R, N]."""
    return values.float().norm(dim=3).mean(dim=1)
