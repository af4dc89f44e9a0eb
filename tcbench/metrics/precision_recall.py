"""Improved precision and recall (Kynkaanniemi et al., NeurIPS 2019) as in ADM: k = 3 on pooled features.

A sample's ball reaches to its k-th nearest neighbour in its own set. Precision is the share of generated
samples inside some real ball, recall the share of real samples inside some generated ball. torch-fidelity has
both in one call; here its distances are kept, so that leaving out a batch costs a look-up and no new
distance.
"""

import torch
from torch import Tensor
from torch_fidelity.metric_prc import calc_cdist_full

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
    return _kth(calc_cdist_full(features_ND, features_ND), torch.arange(len(features_ND)), neighbours)


def inside_real(generated_ND: Tensor, real_MD: Tensor, real_radii_M: Tensor) -> Tensor:
    """Whether each generated sample lies in a real ball, bool [n]; precision is the mean."""
    return (calc_cdist_full(real_MD, generated_ND) <= real_radii_M[:, None]).any(0)


def recall(generated_ND: Tensor, real_MD: Tensor, neighbours: int = NEIGHBOURS) -> Statistic:
    """Recall as a function of the generated samples that are kept: their balls grow when a batch is left out.

    Holds 4 n (n + m) bytes of distances for n generated and m real samples: 12 GB at ADM's 50 000 and 10 000.
    """
    distance_NN = calc_cdist_full(generated_ND, generated_ND)
    distance_MN = calc_cdist_full(real_MD, generated_ND)
    nearest = distance_NN.topk(min(_NEAR, len(distance_NN)), largest=False)

    def statistic(indices: Indices) -> float:
        kept = torch.from_numpy(indices)
        radius_K = _kth(distance_NN, kept, neighbours, nearest.values, nearest.indices)
        return (distance_MN[:, kept] <= radius_K).any(1).double().mean().item()

    return statistic


def _kth(
    distance_NN: Tensor, kept: Tensor, neighbours: int, nearest_NT: Tensor | None = None, who_NT: Tensor | None = None
) -> Tensor:
    """Distance [kept] to the k-th neighbour among `kept`; in blocks of rows, so no second matrix is made.

    With the T nearest of every sample, in order, most rows are a look-up: those of which k + 1 nearest ones are kept.
    """
    if len(kept) <= neighbours:
        raise UserError(f"precision and recall: {len(kept)} samples have no {neighbours} neighbours; use more samples")
    found, open_rows = distance_NN.new_empty(len(kept)), torch.arange(len(kept))
    if nearest_NT is not None and who_NT is not None:
        is_kept = torch.zeros(len(distance_NN), dtype=torch.bool)
        is_kept[kept] = True
        rank_KT = is_kept[who_NT[kept]].cumsum(1)  # the sample itself is among its nearest
        enough = rank_KT[:, -1] > neighbours
        place = (rank_KT > neighbours).int().argmax(1, keepdim=True)
        found[enough] = nearest_NT[kept].gather(1, place)[enough, 0]
        open_rows = (~enough).nonzero()[:, 0]
    for rows in open_rows.split(_ROWS):
        found[rows] = distance_NN[kept[rows]][:, kept].kthvalue(neighbours + 1).values
    return found
