"""Images or videos with what conditions them, behind one interface and integrity-checked; the sets are in `sets`."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from tcbench.errors import UserError

if TYPE_CHECKING:  # a config is checked, and files are listed, without torch
    import torch
    from torch import Tensor

_DIGITS_SHA256 = "87ff0c9e40dc7e2c0e34e7257799c2e3f3aec1a016363bb11cad869ec428a826"


@dataclass(frozen=True)
class Dataset:
    """Images with what conditions them.

    Attributes:
        images: float32 [n, C, H, W], or videos [n, C, T, H, W], in [-1, 1]; or what reads latents of them from disk by
            index (`tcbench.data.images.Latents`).
        labels: classes, int64 [n], or the word ids of captions, int64 [n, LENGTH] (`tcbench.data.captions`), or
            captions as a text encoder left them (`tcbench.models.adapter.Text`) or reads them by index.
    """

    images: Any
    labels: Any

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: "Tensor | slice") -> "Dataset":
        return Dataset(self.images[index], self.labels[index])

    def to(self, device: "torch.device | str") -> "Dataset":
        """The same data on `device`."""
        return Dataset(self.images.to(device), self.labels.to(device))


@lru_cache
def handwriting() -> Dataset:
    """The digits as they come, [1797, 1, 8, 8]; see `tcbench.data.sets.digits`."""
    import numpy as np
    import torch
    from sklearn.datasets import load_digits  # takes two seconds, which what only samples does without

    raw = load_digits()
    pixels, labels = raw.images.astype(np.uint8), raw.target.astype(np.uint8)
    found = hashlib.sha256(pixels.tobytes() + labels.tobytes()).hexdigest()
    if found != _DIGITS_SHA256:
        raise UserError(f"data digits: sha256 {found[:12]}..., not {_DIGITS_SHA256[:12]}...; reinstall scikit-learn")
    images = torch.from_numpy(pixels).float().unsqueeze(1) / 8 - 1  # grey levels 0..16
    return Dataset(images, torch.from_numpy(labels).long())


def split(data: Dataset, held_out: float = 0.1, seed: int = 0) -> tuple[Dataset, Dataset]:
    """Split into (train, held out), with the classes in equal proportion; the same split on every machine."""
    import numpy as np
    import torch
    from sklearn.model_selection import train_test_split

    train, held = train_test_split(
        np.arange(len(data)), test_size=held_out, stratify=data.labels.numpy(), random_state=seed
    )
    return data[torch.from_numpy(train)], data[torch.from_numpy(held)]


Decode = Callable[["Tensor"], tuple["Tensor", "Tensor"]]
"""Samples [n, ...] -> (their images or videos, which of them hold NaN, bool [n]), where they are computed."""


def to_uint8(images: "Tensor") -> "Tensor":
    """Round images in [-1, 1] (values outside are clamped) to uint8, as DiT's sample_ddp.py does; uint8 stays.

    Raises:
        UserError: an image holds NaN, which uint8 cannot show.
    """
    import torch

    if images.dtype == torch.uint8:
        return images
    refuse_nan(has_nan(images))
    return rounded(images)


def rounded(images: "Tensor") -> "Tensor":
    """As `to_uint8`, unchecked, so that a GPU's images wait for nobody."""
    import torch

    return (127.5 * images + 128).clamp(0, 255).to(torch.uint8)


def has_nan(images: "Tensor") -> "Tensor":
    """Which images hold NaN, bool [n] where they are."""
    return images.isnan().flatten(1).any(1)


def refuse_nan(broken_n: "Tensor") -> None:
    """Raise UserError if an image holds NaN (`has_nan`)."""
    if len(broken := broken_n.nonzero().flatten()):
        raise UserError(f"image {int(broken[0])} holds NaN; sampling diverged: use more steps or float32")
