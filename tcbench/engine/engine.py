"""The only code that executes plans: it gathers, scatters, stores features and charges the ledger.

One `Engine` serves one run (one batch of samples from first to last step). A step is: embed, let the method look and
plan, execute the plan, un-embed. Nothing between the plan and the output waits for the device: token counts are shapes
or stay on the device, and indices stay where the model is.

A plan is executed unit by unit through `Blocks`: `PlainBlocks` calls the model's own layers and runs everywhere,
`tcbench.engine.fused.FusedBlocks` does the same with few, fused kernels on a GPU.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tcbench.engine.blocks import Blocks
from tcbench.engine.cache import Cache
from tcbench.engine.plain import PlainBlocks
from tcbench.ledger import Ledger
from tcbench.method import Look, Policy, Run
from tcbench.models.adapter import Adapter, Prompt
from tcbench.observations import observation
from tcbench.plan import (
    ALL,
    NONE,
    All,
    Block,
    Decision,
    Deferred,
    Merged,
    Nothing,
    Output,
    Plan,
    PlanError,
    Rows,
    Settled,
    Site,
    Span,
    Tokens,
    Unit,
)
from tcbench.record.executed import Executed, PlanRecord
from tcbench.shapes import Macs
from tcbench.watch.checking import bits, check_tokens, readable
from tcbench.watch.guard import guarded


@dataclass
class _Step:
    """A step as observations see it (`observations.LiveStep`)."""

    engine: "Engine"
    run: Run
    step: int
    x_RND: Tensor
    condition: Any
    input_RC: Tensor | None


class _Look(Look):
    """`Look` on a live step; nothing public of it leads to the engine."""

    def __init__(self, live: _Step) -> None:
        self.run, self.step, self._live = live.run, live.step, live

    def observe(self, name: str, *arguments: Any) -> Tensor:
        looked_at, engine = observation(name), self._live.engine
        if (macs := looked_at.macs(self.run.shape, *arguments)) != Macs():
            engine.charge(looked_at.tag(*arguments), macs)
        tensor = looked_at.compute(self._live, *arguments)
        return engine.lend(name, tensor) if looked_at.lent else tensor

    def read(self, value: Tensor) -> float:
        return self._live.engine.read_for_method(value)


class _Check:
    """The blocks that a plan checks, while it is executed."""

    def __init__(self, engine: "Engine", plan: Plan, condition: Any) -> None:
        self._engine, self._plan, self._condition = engine, plan, condition
        self._open: tuple[int, Tensor] | None = None  # the block at hand and its input

    def before(self, unit: Unit) -> None:
        """A unit is reached, or the end: compute the checked block that lies behind, note the input of one ahead."""
        block = unit.blocks.start if unit.blocks else None
        blocks, text = self._engine.blocks, self._engine.run.shape.joint_text
        if self._open and self._open[0] != block:
            number, x = self._open
            module = self._engine.adapter.blocks[number]
            computed = blocks.block(module, x, self._condition)
            self._engine.cache.store_checked(number, blocks.stream[:, text:], computed[:, text:])
            self._open = None
        if self._open is None and block in self._plan.checks:
            self._open = block, blocks.stream


class Engine:
    """Runs a policy on a model for one batch.

    Args:
        adapter: the model.
        run: the batch.
        policy: who plans, `method.start(run)`; not needed if only `hidden` is called.
        blocks: makes what executes the plans.
        cache: what earlier steps left; nothing if not given.

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
        cache: Cache | None = None,
    ) -> None:
        self.adapter, self.run = adapter, run
        self.policy = guarded(policy) if policy else None
        self.cache = cache or Cache()
        self.output: Tensor | None = None
        self.read: Callable[[Tensor], float] = Tensor.item
        self.blocks = (blocks or PlainBlocks)(adapter, run, self.cache)
        self._ledger = Ledger(run.rows_per_sample)
        self._plans: list[Mapping[str, Executed]] = []
        self._unsettled: list[tuple[Plan, Plan]] = []  # planned and executed
        self._executed: dict[Unit, Decision] = {}
        self._lent: list[tuple[str, Tensor, Tensor]] = []  # what is lent, the tensor and the copy that was handed out

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

    def read_for_method(self, value: Tensor) -> float:
        """`read`, if the method says that it decides on the host."""
        if self.policy:
            self.policy.check_read()
        return self.read(value)

    def lend(self, name: str, tensor: Tensor) -> Tensor:
        """What a method is handed of a tensor that the run goes on computing with: while values are checked, a copy."""
        if not readable(tensor):
            return tensor
        self._lent.append((name, tensor, copy := tensor.clone()))
        return copy

    @contextmanager
    def _lending(self) -> Iterator[None]:
        """Let a method look inside; refuse that it writes to what it is lent."""
        self._lent = []
        yield
        for name, tensor, copy in self._lent:
            if not bits(tensor).equal(bits(copy)):
                raise PlanError(f"writes to {name}, which is there to be read; change a copy (.clone())")
        self._lent = []

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
        with self.policy.executed(step), self._lending():
            return self.policy.plan(_Look(_Step(self, self.run, step, x_RND, condition, latent)))

    def embed(self, step: int, latent: Tensor, context: Any) -> tuple[Tensor, Any]:
        """(tokens x^0 [R, N, D], condition) at a step."""
        return self.blocks.embed(latent, context), self.blocks.condition(step, context)

    def hidden(self, plan: Plan, step: int, x_RND: Tensor, condition: Any) -> Tensor:
        """Execute a plan on embedded tokens: the last block's output x^L, [R, N, D].

        Raises:
            PlanError: the plan cannot be executed; a UserError that names the method, if a method plans here.
        """
        self._execute(plan, step, x_RND, condition)
        return self.blocks.stream

    def _execute(self, plan: Plan, step: int, x_RND: Tensor, condition: Any) -> None:
        with self.policy.executed(step) if self.policy else nullcontext():
            self.run.shape.check(plan)
            self._rows, self._device = len(x_RND), x_RND.device
            self._check_tokens(plan)
            self.adapter.begin_step(plan.full)
            self._executed = dict(plan.decisions)
            self.blocks.begin(step, x_RND, condition)
            check = _Check(self, plan, condition)
            for unit, decision in self.run.shape.walk(plan):
                check.before(unit)
                self._unit(unit, decision, step)
                if decision and decision.observe == "output":
                    self.cache.store_output(unit.blocks.start, self.blocks.stream[:, self.run.shape.joint_text :])
            check.before(Output())
        self._unsettled.append((plan, Plan(self._executed, plan.checks)))

    def _unit(self, unit: Unit, decision: Decision | None, step: int) -> None:
        if decision is None:
            self._computed(unit)
            return
        match unit:
            case Output():
                self._output(unit, decision, step)
            case Span():
                self._span(unit, decision, step)
            case Block():
                who = self._resolve(unit, decision, step)
                assert not isinstance(who, Rows | Merged), "a plan refuses them here"
                self.blocks.whole(unit.block, who, decision)
            case Site():
                self.blocks.part(unit, self._resolve(unit, decision, step), decision)

    def _computed(self, unit: Unit) -> None:
        """A part, or a parallel block, that is computed in full and not stored."""
        if isinstance(unit, Site):
            self.blocks.part(unit, ALL, None)
        else:
            assert isinstance(unit, Block)
            self.blocks.whole(unit.block, ALL, None)

    def _output(self, unit: Output, decision: Decision, step: int) -> None:
        if isinstance(decision.who, All):
            self.cache.store(unit, self.blocks.stream, step, decision.fill)
        else:
            self.blocks.replace(self.cache.read(unit, decision.fill, step))

    def _span(self, span: Span, decision: Decision, step: int) -> None:
        match self._resolve(span, decision, step):
            case Nothing():
                self.blocks.add(self.cache.read(span, decision.fill, step))
            case All():
                before = self.blocks.stream
                for unit, _ in self.run.shape.walk(Plan()):
                    if unit.blocks.start in span.blocks:
                        self._computed(unit)
                self.cache.store(span, self.blocks.stream - before, step, decision.fill)
            case _:
                raise PlanError(
                    f"{span}: a span is recomputed for all tokens or none; decide its blocks one by one instead"
                )

    def _resolve(self, unit: Unit, decision: Decision, step: int) -> Settled:
        """What to recompute at a unit: taken now if deferred; no tokens at all is `NONE`."""
        who = self._choose(unit, decision, step) if isinstance(decision.who, Deferred) else decision.who
        if isinstance(who, Tokens) and who.index_RK.shape[1] == 0:
            who = NONE
        if isinstance(who, Rows):
            who = who.settled()
        # which tokens they were need not be kept; how many, if the device knows it, is asked for later
        kept = who
        if isinstance(who, Tokens):
            kept = Tokens(who.index_RK.to("meta"), who.used)
        elif isinstance(who, Merged):
            kept = Merged(who.index_RK.to("meta"), who.group_RN.to("meta"))
        self._executed[unit] = replace(decision, who=kept)
        return who

    def _choose(self, unit: Unit, decision: Decision, step: int) -> Settled:
        """Who a deferred decision chooses, looked at as if the plan had said it."""
        assert isinstance(decision.who, Deferred)
        sees = self._image_stream
        if decision.who.sees == "modulated":
            assert isinstance(unit, Site)
            sees = partial(self._modulated_stream, unit)
        with self._lending():
            if self.policy:
                who = self.policy.choose(step, unit, decision.who.choose, sees)
            else:
                who = decision.who.choose(sees)
        self._check_tokens(Plan({unit: replace(decision, who=who)}))
        return who

    def _image_stream(self) -> Tensor:
        """The tokens that methods choose among, as the stream has them now: [R, N, D]."""
        return self.lend("the stream", self.blocks.stream[:, self.run.shape.joint_text :])

    def _modulated_stream(self, site: Site) -> Tensor:
        """The same tokens as a part takes them: [R, N, D]."""
        return self.blocks.part_input(site)[:, self.run.shape.joint_text :]

    def _check_tokens(self, plan: Plan) -> None:
        check_tokens(plan, self._rows, self.run.shape.num_tokens, self._device)

    @property
    def undecided(self) -> list[Tensor]:
        """The numbers of tokens that only the device knows, int32 [1] each, of what is executed but not settled."""
        return [used for _, executed in self._unsettled for used in _counted(executed)]

    def account(self, counts: Sequence[int]) -> tuple[Ledger, PlanRecord]:
        """The ledger and the plans if the numbers of `undecided` are these; what was executed stays unsettled, so that
        a run that is repeated with other numbers is accounted for as often."""
        return self._account(iter(counts), self._ledger + Ledger(self.run.rows_per_sample))

    def _account(self, counts: Iterator[int], ledger: Ledger) -> tuple[Ledger, PlanRecord]:
        plans = []
        for planned, executed in self._unsettled:
            decisions = {}
            for unit, decision in executed.decisions.items():
                who = decision.who
                if isinstance(who, Tokens):
                    who = who.settled(who.index_RK.shape[1] if who.used is None else next(counts))
                decisions[unit] = replace(decision, who=who)
            settled = replace(executed, decisions=decisions)
            ledger.charge_plan(settled, self.run.shape)
            ledger.charge_choices(planned)
            plans.append(settled.executed())
        return ledger, PlanRecord(tuple(plans))

    def _settle(self) -> None:
        counts = torch.cat(self.undecided).tolist() if self.undecided else []  # one wait for all of them
        _, plans = self._account(iter(counts), self._ledger)
        self._plans += plans.steps
        self._unsettled.clear()


def _counted(plan: Plan) -> Iterator[Tensor]:
    """How many tokens count, where only the device knows."""
    for decision in plan.decisions.values():
        if isinstance(decision.who, Tokens) and decision.who.used is not None:
            yield decision.who.used
