"""ToMe's bipartite matching of tokens (arXiv 2303.17604): one destination per cell of the grid, and who is like it.

Destinations are drawn at random, anew for every step and block; all other tokens are sources. A source is as redundant
as it is similar to its nearest destination.
"""

from typing import TYPE_CHECKING

from tcbench.errors import UserError
from tcbench.method import Run
from tcbench.shapes import ModelShape
from tcbench.tensors.unseen import on_values

if TYPE_CHECKING:
    from torch import Tensor


def num_destinations(shape: ModelShape, cell: int) -> int:
    """How many whole cells of `cell` x `cell` tokens the grid of all frames has."""
    height, width = (side // cell for side in shape.grid)
    return shape.frames * height * width


def check_cells(method: str, run: Run, cell: int, kept: int, share: str) -> None:
    """Whether so many tokens may be kept.

    Args:
        method: its name.
        share: the option that leaves `kept` tokens, with its value.

    Raises:
        UserError: the cells need more tokens, or do not fit the grid.
    """
    tokens, cells = run.shape.num_tokens, num_destinations(run.shape, cell)
    if not 0 < cells <= kept:
        name, _, _ = share.partition(" ")
        raise UserError(
            f"{method}: cells of {cell} x {cell} keep {cells} of {tokens} tokens, {share} leaves {kept}; give a cell "
            f"within the grid and a {name} of at most {1 - max(cells, 1) / tokens:g}"
        )


def draw_destinations(run: Run, cell: int) -> "Tensor":
    """All tokens for every step and block, one random token of each cell first: int64 [S, L, N].

    Drawn for the whole run at once, so that no step waits for it. The draw depends on the run's seed alone and is the
    same for all rows, as in the original, so a sample does not depend on its batch. Tokens outside whole cells are
    sources.
    """
    shape = run.shape
    sizes = (run.nfe, shape.num_blocks, shape.num_tokens)
    return on_values(lambda _: _drawn(run, cell), run.sample_index, shape=sizes)


def _drawn(run: Run, cell: int) -> "Tensor":
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


def matching_macs(shape: ModelShape, cell: int) -> int:
    """What `match` costs for a row."""
    cells = num_destinations(shape, cell)
    return (shape.num_tokens - cells) * cells * shape.width


def match(x_RND: "Tensor", destination_C: "Tensor", source_M: "Tensor") -> "tuple[Tensor, Tensor]":
    """The cosine similarity of every source to its nearest destination, and which of them that is, each [R, M]."""
    import torch

    metric = torch.nn.functional.normalize(x_RND, dim=2)
    nearest = (metric[:, source_M] @ metric[:, destination_C].transpose(1, 2)).max(2)
    return nearest.values, nearest.indices
