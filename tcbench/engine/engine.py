"""The only code that executes plans: it gathers, scatters, stores features and charges the ledger.

One `Engine` serves one run (one batch of samples from first to last step). A step is: embed, let the method look and
plan, execute the plan, un-embed. Nothing between the plan and the output waits for the device: token counts are shapes
or stay on the device, and indices stay where the model is.

A plan is executed unit by unit through `Blocks`: `PlainBlocks` calls the model's own layers and runs everywhere,
`tcbench.engine.fused.FusedBlocks` does the same with few, fused kernels on a GPU.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from tcbench.engine.blocks import Blocks
from tcbench.engine.cache import Cache
from tcbench.engine.plain import PlainBlocks
from tcbench.ledger import Ledger
from tcbench.method import Look, Policy, Run
from tcbench.models.adapter import Adapter, Prompt
from tcbench.observations import OBSERVATIONS
from tcbench.plan import ALL, NONE, All, Block, Decision, Deferred, Nothing, Plan, Site, Span, Tokens, Unit
from tcbench.record.executed import Executed, PlanRecord
from tcbench.shapes import Macs


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
