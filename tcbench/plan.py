"""The vocabulary of caching: a plan says where, who and how for one sampling step, and is plain data.

| part      | values                                                     | meaning                                |
|-----------|------------------------------------------------------------|----------------------------------------|
| **where** | `Site(block, part)`, `Block(block)`, `Span(start, stop)`   | the quantity that is cached            |
| **who**   | `ALL`, `NONE`, `Tokens(index)`, `Deferred(choose, like)`   | the tokens that are recomputed         |
| **how**   | `Hold()`, `Forecast(order)`                                | what stands in for those that are not  |

A `Plan` maps units to decisions. A block that no unit covers is computed in full and nothing of it is stored, so the
empty plan is the plain model. A unit decided `ALL` is computed in full *and* stored, which is an I-step. Plans can be
printed (`str`), stored (`Plan.executed`) and costed (`tcbench.ledger.plan_macs`) without a model.

Shape letters: R rows of the transformer's batch (2n under classifier-free guidance, [cond; uncond]), L blocks,
N tokens, K recomputed tokens, D width.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral
from typing import TYPE_CHECKING, Any, Literal, get_args

from tcbench.record.executed import Executed
from tcbench.tensors.unseen import dtype_of

if TYPE_CHECKING:  # configs name methods; checking them must not pay for importing torch
    from torch import Tensor


Keys = Literal["cached", "fresh", "recomputed"]
"""What the recomputed tokens of a block attend to on a P-step (docs/reproduction-notes.md, reading 6).

`cached`: the last key and value of every token, refreshed where recomputed. `fresh`: the recomputed tokens only, the
literal reading of the paper. `recomputed`: keys and values of all tokens from the current hidden state, charged.
"""

Observe = Literal["attn", "cross"]
"""Which attention of a unit is observed (`Decision`)."""

_KEYS, _OBSERVED = get_args(Keys), get_args(Observe)


class PlanError(ValueError):
    """A plan that says nothing, or what cannot be executed; where a method made it, the line also names the method."""


@dataclass(frozen=True, slots=True, order=True)
class Site:
    """One part's output *before* its gate: the current step's gate is applied to whatever is reused."""

    block: int
    part: str

    def __post_init__(self) -> None:
        if not _is_count(self.block):
            raise _wrong("Site.block", "a block's number", self.block)
        if not isinstance(self.part, str):
            raise _wrong("Site.part", "a part's name", self.part)

    @property
    def blocks(self) -> range:
        """The blocks this unit touches."""
        return range(self.block, self.block + 1)

    def __str__(self) -> str:
        return f"block {self.block} {self.part}"


@dataclass(frozen=True, slots=True, order=True)
class Block:
    """A block's whole residual update x^l - x^{l-1}, *after* its gates (TokenCache's f^l, Eq. 5)."""

    block: int

    def __post_init__(self) -> None:
        if not _is_count(self.block):
            raise _wrong("Block.block", "a block's number", self.block)

    @property
    def blocks(self) -> range:
        """The blocks this unit touches."""
        return range(self.block, self.block + 1)

    def __str__(self) -> str:
        return f"block {self.block}"


@dataclass(frozen=True, slots=True, order=True)
class Span:
    """The residual over blocks start..stop-1 as one quantity (Delta-DiT, TeaCache, first-block cache)."""

    start: int
    stop: int

    def __post_init__(self) -> None:
        if not (_is_count(self.start) and _is_count(self.stop) and self.start < self.stop):
            raise _wrong("Span", "two blocks' numbers, the first below the second", (self.start, self.stop))

    @property
    def blocks(self) -> range:
        """The blocks this unit touches."""
        return range(self.start, self.stop)

    def __str__(self) -> str:
        return f"blocks {self.start}-{self.stop - 1}"


Unit = Site | Block | Span


@dataclass(frozen=True, slots=True)
class All:
    """Every token is recomputed and the unit's cache is refreshed."""

    def __str__(self) -> str:
        return "all"


@dataclass(frozen=True, slots=True)
class Nothing:
    """No token is recomputed; the fill serves all of them."""

    def __str__(self) -> str:
        return "none"


ALL, NONE = All(), Nothing()


@dataclass(frozen=True, slots=True, eq=False)
class Tokens:
    """The tokens in `index_RK` (int64, distinct within a row) are recomputed; the count is the same for every row.

    Where the count was decided on the device, `used` (int32 [1]) holds it: only so many of the leading columns count.
    """

    index_RK: "Tensor"
    used: "Tensor | None" = None

    def __post_init__(self) -> None:
        if dtype_of(self.index_RK) != "int64" or len(self.index_RK.shape) != 2:
            raise _wrong("Tokens.index_RK", "an int64 tensor [R, K]", self.index_RK)
        if self.used is not None and (dtype_of(self.used) != "int32" or tuple(self.used.shape) != (1,)):
            raise _wrong("Tokens.used", "an int32 tensor [1], or None", self.used)

    @property
    def count(self) -> int:
        """How many tokens of a row; a shape, but where `used` holds it reading it waits for the device."""
        return self.index_RK.shape[1] if self.used is None else int(self.used)

    def settled(self, count: int | None = None) -> "All | Nothing | Tokens":
        """The same with the count on the host, which is read if it is not given, and `NONE` if it is 0."""
        index_RK = self.index_RK[:, : self.count if count is None else count]
        return Tokens(index_RK) if index_RK.shape[1] else NONE

    def __str__(self) -> str:
        return str(self.count)


@dataclass(frozen=True, slots=True, eq=False)
class Deferred:
    """A decision taken when the unit is reached (ToMe, first-block cache).

    `choose` is given a function that returns the unit's input hidden state x_RND: what waits to be added to it is added
    when that is called, and only then. `like` is what the decision costs when it is not known beforehand: a `Who` of
    the same token count where that count is fixed, otherwise the dearest case; `least` is then the cheapest. `macs` is
    what taking the decision costs per row (matrix products, as the ledger counts them), charged under `tag`.
    """

    choose: Callable[[Callable[[], "Tensor"]], "All | Nothing | Tokens"]
    like: "All | Nothing | Tokens"
    macs: int = 0
    tag: str = "score"
    least: "All | Nothing | Tokens | None" = None

    def __post_init__(self) -> None:
        if not callable(self.choose):
            raise _wrong("Deferred.choose", "a function", self.choose)
        if not isinstance(self.like, Settled):
            raise _wrong("Deferred.like", "ALL, NONE or Tokens", self.like)
        if not _is_count(self.macs):
            raise _wrong("Deferred.macs", "a whole number of MACs, 0 or more", self.macs)
        if not isinstance(self.tag, str):
            raise _wrong("Deferred.tag", "a name", self.tag)
        if not isinstance(self.least, Settled | None):
            raise _wrong("Deferred.least", "ALL, NONE, Tokens or None", self.least)

    def __str__(self) -> str:
        return f"decided at the block (like {self.like})"


Settled = All | Nothing | Tokens
Who = Settled | Deferred


@dataclass(frozen=True, slots=True)
class Hold:
    """Reuse the last computed value, however old (docs/reproduction-notes.md, reading 9)."""

    order: int = field(default=0, init=False)


HIGHEST_ORDER = 10
"""Of a forecast: published are 1 to 4, and an order stores as many differences."""


@dataclass(frozen=True, slots=True)
class Forecast:
    """Extrapolate with a Taylor polynomial of this order in the step index (TaylorSeer, arXiv 2503.06923, Eq. 4)."""

    order: int

    def __post_init__(self) -> None:
        if not (_is_count(self.order) and self.order <= HIGHEST_ORDER):
            raise _wrong("Forecast.order", f"a whole number, 0 to {HIGHEST_ORDER}", self.order)


Fill = Hold | Forecast


@dataclass(frozen=True, slots=True)
class Decision:
    """Who is recomputed at a unit, how the rest is filled, and what the recomputed tokens attend to.

    `observe="attn"` asks for the attention that every token receives, where the unit's self-attention is computed in
    full (`Look.attention_received` reads it at later steps); `"cross"` for the entropy of the attention over the text,
    of every token whose cross-attention is computed (`Look.attention_entropy`). A second pass, charged under "score".
    """

    who: Who
    fill: Fill = Hold()
    keys: Keys = "fresh"
    observe: Observe | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.who, Who):
            raise _wrong("Decision.who", "ALL, NONE, Tokens or Deferred", self.who)
        if not isinstance(self.fill, Fill):
            raise _wrong("Decision.fill", "Hold() or Forecast(order)", self.fill)
        if self.keys not in _KEYS:
            raise _wrong("Decision.keys", f"one of {', '.join(_KEYS)}", self.keys)
        if self.observe is not None and self.observe not in _OBSERVED:
            raise _wrong("Decision.observe", f"one of {', '.join(_OBSERVED)}, or None", self.observe)


@dataclass(frozen=True)
class Plan:
    """The decisions of one sampling step.

    Raises:
        PlanError: it is made of something else, as what it is made of raises too; two units cover the same part of a
            block; some tokens are recomputed where the rest is forecast (the quotients of a forecast are of whole
            values); attention is observed over a span, which stores none.
    """

    decisions: Mapping[Unit, Decision] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.decisions, Mapping):
            raise _wrong("Plan.decisions", "a mapping of units to decisions", self.decisions)
        owner: dict[int, Unit] = {}  # of a block; one of its parts stands for all of them
        for unit, decision in self.decisions.items():
            if not isinstance(unit, Unit):
                raise _wrong("a unit of a plan", "a Site, Block or Span", unit)
            if not isinstance(decision, Decision):
                raise _wrong(f"what a plan decides at {unit}", "a Decision", decision)
            if isinstance(decision.who, Tokens) and decision.fill.order:
                raise PlanError(f"a plan forecasts {unit} and recomputes some of its tokens; hold the rest instead")
            if decision.observe and isinstance(unit, Span):
                raise PlanError(f"a plan observes {decision.observe} at {unit}; observe it at a block or a part")
            for block in unit.blocks:
                other = owner.setdefault(block, unit)
                if other is not unit and not (isinstance(other, Site) and isinstance(unit, Site)):
                    raise PlanError(f"a plan decides {other} and {unit}, which overlap; keep one of them")

    def at(self, unit: Unit) -> Decision | None:
        """The decision for a unit, or None if the plan leaves it to be computed in full."""
        return self.decisions.get(unit)

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
        return ", ".join(f"{unit}: {_said(decision)}" for unit, decision in self.decisions.items())


def _executed(decision: Decision) -> Executed:
    match decision.who:
        case Tokens() as tokens:
            return Executed("some", tokens.count)
        case All():
            return Executed("all")
        case Deferred():
            raise TypeError("a deferred decision was not executed; settle the plan first")
        case _:
            return Executed("none", order=decision.fill.order)


def _said(decision: Decision) -> str:
    return str(decision.who if isinstance(decision.who, Deferred) else _executed(decision))


def every_unit(units: Sequence[Unit], who: Who, fill: Fill | None = None, keys: Keys = "fresh") -> Plan:
    """The same decision for all of `units`."""
    return Plan({unit: Decision(who, fill or Hold(), keys) for unit in units})


def _wrong(what: str, wanted: str, value: Any) -> PlanError:
    return PlanError(f"{what} is {described(value)}; give {wanted}")


def described(value: Any) -> str:
    """A value in a few words: a tensor's type and shape, what is short as it is written, else the type."""
    if shape := getattr(value, "shape", None):
        return f"a {dtype_of(value)} tensor {list(shape)}"
    try:
        text = repr(value)
    except Exception:
        text = ""
    telling = 0 < len(text) <= 60 and "\n" not in text and " at 0x" not in text
    return text if telling else f"of type {type(value).__name__}"


def _is_count(value: Any) -> bool:
    return isinstance(value, int | Integral) and int(value) >= 0
