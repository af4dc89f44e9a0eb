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

from tcbench.choose import counted
from tcbench.errors import UserError
from tcbench.method import Look, Run
from tcbench.plan import Deferred, Plan, Tokens
from tcbench.selector import TokenSelector
from tcbench.tensors.unseen import on_values

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
        """Draw the destinations of the whole run at once, so that no step waits for them.

        Raises:
            UserError: the cells need more recomputed tokens than `cache_ratio` leaves.
        """
        shape = run.shape
        height, width = (side // self.cell for side in shape.grid)
        cells, kept = shape.frames * height * width, self.kept(run)
        if not 0 < cells <= kept:
            raise UserError(
                f"tome: cells of {self.cell} x {self.cell} keep {cells} of {shape.num_tokens} tokens, cache_ratio "
                f"{self.cache_ratio:g} leaves {kept}; give a cell within the grid and a cache_ratio of at most "
                f"{1 - max(cells, 1) / shape.num_tokens:g}"
            )
        order_SLN = on_values(
            lambda _: destinations_first(run, self.cell),
            run.sample_index,
            shape=(run.nfe, shape.num_blocks, shape.num_tokens),
        )
        return _Matching(self, cells, order_SLN)


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
        shape, kept = look.run.shape, method.kept(look.run)
        macs = (shape.num_tokens - self.cells) * self.cells * shape.width
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
        metric = torch.nn.functional.normalize(x_RND, dim=2)
        best_RM = (metric[:, source_M] @ metric[:, destination_C].transpose(1, 2)).amax(2)
        apart = best_RM.topk(self.kept - len(destination_C), largest=False, sorted=False).indices
        return Tokens(torch.cat([destination_C.expand(len(x_RND), -1), source_M[apart]], dim=1))


def destinations_first(run: Run, cell: int) -> "Tensor":
    """All tokens for every step and block, one random token of each cell first: int64 [S, L, N].

    The draw depends on the run's seed alone and is the same for all rows, as in the original, so a sample does not
    depend on its batch. Tokens outside whole cells are sources.
    """
    import torch

    shape = run.shape
    height, width = (side // cell * cell for side in shape.grid)
    generator = torch.Generator().manual_seed(run.seed)
    grids = (run.nfe, shape.num_blocks, shape.frames, *shape.grid)
    score = torch.rand(grids, generator=generator, dtype=torch.float64)  # without ties
    inside = (
        score[..., :height, :width].unflatten(4, (-1, cell)).unflatten(3, (-1, cell))
    )  # [S, L, F, h, cell, w, cell]
    largest = inside == inside.amax((4, 6), keepdim=True)
    chosen = torch.zeros_like(score, dtype=torch.bool)
    chosen[..., :height, :width] = largest.flatten(5, 6).flatten(3, 4)
    return chosen.flatten(2).int().argsort(dim=2, descending=True, stable=True).to(run.sample_index.device)
