"""The vocabulary of caching: a plan says where, who and how for one sampling step, and is plain data.

| part      | values                                                     | meaning                                |
|-----------|------------------------------------------------------------|----------------------------------------|
| **where** | `Site(block, part)`, `Block(block)`, `Span(start, stop)`   | the quantity that is cached            |
| **who**   | `ALL`, `NONE`, `Tokens(index)`, `Deferred(choose, like)`   | the tokens that are recomputed         |
| **how**   | `Hold()`, `Forecast(order)`                                | what stands in for those that are not  |

A `Plan` maps units to decisions. A block that no unit covers is computed in full and nothing of it is stored, so the
empty plan is the plain model. A unit decided `ALL` is computed in full *and* stored, which is an I-step. Plans can be
printed (`str`), stored (`Plan.summary`) and costed (`tcbench.ledger.plan_macs`) without a model.

Shape letters: R rows of the transformer's batch (2n under classifier-free guidance, [cond; uncond]), L blocks,
N tokens, K recomputed tokens, D width.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache, partial
from itertools import accumulate
from math import log
from typing import TYPE_CHECKING, Literal

from tcbench.errors import UserError
from tcbench.executed import Executed
from tcbench.unseen import is_unseen, unseen

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


def counted(count: int) -> Tokens:
    """Some tokens of which only the number is known: what a `Deferred` choice will be like."""
    return Tokens(unseen(1, count, dtype="int64"))


def top_tokens(score_RN: "Tensor", count: int) -> Tokens:
    """The `count` highest-scoring tokens of each row."""
    if is_unseen(score_RN):
        return Tokens(_ranked(score_RN, count))
    return Tokens(score_RN.topk(count, dim=1, sorted=False).indices)


def top_tokens_by_block(score_RLN: "Tensor", counts: "Sequence[int] | Tensor") -> list[Tokens]:
    """The highest-scoring tokens of each row in each block, all blocks at once.

    Args:
        score_RLN: score of every token in every block.
        counts: how many per block; as a tensor (int32 [L]) they stay on the device, and the lower token is the better
            one of equals.
    """
    if is_unseen(score_RLN):
        return _first_of_each(_ranked(score_RLN, max(counts)), counts)
    from tcbench.kernels import selection

    if selection.serves(score_RLN):
        return _first_of_each(selection.rank_tokens(score_RLN), counts)
    if isinstance(counts, Sequence):
        return _first_of_each(score_RLN.topk(max(counts), dim=2).indices, counts)
    return _first_of_each(score_RLN.contiguous().argsort(dim=2, descending=True, stable=True), counts)


def _ranked(score: "Tensor", count: int) -> "Tensor":
    """The best `count` tokens by an unseen score."""
    if count > score.shape[-1]:
        raise ValueError(f"a method chooses {count} of {score.shape[-1]} tokens")
    return unseen(*score.shape[:-1], count, dtype="int64")


def _first_of_each(index_RLK: "Tensor", counts: "Sequence[int] | Tensor") -> list[Tokens]:
    if isinstance(counts, Sequence):
        return [Tokens(index_RLK[:, block, :count]) for block, count in enumerate(counts)]
    return [Tokens(index_RLK[:, block], counts[block : block + 1]) for block in range(index_RLK.shape[1])]


@dataclass(frozen=True, slots=True)
class AttentionScore:
    """ToCa's score of a token (arXiv 2410.05317): s1 or s2, + age_weight * s3, then s4.

    s1 is the attention received and s2 one plus the entropy of the attention over the text, L2-normalised over the
    tokens; s3 is the age; s4 gives the best token of each cell of the grid `bonus` times its score on top.

    Attributes:
        grid: height and width, multiples of `cell`, of an image's N tokens, or of each frame of a video.
        age_weight: weight of s3.
        interval: the age, in steps, at which s3 is 1.
        bonus: gain of s4.
        cell: side of the cells.
        halves: None for s1; for s2 how many rows of a sample share it, 2 in a guided pair. They look at texts of their
            own, side by side in ToCa's packed map, so that the entropy of the averaged map is the mean of theirs plus
            log 2.
    """

    grid: tuple[int, int]
    age_weight: float
    interval: float
    bonus: float
    cell: int = 2
    halves: int | None = None

    def of(self, observed_RBN: "Tensor", age_RBN: "Tensor") -> "Tensor":
        """The score of every token in each of B blocks, [R, B, N].

        Args:
            observed_RBN: what the block's attention showed when it was last observed: received or entropy.
            age_RBN: steps since each token was recomputed, 0 in the step after.
        """
        import torch.nn.functional as F

        if self.halves:
            by_half = observed_RBN.unflatten(0, (self.halves, -1))
            observed_RBN = (1 + by_half.mean(0, keepdim=True) + log(self.halves)).expand_as(by_half).flatten(0, 1)
        score = F.normalize(observed_RBN, dim=2) + self.age_weight * (age_RBN / self.interval)
        side = self.cell
        cells = score.unflatten(2, (-1, side, self.grid[1] // side, side))  # frames one below another
        cells = cells.transpose(3, 4).flatten(4)
        best, place = cells.max(dim=4, keepdim=True)
        cells = cells.scatter_add(4, place, self.bonus * best)
        return cells.unflatten(4, (side, side)).transpose(3, 4).flatten(2)


def choose_by_attention(
    score: AttentionScore,
    observed: "Sequence[Tensor]",
    refreshed: "Sequence[Tensor | int]",
    step: int,
    counts: Sequence[int],
    path: Literal["triton", "torch"] | None = None,
) -> "list[tuple[Tensor, Tensor, Tensor]]":
    """The tokens with the highest scores in each of B blocks, all at once; nothing waits for the device.

    Args:
        observed: by block, float32 [R, N], as in `AttentionScore.of`.
        refreshed: by block, the step at which each token was last recomputed, int32 [R, N]; a number if one for all.
        step: this step.
        counts: by block, how many tokens to choose.
        path: as in `tcbench.kernels`; by default the kernel where it serves.

    Returns:
        by block the tokens' indices, int64 [R, K] in any order, the scores [R, N], and `refreshed` after this step
    """
    if any(map(is_unseen, observed)):
        return [
            (_ranked(value_RN, count), value_RN, unseen(*value_RN.shape, dtype="int32"))
            for value_RN, count in zip(observed, counts, strict=True)
        ]
    import torch

    from tcbench.kernels import choice

    observed_RBN, last = _by_block(observed), refreshed[0]
    if not isinstance(last, int) or any(not isinstance(value, int) or value != last for value in refreshed):
        new = partial(torch.full_like, observed[0], dtype=torch.int32)
        last = _by_block([new(value) if isinstance(value, int) else value for value in refreshed])
    if path == "triton" or (path is None and choice.serves(observed_RBN)):
        index_RBK, score_RBN, last = choice.choose_by_attention(
            observed_RBN, last, step, tuple(counts), **asdict(score)
        )
    else:
        last = torch.zeros_like(observed_RBN, dtype=torch.int32) + last
        score_RBN = score.of(observed_RBN, step - 1 - last)
        index_RBK = score_RBN.argsort(dim=2, descending=True)
        for block, count in enumerate(counts):
            last[:, block].scatter_(1, index_RBK[:, block, :count], step)
    return [(index_RBK[:, b, :count], score_RBN[:, b], last[:, b]) for b, count in enumerate(counts)]


def _by_block(parts_RN: "Sequence[Tensor]") -> "Tensor":
    """[R, B, N] of B parts; one alone is not copied."""
    import torch

    return torch.stack(tuple(parts_RN), dim=1) if len(parts_RN) > 1 else parts_RN[0][:, None]


def spread_evenly(count: int, nfe: int) -> tuple[int, ...]:
    """`count` I-steps spread evenly over `nfe` steps, the first step among them.

    Raises:
        UserError: count is not in 1..nfe.
    """
    if not 1 <= count <= nfe:
        raise UserError(f"num_full_steps={count} must lie between 1 and the number of sampled steps, {nfe}")
    return tuple(i * nfe // count for i in range(count))


@lru_cache
def spread_by_scores(alpha_bar: tuple[float, ...], count: int, beta: float) -> tuple[int, ...]:
    """I-steps from the mean score of every step (Eq. 13): denser where many decisions have accumulated.

    gamma_t = log sum_{i>=t} exp(beta * alpha_bar_i), taken in log-space because |beta| is in the thousands; v_t is
    exp(gamma_t) normalised over *all* steps; its cumulative distribution, walked in sampling order, is cut at the
    quantiles k / count. The paper normalises over i >= t, which makes v_T = 1 and crowds the start, its own worst case
    (docs/reproduction-notes.md, reading 4). A duplicate moves to the nearest unused later step, else earlier one.

    Args:
        alpha_bar: mean score per step in sampling order.
        count: number of I-steps, the first step included.
        beta: smoothing; the paper uses -2e3 to -8e3.
    """
    import numpy as np

    nfe = len(alpha_bar)
    spread_evenly(count, nfe)  # refuses an impossible count
    gamma = np.logaddexp.accumulate(beta * np.array(alpha_bar))
    weights = np.exp(gamma - gamma.max())
    cumulative = np.cumsum(weights / weights.sum())
    chosen = [0]
    for step in np.searchsorted(cumulative, np.arange(1, count) / count).tolist():
        free = [other for other in range(nfe) if other not in chosen]
        chosen.append(min(free, key=lambda other: (other < step, abs(other - step))))
    return tuple(sorted(chosen))


def reverse_gaps(i_steps: Sequence[int], nfe: int) -> tuple[int, ...]:
    """The same gaps between I-steps in the opposite order: Table VIII's control."""
    gaps = [stop - start for start, stop in zip(i_steps, [*i_steps[1:], nfe], strict=True)]
    return tuple(accumulate(reversed(gaps[1:]), initial=0))


def allocate_evenly(blocks: int, budget: int) -> list[int]:
    """The same number of tokens for every block, the first blocks taking the remainder."""
    return [budget // blocks + (block < budget % blocks) for block in range(blocks)]


def allocate_tokens(score_RLN: "Tensor", budget: int) -> "list[int] | Tensor":
    """Block-level allocation (Eq. 12): how many tokens each block recomputes, shared by the batch.

    The `budget * R` best scores over rows, blocks and tokens are marked, among equals those of earlier rows, then of
    earlier blocks; a block's share of them is its share of the budget, rounded by largest remainder so that the counts
    sum to exactly `budget`. The counts stay on the device (int32 [L]): nothing waits for them. Of unseen scores, or on
    meta tensors, the answer is the uniform allocation: MACs are linear in the counts unless keys are `fresh`, so the
    total is the same.

    Args:
        score_RLN: importance of every token in every block that may be cached.
        budget: tokens to recompute per row, summed over blocks; 0..L*N.
    """
    rows, blocks, _ = score_RLN.shape
    if is_unseen(score_RLN) or score_RLN.is_meta:
        return allocate_evenly(blocks, budget)
    threshold = score_RLN.flatten().topk(max(1, budget * rows), sorted=False).values.min()
    above_RL, equal_RL = (score_RLN > threshold).sum(2), (score_RLN == threshold).sum(2)
    before_RL = equal_RL.flatten().cumsum(0).view_as(equal_RL) - equal_RL
    left_RL = (budget * rows - above_RL.sum() - before_RL).clamp(min=0)
    totals = (above_RL + equal_RL.minimum(left_RL)).sum(0)
    counts, remainder = totals // rows, totals % rows
    place = remainder.argsort(descending=True, stable=True).argsort()  # of a block in the order of remainders
    return (counts + (place < budget - counts.sum())).int()


def best_tokens(score_RLN: "Tensor", budget: int) -> list[Tokens]:
    """The budget shared out over the blocks (`allocate_tokens`) and spent on the best tokens (`top_tokens_by_block`).

    On a GPU a few kernels choose the same tokens.
    """
    if not is_unseen(score_RLN):
        from tcbench.kernels import selection

        if selection.serves(score_RLN):
            return _first_of_each(*selection.best_tokens(score_RLN, budget))
    return top_tokens_by_block(score_RLN, allocate_tokens(score_RLN, budget))
