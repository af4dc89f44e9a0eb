"""MACs of any (model, method, NFE) from shapes alone: every step's plan is made and costed, no model is built."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import TYPE_CHECKING, Any, cast

from tcbench.ledger import Ledger, overheads, plan_macs
from tcbench.method import Artefacts, Look, Method, Run, Table
from tcbench.models.specs import MODELS
from tcbench.observations import observation
from tcbench.plan import Deferred, Plan
from tcbench.shapes import Macs, ModelShape
from tcbench.tensors.unseen import unseen
from tcbench.timesteps import respaced_timesteps
from tcbench.trainable import Imported
from tcbench.watch.checking import check_tokens
from tcbench.watch.guard import Guarded, Undecided, guarded

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class _ShapeLook(Look):
    """`Look` where tensors have shapes and no values."""

    run: Run
    step: int
    _ledger: Ledger = field(repr=False)
    _policy: Guarded = field(repr=False)
    _stand_in: "Callable[[Tensor], float] | None" = field(default=None, repr=False)

    def observe(self, name: str, *arguments: Any) -> "Tensor":
        looked_at = observation(name)
        if (macs := looked_at.macs(self.run.shape, *arguments)) != Macs():
            self._ledger.charge(looked_at.tag(*arguments), macs)
        return unseen(self.run.rows_per_sample, *looked_at.size(self.run.shape, *arguments))

    def read(self, value: "Tensor") -> float:
        self._policy.check_read()
        if self._stand_in is None:
            raise Undecided
        return self._stand_in(value)


def run_of_shapes(model: str, steps: int) -> Run:
    """A guided run of one sample, as far as it is known without a model: `steps` sampled steps, nothing trained."""
    spec = MODELS[model]
    return Run(spec.shape, respaced_timesteps(steps), spec.guidance(), unseen(1, dtype="int64", values=[0]))


def macs_of(
    model: str,
    method: Method,
    nfe: int,
    artefacts: Artefacts | None = None,
    stand_in: "Callable[[Tensor], float] | None" = None,
) -> dict[str, Any]:
    """The ledger's totals for one sample with guidance, and the I-steps.

    Without `artefacts`, a schedule that is learned from scores is stood in for by that of a flat alpha-bar: it has as
    many I-steps, and MACs depend on their number alone; a table that would be trained is stood in for by its method's
    floor, and one that is imported is read. Counts per block are stood in for by the uniform allocation
    (`choose.allocate_tokens`).

    What is decided on the host depends on the sample, so its MACs have bounds: the totals are those of the dearest
    outcome of every step, and `least_per_sample` is the sum of the cheapest ones. With `stand_in`, which says the
    numbers that are read in a run, the outcomes are those and the MACs exact.

    Raises:
        UserError: the method misbehaves; names it and the step.
    """
    run = run_of_shapes(model, method.sampled_steps(nfe))
    if artefacts is None:
        given = [stage for stage in method.training(run) if isinstance(stage, Imported)]
        artefacts = Artefacts(alpha_bar=(0.5,) * run.nfe, tables={stage.name: _imported(stage, run) for stage in given})
    run = replace(run, artefacts=artefacts)
    ledger, policy = Ledger(run.guidance.rows), guarded(method.start(run))
    ledger.charge("model", run.shape.once)
    saved: int | Fraction = 0
    undecided, told = False, stand_in is not None and method.decides == "host"
    for step in range(run.nfe):
        try:
            planned = policy.plan(_ShapeLook(run, step, ledger, policy, stand_in))
            plans: tuple[Plan, ...] = (_settled(planned, policy, run, step) if told else planned,)
        except Undecided:
            plans, undecided = method.outcomes(run, step), True
        with policy.executed(step):
            for plan in plans:
                run.shape.check(plan)
                check_tokens(plan, run.rows_per_sample, run.shape.num_tokens)
        dearest = plans[0]
        outcomes = [*plans, *(cheapest for plan in plans if (cheapest := _cheapest(plan)) is not plan)]
        if len(outcomes) > 1:  # most plans are the only outcome of their step: nothing to compare
            costs = [_cost(plan, run.shape) for plan in outcomes]
            dearest = plans[costs.index(max(costs[: len(plans)]))]
            saved += ledger.rows_per_sample * (max(costs) - min(costs))
        ledger.charge_plan(dearest, run.shape)
        ledger.charge_choices(planned if told else dearest)
    totals = ledger.totals()
    bounds = {"least_per_sample": cast("int", totals["per_sample"]) - round(saved)} if saved or undecided else {}
    return {
        "model": model,
        "method": method.name,
        "options": method.model_dump(mode="json"),
        "nfe": nfe,
        "sampled_steps": run.nfe,
        "full_steps": None if bounds or told else len(method.i_steps(run)),
        **totals,
        **bounds,
    }


def _settled(plan: Plan, policy: Guarded, run: Run, step: int) -> Plan:
    """The plan with its deferred decisions taken."""
    stream = unseen(run.rows_per_sample, run.shape.num_tokens, run.shape.width)
    return replace(
        plan,
        decisions={
            unit: replace(decision, who=policy.choose(step, unit, decision.who.choose, lambda: stream))
            if isinstance(decision.who, Deferred)
            else decision
            for unit, decision in plan.decisions.items()
        },
    )


def _cost(plan: Plan, shape: ModelShape) -> int | Fraction:
    """MACs of a plan for one row, by which outcomes are compared."""
    return sum((macs.matmul for macs in overheads(plan, shape).values()), plan_macs(plan, shape).matmul)


def _cheapest(plan: Plan) -> Plan:
    """The plan with its deferred decisions at their cheapest; the plan itself if there are none."""
    decisions = {
        unit: replace(decision, who=decision.who.least)
        for unit, decision in plan.decisions.items()
        if isinstance(decision.who, Deferred) and decision.who.least is not None
    }
    return replace(plan, decisions={**plan.decisions, **decisions}) if decisions else plan


def _imported(stage: Imported, run: Run) -> Table:
    from tcbench.artefacts import read_imported  # routers are in torch's own format: the one part that imports torch

    return read_imported(stage, run.shape, run.nfe)
