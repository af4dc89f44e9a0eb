"""Self-attention as a model does it: plain, or with rotary positions, or inside groups of tokens."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tcbench.kernels import rows
from tcbench.kernels.chosen import Chosen, Path
from tcbench.kernels.context import group_attention
from tcbench.kernels.rotary import Rotary, turn

Linear = tuple[Tensor, Tensor]
"""Weight and bias."""


@dataclass(frozen=True)
class SelfAttention:
    """A model's self-attention.

    Queries, keys and values are [R, N, D] each, heads side by side, any stride between tokens. `groups` is (count,
    stride) of a block where token n attends to its own group n // stride % count, and None where to all.

    Attributes:
        rotary: the tables of positions, for models whose queries and keys are turned to them.
    """

    heads: int
    rotary: Rotary | None
    path: Path

    def project(self, h_RND: Tensor, layer: Linear) -> Tensor:
        """Stacked queries, keys and values (or some of them) of all tokens: [R, N, C]."""
        stacked = F.linear(h_RND, *layer)
        if self.rotary is None:
            return stacked
        turned = torch.empty_like(stacked)
        turn(stacked, self.rotary, self.heads, turned, path=self.path)
        return turned

    def project_chosen(self, h_MD: Tensor, layer: Linear, chosen: Chosen, out_RNC: Tensor) -> None:
        """Write those of the chosen tokens into `out_RNC`, leaving the others."""
        if self.rotary is None:
            rows.linear_scatter(h_MD, *layer, chosen, out_RNC, path=self.path)
        else:
            stacked = rows.linear(h_MD, *layer, chosen, path=self.path)
            turn(stacked, self.rotary, self.heads, out_RNC, chosen, path=self.path)

    def everyone(
        self, stacked_RNC: Tensor, groups: tuple[int, int] | None, observed: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Attention of all tokens, [R, N, D], from stacked queries, keys and values.

        Returns:
            that and, if `observed`, the attention that each token received: column sums of the head-mean map, [R, N].
        """
        stacked = stacked_RNC if groups is None else split(stacked_RNC, groups)
        queries, keys, values = stacked.chunk(3, dim=2)
        log_sums = None
        if observed:
            log_sums = queries.new_empty(len(queries), self.heads, queries.shape[1], dtype=torch.float32)
        mixed = rows.attention(queries, keys, values, self.heads, log_sums_RHN=log_sums, path=self.path)
        received = None
        if log_sums is not None:
            received = rows.attention_received(queries, keys, log_sums, self.heads, path=self.path)
        if groups is None:
            return mixed, received
        return join(mixed, groups), received if received is None else join(received[:, :, None], groups)[:, :, 0]

    def of_chosen(
        self,
        queries_RND: Tensor,
        keys_RND: Tensor,
        values_RND: Tensor,
        groups: tuple[int, int] | None,
        chosen: Chosen,
        among_chosen: bool,
    ) -> Tensor:
        """Attention of the chosen tokens, compact [M, D], to all tokens or among themselves."""
        qkv = queries_RND, keys_RND, values_RND
        if groups is None:
            return rows.attention(*qkv, self.heads, chosen, among_chosen, path=self.path)
        return group_attention(*qkv, self.heads, groups, chosen, among_chosen, path=self.path)


def split(x_RNC: Tensor, groups: tuple[int, int]) -> Tensor:
    """All tokens by group: [R * count, N / count, C]."""
    count, stride = groups
    return x_RNC.unflatten(1, (-1, count, stride)).movedim(2, 1).flatten(2, 3).flatten(0, 1)


def join(x: Tensor, groups: tuple[int, int]) -> Tensor:
    """The inverse of `split`: [R, N, C]."""
    count, stride = groups
    return x.unflatten(0, (-1, count)).unflatten(2, (-1, stride)).movedim(1, 2).flatten(1, 3)
