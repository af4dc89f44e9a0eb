"""ToCa: Accelerating Diffusion Transformers with Token-wise Feature Caching (arXiv 2410.05317).

Full steps compute everything; on the steps between them, self-attention outputs are reused for all tokens, and
cross-attention and MLP run for the highest-scoring tokens of every row. Outputs are cached before their gates.

A token's score is the attention it received in its block's last full step (s1) or, where there is cross-attention, the
entropy of its attention over the text (s2), L2-normalised over the tokens; plus `soft_fresh_weight` times its age in
steps over `interval` (s3); the best token of each cell then gains `bonus` times its score (s4). The halves of a guided
pair choose apart by s1; by s2 they choose alike, from the entropy of their averaged maps. How many tokens, and when a
step is full, depends on the step and the block alone. `tests/test_golden.py` holds it to the released code for DiT and
PixArt-alpha.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Literal

from pydantic import Field, NonNegativeFloat, PositiveInt, model_validator

from tcbench.choose import AttentionScore, choose_by_attention, counted
from tcbench.errors import UserError
from tcbench.method import Look, Method, Run
from tcbench.plan import ALL, NONE, Decision, Deferred, Plan, Site, Tokens, Unit
from tcbench.schedule import PACES, StepList, check_one, listed_steps, token_counts

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Row:
    """What one step does, known before sampling.

    Attributes:
        full: by block, whether it is computed in full.
        intervals: by block, the interval that decided so; block 0 may change it for the others.
        counts, cross_counts: by block, the tokens that its MLP and its cross-attention recompute; N where it is full.
    """

    full: tuple[bool, ...]
    intervals: tuple[int, ...]
    counts: tuple[int, ...]
    cross_counts: tuple[int, ...]

    def count(self, site: Site) -> int:
        """Tokens that a branch recomputes."""
        return (self.counts if site.part == "mlp" else self.cross_counts)[site.block]


class ToCa(Method):
    """Token-wise caching of cross-attention and MLP outputs by attention and age.

    Options (defaults: the released setting for DiT and 50 DDIM steps; for 250 ancestral steps it is interval 4 and
    ddpm250, for PixArt-alpha fresh_ratio 0.3, schedule pixart, bonus 0.4 and cell 4):
        fresh_ratio: R, the share of tokens that schedules scale; 0 is FORA.
        interval: N, the base distance of full steps. A full step with i of S steps to go sets the distance in force to
            round(N / (1.4 - 0.8 i / S)), or to 2 if 0.2 S <= i < 0.4 S; under `pixart` step i of S sets it to
            round(N / (0.8 + 0.4 i / S)). It is 3 if neither it nor a list of full steps is given.
        full_steps: a list of them in the place of `interval`; ages are then counted in their mean distance.
        schedule: how R changes over steps and blocks: `ddim50` grows from none in the first quarter of the steps and
            grows with depth, `ddpm250` grows over the steps and falls with depth, `pixart` falls over both and gives
            cross-attention less than the MLP, `constant` is R.
        soft_fresh_weight: weight of a token's age, s3.
        bonus: gain of the best token of each cell, s4.
        cell: side of the cells.
        faithful: in the released code block 0 of a full step renews the distance and the blocks after it ask again
            whether the step is full, so that on some steps only block 0 is. False decides once a step.
    """

    name = "toca"
    label = "ToCa"
    knob = "fresh_ratio"

    fresh_ratio: float = Field(0.07, ge=0, le=1)
    interval: PositiveInt | None = None
    full_steps: StepList | None = None
    schedule: Literal["ddim50", "ddpm250", "pixart", "constant"] = "ddim50"
    soft_fresh_weight: NonNegativeFloat = 0.25
    bonus: NonNegativeFloat = 0.6
    cell: PositiveInt = 2
    faithful: bool = True

    @model_validator(mode="after")
    def _one_schedule(self) -> "ToCa":
        check_one(self)
        return self

    def base_interval(self, nfe: int) -> float:
        """N, or the mean distance of the full steps of a list."""
        return nfe / len(self.full_steps) if self.full_steps else float(self.interval or 3)

    def timetable(self, run: Run) -> tuple[Row, ...]:
        """What every step does, in sampling order."""
        return _timetable(self, run.nfe, run.shape.num_blocks, run.shape.num_tokens)

    def i_steps(self, run: Run) -> tuple[int, ...]:
        """Steps at which every block is computed in full."""
        return tuple(step for step, row in enumerate(self.timetable(run)) if all(row.full))

    def counter(self, step: int, nfe: int) -> int:
        """What the released code calls a step: some count up, others down."""
        return PACES[self.schedule].counter(step, nfe)

    def ratio(self, counter: int, nfe: int, block: int, num_blocks: int, branch: str = "mlp") -> float:
        """The share of tokens that a branch recomputes; below 0 it means none."""
        return self.fresh_ratio * PACES[self.schedule].share(counter, nfe, block, num_blocks, branch)

    def renewed_interval(self, counter: int, nfe: int) -> int:
        """The distance of full steps that a full step sets."""
        pace, varies = PACES[self.schedule], self.fresh_ratio > 0
        return pace.renewed_interval(self.base_interval(nfe), counter, nfe, varies=varies)

    def start(self, run: Run) -> "ToCaRun":
        """Ages of tokens live for one run."""
        if any(side % self.cell for side in run.shape.grid):
            cells = f"{self.cell}x{self.cell} cells"
            raise UserError(f"toca: its {cells} do not tile the token grid {run.shape.grid}; set another cell")
        halves = run.rows_per_sample if "cross" in run.shape.kinds else None
        score = AttentionScore(
            run.shape.grid, self.soft_fresh_weight, self.base_interval(run.nfe), self.bonus, self.cell, halves=halves
        )
        return ToCaRun(run, self.timetable(run), score, "cross" if halves else "attn")


@dataclass
class ToCaRun:
    """One run's memory of its tokens.

    Attributes:
        observes: the branch whose attention says which tokens matter.
        refreshed: by branch, the step at which each token was last recomputed, [R, N]; a number if it is one for all.
        scores, chosen: by branch, the scores [R, N] by which the last step chose tokens, and their places [R, K].
    """

    run: Run
    rows: tuple[Row, ...]
    score: AttentionScore
    observes: Literal["attn", "cross"]
    refreshed: "dict[Site, Tensor | int]" = field(default_factory=dict)
    scores: "dict[Site, Tensor]" = field(default_factory=dict)
    chosen: "dict[Site, Tensor]" = field(default_factory=dict)

    def plan(self, look: Look) -> Plan:
        """Every branch of a full block; the chosen tokens' cross-attention and MLP of the others."""
        row, decisions = self.rows[look.step], dict[Unit, Decision]()
        partial = [
            site
            for site in self.run.shape.sites
            if not row.full[site.block] and site.part in ("cross", "mlp") and row.count(site)
        ]
        # a block's cross-attention refreshes the entropies that its MLP's choice reads
        later = {site for site in partial if site.part == "mlp" and Site(site.block, "cross") in partial}
        self.scores, self.chosen = {}, {}
        if now := [site for site in partial if site not in later]:
            self._choose(now, look)
        read = [self._is_read_after(look.step, block) for block in range(self.run.shape.num_blocks)]
        for site in self.run.shape.sites:
            observe = self.observes if read[site.block] and site.part == self.observes else None
            if row.full[site.block]:
                self.refreshed[site] = look.step
                decisions[site] = Decision(ALL, observe=observe)
            elif site in self.chosen:
                decisions[site] = Decision(Tokens(self.chosen[site]), observe=observe)
            elif site in later:
                decisions[site] = Decision(self._deferred(look, site))
            else:
                decisions[site] = Decision(NONE)
        return Plan(decisions)

    def _is_read_after(self, step: int, block: int) -> bool:
        """Whether some tokens are chosen before the block is full again: a map that nothing reads is not taken."""
        if not self.rows[step].full[block] and self.rows[step].counts[block]:
            return True  # the MLP's choice follows the cross-attention's refresh
        for row in self.rows[step + 1 :]:
            if row.full[block]:
                return False
            if row.counts[block] or row.cross_counts[block]:
                return True
        return False

    def _deferred(self, look: Look, site: Site) -> Deferred:
        """The choice when the branch is reached; it reads no token."""

        def choose(_: "Callable[[], Tensor]") -> Tokens:
            self._choose([site], look)
            return Tokens(self.chosen[site])

        return Deferred(choose, counted(self.rows[look.step].count(site)))

    def _choose(self, sites: list[Site], look: Look) -> None:
        """Choose the tokens to recompute at some branches, all at once; they are young from here on."""
        observed = look.attention_received if self.observes == "attn" else look.attention_entropy
        choices = choose_by_attention(
            self.score,
            [observed(site.block) for site in sites],
            [self.refreshed[site] for site in sites],
            look.step,
            [self.rows[look.step].count(site) for site in sites],
        )
        for site, choice in zip(sites, choices, strict=True):
            self.chosen[site], self.scores[site], self.refreshed[site] = choice


@lru_cache
def _timetable(method: ToCa, nfe: int, num_blocks: int, num_tokens: int) -> tuple[Row, ...]:
    def counts(counter: int, fulls: tuple[bool, ...], branch: str) -> tuple[int, ...]:
        ratios = [method.ratio(counter, nfe, block, num_blocks, branch) for block in range(num_blocks)]
        return tuple(num_tokens if full else n for full, n in zip(fulls, token_counts(ratios, num_tokens), strict=True))

    rows, interval = [], method.interval or 3
    listed = listed_steps(method.full_steps, nfe) if method.full_steps else None
    for step in range(nfe):
        first, counter = interval, method.counter(step, nfe)
        full = step in listed if listed else step == 0 or counter % interval == 0
        if full:
            interval = method.renewed_interval(counter, nfe)
        again = full if listed or not method.faithful else step == 0 or counter % interval == 0
        fulls = (full, *[again] * (num_blocks - 1))
        intervals = (first, *[interval] * (num_blocks - 1))
        rows.append(Row(fulls, intervals, counts(counter, fulls, "mlp"), counts(counter, fulls, "cross")))
    return tuple(rows)
