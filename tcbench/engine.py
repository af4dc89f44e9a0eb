"""The only code that executes plans: it gathers, scatters, stores features and charges the ledger.

One `Engine` serves one run (one batch of samples from first to last step). A step is: embed, let the method look and
plan, execute the plan, un-embed. Nothing between the plan and the output waits for the device: token counts are shapes
and indices stay where the model is.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tcbench import noise
from tcbench.cache import Cache, take_tokens
from tcbench.errors import UserError
from tcbench.ledger import Ledger, block_macs
from tcbench.method import Policy, Run
from tcbench.models.dit import DiTAdapter, Modulation
from tcbench.plan import (
    ALL,
    NONE,
    All,
    Block,
    Decision,
    Deferred,
    Hold,
    Nothing,
    Plan,
    Site,
    Span,
    Tokens,
    Unit,
    every_unit,
)


@dataclass
class _Look:
    """`tcbench.method.Look` on a live step."""

    engine: "Engine"
    run: Run
    step: int
    x_RND: Tensor
    condition_RD: Tensor

    def latent(self) -> Tensor:
        return self.x_RND

    def scores(self, name: str) -> Tensor:
        scorer = self.run.artefacts.scorers.get(name)
        if scorer is None:
            raise UserError(f"scorer {name!r} is not among the artefacts; train the row first, or set artefacts_from")
        self.engine.ledger.charge(name, scorer.macs(self.run.shape))
        return scorer(self.engine.adapter, self.x_RND, self.condition_RD)

    def uniform(self, block: int) -> Tensor:
        run = self.run
        numbers = noise.uniform(run.seed, run.sample_index, run.shape.num_tokens, self.step, block)
        return numbers.repeat(run.rows_per_sample, 1)

    def attention_received(self, block: int) -> Tensor:
        return self.engine.cache.attention_received(block)

    def updates(self) -> Tensor:
        shape = self.run.shape
        units = [Block(block) for block in range(shape.num_blocks)]
        uncached = Engine(self.engine.adapter, self.run)
        uncached.hidden(every_unit(units, ALL), self.step, self.x_RND, self.condition_RD)
        self.engine.ledger.charge("oracle", block_macs(shape, shape.num_tokens) * shape.num_blocks)
        return torch.stack([uncached.cache.read(unit, Hold(), self.step) for unit in units], dim=1)


class Engine:
    """Runs a policy on a model for one batch.

    Args:
        adapter: the model.
        run: the batch.
        policy: who plans, `method.start(run)`; not needed if only `hidden` is called.

    Attributes:
        ledger: MACs charged so far, per sample.
        plans: the plans executed so far, in sampling order, as JSON-able summaries.
        cache: the features held.
    """

    def __init__(self, adapter: DiTAdapter, run: Run, policy: Policy | None = None) -> None:
        self.adapter, self.run, self.policy = adapter, run, policy
        self.cache = Cache()
        self.ledger = Ledger(run.rows_per_sample)
        self.plans: list[dict[str, str | int]] = []
        self._executed: dict[Unit, Decision] = {}

    def __call__(self, step: int, latent: Tensor, label_R: Tensor) -> Tensor:
        """The model's output at sampling step `step`.

        Args:
            step: 0..NFE-1 in sampling order.
            latent: the transformer's input, [R, C, H, W], conditional rows first.
            label_R: class labels, the null label in unconditional rows.
        """
        x, condition = self.embed(step, latent, label_R)
        x = self.hidden(self.plan(step, x, condition), step, x, condition)
        return self.adapter.unembed(x, condition)

    def plan(self, step: int, x_RND: Tensor, condition_RD: Tensor) -> Plan:
        """The policy's plan for a step, given what it may look at."""
        if self.policy is None:
            raise RuntimeError("this engine was made without a policy; give it plans through hidden()")
        return self.policy.plan(_Look(self, self.run, step, x_RND, condition_RD))

    def embed(self, step: int, latent: Tensor, label_R: Tensor) -> tuple[Tensor, Tensor]:
        """(tokens x^0 [R, N, D], condition [R, D]) at a step."""
        timestep = torch.full((len(latent),), self.run.timesteps[step], device=latent.device)
        return self.adapter.embed(latent), self.adapter.condition(timestep, label_R)

    def hidden(self, plan: Plan, step: int, x_RND: Tensor, condition_RD: Tensor) -> Tensor:
        """Execute a plan on embedded tokens: the last block's output x^L, [R, N, D]."""
        self._check_units(plan)
        self._executed = dict(plan.decisions)
        spans, block, x = plan.spans(), 0, x_RND
        while block < self.run.shape.num_blocks:
            if span := spans.get(block):
                x = self._span(span, plan.decisions[span], step, x, condition_RD)
                block = span.stop
            else:
                x = self._block(block, plan, step, x, condition_RD)
                block += 1
        executed = Plan(self._executed)
        self.ledger.charge_plan(executed, self.run.shape)
        self.ledger.charge_choices(plan)
        self.plans.append(executed.summary())
        return x

    def _check_units(self, plan: Plan) -> None:
        shape = self.run.shape
        for unit in plan.decisions:
            missing = isinstance(unit, Site) and unit.branch not in shape.branches
            if missing or not 0 <= unit.blocks.start < unit.blocks.stop <= shape.num_blocks:
                raise ValueError(f"a plan decides {unit}, which a model of {shape.num_blocks} blocks does not have")

    def _span(self, span: Span, decision: Decision, step: int, x: Tensor, condition: Tensor) -> Tensor:
        match self._resolve(span, decision, x):
            case Nothing():
                return x + self.cache.read(span, decision.fill, step)
            case All():
                before = x
                for block in span.blocks:
                    x = self._block(block, Plan(), step, x, condition)
                self.cache.store(span, x - before, step, decision.fill.order)
                return x
        raise ValueError(f"{span}: a span is recomputed for all tokens or none; decide its blocks one by one instead")

    def _block(self, block: int, plan: Plan, step: int, x: Tensor, condition: Tensor) -> Tensor:
        module, unit = self.adapter.blocks[block], Block(block)
        decision = plan.at(unit)
        who = self._resolve(unit, decision, x) if decision else ALL
        if decision and isinstance(who, Nothing):
            return x + self.cache.read(unit, decision.fill, step)
        modulation = self.adapter.modulation(module, condition)
        if decision is None:
            for branch in self.run.shape.branches:
                site = Site(block, branch)
                x = x + modulation[branch].gate * self._site(site, plan.at(site), step, x, modulation[branch])
            return x
        index = who.index_RK if isinstance(who, Tokens) else None
        before = after = x if index is None else take_tokens(x, index)
        for branch in self.run.shape.branches:
            part = modulation[branch]
            after = after + part.gate * self._branch(block, branch, after, part, decision, index, x)
        if index is None:
            self.cache.store(unit, after - before, step, decision.fill.order)
            return after
        self.cache.refresh(unit, index, after - before)
        return x + self.cache.read(unit, decision.fill, step)

    def _site(self, site: Site, decision: Decision | None, step: int, x: Tensor, part: Modulation) -> Tensor:
        """A branch's output for all tokens, before its gate."""
        if decision is None:
            return self._branch(site.block, site.branch, x, part, None, None, x)
        match self._resolve(site, decision, x):
            case All():
                value = self._branch(site.block, site.branch, x, part, decision, None, x)
                self.cache.store(site, value, step, decision.fill.order)
                return value
            case Tokens(index):
                fresh = self._branch(site.block, site.branch, take_tokens(x, index), part, decision, index, x)
                self.cache.refresh(site, index, fresh)
        return self.cache.read(site, decision.fill, step)

    def _branch(
        self,
        block: int,
        branch: str,
        x_RKD: Tensor,
        part: Modulation,
        decision: Decision | None,
        index_RK: Tensor | None,
        x_RND: Tensor,
    ) -> Tensor:
        """Compute a branch for the tokens x_RKD (`index_RK` of x_RND; None means all of them)."""
        adapter, module = self.adapter, self.adapter.blocks[block]
        h = adapter.branch_input(module, branch, x_RKD, part)
        if branch != "attn":
            return adapter.mlp(module, h)
        policy = decision.keys if decision else "fresh"
        if index_RK is not None and policy == "recomputed":
            keys, values = adapter.keys_values(module, adapter.branch_input(module, branch, x_RND, part))
        else:
            keys, values = adapter.keys_values(module, h)
        if policy == "cached":
            if index_RK is None:
                self.cache.store_keys_values(block, keys, values)
            else:
                keys, values = self.cache.refresh_keys_values(block, index_RK, keys, values)
        queries = adapter.queries(module, h)
        if index_RK is None and decision and decision.observe:
            self.cache.store_attention(block, adapter.attention_received(queries, keys))
        return adapter.mix(module, queries, keys, values)

    def _resolve(self, unit: Unit, decision: Decision, x: Tensor) -> All | Nothing | Tokens:
        """The tokens to recompute at a unit: taken now if deferred; no tokens at all is `NONE`."""
        who = decision.who.choose(x) if isinstance(decision.who, Deferred) else decision.who
        if isinstance(who, Tokens) and who.count == 0:
            who = NONE
        self._executed[unit] = replace(decision, who=who)
        return who


def soft_hidden(
    adapter: DiTAdapter,
    x_RND: Tensor,
    condition_RD: Tensor,
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
        condition_RD: timestep and label embedding; timesteps may differ between rows.
        gates: by `Block` or `Site`, broadcastable to [R, N, D].
        cached: the stored value of every unit in `gates`, [R, N, D].
        inputs: the uncached input of every block; if given, each block starts from it instead of from the cached path,
            which is Alg. 1's literal line 13.

    Returns:
        x-hat^L, [R, N, D].
    """
    x = x_RND
    for index, module in enumerate(adapter.blocks):
        x = x if inputs is None else inputs[index]
        modulation, before = adapter.modulation(module, condition_RD), x
        for branch in adapter.shape.branches:
            out = adapter.branch(module, branch, x, modulation[branch])
            if (site := Site(index, branch)) in gates:
                out = torch.lerp(cached[site], out, gates[site])
            x = x + modulation[branch].gate * out
        if (unit := Block(index)) in gates:
            x = before + torch.lerp(cached[unit], x - before, gates[unit])
    return x
