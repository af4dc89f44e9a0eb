"""The vocabulary of caching: a plan says where, who and how for one sampling step, and is plain data.

| part      | values                                                             | meaning                        |
|-----------|--------------------------------------------------------------------|--------------------------------|
| **where** | `Site(block, part)`, `Block(block)`, `Span(start, stop)`, `Output()` | the quantity that is cached  |
| **who**   | `ALL`, `NONE`, `Tokens(index)`, `Rows(mask)`, `Deferred(choose, like)` | what is recomputed of it   |
| **how**   | `Hold()`, `Forecast(order)`, `Mix(weights)`, and a `Spread(group)` | what stands in for what is not |

A `Plan` maps units to decisions. A block that no unit covers is computed in full and nothing of it is stored, so the
empty plan is the plain model. A unit decided `ALL` is computed in full *and* stored, which is an I-step. A plan may
also have blocks computed beside what it decides, as a check of it (`Plan.checks`). Plans can be printed (`str`), stored
(`Plan.executed`) and costed (`tcbench.ledger.plan_macs`) without a model.

Shape letters: R rows of the transformer's batch (2n under classifier-free guidance, [cond; uncond]), L blocks,
N tokens, K recomputed tokens, D width.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite
from numbers import Integral
from typing import TYPE_CHECKING, Any, Literal, get_args

from tcbench.record.executed import Executed
from tcbench.unseen import dtype_of

if TYPE_CHECKING:  # configs name methods; checking them must not pay for importing torch
    from torch import Tensor


Keys = Literal["cached", "fresh", "recomputed"]
"""What the recomputed tokens of a block attend to on a P-step (docs/reproduction-notes.md, reading 6).

`cached`: the last key and value of every token, refreshed where recomputed. `fresh`: the recomputed tokens only, the
literal reading of the paper. `recomputed`: keys and values of all tokens from the current hidden state, charged.
"""

Observe = Literal["attn", "cross", "values", "output"]
"""What of a unit is observed (`Decision`)."""

Of = Literal["computed", "used"]
"""Which values a `Mix` remembers: those that were computed, or those of every step, whatever stood there."""

_KEYS, _OBSERVED, _OF = get_args(Keys), get_args(Observe), get_args(Of)


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


@dataclass(frozen=True, slots=True, order=True)
class Output:
    """The stream as it enters the final layer, not a difference: held, it takes the place of all that blocks would add.

    A plan that holds it decides every block, and units decided `NONE` behind the last computed one are not even reached
    (DuCa's aggressive steps). Whatever is computed nevertheless is stored.
    """

    @property
    def blocks(self) -> range:
        """It is of no block."""
        return range(0)

    def __str__(self) -> str:
        return "output"


Unit = Site | Block | Span | Output


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

    def settled(self) -> "All | Nothing | Tokens":
        """The same with the count on the host, and `NONE` if it is 0."""
        index_RK = self.index_RK[:, : self.count]
        return Tokens(index_RK) if index_RK.shape[1] else NONE

    def __str__(self) -> str:
        return str(self.count)


@dataclass(frozen=True, slots=True)
class Rows:
    """The rows of the batch where `mask` is true are recomputed, all their tokens; the others are held (LazyDiT).

    It is on the host, because how much is computed depends on it: `Look.read_rows` brings it there.
    """

    mask: tuple[bool, ...]

    def __post_init__(self) -> None:
        if not isinstance(self.mask, tuple) or not all(isinstance(row, bool) for row in self.mask):
            raise _wrong("Rows.mask", "a tuple of True and False, one a row of the batch", self.mask)

    @property
    def index(self) -> list[int]:
        """The rows that are recomputed."""
        return [row for row, computed in enumerate(self.mask) if computed]

    def settled(self) -> "All | Nothing | Rows":
        """The same, and `ALL` or `NONE` if it is one for all rows."""
        return ALL if all(self.mask) else self if any(self.mask) else NONE

    def __str__(self) -> str:
        return f"rows {len(self.index)}/{len(self.mask)}"


@dataclass(frozen=True, slots=True, eq=False)
class Deferred:
    """A decision taken when the unit is reached (ToMe, first-block cache).

    `choose` is given a function that returns the unit's input hidden state x_RND, or with `sees="modulated"` what the
    part makes of it, normalised and modulated: what waits to be added to it is added when that is called, and only
    then. `like` is what the decision costs when it is not known beforehand: a `Who` of
    the same token count where that count is fixed, otherwise the dearest case; `least` is then the cheapest. `macs` is
    what taking the decision costs per row (matrix products, as the ledger counts them), charged under `tag`.
    """

    choose: Callable[[Callable[[], "Tensor"]], "All | Nothing | Tokens | Rows"]
    like: "All | Nothing | Tokens | Rows"
    macs: int = 0
    tag: str = "score"
    least: "All | Nothing | Tokens | Rows | None" = None
    sees: Literal["hidden", "modulated"] = "hidden"

    def __post_init__(self) -> None:
        if not callable(self.choose):
            raise _wrong("Deferred.choose", "a function", self.choose)
        if not isinstance(self.like, Settled):
            raise _wrong("Deferred.like", "ALL, NONE, Tokens or Rows", self.like)
        if not _is_count(self.macs):
            raise _wrong("Deferred.macs", "a whole number of MACs, 0 or more", self.macs)
        if not isinstance(self.tag, str):
            raise _wrong("Deferred.tag", "a name", self.tag)
        if not isinstance(self.least, Settled | None):
            raise _wrong("Deferred.least", "ALL, NONE, Tokens, Rows or None", self.least)
        if self.sees not in ("hidden", "modulated"):
            raise _wrong("Deferred.sees", "hidden or modulated", self.sees)

    def __str__(self) -> str:
        return f"decided at the block (like {self.like})"


Settled = All | Nothing | Tokens | Rows
Who = Settled | Deferred


@dataclass(frozen=True, slots=True)
class Hold:
    """Reuse the last computed value, however old (docs/reproduction-notes.md, reading 9)."""

    order: int = field(default=0, init=False)


@dataclass(frozen=True, slots=True)
class Forecast:
    """Extrapolate with a Taylor polynomial of this order in the step index (TaylorSeer, arXiv 2503.06923, Eq. 4)."""

    order: int

    def __post_init__(self) -> None:
        if not _is_count(self.order):
            raise _wrong("Forecast.order", "a whole number, 0 or more", self.order)


@dataclass(frozen=True, slots=True)
class Mix:
    """A weighted sum of a unit's last values, the latest first: (1,) holds, (1 + a, -a) goes on along a line.

    Where a unit is computed, the fill says how many of its values are kept, so all steps of a run name one length
    (`keeping`); a weight of 0 asks for no value. Weights belong to a step and are made when it is planned
    (`tcbench.extrapolate`): nothing is computed on the host or the device for them.

    Attributes:
        weights: of the last values.
        of: which values those are. Of those that were `used`, what this fill makes is one of the next step.
    """

    weights: tuple[float, ...]
    of: Of = "computed"

    def __post_init__(self) -> None:
        numbers = isinstance(self.weights, tuple) and all(isinstance(weight, int | float) for weight in self.weights)
        if not numbers or not self.weights or not all(isfinite(weight) for weight in self.weights):
            raise _wrong("Mix.weights", "a tuple of finite numbers, one or more", self.weights)
        if self.of not in _OF:
            raise _wrong("Mix.of", f"one of {', '.join(_OF)}", self.of)

    @classmethod
    def keeping(cls, count: int, of: Of = "computed") -> "Mix":
        """The last value as it is, with `count` remembered."""
        return cls((1.0, *[0.0] * (count - 1)), of)

    @property
    def holds(self) -> bool:
        """Whether it is the last value as it is."""
        return self.weights[0] == 1 and not any(self.weights[1:])


Fill = Hold | Forecast | Mix


@dataclass(frozen=True, slots=True, eq=False)
class Spread:
    """What recomputed tokens tell the others of their group (ClusCa): value <- ratio * told + (1 - ratio) * value.

    `told` is the sum of the fresh values of the group's recomputed tokens, and it is of all tokens, those that were
    recomputed too. An index with a spread may name a token twice; it is computed twice, charged twice, and counts twice
    in the sum. The sums themselves are additions, which the ledger does not count; at a ratio of 0 nothing is told.

    Attributes:
        group_RN: the number of every token's group, 0 to N - 1, int64 [R, N].
        ratio: how far the values go towards what is told, 0 to 1.
    """

    group_RN: "Tensor"
    ratio: float

    def __post_init__(self) -> None:
        if dtype_of(self.group_RN) != "int64" or len(self.group_RN.shape) != 2:
            raise _wrong("Spread.group_RN", "an int64 tensor [R, N]", self.group_RN)
        if not isinstance(self.ratio, int | float) or not 0 <= self.ratio <= 1:
            raise _wrong("Spread.ratio", "a number from 0 to 1", self.ratio)


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
    fill: Fill = Hold()
    keys: Keys = "fresh"
    observe: Observe | None = None
    spread: Spread | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.who, Who):
            raise _wrong("Decision.who", "ALL, NONE, Tokens, Rows or Deferred", self.who)
        if not isinstance(self.fill, Fill):
            raise _wrong("Decision.fill", "Hold(), Forecast(order) or Mix(weights)", self.fill)
        if self.keys not in _KEYS:
            raise _wrong("Decision.keys", f"one of {', '.join(_KEYS)}", self.keys)
        if self.observe is not None and self.observe not in _OBSERVED:
            raise _wrong("Decision.observe", f"one of {', '.join(_OBSERVED)}, or None", self.observe)
        if not isinstance(self.spread, Spread | None):
            raise _wrong("Decision.spread", "a Spread, or None", self.spread)


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
            raise _wrong("Plan.decisions", "a mapping of units to decisions", self.decisions)
        owner: dict[int, Unit] = {}  # of a block; one of its parts stands for all of them
        for unit, decision in self.decisions.items():
            if not isinstance(unit, Unit):
                raise _wrong("a unit of a plan", "a Site, Block, Span or Output", unit)
            if not isinstance(decision, Decision):
                raise _wrong(f"what a plan decides at {unit}", "a Decision", decision)
            _refuse(unit, decision)
            for block in unit.blocks:
                other = owner.setdefault(block, unit)
                if other is not unit and not (isinstance(other, Site) and isinstance(unit, Site)):
                    raise PlanError(f"a plan decides {other} and {unit}, which overlap; keep one of them")
        if not isinstance(self.checks, tuple) or not all(_is_count(block) for block in self.checks):
            raise _wrong("Plan.checks", "a tuple of blocks' numbers", self.checks)
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
    if isinstance(unit, Output) and not isinstance(who, All | Nothing):
        raise PlanError("a plan decides the output for some tokens, or when it is reached; say ALL or NONE")
    if isinstance(who, Deferred) and who.sees == "modulated" and not isinstance(unit, Site):
        raise PlanError(f"a decision at {unit} sees a modulated input; only parts of blocks have one")
    if decision.observe and isinstance(unit, Span | Output):
        raise PlanError(f"a plan observes {decision.observe} at {unit}; observe it at a block or a part")


def _executed(decision: Decision) -> Executed:
    match decision.who:
        case Tokens() as tokens:
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
