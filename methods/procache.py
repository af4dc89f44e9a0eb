"""ProCache: Constraint-Aware Feature Caching with Selective Computation (AAAI 2026; macovaseas/ProCache, for DiT).

A list says what each step does: compute everything, reuse everything, or reuse everything in the first blocks and
recompute some tokens' MLPs, as ToCa does, in the last quarter of them. The list was searched under a budget of full
steps; its gaps narrow towards the clean end. Its code reads it in sampling order, as the paper says; only its README
prints it the other way round.
"""

from typing import Annotated

from pydantic import AfterValidator, Field, NonNegativeFloat, NonNegativeInt

from tcbench.method import Run
from tcbench.partial import Kind, PartialSteps, Row, TokenScore
from tcbench.schedule import PACES, token_counts

RELEASED = (*(1, 0, 2, 0) * 6, *(1, 0, 2) * 4, *(1, 0) * 7)
"""The released list, of 50 steps: 17 full, 10 partial."""


def _begins_full(steps: tuple[int, ...]) -> tuple[int, ...]:
    if not steps or steps[0] != 1 or not set(steps) <= {0, 1, 2}:
        raise ValueError("schedule must begin with 1 and hold 1 (full), 0 (reused) and 2 (partial), e.g. [1, 0, 2, 0]")
    return steps


class ProCache(PartialSteps):
    """A list of full, partial and reused steps.

    Options (defaults: the released setting for DiT and 50 DDIM steps):
        schedule: the list, in sampling order: 1 full, 0 reused, 2 partial. A run of another number of steps takes the
            entry at the same share of the list.
        fresh_ratio: of ToCa's schedule for 50 DDIM steps.
        first_partial_block: before it, blocks reuse everything at a partial step; 21 of DiT-XL's 28 is released, and
            three quarters of the blocks if it is not given.
        score: `kv-norm` is released; the others are in its code.
        interval: the age, in steps, that is one weight.
    """

    name = "procache"
    label = "ProCache"

    schedule: Annotated[tuple[NonNegativeInt, ...], AfterValidator(_begins_full)] = RELEASED
    fresh_ratio: float = Field(0.07, ge=0, le=1)
    first_partial_block: NonNegativeInt | None = None
    score: TokenScore = "kv-norm"
    bonus: NonNegativeFloat = 0.6

    def ratio(self, counter: int, nfe: int, block: int, num_blocks: int) -> float:
        """The share of tokens that an MLP recomputes; below 0 it means none."""
        return self.fresh_ratio * PACES["ddim50"].share(counter, nfe, block, num_blocks)

    def timetable(self, run: Run) -> tuple[Row, ...]:
        """What every step does, in sampling order."""
        blocks, rows = run.shape.num_blocks, []
        first_partial = blocks * 3 // 4 if self.first_partial_block is None else self.first_partial_block
        of_entry: dict[int, list[Kind]] = {
            0: ["held"] * blocks,
            1: ["full"] * blocks,
            2: ["partial" if block >= first_partial else "held" for block in range(blocks)],
        }
        for step in range(run.nfe):
            counter = PACES["ddim50"].counter(step, run.nfe)
            ratios = [self.ratio(counter, run.nfe, block, blocks) for block in range(blocks)]
            kinds = of_entry[self.schedule[step * len(self.schedule) // run.nfe]]
            rows.append(Row(tuple(kinds), tuple(token_counts(ratios, run.shape.num_tokens))))
        return tuple(rows)
