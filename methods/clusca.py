"""ClusCa: Cluster-wise Feature Caching (ACM MM 2025; Shenyi-Z/Cache4Diffusion, for DiT).

TaylorSeer's full steps, and between them its forecast of self-attention. Of every MLP one token of each cluster is
computed: its fresh value takes the place of the stored one and tells its cluster a small part of itself, and what is
stored is then extrapolated, the fresh tokens too. Clusters are found by K-means on the last block's output at every
full step, from the centroids of the one before. `tests/test_golden_rivals.py` holds it to the released code, whose
quirks stay: what a cluster was told is kept until the next full step, an empty cluster computes token 0, and a cluster
is told the sum of what is fresh in it. Random numbers are one for both halves of a guided pair, which there draw apart.
K-means has no matrix product and is not charged.
"""

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from tcbench.errors import UserError
from tcbench.method import Look, Method, Run
from tcbench.plan import ALL, NONE, Decision, Forecast, Plan, Spread, Tokens, Unit
from tcbench.schedule import Placement, StepList, after_a_start, check_one, stated_steps
from tcbench.tensors.unseen import is_unseen, on_values, unseen

if TYPE_CHECKING:
    from torch import Tensor


class ClusCa(Method):
    """Recompute one token of each cluster, tell the others, and forecast from there.

    Options (defaults: the published setting for DiT and 50 DDIM steps):
        interval: the distance of full steps after the start; 5 is published.
        num_full_steps: instead of it, a labelled variant that reaches budgets no interval gives: this many full steps,
            those after the first ones spread evenly.
        full_steps: a list of them, in the place of all that places them.
        placement: of the even spread (`tcbench.schedule.spread_evenly`).
        order: of the forecast.
        clusters: K, and with it the number of tokens that an MLP recomputes.
        ratio: gamma, how far a cluster's tokens go towards what is fresh; 0.005 is published, 0 tells nothing.
        first_steps: full steps at the start, before the interval counts.
        iterations: of K-means, at most; it stops for the whole batch at once, when no centroid of it moves. So that the
            host need not wait, the iterations after that run on without effect.
    """

    name = "clusca"
    label = "ClusCa"
    knob = "num_full_steps"

    interval: PositiveInt | None = None
    num_full_steps: PositiveInt | None = None
    full_steps: StepList | None = None
    placement: Placement = "start"
    order: NonNegativeInt = Field(4, le=8)
    clusters: PositiveInt = 16
    ratio: float = Field(0.005, ge=0, le=1)
    first_steps: PositiveInt = 2
    iterations: PositiveInt = 100

    @model_validator(mode="after")
    def _one_schedule(self) -> "ClusCa":
        check_one(self)
        return self

    def i_steps(self, run: Run) -> tuple[int, ...]:
        """Full steps, in sampling order."""
        first = self.first_steps
        return stated_steps(self, run.nfe, first) or after_a_start(first, self.interval or 5, run.nfe)

    def start(self, run: Run) -> "Clusters":
        """Clusters live for one run.

        Raises:
            UserError: there are more clusters than tokens.
        """
        if self.clusters > run.shape.num_tokens:
            raise UserError(f"clusters: {self.clusters} of {run.shape.num_tokens} tokens; give as many or fewer")
        return Clusters(self, self.i_steps(run))


@dataclass
class Clusters:
    """One run's memory.

    Attributes:
        label_RN: the cluster of every token, int64.
        centroid_RKD: of the clusters.
        first_RK: the tokens at which the first centroids are.
        fresh: the tokens that the last step recomputed, by block and cluster, int64 [R, L, K]; None at a full step.
    """

    method: ClusCa
    full: tuple[int, ...]
    label_RN: "Tensor | None" = None
    centroid_RKD: "Tensor | None" = None
    first_RK: "Tensor | None" = None
    fresh: "Tensor | None" = None

    def plan(self, look: Look) -> Plan:
        """Everything, or a forecast from one fresh token of each cluster."""
        shape, forecast, decisions = look.run.shape, Forecast(self.method.order), dict[Unit, Decision]()
        if look.step == 0:
            numbers_RN, clusters = look.uniform()[:, 0], self.method.clusters
            self.first_RK = on_values(partial(_tokens, clusters), numbers_RN, shape=(len(numbers_RN), clusters))
        elif look.step - 1 in self.full:
            self._cluster(look.block_output(shape.num_blocks - 1))
        if look.step in self.full:
            self.fresh = None
            last = shape.sites[-1]
            return Plan(
                {site: Decision(ALL, forecast, observe="output" if site == last else None) for site in shape.sites}
            )
        self.fresh = fresh = self._choose(look)
        assert self.label_RN is not None
        spread = Spread(self.label_RN, self.method.ratio)
        for site in shape.sites:
            if site.part == "mlp":
                decisions[site] = Decision(Tokens(fresh[:, site.block]), forecast, spread=spread)
            else:
                decisions[site] = Decision(NONE, forecast)
        return Plan(decisions)

    def _cluster(self, x_RND: "Tensor") -> None:
        """Find the clusters anew, from the last centroids."""
        start_RKD = self.centroid_RKD
        if start_RKD is None:
            assert self.first_RK is not None
            (rows, _, width), clusters = x_RND.shape, self.method.clusters
            start_RKD = on_values(_at, x_RND, self.first_RK, shape=(rows, clusters, width))
        if is_unseen(x_RND):
            self.label_RN, self.centroid_RKD = unseen(*x_RND.shape[:2], dtype="int64"), start_RKD
        else:
            self.label_RN, self.centroid_RKD = k_means(x_RND.float(), start_RKD.float(), self.method.iterations)

    def _choose(self, look: Look) -> "Tensor":
        """A token of every cluster for every block, by the highest of its random numbers; token 0 of an empty one."""
        numbers_RLN, clusters = look.uniform(), self.method.clusters
        shape = (*numbers_RLN.shape[:2], clusters)
        if is_unseen(numbers_RLN):
            return unseen(*shape, dtype="int64")
        import torch

        assert self.label_RN is not None
        cluster_K1 = torch.arange(clusters, device=self.label_RN.device)[:, None]
        member_RKN = self.label_RN[:, None] == cluster_K1
        numbers_RLN = numbers_RLN.to(self.label_RN.device)  # another one where memory is counted without values
        return torch.where(member_RKN[:, None], numbers_RLN[:, :, None], -torch.inf).argmax(dim=3)


def k_means(x_RND: "Tensor", centroid_RKD: "Tensor", iterations: int) -> "tuple[Tensor, Tensor]":
    """(labels int64 [R, N], centroids [R, K, D]) by L1 distance and means; an empty cluster has the centroid 0.

    It stops where no centroid of the batch moves by more than 1e-8 and a ten-thousandth of itself. Which iteration that
    is, the device knows: what comes after it changes nothing. Sums are in an order of their own on every device, always
    the same.
    """
    import torch

    row_RN = torch.arange(len(x_RND), device=x_RND.device)[:, None].expand(x_RND.shape[:2])
    ones_RN1 = torch.ones_like(x_RND[..., :1])
    label_RN = torch.zeros_like(row_RN)
    stopped = torch.zeros((), dtype=torch.bool, device=x_RND.device)
    for _ in range(iterations):
        nearest_RN = torch.cdist(x_RND, centroid_RKD, p=1).argmin(dim=2)
        sums = torch.zeros_like(centroid_RKD).index_put((row_RN, nearest_RN), x_RND, accumulate=True)
        count = torch.zeros_like(sums[..., :1]).index_put((row_RN, nearest_RN), ones_RN1, accumulate=True)
        moved = sums / (count + 1e-8)
        label_RN = torch.where(stopped, label_RN, nearest_RN)
        stopped = stopped | torch.isclose(centroid_RKD, moved, rtol=1e-4).all()
        centroid_RKD = torch.where(stopped, centroid_RKD, moved)
    return label_RN, centroid_RKD


def _tokens(clusters: int, number_RN: "Tensor") -> "Tensor":
    """Tokens by uniform numbers, with replacement: [R, K]."""
    return (number_RN[:, :clusters] * number_RN.shape[1]).long()


def _at(x_RND: "Tensor", index_RK: "Tensor") -> "Tensor":
    return x_RND.gather(1, index_RK[..., None].expand(-1, -1, x_RND.shape[2]))
