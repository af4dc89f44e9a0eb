"""Self-attention as a model does it: plain, or with rotary positions, or inside groups of tokens."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tcbench.kernels import rows
from tcbench.kernels.chosen import Backend, Chosen
from tcbench.kernels.context import group_attention
from tcbench.kernels.rotary import Rotary, turn
from tcbench.tensors.groups import Groups, join_groups, split_groups

LONG = 1024
"""Tokens from which torch's own attention of all of them is the faster one (docs/speed.md)."""

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
    backend: Backend

    def project(self, h_RND: Tensor, layer: Linear) -> Tensor:
        """Stacked queries, keys and values (or some of them) of all tokens: [R, N, C]."""
        stacked = F.linear(h_RND, *layer)
        if self.rotary is None:
            return stacked
        turned = torch.empty_like(stacked)
        turn(stacked, self.rotary, self.heads, turned, backend=self.backend)
        return turned

    def project_chosen(self, h_MD: Tensor, layer: Linear, chosen: Chosen, out_RNC: Tensor) -> None:
        """Write those of the chosen tokens into `out_RNC`, leaving the others."""
        if self.rotary is None:
            rows.linear_scatter(h_MD, *layer, chosen, out_RNC, backend=self.backend)
        else:
            stacked = rows.linear(h_MD, *layer, chosen, backend=self.backend)
            turn(stacked, self.rotary, self.heads, out_RNC, chosen, backend=self.backend)

    def everyone(
        self, stacked_RNC: Tensor, groups: Groups | None, observed: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Attention of all tokens, [R, N, D], from stacked queries, keys and values.

        Returns:
            that and, if `observed`, the attention that each token received: column sums of the head-mean map, [R, N].
        """
        stacked = stacked_RNC if groups is None else split_groups(stacked_RNC, groups, 1)
        queries, keys, values = stacked.chunk(3, dim=2)
        mixed, received = self._mix(queries, keys, values, observed)
        if groups is None:
            return mixed, received
        return join_groups(mixed, groups, 1), received if received is None else join_groups(received, groups, 1)

    def _mix(
        self, queries_RND: Tensor, keys_RND: Tensor, values_RND: Tensor, observed: bool
    ) -> tuple[Tensor, Tensor | None]:
        qkv, tokens = (queries_RND, keys_RND, values_RND), queries_RND.shape[1]
        if observed:
            log_sums = queries_RND.new_empty(len(queries_RND), self.heads, tokens, dtype=torch.float32)
            mixed = rows.attention(*qkv, self.heads, log_sums_RHN=log_sums, backend=self.backend)
            return mixed, rows.attention_received(queries_RND, keys_RND, log_sums, self.heads, backend=self.backend)
        if tokens >= LONG:
            by_head = (part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in qkv)
            return F.scaled_dot_product_attention(*by_head).transpose(1, 2).flatten(2), None
        return rows.attention(*qkv, self.heads, backend=self.backend), None

    def of_chosen(
        self,
        queries_RND: Tensor,
        keys_RND: Tensor,
        values_RND: Tensor,
        groups: Groups | None,
        chosen: Chosen,
        among_chosen: bool,
    ) -> Tensor:
        """Attention of the chosen tokens, compact [M, D], to all tokens or among themselves."""
        qkv = queries_RND, keys_RND, values_RND
        if groups is None:
            return rows.attention(*qkv, self.heads, chosen, among_chosen, backend=self.backend)
        return group_attention(*qkv, self.heads, groups, chosen, among_chosen, backend=self.backend)
