"""Steps that hold attention and recompute some tokens' MLPs, between full ones: what ToCa's successors share.

DuCa and ProCache differ in which steps and blocks do what; how tokens are then chosen, aged and observed is here.
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt

from tcbench.choose import AttentionScore, Visits
from tcbench.errors import UserError
from tcbench.method import Look, Method, Run
from tcbench.plan import ALL, NONE, Decision, Observe, Output, Plan, Site, Tokens, Unit
from tcbench.tensors.unseen import on_values

if TYPE_CHECKING:
    from torch import Tensor

Kind = Literal["full", "partial", "held", "aggressive"]
"""What a block does at a step: everything; some tokens' MLP; nothing, but through the step's own gates; nothing at all,
and where that is the last block, what enters the final layer is what entered it at the step before."""

TokenScore = Literal["attention", "kv-norm", "random"]
"""What of a token is scored, as ToCa's code calls it: the attention it received when its block was last full, one minus
the length of its value vectors there, both L2-normalised over the tokens, or uniform random numbers."""

_OBSERVES: dict[TokenScore, Observe | None] = {"attention": "attn", "kv-norm": "values", "random": None}


@dataclass(frozen=True)
class Row:
    """What one step does, known before sampling.

    Attributes:
        kinds: by block.
        counts: by block, the tokens that its MLP recomputes where it is partial.
        intervals: by block, the distance of full steps that decided so, where there is one.
    """

    kinds: tuple[Kind, ...]
    counts: tuple[int, ...]
    intervals: tuple[int, ...] = ()


class PartialSteps(Method):
    """Recompute, between full steps, some tokens' MLPs or nothing; which steps do what is a subclass's `timetable`.

    Options:
        fresh_ratio: R, the share of tokens that ToCa's schedule scales.
        score: of a token: `attention`, what it received; `kv-norm`, one minus the length of its value vectors, needs no
            map of it; or `random`.
        soft_fresh_weight: weight of a token's age, counted in steps at which its block ran.
        bonus: gain of the best token of each cell.
        cell: side of the cells.
        interval: the age, in steps, that is one weight.
    """

    knob = "fresh_ratio"

    fresh_ratio: float = Field(0.05, ge=0, le=1)
    score: TokenScore = "random"
    soft_fresh_weight: NonNegativeFloat = 0.25
    bonus: NonNegativeFloat = 0.8
    cell: PositiveInt = 2
    interval: PositiveFloat = 4

    def timetable(self, run: Run) -> tuple[Row, ...]:
        """What every step does, in sampling order."""
        raise TypeError(f"methods/{self.name}.py does not define timetable(run)")

    def i_steps(self, run: Run) -> tuple[int, ...]:
        """Steps at which every block is computed in full."""
        return tuple(step for step, row in enumerate(self.timetable(run)) if set(row.kinds) == {"full"})

    def start(self, run: Run) -> "PartialRun":
        """Ages of tokens live for one run.

        Raises:
            UserError: the cells do not tile the grid of tokens.
        """
        grid, cell = run.shape.grid, self.cell
        if any(side % cell for side in grid):
            raise UserError(f"its {cell}x{cell} cells do not tile the token grid {grid}; set another cell")
        scaled = self.score != "random"
        by_score = AttentionScore(grid, self.soft_fresh_weight, self.interval, self.bonus, cell, scaled=scaled)
        return PartialRun(self.timetable(run), self.score, Visits(by_score))


def _shortness(norm_RN: "Tensor") -> "Tensor":
    return 1 - norm_RN


@dataclass
class PartialRun:
    """One run's memory of its tokens.

    Attributes:
        scores, chosen: by branch, the scores [R, N] by which the last step chose tokens, and their places [R, K].
    """

    rows: tuple[Row, ...]
    score: TokenScore
    visits: Visits
    scores: "dict[Site, Tensor]" = field(default_factory=dict)
    chosen: "dict[Site, Tensor]" = field(default_factory=dict)

    def plan(self, look: Look) -> Plan:
        """Every part of a full block, the chosen tokens' MLP of a partial one, nothing of the others."""
        row, shape, decisions = self.rows[look.step], look.run.shape, dict[Unit, Decision]()
        self._choose(row, look)
        for site in shape.sites:
            if row.kinds[site.block] == "full":
                self.visits.full(site.block)
                observed = site.part == "attn" and self._is_read_after(look.step, site.block)
                decisions[site] = Decision(ALL, observe=_OBSERVES[self.score] if observed else None)
            elif site in self.chosen:
                decisions[site] = Decision(Tokens(self.chosen[site]))
            else:
                decisions[site] = Decision(NONE)
        if any("aggressive" in row.kinds for row in self.rows):
            decisions[Output()] = Decision(NONE if row.kinds[-1] == "aggressive" else ALL)
        return Plan(decisions)

    def _choose(self, row: Row, look: Look) -> None:
        """Choose the tokens to recompute, of all blocks at once; ages stand still where a block is not partial."""
        partial = [
            site.block for site in look.run.shape.sites if site.part == "mlp" and row.kinds[site.block] == "partial"
        ]
        counts = {block: row.counts[block] for block in partial}
        choices = self.visits.choose(self._observed([block for block in partial if counts[block]], look), counts)
        self.chosen = {Site(block, "mlp"): index_RK for block, (index_RK, _) in choices.items()}
        self.scores = {Site(block, "mlp"): score_RN for block, (_, score_RN) in choices.items()}

    def _observed(self, blocks: list[int], look: Look) -> "dict[int, Tensor]":
        """What is scored of the tokens of each block, [R, N]."""
        match self.score:
            case "attention":
                return {block: look.attention_received(block) for block in blocks}
            case "kv-norm":
                norms = {block: look.value_norms(block) for block in blocks}
                return {block: on_values(_shortness, norm, shape=norm.shape) for block, norm in norms.items()}
            case "random":
                uniform_RLN = look.uniform() if blocks else None
                return {block: uniform_RLN[:, block] for block in blocks if uniform_RLN is not None}

    def _is_read_after(self, step: int, block: int) -> bool:
        """Whether some tokens are chosen before the block is full again: a map that nothing reads is not taken."""
        for row in self.rows[step + 1 :]:
            if row.kinds[block] == "full":
                return False
            if row.kinds[block] == "partial" and row.counts[block]:
                return True
        return False
