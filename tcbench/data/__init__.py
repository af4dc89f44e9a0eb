"""Images or videos with what conditions them, behind one interface and integrity-checked."""

import hashlib
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from tcbench.errors import UserError

if TYPE_CHECKING:  # who only lists files (`tcbench.data.images`) must not pay for importing torch
    import torch
    from torch import Tensor

DataName = Literal["digits", "scenes", "moving", "fashion", "cifar10"]
Part = Literal["train", "test"]
"""Of a data set that comes divided into what is trained on and what is held out."""

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


def load_images(name: DataName, held_out: bool = False) -> Dataset:
    """Load a data set.

    "digits" is scikit-learn's copy of the UCI optical digits test set: 1797 images of 8x8 with 17 grey levels,
    enlarged to 16x16 with PIL's bicubic kernel (sharper strokes than bilinear, by eye).
    "scenes" and "moving" are drawn from it with captions (`tcbench.data.captioned`), 2048 of each kind.
    "fashion" and "cifar10" are read from files that do not ship (`tcbench.data.fashion`, `tcbench.data.cifar`).

    Args:
        held_out: captions and handwriting, or a part of the files, that no model is trained on. The digits have no such
            part: their classes are all there is to condition on.

    Raises:
        UserError: the name is unknown, or the copy is missing or not the one the models were trained on.
    """
    if name == "digits":
        import torch.nn.functional as F

        digits = handwriting()
        images = F.interpolate(digits.images, size=16, mode="bicubic", align_corners=False, antialias=True)
        return Dataset(images.clamp(-1, 1), digits.labels)
    if name not in get_args(DataName):
        raise UserError(f"data {name!r}: no images of it are read here; known: {', '.join(get_args(DataName))}")
    part: Part = "test" if held_out else "train"
    if name == "fashion":
        from tcbench.data.fashion import load_fashion  # which builds on this module, as do the others

        return load_fashion(part)
    if name == "cifar10":
        from tcbench.data.cifar import load_cifar10

        return load_cifar10(part)
    from tcbench.data.captioned import compose

    return compose(name, range(2048), held_out)


@lru_cache
def handwriting() -> Dataset:
    """The digits as they come, [1797, 1, 8, 8]; see `load_images`."""
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
    import torch
    from sklearn.model_selection import train_test_split

    train, held = train_test_split(
        np.arange(len(data)), test_size=held_out, stratify=data.labels.numpy(), random_state=seed
    )
    return data[torch.from_numpy(train)], data[torch.from_numpy(held)]


def to_uint8(images: "Tensor") -> "Tensor":
    """Round images in [-1, 1] (values outside are clamped) to uint8, as DiT's sample_ddp.py does; uint8 stays.

    Raises:
        UserError: an image holds NaN, which uint8 cannot show.
    """
    import torch

    if images.dtype == torch.uint8:
        return images
    broken = images.isnan().flatten(1).any(1).nonzero().flatten()
    if len(broken):
        raise UserError(f"image {int(broken[0])} holds NaN; sampling diverged: use more steps or float32")
    return (127.5 * images + 128).clamp(0, 255).to(torch.uint8)
