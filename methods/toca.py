"""ToCa: Accelerating Diffusion Transformers with Token-wise Feature Caching (arXiv 2410.05317), for DiT.

Full steps compute everything; on the steps between them, attention outputs are reused for all tokens and the MLP runs
for the highest-scoring tokens of every row, conditional and unconditional apart. Outputs are cached before their gates.

A token's score is the attention it received in its block's last full step, L2-normalised over the tokens (s1), plus
`soft_fresh_weight` times its age in steps over `interval` (s3); the best token of each 2x2 cell then gains `bonus`
times its score (s4). s2 needs cross-attention, which DiT has not. How many tokens, and when a step is full, depends on
the step and the block alone. `tests/test_golden.py` holds all of it against the released code.
"""

from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Literal

from pydantic import Field, NonNegativeFloat, PositiveInt

from tcbench.errors import UserError
from tcbench.method import Look, Method, Run
from tcbench.plan import ALL, NONE, Decision, Plan, Site, Tokens, Unit, score_by_attention

if TYPE_CHECKING:
    from torch import Tensor

# schedule -> slope over steps, slope over blocks, factor of the MLP: the released "ToCa-ddim50" and "ToCa-ddpm250"
SCHEDULES = {"ddim50": (2.0, -0.2, 2.5), "ddpm250": (0.4, 0.8, 2.5), "constant": (0.0, 0.0, 1.0)}


@dataclass(frozen=True)
class Row:
    """What one step does, known before sampling.

    Attributes:
        full: by block, whether it is computed in full.
        intervals: by block, the interval that decided so; block 0 may change it for the others.
        counts: by block, the tokens that its MLP recomputes; N where it is computed in full.
    """

    full: tuple[bool, ...]
    intervals: tuple[int, ...]
    counts: tuple[int, ...]


class ToCa(Method):
    """Token-wise caching of MLP outputs by attention received and age.

    Options (defaults: the released setting for 50 DDIM steps; that for 250 ancestral steps is interval 4, ddpm250):
        fresh_ratio: R, the share of tokens that schedules scale; 0 is FORA.
        interval: N, the base distance of full steps. A full step with i of S steps to go sets the distance in force to
            round(N / (1.4 - 0.8 i / S)), or to 2 if 0.2 S <= i < 0.4 S.
        schedule: how R changes over steps and blocks: `ddim50` grows from none in the first quarter of the steps and
            grows with depth, `ddpm250` grows over the steps and falls with depth, `constant` is R.
        soft_fresh_weight: weight of a token's age, s3.
        bonus: gain of the best token of each 2x2 cell, s4.
        faithful: in the released code block 0 of a full step renews the distance and the blocks after it ask again
            whether the step is full, so that on some steps only block 0 is. False decides once a step.
    """

    name = "toca"
    label = "ToCa"
    knob = "fresh_ratio"

    fresh_ratio: float = Field(0.07, ge=0, le=1)
    interval: PositiveInt = 3
    schedule: Literal["ddim50", "ddpm250", "constant"] = "ddim50"
    soft_fresh_weight: NonNegativeFloat = 0.25
    bonus: NonNegativeFloat = 0.6
    faithful: bool = True

    def timetable(self, run: Run) -> tuple[Row, ...]:
        """What every step does, in sampling order."""
        return _timetable(self, run.nfe, run.shape.num_blocks, run.shape.num_tokens)

    def i_steps(self, run: Run) -> tuple[int, ...]:
        """Steps at which every block is computed in full."""
        return tuple(step for step, row in enumerate(self.timetable(run)) if all(row.full))

    def ratio(self, left: int, nfe: int, block: int, num_blocks: int) -> float:
        """The share of tokens recomputed in a block with `left` steps to go; below 0 it means none."""
        over_steps, over_blocks, mlp = SCHEDULES[self.schedule]
        by_step = 1 + over_steps - 2 * over_steps * left / nfe
        by_block = 1 + over_blocks - 2 * over_blocks * block / max(1, num_blocks - 1)
        return self.fresh_ratio * by_block * by_step * mlp

    def renewed_interval(self, left: int, nfe: int) -> int:
        """The distance of full steps that a full step with `left` steps to go sets."""
        import torch

        if self.fresh_ratio and int(0.2 * nfe) <= left < int(0.4 * nfe):
            return 2
        weight = 0.4 if self.fresh_ratio else 0.0
        # in float32 and half to even, as released: in float64 interval 2 rounds 2.5 up at i / S = 0.75
        pace = torch.tensor(1 + weight - 2 * weight * left / nfe, dtype=torch.float32)
        return int((self.interval / pace).round())

    def start(self, run: Run) -> "ToCaRun":
        """Ages of tokens live for one run."""
        if any(side % 2 for side in run.shape.grid):
            raise UserError(f"toca: its 2x2 cells need an even token grid, not {run.shape.grid}; use another model")
        return ToCaRun(self, run, self.timetable(run))


@dataclass
class ToCaRun:
    """One run's memory of its tokens.

    Attributes:
        refreshed: by block, the step at which each token was last recomputed, [R, N]; a number if it is one for all.
        scores: by block, the scores by which the last step chose tokens, [R, N].
    """

    method: ToCa
    run: Run
    rows: tuple[Row, ...]
    refreshed: "dict[int, Tensor | int]" = field(default_factory=dict)
    scores: "dict[int, Tensor]" = field(default_factory=dict)

    def plan(self, look: Look) -> Plan:
        """Every branch of a full block; the chosen tokens' MLP of the others."""
        row, decisions = self.rows[look.step], dict[Unit, Decision]()
        chosen = self._choose(look, [block for block, full in enumerate(row.full) if not full and row.counts[block]])
        for block, full in enumerate(row.full):
            attention, mlp = Site(block, "attn"), Site(block, "mlp")
            if full:
                self.refreshed[block] = look.step
                decisions[attention] = Decision(ALL, observe=self._is_read_after(look.step, block))
                decisions[mlp] = Decision(ALL)
            else:
                decisions[attention] = Decision(NONE)
                decisions[mlp] = Decision(chosen.get(block, NONE))
        return Plan(decisions)

    def _is_read_after(self, step: int, block: int) -> bool:
        """Whether some tokens are chosen before the block is full again: a map that nothing reads is not taken."""
        for row in self.rows[step + 1 :]:
            if row.full[block]:
                return False
            if row.counts[block]:
                return True
        return False

    def _choose(self, look: Look, blocks: list[int]) -> dict[int, Tokens]:
        """The tokens to recompute in `blocks`, scored in all of them at once."""
        import torch

        self.scores = {}
        if not blocks:
            return {}
        received_RBN = torch.stack([look.attention_received(block) for block in blocks], dim=1)
        zero_RN = torch.zeros_like(received_RBN[:, 0])
        refreshed_RBN = torch.stack([zero_RN + self.refreshed[block] for block in blocks], dim=1)
        method, age_RBN = self.method, look.step - 1 - refreshed_RBN
        score_RBN = score_by_attention(
            received_RBN, age_RBN / method.interval, self.run.shape.grid, method.soft_fresh_weight, method.bonus
        )
        order_RBN, chosen = score_RBN.argsort(dim=2, descending=True), {}
        for place, block in enumerate(blocks):
            index_RK = order_RBN[:, place, : self.rows[look.step].counts[block]]
            chosen[block] = Tokens(index_RK)
            self.refreshed[block] = refreshed_RBN[:, place].scatter(1, index_RK, look.step)
            self.scores[block] = score_RBN[:, place]
        return chosen


@lru_cache
def _timetable(method: ToCa, nfe: int, num_blocks: int, num_tokens: int) -> tuple[Row, ...]:
    import torch

    rows, interval = [], method.interval
    for step, left in enumerate(reversed(range(nfe))):
        first = interval
        full = step == 0 or left % interval == 0
        if full:
            interval = method.renewed_interval(left, nfe)
        again = step == 0 or left % interval == 0 if method.faithful else full
        ratios = [method.ratio(left, nfe, block, num_blocks) for block in range(num_blocks)]
        share = torch.tensor(ratios, dtype=torch.float32).clamp(0, 1)  # truncated in float32, as released
        fulls = (full, *[again] * (num_blocks - 1))
        counts = [num_tokens if whole else int(part) for whole, part in zip(fulls, share * num_tokens, strict=True)]
        rows.append(Row(fulls, (first, *[interval] * (num_blocks - 1)), tuple(counts)))
    return tuple(rows)
