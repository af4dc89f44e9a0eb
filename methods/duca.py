"""DuCa: Accelerating Diffusion Transformers with Dual Feature Caching (arXiv 2412.18911; Shenyi-Z/DuCa, for DiT).

Full steps as in ToCa, and between them two kinds in turn. A partial step holds attention and recomputes some tokens'
MLP, as ToCa does. An aggressive step runs no block: what enters the final layer is what entered it at the step before,
whatever that was, so that the step's own latents do not count at all. Within an interval the aggressive step comes
first, because the released code counts steps down. Token scores are ToCa's with a bonus of 0.8 or, as in the script
that made the published FIDs, random numbers in the place of the attention received. `tests/test_golden_rivals.py` holds
it to the released code.
"""

from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Literal

from pydantic import Field, NonNegativeFloat, PositiveInt

from tcbench.choose import AttentionScore, Visits
from tcbench.errors import UserError
from tcbench.method import Look, Method, Run
from tcbench.plan import ALL, NONE, Decision, Output, Plan, Site, Tokens, Unit
from tcbench.schedule import TOCA_DDIM50, token_counts

if TYPE_CHECKING:
    from torch import Tensor

Kind = Literal["full", "partial", "aggressive"]


@dataclass(frozen=True)
class Row:
    """What one step does, known before sampling.

    Attributes:
        kinds: by block.
        intervals: by block, the distance of full steps that decided so; block 0 may change it for the others, but not at
            the first step.
        counts: by block, the tokens that its MLP recomputes at a partial step.
    """

    kinds: tuple[Kind, ...]
    intervals: tuple[int, ...]
    counts: tuple[int, ...]


class DuCa(Method):
    """Full, aggressive and partial steps in turn.

    Options (defaults: the released setting for DiT and 50 DDIM steps):
        fresh_ratio: R, the share of tokens that ToCa's schedule for 50 DDIM steps scales.
        interval: N, the base distance of full steps, which a full step renews as in ToCa.
        score: of a token: `random` is the default of the script that makes samples for FIDs, `attention` that of the
            one that makes a picture.
        soft_fresh_weight: weight of a token's age, counted in steps at which its block ran.
        bonus: gain of the best token of each cell.
        cell: side of the cells.
        faithful: in the released code block 0 of a full step renews the distance and the blocks after it ask again
            what kind the step is; where they find it aggressive, block 0 is computed for its cache alone. False decides
            once a step.
    """

    name = "duca"
    label = "DuCa"
    knob = "fresh_ratio"

    fresh_ratio: float = Field(0.05, ge=0, le=1)
    interval: PositiveInt = 3
    score: Literal["random", "attention"] = "random"
    soft_fresh_weight: NonNegativeFloat = 0.25
    bonus: NonNegativeFloat = 0.8
    cell: PositiveInt = 2
    faithful: bool = True

    def ratio(self, counter: int, nfe: int, block: int, num_blocks: int) -> float:
        """The share of tokens that an MLP recomputes; below 0 it means none."""
        return self.fresh_ratio * TOCA_DDIM50.share(counter, nfe, block, num_blocks)

    def timetable(self, run: Run) -> tuple[Row, ...]:
        """What every step does, in sampling order."""
        return _timetable(self, run.nfe, run.shape.num_blocks, run.shape.num_tokens)

    def i_steps(self, run: Run) -> tuple[int, ...]:
        """Steps at which every block is computed in full."""
        return tuple(step for step, row in enumerate(self.timetable(run)) if set(row.kinds) == {"full"})

    def start(self, run: Run) -> "DuCaRun":
        """Ages of tokens live for one run."""
        if any(side % self.cell for side in run.shape.grid):
            cells = f"{self.cell}x{self.cell} cells"
            raise UserError(f"its {cells} do not tile the token grid {run.shape.grid}; set another cell")
        score = AttentionScore(
            run.shape.grid,
            self.soft_fresh_weight,
            self.interval,
            self.bonus,
            self.cell,
            scaled=self.score == "attention",
        )
        return DuCaRun(self, self.timetable(run), Visits(score))


@dataclass
class DuCaRun:
    """One run's memory of its tokens.

    Attributes:
        scores, chosen: by branch, the scores [R, N] by which the last step chose tokens, and their places [R, K].
    """

    method: DuCa
    rows: tuple[Row, ...]
    visits: Visits
    scores: "dict[Site, Tensor]" = field(default_factory=dict)
    chosen: "dict[Site, Tensor]" = field(default_factory=dict)

    def plan(self, look: Look) -> Plan:
        """Every part of a full block, the chosen tokens' MLP of a partial one, nothing of an aggressive one."""
        row, shape, decisions = self.rows[look.step], look.run.shape, dict[Unit, Decision]()
        partial = [Site(block, "mlp") for block, kind in enumerate(row.kinds) if kind == "partial"]
        partial = [site for site in partial if site in shape.sites]
        self._choose(partial, row, look)
        for site in shape.sites:
            match row.kinds[site.block]:
                case "full":
                    self.visits.full(site.block)
                    attends = site.part == "attn" and self.method.score == "attention"
                    observed = attends and self._is_read_after(look.step, site.block)
                    decisions[site] = Decision(ALL, observe="attn" if observed else None)
                case "partial" if site in self.chosen:
                    decisions[site] = Decision(Tokens(self.chosen[site]))
                case _:
                    decisions[site] = Decision(NONE)
        decisions[Output()] = Decision(NONE if row.kinds[-1] == "aggressive" else ALL)
        return Plan(decisions)

    def _choose(self, sites: list[Site], row: Row, look: Look) -> None:
        """Choose the tokens to recompute, of all blocks at once."""
        counts = {site.block: row.counts[site.block] for site in sites}
        observed = {}
        if self.method.score == "attention":
            observed = {block: look.attention_received(block) for block, count in counts.items() if count}
        elif any(counts.values()):
            uniform_RLN = look.uniform()
            observed = {block: uniform_RLN[:, block] for block in counts}
        choices = self.visits.choose(observed, counts)
        self.chosen = {Site(block, "mlp"): index_RK for block, (index_RK, _) in choices.items()}
        self.scores = {Site(block, "mlp"): score_RN for block, (_, score_RN) in choices.items()}

    def _is_read_after(self, step: int, block: int) -> bool:
        """Whether some tokens are chosen before the block is full again: a map that nothing reads is not taken."""
        for row in self.rows[step + 1 :]:
            if row.kinds[block] == "full":
                return False
            if row.kinds[block] == "partial" and row.counts[block]:
                return True
        return False


@lru_cache
def _timetable(method: DuCa, nfe: int, num_blocks: int, num_tokens: int) -> tuple[Row, ...]:
    def kind(step: int, counter: int, interval: int) -> Kind:
        if step == 0 or counter % interval == 0:
            return "full"
        return "partial" if counter % interval % 2 else "aggressive"

    rows, interval = [], method.interval
    for step in range(nfe):
        first, counter = interval, TOCA_DDIM50.counter(step, nfe)
        first_kind = kind(step, counter, interval)
        if first_kind == "full":
            varies = method.fresh_ratio > 0
            interval = TOCA_DDIM50.renewed_interval(method.interval, counter, nfe, varies)
        others = kind(step, counter, interval) if method.faithful else first_kind
        ratios = [method.ratio(counter, nfe, block, num_blocks) for block in range(num_blocks)]
        rows.append(
            Row(
                (first_kind, *[others] * (num_blocks - 1)),
                (first, *[interval if step else first] * (num_blocks - 1)),
                tuple(token_counts(ratios, num_tokens)),
            )
        )
    return tuple(rows)
