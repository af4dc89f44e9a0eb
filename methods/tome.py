"""ToMe as a token selector: similar tokens are reused from the cache instead of merged (Table VI, "ToMe").

Token Merging for Stable Diffusion (arXiv 2303.17604) matches tokens in two sets: one destination token per cell of the
grid, drawn at random, and all others. A source token that is very similar to a destination is redundant. The original
merges it; here, inside TokenCache's I- and P-steps, its block update is reused, and the destinations and the least
similar sources are recomputed. The matching is made anew from every block's input and is charged.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pydantic import Field, NonNegativeInt, PositiveInt

from tcbench.choose import counted
from tcbench.errors import UserError
from tcbench.method import Look, Method, Run, free_blocks
from tcbench.plan import ALL, Block, Decision, Deferred, Keys, Plan, Tokens, Unit, every_unit
from tcbench.schedule import Schedule, full_steps
from tcbench.unseen import on_values

if TYPE_CHECKING:
    from torch import Tensor


class ToMe(Method):
    """Reuse the tokens that ToMe would merge.

    Options:
        num_full_steps, cache_ratio, refiner_blocks, schedule, beta, keys: as in `methods/tokencache.py`. The adaptive
            schedule needs the artefacts of a trained TokenCache row (`artefacts_from` in the config).
        cell: side of the cells with one destination each. Cells of 4 x 4 allow to reuse up to 15/16 of the tokens, the
            original's 2 x 2 only 3/4.
    """

    name = "tome"
    label = "ToMe"
    knob = "num_full_steps"

    num_full_steps: PositiveInt = 12
    cache_ratio: float = Field(0.9, ge=0, le=1)
    refiner_blocks: NonNegativeInt = 4
    schedule: Schedule = "even"
    beta: float = -8000.0
    keys: Keys = "cached"
    cell: PositiveInt = 4

    def i_steps(self, run: Run) -> tuple[int, ...]:
        """Steps at which everything is computed."""
        return full_steps(run, self.num_full_steps, self.schedule, self.beta)

    def start(self, run: Run) -> "_Matching":
        """Draw the destinations of the whole run at once, so that no step waits for them.

        Raises:
            UserError: the cells need more recomputed tokens than `cache_ratio` leaves.
        """
        shape = run.shape
        height, width = (side // self.cell for side in shape.grid)
        cells, kept = shape.frames * height * width, round((1 - self.cache_ratio) * shape.num_tokens)
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
        return _Matching(self, kept, cells, order_SLN)


@dataclass(frozen=True)
class _Matching:
    """The plans of one run.

    Attributes:
        kept: tokens that every row recomputes in a block.
        cells: how many of them are destinations.
        order_SLN: for every step and block all tokens, destinations first.
    """

    method: ToMe
    kept: int
    cells: int
    order_SLN: "Tensor"

    def plan(self, look: Look) -> Plan:
        """Everything on I-steps; on P-steps a matching in every block that may be cached."""
        shape = look.run.shape
        free = range(free_blocks(shape, self.method.refiner_blocks))
        if look.step in self.method.i_steps(look.run):
            return every_unit([Block(block) for block in free], ALL, keys=self.method.keys)
        like = counted(self.kept)
        macs = (shape.num_tokens - self.cells) * self.cells * shape.width
        decisions: dict[Unit, Decision] = {}
        for block in free:
            order_N = self.order_SLN[look.step, block]
            choose = _Chooser(self.kept, order_N[: self.cells], order_N[self.cells :])
            decisions[Block(block)] = Decision(Deferred(choose, like, macs), keys=self.method.keys)
        return Plan(decisions)


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
