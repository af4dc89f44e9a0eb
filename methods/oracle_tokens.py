"""Oracle token selection: the upper bound of any token score inside TokenCache's framework.

The same cache, I-steps and budget as TokenCache, but a token's score is what Eq. (11) says it should reflect: the
squared distance of the update that the cache holds from the one that would be computed now. Knowing it takes a whole
forward at every step, charged under "oracle", so this is no acceleration: its MACs without overheads are what a perfect
score would cost.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tcbench.method import Artefacts, Look, Run
from tcbench.plan import Plan, Tokens
from tcbench.selector import Allocation, TokenSelector, spend
from tcbench.tensors.unseen import on_values

if TYPE_CHECKING:
    from torch import Tensor


class OracleTokens(TokenSelector):
    """Recompute the tokens whose cached update is most wrong.

    Options:
        allocation: as in `methods/tokencache.py`.
    """

    name = "oracle_tokens"
    label = "oracle tokens"

    allocation: Allocation = "batch"

    def start(self, run: Run) -> "_Oracle":
        """Forgets nothing within a run and everything after it."""
        return _Oracle(self)

    def macs_depend_on(self, artefacts: Artefacts) -> str | None:
        """The batch's updates, where they share out the tokens."""
        return None if self.allocation == "uniform" else "the batch's updates share out the tokens over blocks"


@dataclass
class _Oracle:
    """The plans of one run.

    Attributes:
        held_RLND: the update of every token when it was last recomputed, as the uncached forward has it.
    """

    method: OracleTokens
    held_RLND: "Tensor | None" = None

    def plan(self, look: Look) -> Plan:
        """Everything on I-steps; on P-steps the tokens whose held update is furthest from the true one."""
        method, units = self.method, self.method.units(look.run)
        update_RLND = look.updates()[:, : len(units)]
        if self.held_RLND is None or look.step in method.i_steps(look.run):
            self.held_RLND = update_RLND
            return method.everything(units)
        change_RLN = on_values(_squared_distance, update_RLND, self.held_RLND, shape=update_RLND.shape[:3])
        budget = round((1 - method.cache_ratio) * len(units) * look.run.shape.num_tokens)
        chosen = spend(change_RLN, budget, method.allocation)
        self.held_RLND = on_values(_refreshed, self.held_RLND, update_RLND, chosen, shape=update_RLND.shape)
        return method.recompute(units, chosen)


def _squared_distance(update_RLND: "Tensor", held_RLND: "Tensor") -> "Tensor":
    return (update_RLND - held_RLND).square().sum(-1)


def _refreshed(held_RLND: "Tensor", update_RLND: "Tensor", chosen: list[Tokens]) -> "Tensor":
    """The held updates with those of each block's chosen tokens replaced; waits for nothing."""
    import torch

    by_block = zip(held_RLND.unbind(1), update_RLND.unbind(1), chosen, strict=True)
    return torch.stack([_refreshed_block(held, update, tokens) for held, update, tokens in by_block], dim=1)


def _refreshed_block(held_RND: "Tensor", update_RND: "Tensor", tokens: Tokens) -> "Tensor":
    import torch

    index_RK = tokens.index_RK
    place_K = torch.arange(index_RK.shape[1], device=index_RK.device)
    chosen_RK = (place_K < (len(place_K) if tokens.used is None else tokens.used)).expand_as(index_RK)
    mask_RN = torch.zeros_like(held_RND[..., 0], dtype=torch.bool).scatter(1, index_RK, chosen_RK)
    return torch.where(mask_RN.unsqueeze(-1), update_RND, held_RND)
