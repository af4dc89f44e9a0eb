"""Improved precision and recall (Kynkaanniemi et al., NeurIPS 2019) as in ADM: k = 3 on pooled features.

A sample's ball reaches to its k-th nearest neighbour in its own set. Precision is the share of generated
samples inside some real ball, recall the share of real samples inside some generated ball. torch-fidelity has
both in one call; here distances are kept, so that leaving out a batch costs a look-up and no new distance. It runs
where the features are.
"""

import torch
from torch import Tensor

from tcbench.errors import UserError
from tcbench.metrics.catalogue import NEIGHBOURS
from tcbench.stats import Indices, Statistic

MAX_REFERENCES = 10_000
"""Real images in ADM's reference batch for these two metrics."""
_ROWS = 2048
_NEAR = 32
"""Nearest samples that are looked among first when a batch is left out."""


def thin(real_MD: Tensor, limit: int = MAX_REFERENCES) -> Tensor:
    """At most `limit` real features, evenly spaced so that a set sorted by class keeps its class balance."""
    if len(real_MD) <= limit:
        return real_MD
    return real_MD[torch.linspace(0, len(real_MD) - 1, limit, dtype=torch.float64).round().long()]


def radii(features_ND: Tensor, neighbours: int = NEIGHBOURS) -> Tensor:
    """Distance [n] from each feature to its k-th nearest neighbour within the set, itself not counted."""
    everyone = torch.arange(len(features_ND), device=features_ND.device)
    return _kth(_distances(features_ND, features_ND), everyone, everyone, neighbours)


def inside_real(generated_ND: Tensor, real_MD: Tensor, real_radii_M: Tensor) -> Tensor:
    """Whether each generated sample lies in a real ball, bool [n]; precision is the mean."""
    return (_distances(real_MD, generated_ND) <= real_radii_M[:, None]).any(0)


def recall(generated_ND: Tensor, real_MD: Tensor, neighbours: int = NEIGHBOURS) -> Statistic:
    """Recall as a function of the generated samples that are kept: their balls grow when a batch is left out.

    Only balls that one of the samples left out had bounded are looked at again; of the others it is known how many hold
    a real sample.

    Holds 4 n (n + m) bytes of distances for n generated and m real samples, 12 GB at ADM's 50 000 and 10 000, and n m
    of who is inside.
    """
    distance_NN = _distances(generated_ND, generated_ND)
    distance_MN = _distances(real_MD, generated_ND)
    nearest = distance_NN.topk(min(_NEAR, len(distance_NN)), largest=False)
    if len(distance_NN) <= neighbours:
        raise _too_few(len(distance_NN), neighbours)
    inside_MN = distance_MN <= nearest.values[:, neighbours]
    balls_M, bounds_NK = inside_MN.sum(1), nearest.indices[:, : neighbours + 1]

    def statistic(indices: Indices) -> float:
        kept = torch.from_numpy(indices).to(distance_NN.device)
        left_out = torch.ones(len(distance_NN), dtype=torch.bool, device=kept.device)
        left_out[kept] = False
        grown = kept[left_out[bounds_NK[kept]].any(1)]
        radius_G = _kth(distance_NN, grown, kept, neighbours, nearest.values, nearest.indices)
        covered_M = balls_M > inside_MN[:, left_out].sum(1)
        covered_M |= (distance_MN[:, grown] <= radius_G).any(1)
        return covered_M.double().mean().item()

    return statistic


def _distances(rows_ND: Tensor, columns_MD: Tensor) -> Tensor:
    """Euclidean ones, [n, m]."""
    found_NM = rows_ND.new_empty(len(rows_ND), len(columns_MD))
    for rows, found in zip(rows_ND.split(_ROWS), found_NM.split(_ROWS), strict=True):  # no second matrix as large
        found.copy_(torch.cdist(rows, columns_MD))
    return found_NM


def _kth(
    distance_NN: Tensor,
    rows: Tensor,
    kept: Tensor,
    neighbours: int,
    nearest_NT: Tensor | None = None,
    who_NT: Tensor | None = None,
) -> Tensor:
    """Distance [rows] of some of the `kept` to their k-th neighbour among these; in blocks, without a second matrix.

    With the T nearest of every sample, in order, most rows are a look-up: those of which k + 1 nearest ones are kept.
    """
    if len(kept) <= neighbours:
        raise _too_few(len(kept), neighbours)
    found, open_rows = distance_NN.new_empty(len(rows)), torch.arange(len(rows), device=rows.device)
    if nearest_NT is not None and who_NT is not None:
        is_kept = torch.zeros(len(distance_NN), dtype=torch.bool, device=rows.device)
        is_kept[kept] = True
        rank_RT = is_kept[who_NT[rows]].cumsum(1)  # the sample itself is among its nearest
        enough = rank_RT[:, -1] > neighbours
        place = (rank_RT > neighbours).int().argmax(1, keepdim=True)
        found[enough] = nearest_NT[rows].gather(1, place)[enough, 0]
        open_rows = (~enough).nonzero()[:, 0]
    for some in open_rows.split(_ROWS):
        found[some] = distance_NN[rows[some]][:, kept].kthvalue(neighbours + 1).values
    return found


def _too_few(samples: int, neighbours: int) -> UserError:
    return UserError(f"precision and recall: {samples} samples have no {neighbours} neighbours; use more samples")
