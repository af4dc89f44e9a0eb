"""A small network that reads digits off a canvas: which, how large and where; its features serve FID as well."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tcbench.models.weights import check_state, read_state
from tcbench.outside.places import locate

DIGIT_READER = "scenes/reader.safetensors"
SIZES = ("small", "large")
NONE = 0
CLASSES = 1 + 10 * len(SIZES)
"""Of a pixel: nothing is centred here, or a digit of a size is: 1 + digit + 10 * size."""
_NEAR = 2  # pixels around a peak that belong to it
_APART = 3  # no two digits are centred this close in either direction


@dataclass(frozen=True)
class Reading:
    """A digit that was read: its centre in pixels from the canvas' upper left corner."""

    digit: int
    size: str
    y: float
    x: float


class DigitReader(nn.Module):
    """Five convolutions, the last four at half resolution, each output pixel seeing 25 x 25; 72 thousand parameters.

    Without biases before the head, a blank background is 0 in every layer: the canvas' edge looks like more of it, and
    any canvas can be read.
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(16, 32, 3, stride=2, padding=1, bias=False)
        self.conv3 = nn.Conv2d(32, 48, 3, padding=1, bias=False)
        self.conv4 = nn.Conv2d(48, 48, 3, padding=2, dilation=2, bias=False)
        self.conv5 = nn.Conv2d(48, 64, 3, padding=2, dilation=2, bias=False)
        self.head = nn.Conv2d(64, 4 * CLASSES, 1)

    def forward(self, x_B1HW: Tensor) -> dict[str, Tensor]:
        """Read grey images [B, 1, H, W] in [-1, 1], H and W even.

        Returns:
            features [B, 64], pooled; spatial [B, 7, 4, 4], the first 7 channels of conv3 before its activation; logits
            [B, 10], the evidence for each digit anywhere; map [B, CLASSES, H, W], logits of every pixel.
        """
        middle = self.conv3(F.relu(self.conv2(F.relu(self.conv1(x_B1HW + 1)))))
        deep = F.relu(self.conv5(F.relu(self.conv4(F.relu(middle)))))
        pixels = F.pixel_shuffle(self.head(deep), 2)
        return {
            "features": deep.mean((2, 3)),
            "spatial": F.adaptive_avg_pool2d(middle[:, :7], 4),
            "logits": pixels[:, 1:].unflatten(1, (len(SIZES), 10)).logsumexp((1, 3, 4)),
            "map": pixels,
        }


@torch.no_grad()
def read_digits(reader: DigitReader, images_B1HW: Tensor) -> list[list[Reading]]:
    """The digits in each image [B, 1, H, W] in [-1, 1], from top to bottom.

    A digit is where the probability that one is centred peaks and its sum over the surrounding 5 x 5 pixels, which is
    the probability that one is centred there, is at least 1/2. Its centre is the mean over those pixels.
    """
    read = []
    for probability in reader(images_B1HW)["map"].softmax(1).cpu():  # one transfer; peaks are looked at one by one
        anything = 1 - probability[NONE]
        peaks = anything == F.max_pool2d(anything[None], 2 * _APART + 1, 1, _APART)[0]
        found = (_read_peak(probability, *peak) for peak in peaks.nonzero().tolist())
        read.append(sorted((reading for reading in found if reading), key=lambda reading: reading.y))
    return read


def _read_peak(probability_KHW: Tensor, y: int, x: int) -> Reading | None:
    top, left = max(0, y - _NEAR), max(0, x - _NEAR)
    around = probability_KHW[1:, top : y + _NEAR + 1, left : x + _NEAR + 1]
    mass = around.sum(0)
    if (total := mass.sum()) < 0.5:
        return None
    number = int(around.sum((1, 2)).argmax())
    down, right = (torch.arange(side, device=mass.device) for side in mass.shape)
    return Reading(
        number % 10,
        SIZES[number // 10],
        top + float((mass.sum(1) * down).sum() / total),
        left + float((mass.sum(0) * right).sum() / total),
    )


def target_map(readings: Sequence[Sequence[Reading]], side: int) -> Tensor:
    """What a perfect reader's map says, int64 [B, side, side]: the class of the digit centred at a pixel, else NONE."""
    target = torch.full((len(readings), side, side), NONE)
    for row, items in enumerate(readings):
        for item in items:
            target[row, int(item.y), int(item.x)] = 1 + item.digit + 10 * SIZES.index(item.size)
    return target


def load_reader(weights: Path | str = DIGIT_READER) -> DigitReader:
    """The trained reader, in eval mode; its weights ship with the package.

    Raises:
        UserError: the weights are missing, damaged or of another network.
    """
    path, model = locate(weights), DigitReader()
    state = read_state(path)
    check_state(state, model, "the digit reader", path)
    model.load_state_dict(state)
    return model.requires_grad_(False).eval()
