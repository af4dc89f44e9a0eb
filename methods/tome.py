"""ToMe as a token selector: similar tokens are reused from the cache instead of merged (Table VI, "ToMe").

Token Merging for Stable Diffusion (arXiv 2303.17604) matches tokens in two sets: one destination token per cell of the
grid, drawn at random, and all others. A source token that is very similar to a destination is redundant. The original
merges it; here, inside TokenCache's I- and P-steps, its block update is reused, and the destinations and the least
similar sources are recomputed. The matching is made anew from every block's input and is charged.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pydantic import PositiveInt

from tcbench.bipartite import check_cells, draw_destinations, match, matching_macs, num_destinations
from tcbench.choose import counted
from tcbench.method import Look, Run
from tcbench.plan import Deferred, Plan, Tokens
from tcbench.selector import TokenSelector

if TYPE_CHECKING:
    from torch import Tensor


class ToMe(TokenSelector):
    """Reuse the tokens that ToMe would merge.

    Options:
        cell: side of the cells with one destination each. Cells of 4 x 4 allow to reuse up to 15/16 of the tokens, the
            original's 2 x 2 only 3/4.
    """

    name = "tome"
    label = "ToMe"

    cell: PositiveInt = 4

    def start(self, run: Run) -> "_Matching":
        """Draw the destinations of the whole run.

        Raises:
            UserError: the cells need more recomputed tokens than `cache_ratio` leaves.
        """
        check_cells(self.name, run, self.cell, self.kept(run), f"cache_ratio {self.cache_ratio:g}")
        return _Matching(self, num_destinations(run.shape, self.cell), draw_destinations(run, self.cell))


@dataclass(frozen=True)
class _Matching:
    """The plans of one run.

    Attributes:
        cells: how many of the recomputed tokens are destinations.
        order_SLN: for every step and block all tokens, destinations first.
    """

    method: ToMe
    cells: int
    order_SLN: "Tensor"

    def plan(self, look: Look) -> Plan:
        """Everything on I-steps; on P-steps a matching in every block that may be cached."""
        method, units = self.method, self.method.units(look.run)
        if look.step in method.i_steps(look.run):
            return method.everything(units)
        kept, macs = method.kept(look.run), matching_macs(look.run.shape, method.cell)
        order_LN = self.order_SLN[look.step, : len(units)]
        choosers = [_Chooser(kept, order_N[: self.cells], order_N[self.cells :]) for order_N in order_LN]
        return method.recompute(units, [Deferred(choose, counted(kept), macs) for choose in choosers])


@dataclass(frozen=True)
class _Chooser:
    """Bipartite matching of a block's input."""

    kept: int
    destination_C: "Tensor"
    source_M: "Tensor"

    def __call__(self, stream: Callable[[], "Tensor"]) -> Tokens:
        """The destinations, and the sources whose best cosine similarity to one is lowest."""
        import torch

        x_RND = stream()
        destination_C, source_M = self.destination_C.to(x_RND.device), self.source_M.to(x_RND.device)
        best_RM, _ = match(x_RND, destination_C, source_M)
        apart = best_RM.topk(self.kept - len(destination_C), largest=False, sorted=False).indices
        return Tokens(torch.cat([destination_C.expand(len(x_RND), -1), source_M[apart]], dim=1))
