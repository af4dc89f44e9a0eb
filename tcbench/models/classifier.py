"""The small networks that stand in for Inception: their features give FID, sFID and Inception score."""

from pathlib import Path
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tcbench.models.weights import check_state, read_state
from tcbench.outside.places import locate

DIGITS_CLASSIFIER = "digits/classifier.safetensors"


class DigitsCNN(nn.Module):
    """Four 3x3 convolutions, 16x16 -> 4x4, a global mean and a linear layer; 49 thousand parameters.

    Without batch normalisation or dropout, so that a sample's features depend on that sample alone.
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 24, 3, padding=1)
        self.conv2 = nn.Conv2d(24, 32, 3, stride=2, padding=1)
        self.conv3 = nn.Conv2d(32, 48, 3, stride=2, padding=1)
        self.conv4 = nn.Conv2d(48, 64, 3, padding=1)
        self.head = nn.Linear(64, 10)

    def forward(self, x_B1HW: Tensor) -> dict[str, Tensor]:
        """Classify grey images [B, 1, 16, 16] in [-1, 1].

        Returns:
            features [B, 64], pooled; spatial [B, 7, 4, 4], the first 7 channels of conv3 before its activation,
            as sFID takes 7 channels of a middle convolution of Inception (Nash et al. 2021); logits [B, 10].
        """
        middle = self.conv3(F.relu(self.conv2(F.relu(self.conv1(x_B1HW)))))  # [B, 48, 4, 4]
        features = F.relu(self.conv4(F.relu(middle))).mean((2, 3))
        return {"features": features, "spatial": middle[:, :7], "logits": self.head(features)}


class FashionCNN(nn.Module):
    """Six 3x3 convolutions with group normalisation, 32x32 -> 8x8, a global mean and a linear layer; 1.4 million
    parameters. A sample's features depend on that sample alone.

    Args:
        channels: of the images.
    """

    def __init__(self, channels: int = 1) -> None:
        super().__init__()
        widths = (channels, 64, 128, 128, 256, 256, 128)
        strides = (1, 2, 1, 2, 1, 1)
        self.convolutions = nn.ModuleList(
            nn.Conv2d(into, out, 3, stride, padding=1, bias=False)
            for into, out, stride in zip(widths[:-1], widths[1:], strides, strict=True)
        )
        self.norms = nn.ModuleList(nn.GroupNorm(8, out) for out in widths[1:])
        self.head = nn.Linear(widths[-1], 10)

    def forward(self, x_BCHW: Tensor) -> dict[str, Tensor]:
        """Classify images [B, C, 32, 32] in [-1, 1].

        Returns:
            features [B, 128], pooled; spatial [B, 7, 8, 8], the first 7 channels of the fourth convolution, normalised,
            before its activation; logits [B, 10].
        """
        hidden, layers = x_BCHW, []
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            layers.append(norm(convolution(hidden)))
            hidden = F.relu(layers[-1])
        features = hidden.mean((2, 3))
        return {"features": features, "spatial": layers[3][:, :7], "logits": self.head(features)}


class Cifar10CNN(FashionCNN):
    """The same for colours."""

    def __init__(self) -> None:
        super().__init__(channels=3)


Classifier = TypeVar("Classifier", DigitsCNN, FashionCNN, Cifar10CNN)


def load_classifier(kind: type[Classifier], weights: Path | str, device: torch.device | str = "cpu") -> Classifier:
    """Load a classifier, in eval mode; that of digits ships with the package as `DIGITS_CLASSIFIER`.

    Raises:
        UserError: the file is missing, truncated, or does not hold this network.
    """
    model, path = kind(), locate(weights)
    state = read_state(path)
    check_state(state, model, f"the classifier {kind.__name__}", path)
    model.load_state_dict(state)
    return model.to(device).eval()
