"""Inception score (Salimans et al., NeurIPS 2016) by ADM's convention."""

from torch import Tensor
from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, isc_features_to_metric

SPLIT_SIZE = 5000
"""Samples per split in ADM's evaluator."""


def inception_score(logits_NC: Tensor, splits: int | None = None) -> float:
    """exp E KL(p(y|x) || p(y)), averaged over consecutive splits of the samples in their given order.

    Args:
        logits_NC: classifier outputs before softmax [n, classes].
        splits: number of splits; by default one per 5000 samples, and one in all for fewer. torch-fidelity's
            own default, ten shuffled splits, gives other numbers.
    """
    splits = splits or max(1, len(logits_NC) // SPLIT_SIZE)
    return isc_features_to_metric(logits_NC, splits, shuffle=False)[KEY_METRIC_ISC_MEAN]
