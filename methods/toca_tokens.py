"""ToCa's score as a token selector: attention and age, inside TokenCache's framework (Table VI, "ToCa").

ToCa (arXiv 2410.05317, `methods/toca.py`) caches the outputs of branches on a timetable of its own. Here only its score
is kept: I- and P-steps, cached block updates and refiners are TokenCache's, and the score takes the predictor's place.
It begins with the attention that a token received (s1), or with the entropy of its attention over the text (s2) where
there is text, by which the halves of a guided pair choose alike. The attention maps that it reads are charged.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from pydantic import NonNegativeFloat

from tcbench.choose import AttentionScore, choose_by_attention
from tcbench.errors import UserError
from tcbench.method import Artefacts, Look, Run
from tcbench.plan import NONE, Block, Plan, Tokens, every_unit
from tcbench.selector import TokenSelector

if TYPE_CHECKING:
    from torch import Tensor


class ToCaTokens(TokenSelector):
    """Recompute the tokens of every block update that ToCa scores highest.

    Options:
        soft_fresh_weight: weight of a token's age, s3. ToCa counts age in its base interval; TokenCache's schedule has
            none, so it is counted in mean distances of I-steps, the NFE over their number.
        bonus: gain of the best token of each 2x2 cell, s4.
    """

    name = "toca_tokens"
    label = "ToCa tokens"

    soft_fresh_weight: NonNegativeFloat = 0.25
    bonus: NonNegativeFloat = 0.6

    def macs_depend_on(self, artefacts: Artefacts) -> str | None:
        """Alpha-bar, where it places the I-steps: only maps that a P-step reads are taken."""
        if self.full_steps or self.schedule == "even" or artefacts.alpha_bar:
            return None
        return "alpha-bar places the I-steps, and with them the attention maps that P-steps read"

    def start(self, run: Run) -> "_Selection":
        """Ages of tokens live for one run.

        Raises:
            UserError: the grid has no 2x2 cells.
        """
        if any(side % 2 for side in run.shape.grid):
            raise UserError(f"toca_tokens: its 2x2 cells need an even token grid, not {run.shape.grid}")
        text = "cross" in run.shape.kinds
        score = AttentionScore(
            run.shape.grid,
            self.soft_fresh_weight,
            run.nfe / self.full_count(run),
            self.bonus,
            halves=run.rows_per_sample if text else None,
        )
        return _Selection(self, self.units(run), self.i_steps(run), score, "cross" if text else "attn")


@dataclass
class _Selection:
    """The plans of one run.

    Attributes:
        units: the B blocks that may be cached.
        observes: the branch whose attention says which tokens matter.
        refreshed: by unit, the step at which each token was last recomputed, [R, N]; a number if it is one for all.
    """

    method: ToCaTokens
    units: list[Block]
    i_steps: tuple[int, ...]
    score: AttentionScore
    observes: Literal["attn", "cross"]
    refreshed: "Sequence[Tensor | int]" = ()

    def plan(self, look: Look) -> Plan:
        """Everything on I-steps, with attention observed if the next step reads it; on P-steps the best tokens."""
        method, units, kept = self.method, self.units, self.method.kept(look.run)
        if look.step in self.i_steps:
            self.refreshed = [look.step] * len(units)
            following = look.step + 1
            read = kept > 0 and following < look.run.nfe and following not in self.i_steps
            return method.everything(units, observe=self.observes if read else None)
        if not kept:
            return every_unit(units, NONE)
        observed = look.attention_received if self.observes == "attn" else look.attention_entropy
        choices = choose_by_attention(
            self.score,
            [observed(unit.block) for unit in units],
            self.refreshed,
            look.step,
            [kept] * len(units),
        )
        self.refreshed = [refreshed_RN for _, _, refreshed_RN in choices]
        return method.recompute(units, [Tokens(index_RK) for index_RK, _, _ in choices])
