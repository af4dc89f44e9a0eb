"""Class accuracy of conditional samples."""

from torch import Tensor


def correct(logits_NC: Tensor, labels_N: Tensor) -> Tensor:
    """Whether the classifier gives each sample the label it was sampled for, bool [n]; accuracy is the mean.

    The labels must be in the classifier's own numbering. Inception's 1008 outputs are not in ImageNet's
    order, so samples scored with it carry no labels.
    """
    return logits_NC.argmax(1) == labels_N
