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
from typing import TYPE_CHECKING, Literal

from tcbench.record.executed import Executed

if TYPE_CHECKING:  # configs name methods; checking them must not pay for importing torch
    from torch import Tensor


Keys = Literal["cached", "fresh", "recomputed"]
"""What the recomputed tokens of a block attend to on a P-step (docs/reproduction-notes.md, reading 6).

`cached`: the last key and value of every token, refreshed where recomputed. `fresh`: the recomputed tokens only, the
literal reading of the paper. `recomputed`: keys and values of all tokens from the current hidden state, charged.
"""


@dataclass(frozen=True, slots=True, order=True)
class Site:
    """One part's output *before* its gate: the current step's gate is applied to whatever is reused."""

    block: int
    part: str

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

    def __str__(self) -> str:
        return f"decided at the block (like {self.like})"


Who = All | Nothing | Tokens | Deferred


@dataclass(frozen=True, slots=True)
class Hold:
    """Reuse the last computed value, however old (docs/reproduction-notes.md, reading 9)."""

    order: int = field(default=0, init=False)


@dataclass(frozen=True, slots=True)
class Forecast:
    """Extrapolate with a Taylor polynomial of this order in the step index (TaylorSeer, arXiv 2503.06923, Eq. 4)."""

    order: int


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
    observe: Literal["attn", "cross"] | None = None


@dataclass(frozen=True)
class Plan:
    """The decisions of one sampling step.

    Raises:
        ValueError: two units cover the same part of a block; some tokens are recomputed where the rest is forecast
            (the quotients of a forecast are of whole values); attention is observed over a span, which stores none.
    """

    decisions: Mapping[Unit, Decision] = field(default_factory=dict)

    def __post_init__(self) -> None:
        owner: dict[int, Unit] = {}  # of a block; one of its parts stands for all of them
        for unit, decision in self.decisions.items():
            if isinstance(decision.who, Tokens) and decision.fill.order:
                raise ValueError(f"a plan forecasts {unit} and recomputes some of its tokens; hold the rest instead")
            if decision.observe and isinstance(unit, Span):
                raise ValueError(f"a plan observes {decision.observe} at {unit}; observe it at a block or a part")
            for block in unit.blocks:
                other = owner.setdefault(block, unit)
                if other is not unit and not (isinstance(other, Site) and isinstance(unit, Site)):
                    raise ValueError(f"a plan decides {other} and {unit}, which overlap; keep one of them")

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
