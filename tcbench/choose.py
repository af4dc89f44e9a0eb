"""Which tokens are recomputed: by a score, by Eq. (12)'s allocation over the blocks, by ToCa's attention score.

Shape letters as in `tcbench.plan`. On a GPU, kernels choose the same tokens.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from math import log
from typing import TYPE_CHECKING, Literal

from tcbench.plan import PlanError, Tokens
from tcbench.tensors.unseen import is_unseen, unseen
from tcbench.watch.checking import readable

if TYPE_CHECKING:  # configs name methods; checking them must not pay for importing torch
    from torch import Tensor


def counted(count: int) -> Tokens:
    """Some tokens of which only the number is known: what a `Deferred` choice will be like."""
    return Tokens(unseen(1, count, dtype="int64"))


def top_tokens(score_RN: "Tensor", count: int) -> Tokens:
    """The `count` highest-scoring tokens of each row.

    Raises:
        PlanError: as all functions here do: there are not that many tokens, or where values are checked a score is NaN.
    """
    _check(score_RN, [count])
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
    _check(score_RLN, counts if isinstance(counts, Sequence) else ())
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
    return unseen(*score.shape[:-1], count, dtype="int64")


def _check(score: "Tensor", counts: Sequence[int]) -> None:
    """Whether the best tokens by a score [..., N] can be told, so many of a row."""
    for count in counts:
        if not 0 <= count <= score.shape[-1]:
            raise PlanError(f"a method chooses {count} of {score.shape[-1]} tokens")
    if readable(score) and score.isnan().any():
        raise PlanError("a method chooses tokens by a score that is NaN for some; look at what the score is made of")


def _check_budget(score_RLN: "Tensor", budget: int) -> None:
    _, blocks, num_tokens = score_RLN.shape
    if not 0 <= budget <= blocks * num_tokens:
        raise PlanError(f"a method shares out {budget} tokens over {blocks} blocks of {num_tokens}")
    _check(score_RLN, ())


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
        scaled: whether what is observed is L2-normalised; uniform random numbers are not.
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
    scaled: bool = True

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
        observed_RBN = F.normalize(observed_RBN, dim=2) if self.scaled else observed_RBN
        score = observed_RBN + self.age_weight * (age_RBN / self.interval)
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
    backend: Literal["triton", "torch"] | None = None,
) -> "list[tuple[Tensor, Tensor, Tensor]]":
    """The tokens with the highest scores in each of B blocks, all at once; nothing waits for the device.

    Args:
        observed: by block, float32 [R, N], as in `AttentionScore.of`.
        refreshed: by block, the step at which each token was last recomputed, int32 [R, N]; a number if one for all.
        step: this step.
        counts: by block, how many tokens to choose.
        backend: as in `tcbench.kernels`; by default the kernel where it serves.

    Returns:
        by block the tokens' indices, int64 [R, K] in any order, the scores [R, N], and `refreshed` after this step
    """
    for value_RN in observed:
        _check(value_RN, counts)
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
    if backend == "triton" or (backend is None and score.scaled and choice.serves(observed_RBN)):
        settings = asdict(score)
        del settings["scaled"]  # the kernel always does
        index_RBK, score_RBN, last = choice.choose_by_attention(observed_RBN, last, step, tuple(counts), **settings)
    else:
        last = torch.zeros_like(observed_RBN, dtype=torch.int32) + last
        score_RBN = score.of(observed_RBN, step - 1 - last)
        index_RBK = score_RBN.argsort(dim=2, descending=True)
        for block, count in enumerate(counts):
            last[:, block].scatter_(1, index_RBK[:, block, :count], step)
    return [(index_RBK[:, b, :count], score_RBN[:, b], last[:, b]) for b, count in enumerate(counts)]


@dataclass
class Visits:
    """One run's memory of which tokens of a block are how old, in visits: partial steps since it was last full (DuCa).

    Attributes:
        score: by which tokens are chosen.
    """

    score: AttentionScore
    _since_full: dict[int, int] = field(default_factory=dict)
    _refreshed: "dict[int, Tensor | int]" = field(default_factory=dict)

    def full(self, block: int) -> None:
        """All tokens of a block were recomputed."""
        self._since_full[block] = self._refreshed[block] = 0

    def choose(self, observed: "Mapping[int, Tensor]", counts: Mapping[int, int]) -> "dict[int, tuple[Tensor, Tensor]]":
        """Visit some blocks, and choose tokens of those with a count; these are young from here on.

        Args:
            observed: by block of those, what it showed, float32 [R, N].
            counts: by visited block, how many tokens to choose.

        Returns:
            by block with a count, the tokens' indices [R, K] and the scores [R, N]
        """
        groups: dict[int, list[int]] = {}
        for block, count in counts.items():
            self._since_full[block] += 1
            if count:
                groups.setdefault(self._since_full[block], []).append(block)
        chosen = {}
        for visit, blocks in groups.items():
            seen, last = [observed[block] for block in blocks], [self._refreshed[block] for block in blocks]
            choices = choose_by_attention(self.score, seen, last, visit, [counts[block] for block in blocks])
            for block, (index_RK, score_RN, refreshed) in zip(blocks, choices, strict=True):
                self._refreshed[block], chosen[block] = refreshed, (index_RK, score_RN)
        return chosen


def _by_block(parts_RN: "Sequence[Tensor]") -> "Tensor":
    """[R, B, N] of B parts; one alone is not copied."""
    import torch

    return torch.stack(tuple(parts_RN), dim=1) if len(parts_RN) > 1 else parts_RN[0][:, None]


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
    _check_budget(score_RLN, budget)
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
            _check_budget(score_RLN, budget)
            return _first_of_each(*selection.best_tokens(score_RLN, budget))
    return top_tokens_by_block(score_RLN, allocate_tokens(score_RLN, budget))
