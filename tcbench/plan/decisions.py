"""The decisions of a step: who and how, by unit."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal, get_args

from tcbench.plan.fill import HOLD, Fill, Hold, Mix, Spread
from tcbench.plan.refusal import PlanError, is_count, wrong
from tcbench.plan.where import Output, Site, Span, Unit
from tcbench.plan.who import All, Deferred, Merged, Nothing, Rows, Tokens, Who
from tcbench.record.executed import Executed

if TYPE_CHECKING:
    from torch import Tensor

Keys = Literal["cached", "fresh", "recomputed"]
"""What the recomputed tokens of a block attend to on a P-step (docs/reproduction-notes.md, reading 6).

`cached`: the last key and value of every token, refreshed where recomputed. `fresh`: the recomputed tokens only, the
literal reading of the paper. `recomputed`: keys and values of all tokens from the current hidden state, charged.
"""

Observe = Literal["attn", "cross", "values", "output"]
"""What of a unit is observed (`Decision`)."""

_KEYS, _OBSERVED = get_args(Keys), get_args(Observe)


@dataclass(frozen=True, slots=True)
class Decision:
    """Who is recomputed at a unit, how the rest is filled, and what the recomputed tokens attend to.

    Fresh tokens enter the stored value, and the fill is of that whole value: with `Hold` they are used as computed, and
    a forecast goes on from where they are (ClusCa).

    `observe="attn"` asks for the attention that every token receives, where the unit's self-attention is computed in
    full (`Look.attention_received` reads it at later steps); `"cross"` for the entropy of the attention over the text,
    of every token whose cross-attention is computed (`Look.attention_entropy`). A second pass, charged under "score".
    `"values"` asks for the length of every token's value vectors where self-attention is computed in full
    (`Look.value_norms`), `"output"` for the stream behind a block, at the unit that ends it (`Look.block_output`); both
    cost no product.
    """

    who: Who
    fill: Fill = HOLD
    keys: Keys = "fresh"
    observe: Observe | None = None
    spread: Spread | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.who, Who):
            raise wrong("Decision.who", "ALL, NONE, Tokens, Rows, Merged or Deferred", self.who)
        if not isinstance(self.fill, Fill):
            raise wrong("Decision.fill", "Hold(), Forecast(order) or Mix(weights)", self.fill)
        if self.keys not in _KEYS:
            raise wrong("Decision.keys", f"one of {', '.join(_KEYS)}", self.keys)
        if self.observe is not None and self.observe not in _OBSERVED:
            raise wrong("Decision.observe", f"one of {', '.join(_OBSERVED)}, or None", self.observe)
        if not isinstance(self.spread, Spread | None):
            raise wrong("Decision.spread", "a Spread, or None", self.spread)


@dataclass(frozen=True)
class Plan:
    """The decisions of one sampling step.

    Attributes:
        decisions: by unit.
        checks: blocks that are also computed in full, beside what is decided of them and from the same input. Nothing
            of it enters the run: the next step's look sees both results (`Look.checked`). Charged under "check".

    Raises:
        PlanError: it is made of something else, as what it is made of raises too; two units cover the same part of a
            block; a unit cannot be recomputed as decided (`_refuse`).
    """

    decisions: Mapping[Unit, Decision] = field(default_factory=dict)
    checks: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.decisions, Mapping):
            raise wrong("Plan.decisions", "a mapping of units to decisions", self.decisions)
        owner: dict[int, Unit] = {}  # of a block; one of its parts stands for all of them
        for unit, decision in self.decisions.items():
            if not isinstance(unit, Unit):
                raise wrong("a unit of a plan", "a Site, Block, Span or Output", unit)
            if not isinstance(decision, Decision):
                raise wrong(f"what a plan decides at {unit}", "a Decision", decision)
            _refuse(unit, decision)
            for block in unit.blocks:
                other = owner.setdefault(block, unit)
                if other is not unit and not (isinstance(other, Site) and isinstance(unit, Site)):
                    raise PlanError(f"a plan decides {other} and {unit}, which overlap; keep one of them")
        if not isinstance(self.checks, tuple) or not all(is_count(block) for block in self.checks):
            raise wrong("Plan.checks", "a tuple of blocks' numbers", self.checks)
        for block in self.checks:
            if isinstance(owner.get(block), Span) or self.holds_output:
                raise PlanError(
                    f"a plan checks block {block}, which it does not reach apart; decide the block by itself"
                )

    @property
    def holds_output(self) -> bool:
        """Whether what enters the final layer is held, so that blocks are computed for later steps alone."""
        output = self.decisions.get(Output())
        return output is not None and isinstance(output.who, Nothing)

    def at(self, unit: Unit) -> Decision | None:
        """The decision for a unit, or None if the plan leaves it to be computed in full."""
        return self.decisions.get(unit)

    def of_rows(self, index: "Tensor") -> "Plan":
        """The same decisions for some rows of the batch.

        Raises:
            PlanError: one is not taken yet, or is of rows itself.
        """
        decisions = {}
        for unit, decision in self.decisions.items():
            if isinstance(decision.who, Rows | Deferred) or decision.spread is not None:
                raise PlanError(f"{unit}: what is decided where it is reached cannot be shared out over GPUs")
            who = decision.who
            if isinstance(who, Tokens | Merged):
                rows = index.to(who.index_RK.device)
                taken = who.index_RK[rows]
                who = Tokens(taken, who.used) if isinstance(who, Tokens) else Merged(taken, who.group_RN[rows])
            decisions[unit] = replace(decision, who=who)
        return Plan(decisions, self.checks)

    @property
    def full(self) -> bool:
        """Whether everything is computed, and known to be before the step runs."""
        return all(isinstance(decision.who, All) for decision in self.decisions.values())

    def executed(self) -> dict[str, Executed]:
        """What a step that ran it did, by unit; of a plan in which nothing is left to decide."""
        return {str(unit): _executed(decision) for unit, decision in self.decisions.items()}

    def __str__(self) -> str:
        if not self.decisions:
            return "everything computed, nothing cached"
        checks = [f"block {block}: checked" for block in self.checks]
        return ", ".join([*(f"{unit}: {_said(decision)}" for unit, decision in self.decisions.items()), *checks])


def _refuse(unit: Unit, decision: Decision) -> None:
    """Raise PlanError for what cannot be decided at a unit."""
    who, fill = decision.who, decision.fill
    if isinstance(who, Tokens) and isinstance(fill, Mix) and fill.of == "used":
        raise PlanError(f"a plan mixes the used values of {unit} and recomputes some of its tokens; mix computed ones")
    if decision.spread and not (isinstance(who, Tokens) and who.used is None):
        raise PlanError(f"a plan spreads values at {unit}; recompute some tokens, of which the host knows the number")
    if decision.spread and not isinstance(unit, Site):
        raise PlanError(f"a plan spreads values at {unit}; spread the values of its parts")
    if isinstance(who, Rows) and (not isinstance(unit, Site) or fill != Hold() or decision.observe):
        raise PlanError(f"a plan recomputes some rows of {unit}; decide parts of blocks, hold them and observe nothing")
    if isinstance(who, Merged) and (not isinstance(unit, Site) or decision != Decision(who)):
        raise PlanError(f"a plan merges tokens at {unit}; merge those of parts, which hold, keep and show nothing")
    if isinstance(unit, Output) and not isinstance(who, All | Nothing):
        raise PlanError("a plan decides the output for some tokens, or when it is reached; say ALL or NONE")
    if isinstance(who, Deferred) and who.sees == "modulated" and not isinstance(unit, Site):
        raise PlanError(f"a decision at {unit} sees a modulated input; only parts of blocks have one")
    if decision.observe and isinstance(unit, Span | Output):
        raise PlanError(f"a plan observes {decision.observe} at {unit}; observe it at a block or a part")


def _executed(decision: Decision) -> Executed:
    match decision.who:
        case Tokens() | Merged() as tokens:
            return Executed("some", tokens.count)
        case Rows() as rows:
            return Executed("rows", len(rows.index), of=len(rows.mask))
        case All():
            return Executed("all")
        case Deferred():
            raise TypeError("a deferred decision was not executed; settle the plan first")
        case _:
            fill = decision.fill
            if isinstance(fill, Mix):
                return Executed("none", mixed=0 if fill.holds else sum(weight != 0 for weight in fill.weights))
            return Executed("none", order=fill.order)


def _said(decision: Decision) -> str:
    return str(decision.who if isinstance(decision.who, Deferred) else _executed(decision))


def every_unit(units: Sequence[Unit], who: Who, fill: Fill | None = None, keys: Keys = "fresh") -> Plan:
    """The same decision for all of `units`."""
    return Plan({unit: Decision(who, fill or Hold(), keys) for unit in units})
