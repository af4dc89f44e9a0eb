"""ToMe: Token Merging for Fast Stable Diffusion (arXiv 2303.17604; dbolya/tomesd), without a cache (Sec. IV-D.1).

At every step, in every block, similar tokens are merged before a part and unmerged behind it. Tokens are matched in two
sets, by the cosine similarity of the block's input: one destination token per cell of the grid, drawn at random, and
all others. The sources that are most similar to a destination are merged into it, by the mean of what the part is
given; the part runs on fewer tokens, and merged ones get their destination's output. The stream keeps all tokens. All
parts of a block share its matching, which is charged.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from pydantic import Field, PositiveInt

from tcbench.bipartite import check_cells, draw_destinations, match, matching_macs, num_destinations
from tcbench.method import Look, Method, Run
from tcbench.plan import Decision, Deferred, Merged, Plan, Site, Unit
from tcbench.tensors.unseen import unseen

if TYPE_CHECKING:
    from torch import Tensor

Parts = Literal["attention", "attention-mlp", "all"]

KINDS: dict[Parts, tuple[Literal["mix", "pointwise", "cross"], ...]] = {
    "attention": ("mix",),
    "attention-mlp": ("mix", "pointwise"),
    "all": ("mix", "pointwise", "cross"),
}
"""The parts that are merged, by option."""


class ToMeMerge(Method):
    """Merge similar tokens at every step; nothing is cached.

    Options:
        ratio: the share of tokens that is merged away; 0.5 is published and the original's default. Cells of 2 x 2
            allow no more than 3/4.
        cell: side of the cells with one destination each; 2 is published.
        parts: whose tokens are merged: self-attention's as published, the MLP's too, or also cross-attention's. The
            original advises against the last two.
    """

    name = "tome_merge"
    label = "ToMe merging"
    knob = "ratio"

    ratio: float = Field(0.5, ge=0, le=0.75)
    cell: PositiveInt = 2
    parts: Parts = "attention"

    def kept(self, run: Run) -> int:
        """How many tokens are left of a row; any ratio above 0 merges one at least."""
        total = run.shape.num_tokens
        return total - max(int(total * self.ratio), self.ratio > 0)

    def i_steps(self, run: Run) -> tuple[int, ...]:
        """None, unless nothing is merged."""
        return tuple(range(run.nfe)) if self.kept(run) == run.shape.num_tokens else ()

    def start(self, run: Run) -> "_Matching":
        """Draw the destinations of the whole run.

        Raises:
            UserError: the cells need more tokens than `ratio` leaves.
        """
        check_cells(self.name, run, self.cell, self.kept(run), f"ratio {self.ratio:g}")
        cells, order_SLN = num_destinations(run.shape, self.cell), draw_destinations(run, self.cell)
        return _Matching(self, self.kept(run), cells, order_SLN)


@dataclass
class _Matching:
    """The plans of one run.

    Attributes:
        kept, cells: how many tokens are left, and how many of them are destinations.
        order_SLN: for every step and block all tokens, destinations first.
        latest: the matching of the block at hand. That of another one is not kept: it would be as large as the stream's
            index for every block and step.
    """

    method: ToMeMerge
    kept: int
    cells: int
    order_SLN: "Tensor"
    latest: tuple[int, Merged] | None = None

    def plan(self, look: Look) -> Plan:
        """A matching in every block, and what it merges in the parts."""
        shape, self.latest = look.run.shape, None
        if self.kept == shape.num_tokens:
            return Plan({})
        decisions, matched = dict[Unit, Decision](), set[int]()
        like = Merged(unseen(1, self.kept, dtype="int64"), unseen(1, shape.num_tokens, dtype="int64"))
        macs = matching_macs(shape, self.method.cell)
        for site in shape.sites_of(*KINDS[self.method.parts]):
            first = site.block not in matched
            decisions[site] = Decision(Deferred(self._chooser(look.step, site), like, macs if first else 0))
            matched.add(site.block)
        return Plan(decisions)

    def _chooser(self, step: int, site: Site) -> "Callable[[Callable[[], Tensor]], Merged]":
        def choose(stream: "Callable[[], Tensor]") -> Merged:
            if self.latest is None or self.latest[0] != site.block:
                self.latest = site.block, self._merged(stream(), self.order_SLN[step, site.block])
            return self.latest[1]

        return choose

    def _merged(self, x_RND: "Tensor", order_N: "Tensor") -> Merged:
        """Destinations and the least similar sources stay; the others join their nearest destination."""
        import torch

        order_N = order_N.to(x_RND.device)
        destination_C, source_M = order_N[: self.cells], order_N[self.cells :]
        best_RM, nearest_RM = match(x_RND, destination_C, source_M)
        apart_RU = best_RM.topk(self.kept - self.cells, largest=False, sorted=False).indices
        index_RK = torch.cat([destination_C.expand(len(x_RND), -1), source_M[apart_RU]], dim=1)
        group_RN = torch.empty(x_RND.shape[:2], dtype=torch.int64, device=x_RND.device)
        group_RN[:, source_M] = nearest_RM
        return Merged(index_RK, group_RN.scatter_(1, index_RK, _counting(index_RK)))


def _counting(index_RK: "Tensor") -> "Tensor":
    """0 to K - 1 in every row."""
    import torch

    return torch.arange(index_RK.shape[1], device=index_RK.device).expand_as(index_RK)
