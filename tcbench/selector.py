"""Token selectors: TokenCache's I-steps, P-steps and cached block updates, open for the choice of tokens.

I-steps compute every block and store its update. P-steps compute the last blocks, the refiners; the update of every
other block is recomputed for some tokens and reused for the rest. A method is a subclass of `TokenSelector` whose
`choose` says which tokens. One that remembers something from step to step overrides `start` instead, and what it starts
makes its plans with `everything` and `recompute`.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from tcbench.choose import allocate_evenly, best_tokens, top_tokens_by_block
from tcbench.method import Look, Method, Run, free_blocks
from tcbench.plan import ALL, Block, Decision, Keys, Plan, Tokens, Who
from tcbench.schedule import Placement, Schedule, StepList, check_one, full_steps, listed_steps

if TYPE_CHECKING:
    from torch import Tensor


class BlockUpdates(Method):
    """Cache the updates of all blocks but the last, between steps that compute everything.

    Options:
        num_full_steps: number of I-steps, the first step included ("#Full"); 12 if neither it nor a list is given.
        full_steps: a list of them, in the place of `num_full_steps` and of all that places these.
        refiner_blocks: K, the last blocks that are always computed.
        schedule: I-steps by Eq. (13), spread evenly, or Eq. (13)'s gaps reversed (Table VIII). A method without a
            predictor needs the artefacts of a trained TokenCache row for Eq. (13) (`artefacts_from` in the config).
        placement: of the even spread (`tcbench.schedule.spread_evenly`).
        beta: smoothing in Eq. (13).
    """

    knob = "num_full_steps"

    num_full_steps: PositiveInt | None = None
    full_steps: StepList | None = None
    refiner_blocks: NonNegativeInt = 4
    schedule: Schedule = "even"
    placement: Placement = "start"
    beta: float = -8000.0

    @model_validator(mode="after")
    def _one_schedule(self) -> "BlockUpdates":
        check_one(self)
        return self

    def i_steps(self, run: Run) -> tuple[int, ...]:
        """Steps at which everything is computed.

        Raises:
            UserError: as `tcbench.schedule.full_steps` and `listed_steps`.
        """
        if self.full_steps:
            return listed_steps(self.full_steps, run.nfe)
        return full_steps(run, self.full_count(run), self.schedule, self.smoothing(run), self.placement)

    def implied(self, run: Run) -> dict[str, Any]:
        """How many I-steps there are, where nothing says which."""
        return {} if self.full_steps else {"num_full_steps": self.full_count(run)}

    def full_count(self, run: Run) -> int:
        """How many steps compute everything."""
        return len(self.full_steps or ()) or self.num_full_steps or 12

    def smoothing(self, run: Run) -> float:
        """beta of Eq. (13)."""
        return self.beta

    def free_blocks(self, run: Run) -> int:
        """L - K: the blocks that may be cached, which are the first ones.

        Raises:
            UserError: there are none.
        """
        return free_blocks(run.shape, self.refiner_blocks)

    def units(self, run: Run) -> list[Block]:
        """The blocks that may be cached."""
        return [Block(block) for block in range(self.free_blocks(run))]


class TokenSelector(BlockUpdates):
    """Recompute block updates for some tokens on P-steps, and reuse them for the others.

    Options:
        cache_ratio: r, the share of tokens reused on a P-step over the blocks that may be cached.
        keys: what recomputed tokens attend to; `fresh` is the paper's literal reading.
    """

    cache_ratio: float = Field(0.9, ge=0, le=1)
    keys: Keys = "cached"

    def kept(self, run: Run) -> int:
        """Tokens that a row recomputes in a block on a P-step, if every block gets the same number."""
        return round((1 - self.cache_ratio) * run.shape.num_tokens)

    def plan(self, look: Look) -> Plan:
        """Everything on I-steps; on P-steps the chosen tokens and the refiners."""
        units = self.units(look.run)
        if look.step in self.i_steps(look.run):
            return self.everything(units)
        return self.recompute(units, self.choose(look))

    def choose(self, look: Look) -> Sequence[Who]:
        """Which tokens a P-step recomputes, for each of the blocks that may be cached."""
        raise TypeError(f"methods/{self.name}.py defines neither choose(look) nor start(run)")

    def everything(self, units: Sequence[Block], observe: Literal["attn", "cross"] | None = None) -> Plan:
        """An I-step: `units` are computed and stored; `observe` as in `Decision`."""
        return Plan(dict.fromkeys(units, Decision(ALL, keys=self.keys, observe=observe)))

    def recompute(self, units: Sequence[Block], chosen: Sequence[Who]) -> Plan:
        """A P-step: at every unit the tokens chosen for it are recomputed.

        Raises:
            ValueError: there are not as many choices as units.
        """
        return Plan({unit: Decision(who, keys=self.keys) for unit, who in zip(units, chosen, strict=True)})


Allocation = Literal["batch", "uniform"]
"""Tokens per block: from the scores of the whole batch (Eq. 12), or the same number for every block."""


def spend(score_RLN: "Tensor", budget: int, allocation: Allocation) -> list[Tokens]:
    """The best tokens of each row in each block.

    Args:
        score_RLN: score of every token in every block that may be cached.
        budget: tokens to recompute per row, summed over blocks; 0..L*N.
        allocation: how blocks share the budget.
    """
    if allocation == "batch":
        return best_tokens(score_RLN, budget)
    return top_tokens_by_block(score_RLN, allocate_evenly(score_RLN.shape[1], budget))
