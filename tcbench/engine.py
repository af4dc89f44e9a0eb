"""The only code that executes plans: it gathers, scatters, stores features and charges the ledger.

One `Engine` serves one run (one batch of samples from first to last step). A step is: embed, let the method look and
plan, execute the plan, un-embed. Nothing between the plan and the output waits for the device: token counts are shapes
or stay on the device, and indices stay where the model is.

A plan is executed unit by unit through `Blocks`: `PlainBlocks` calls the model's own layers and runs everywhere,
`tcbench.fused.FusedBlocks` does the same with few, fused kernels on a GPU.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from tcbench.cache import Cache, take_tokens
from tcbench.executed import Executed, PlanRecord
from tcbench.ledger import Ledger
from tcbench.method import Look, Policy, Run
from tcbench.models.adapter import Adapter, Gated, Prompt
from tcbench.observations import OBSERVATIONS
from tcbench.plan import ALL, NONE, All, Block, Decision, Deferred, Nothing, Plan, Site, Span, Tokens, Unit
from tcbench.shapes import Macs


class Blocks(Protocol):
    """How the units of a plan are executed on the token stream.

    `whole` and `part` move the stream through a block or one of its parts; `who` is already resolved. Without a
    decision all tokens are computed and nothing is stored.
    """

    def prepare(self, context: Any) -> None:
        """Called once per run, with the run's context (`Adapter.prepare`)."""

    def condition(self, step: int, context: Any) -> Any:
        """What conditions the rows at a step (`Adapter.condition`)."""

    def embed(self, latent: Tensor, context: Any) -> Tensor:
        """Tokens of the latents, [R, N, D] (`Adapter.embed`)."""

    def begin(self, step: int, x_RND: Tensor, condition: Any) -> None:
        """Start a step at the embedded tokens."""

    @property
    def stream(self) -> Tensor:
        """The tokens after what was executed since `begin`, [R, N, D]."""

    def add(self, value_RND: Tensor) -> None:
        """Add to the stream."""

    def whole(self, block: int, who: All | Nothing | Tokens, decision: Decision) -> None:
        """A block whose update is one unit."""

    def part(self, site: Site, who: All | Nothing | Tokens, decision: Decision | None) -> None:
        """One part of a block, which is a unit or is left to be computed."""

    def block(self, module: Any, x_RND: Tensor, condition: Any) -> Tensor:
        """A whole block that is not the model's (a predictor's), for all tokens and beside the stream: [R, N, D]."""

    def unembed(self, condition: Any) -> Tensor:
        """The model's output from the stream: [R, out_channels, ...]."""


@dataclass
class _Look(Look):
    """`Look` on a live step."""

    engine: "Engine"
    run: Run
    step: int
    x_RND: Tensor
    condition: Any
    input_RC: Tensor | None = None

    def observe(self, name: str, *arguments: Any) -> Tensor:
        observation = OBSERVATIONS[name]
        if (macs := observation.macs(self.run.shape, *arguments)) != Macs():
            self.engine.charge(observation.tag(*arguments), macs)
        return observation.compute(self, *arguments)

    def read(self, value: Tensor) -> float:
        return self.engine.read(value)


class Engine:
    """Runs a policy on a model for one batch.

    Args:
        adapter: the model.
        run: the batch.
        policy: who plans, `method.start(run)`; not needed if only `hidden` is called.
        blocks: makes what executes the plans.

    Attributes:
        blocks: what executes the plans.
        cache: the features held.
        output: what the network put out at the last step, [R, C, ...].
        read: brings a number to the host; whoever captures a run puts another function here.
    """

    def __init__(
        self,
        adapter: Adapter,
        run: Run,
        policy: Policy | None = None,
        blocks: Callable[[Adapter, Run, Cache], Blocks] | None = None,
    ) -> None:
        self.adapter, self.run, self.policy = adapter, run, policy
        self.cache = Cache()
        self.output: Tensor | None = None
        self.read: Callable[[Tensor], float] = Tensor.item
        self.blocks = (blocks or PlainBlocks)(adapter, run, self.cache)
        self._ledger = Ledger(run.rows_per_sample)
        self._plans: list[dict[str, Executed]] = []
        self._unsettled: list[tuple[Plan, Plan]] = []  # planned and executed
        self._executed: dict[Unit, Decision] = {}

    @property
    def ledger(self) -> Ledger:
        """MACs charged so far, per sample; waits for the device where it decided counts."""
        self._settle()
        return self._ledger

    @property
    def plans(self) -> PlanRecord:
        """The plans executed so far; waits like `ledger`."""
        self._settle()
        return PlanRecord(tuple(self._plans))

    def charge(self, name: str, macs_per_row: Macs) -> None:
        """Charge what a method looks at, a call of a scorer for one."""
        self._ledger.charge(name, macs_per_row)

    def prepare(self, prompt: Prompt) -> Any:
        """The context of a run, made and charged once: what depends on the prompt alone.

        Args:
            prompt: of all rows, conditional ones first (`Adapter.guided`).
        """
        self._ledger.charge("model", self.run.shape.once)
        context = self.adapter.prepare(prompt)
        self.blocks.prepare(context)
        return context

    def __call__(self, step: int, latent: Tensor, context: Any) -> Tensor:
        """The model's output at sampling step `step`.

        Args:
            step: 0..NFE-1 in sampling order.
            latent: the transformer's input, [R, C, H, W] or [R, C, F, H, W], conditional rows first.
            context: what `prepare` made.
        """
        x, condition = self.embed(step, latent, context)
        self._execute(self.plan(step, x, condition, latent), step, x, condition)
        self.output = self.blocks.unembed(condition)
        return self.output

    def plan(self, step: int, x_RND: Tensor, condition: Any, latent: Tensor | None = None) -> Plan:
        """The policy's plan for a step, given what it may look at; of `latent` it is `Look.input`."""
        if self.policy is None:
            raise RuntimeError("this engine was made without a policy; give it plans through hidden()")
        return self.policy.plan(_Look(self, self.run, step, x_RND, condition, latent))

    def embed(self, step: int, latent: Tensor, context: Any) -> tuple[Tensor, Any]:
        """(tokens x^0 [R, N, D], condition) at a step."""
        return self.blocks.embed(latent, context), self.blocks.condition(step, context)

    def hidden(self, plan: Plan, step: int, x_RND: Tensor, condition: Any) -> Tensor:
        """Execute a plan on embedded tokens: the last block's output x^L, [R, N, D]."""
        self._execute(plan, step, x_RND, condition)
        return self.blocks.stream

    def _execute(self, plan: Plan, step: int, x_RND: Tensor, condition: Any) -> None:
        self.run.shape.check(plan)
        self.adapter.begin_step(plan.full)
        self._executed = dict(plan.decisions)
        self.blocks.begin(step, x_RND, condition)
        for unit, decision in self.run.shape.walk(plan):
            self._unit(unit, decision, step)
        self._unsettled.append((plan, Plan(self._executed)))

    def _unit(self, unit: Unit, decision: Decision | None, step: int) -> None:
        if decision is None:
            assert isinstance(unit, Site)
            self.blocks.part(unit, ALL, None)
            return
        match unit:
            case Span():
                self._span(unit, decision, step)
            case Block():
                self.blocks.whole(unit.block, self._resolve(unit, decision), decision)
            case Site():
                self.blocks.part(unit, self._resolve(unit, decision), decision)

    def _span(self, span: Span, decision: Decision, step: int) -> None:
        match self._resolve(span, decision):
            case Nothing():
                self.blocks.add(self.cache.read(span, decision.fill, step))
            case All():
                before = self.blocks.stream
                for site in self.run.shape.sites:
                    if site.block in span.blocks:
                        self.blocks.part(site, ALL, None)
                self.cache.store(span, self.blocks.stream - before, step, decision.fill.order)
            case _:
                raise ValueError(
                    f"{span}: a span is recomputed for all tokens or none; decide its blocks one by one instead"
                )

    def _resolve(self, unit: Unit, decision: Decision) -> All | Nothing | Tokens:
        """The tokens to recompute at a unit: taken now if deferred; no tokens at all is `NONE`."""
        who = decision.who.choose(self._image_stream) if isinstance(decision.who, Deferred) else decision.who
        if isinstance(who, Tokens) and who.index_RK.shape[1] == 0:
            who = NONE
        # which tokens they were need not be kept; how many, if the device knows it, is asked for later
        kept = Tokens(who.index_RK.to("meta"), who.used) if isinstance(who, Tokens) else who
        self._executed[unit] = replace(decision, who=kept)
        return who

    def _image_stream(self) -> Tensor:
        """The tokens that methods choose among, as the stream has them now: [R, N, D]."""
        return self.blocks.stream[:, self.run.shape.joint_text :]

    def _settle(self) -> None:
        for planned, executed in self._unsettled:
            settled = Plan(
                {
                    unit: replace(decision, who=decision.who.settled())
                    if isinstance(decision.who, Tokens)
                    else decision
                    for unit, decision in executed.decisions.items()
                }
            )
            self._ledger.charge_plan(settled, self.run.shape)
            self._ledger.charge_choices(planned)
            self._plans.append(settled.executed())
        self._unsettled.clear()


class PlainBlocks:
    """`Blocks` by the model's own layers, in the order of its own forward."""

    path: Literal["torch"] = "torch"

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

    def add(self, value_RND: Tensor) -> None:
        """Add to the stream."""
        self.stream = self.stream + value_RND

    def whole(self, block: int, who: All | Nothing | Tokens, decision: Decision) -> None:
        """A block whose update is one unit."""
        unit = Block(block)
        if isinstance(who, Tokens):
            who = who.settled()
        if isinstance(who, Nothing):
            self.add(self.cache.read(unit, decision.fill, self.step))
            return
        index = self._places(who)
        before = after = self.stream if index is None else take_tokens(self.stream, index)
        for name, gated in self._modulation(block).items():
            value = self._compute(Site(block, name), after, gated, decision, index)
            after = after + self.adapter.gate(gated, value)
        if index is None:
            self.cache.store(unit, after - before, self.step, decision.fill.order)
            self.stream = after
        else:
            self.cache.refresh(unit, index, after - before)
            self.add(self.cache.read(unit, decision.fill, self.step))

    def part(self, site: Site, who: All | Nothing | Tokens, decision: Decision | None) -> None:
        """One part of a block."""
        gated = self._modulation(site.block)[site.part]
        self.stream = self.stream + self.adapter.gate(gated, self._value(site, who, decision, gated))

    def block(self, module: Any, x_RND: Tensor, condition: Any) -> Tensor:
        """A whole block beside the stream."""
        return self.adapter.block(module, x_RND, condition)

    def unembed(self, condition: Any) -> Tensor:
        """The model's output."""
        return self.adapter.unembed(self.stream, condition)

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

    def _value(self, site: Site, who: All | Nothing | Tokens, decision: Decision | None, gated: Gated) -> Tensor:
        """A part's output for all tokens, before its gate."""
        if decision is None:
            return self._compute(site, self.stream, gated, None, None)
        match who.settled() if isinstance(who, Tokens) else who:
            case All():
                value = self._compute(site, self.stream, gated, decision, None)
                self.cache.store(site, value, self.step, decision.fill.order)
                return value
            case Tokens() as tokens:
                index = self._places(tokens)
                assert index is not None
                value = self._compute(site, take_tokens(self.stream, index), gated, decision, index)
                self.cache.refresh(site, index, value)
        return self.cache.read(site, decision.fill, self.step)

    def _compute(
        self, site: Site, x_RKD: Tensor, gated: Gated, decision: Decision | None, index_RK: Tensor | None
    ) -> Tensor:
        """Compute a part for the tokens x_RKD (`index_RK` of the stream; None means all of them)."""
        adapter, block, text = self.adapter, site.block, self.run.shape.joint_text
        module, kind = adapter.blocks[block], self.run.shape.kind(site)
        h = adapter.part_input(module, site.part, x_RKD, gated)
        if kind == "pointwise":
            return adapter.pointwise(module, h)
        if kind == "cross":
            queries = adapter.text_queries(module, h)
            if decision and decision.observe == "cross":
                self.cache.store_entropy(block, adapter.attention_entropy(queries, gated), index_RK)
            return adapter.cross(module, queries, gated)
        policy = decision.keys if decision else "fresh"
        if index_RK is not None and policy == "recomputed":
            everything = adapter.part_input(module, site.part, self.stream, gated)
            keys, values = adapter.keys_values(module, everything)
        else:
            keys, values = adapter.keys_values(module, h, index_RK)
        if policy == "cached":
            if index_RK is None:
                self.cache.store_keys_values(block, keys, values)
            else:
                keys, values = self.cache.refresh_keys_values(block, index_RK, keys, values)
        queries = adapter.queries(module, h, index_RK)
        if index_RK is None and decision and decision.observe == "attn":
            self.cache.store_attention(block, adapter.attention_received(module, queries, keys)[:, text:])
        return adapter.mix(module, h, queries, keys, values, index_RK, index_RK if policy == "fresh" else None)


def soft_hidden(
    adapter: Adapter,
    x_RND: Tensor,
    condition: Any,
    gates: Mapping[Unit, Tensor],
    cached: Mapping[Unit, Tensor],
    inputs: Sequence[Tensor] | None = None,
) -> Tensor:
    """The training path: every unit in `gates` is gate * fresh + (1 - gate) * cached, differentiably.

    This is Eq. (6) with alpha relaxed to [0, 1] and the recursion through the cached path (x-hat^l from x-hat^{l-1};
    docs/reproduction-notes.md, reading 1). Everything is computed for all tokens and nothing is written in place. At
    gates of 0 and 1 it equals the engine with `keys="recomputed"` (tests/test_engine.py).

    Args:
        x_RND: embedded tokens.
        condition: of timestep and prompt; timesteps may differ between rows.
        gates: by `Block` or `Site`, broadcastable to [R, N, D]; a joint text's tokens are always computed.
        cached: the stored value of every unit in `gates`, [R, N, D].
        inputs: the uncached input of every block; if given, each block starts from it instead of from the cached path,
            which is Alg. 1's literal line 13.

    Returns:
        x-hat^L, [R, N, D].
    """
    x, text = x_RND, adapter.shape.joint_text

    def blend(unit: Unit, fresh: Tensor) -> Tensor:
        gate = gates[unit]
        if text and gate.ndim > 1 and gate.shape[1] > 1:
            gate = F.pad(gate, (0, 0, text, 0), value=1.0)
        return torch.lerp(cached[unit], fresh, gate)

    for index, module in enumerate(adapter.blocks):
        x = x if inputs is None else inputs[index]
        before = x
        for name, gated in adapter.modulation(module, condition).items():
            out = adapter.part(module, name, x, gated)
            x = x + adapter.gate(gated, blend(site, out) if (site := Site(index, name)) in gates else out)
        if (unit := Block(index)) in gates:
            x = before + blend(unit, x - before)
    return x
