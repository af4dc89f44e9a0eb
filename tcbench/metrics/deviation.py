"""Deviation from the uncached run at equal noise and labels: paired, so a few samples separate methods.

Images are compared as they are seen: in [-1, 1] (data range 2), what a float image has outside cut off as `to_uint8`
cuts it, but not rounded, which would hide differences below 1/255. States of the sampler are compared as it holds them.

Images of a full run exceed a card's memory, so they are compared in blocks; with a `device`, there.
"""

from collections.abc import Iterator

import piq
import torch
from torch import Tensor

from tcbench.errors import UserError
from tcbench.metrics.images import Rows, blocks

PEAK = 2.0
"""Data range of images in [-1, 1]."""
MSE_FLOOR = (PEAK / 255) ** 2 / 12
"""Mean squared error of rounding an image to 8 bits."""
WINDOW = 11
"""Side of the Gaussian window that SSIM looks through."""


def final_mae(images_BCHW: Rows, reference_BCHW: Rows, device: torch.device | None = None) -> Tensor:
    """Mean absolute difference of each image from the uncached one at the same noise, float32 [B]."""
    return _mean_absolute(images_BCHW, reference_BCHW, device, seen=True)


def psnr(images_BCHW: Rows, reference_BCHW: Rows, device: torch.device | None = None) -> Tensor:
    """Peak signal-to-noise ratio of each image against the uncached one, dB, float32 [B].

    The squared error is taken as at least that of 8-bit rounding, so equal images score 58.9 dB and not
    infinity.
    """
    mse_B = _mean_square(images_BCHW, reference_BCHW, device, seen=True)
    return 10 * torch.log10(PEAK**2 / mse_B.clamp_min(MSE_FLOOR))


def ssim(images: Rows, reference: Rows, device: torch.device | None = None) -> Tensor:
    """Structural similarity of each image or video with the uncached one, float32 [B] in -1..1, 1 where they are equal.

    Wang et al. (2004): a Gaussian window of 11 pixels with sigma 1.5, where it lies inside; mean over places, channels
    and frames.

    Raises:
        UserError: an image is smaller than the window.
    """
    _same_shape(images, reference)
    if min(images.shape[-2:]) < WINDOW:
        raise UserError(
            f"ssim: images of {images.shape[-2]}x{images.shape[-1]} are smaller than its window of {WINDOW}"
        )
    pairs = _blocks(images, reference, device)
    sides = ([(shown(side) + 1).flatten(1, -3) / PEAK for side in pair] for pair in pairs)  # frames as channels
    return torch.cat([piq.ssim(*pair, reduction="none", downsample=False) for pair in sides])


def trajectory_mae(x_SBCHW: Tensor, reference_SBCHW: Tensor) -> Tensor:
    """Mean absolute difference at every step, float32 [S, B] (TokenCache, Section IV-E and Fig. 10).

    Given the states after each step this is the paper's "trajectory difference" (its posterior mean is that
    state in a sampler without added noise), given the predicted clean images its "visual-space difference".
    The paper plots mean and standard deviation over the batch, dim 1.
    """
    steps, batch = x_SBCHW.shape[:2]
    _same_shape(x_SBCHW, reference_SBCHW)
    return _mean_absolute(x_SBCHW.flatten(0, 1), reference_SBCHW.flatten(0, 1)).view(steps, batch)


def feature_mse(features_ND: Tensor, reference_ND: Tensor) -> Tensor:
    """Mean squared difference of each sample's pooled features from the uncached sample's, float32 [n]."""
    return _mean_square(features_ND, reference_ND)


def shown(images: Tensor) -> Tensor:
    """Images as they are shown, in [-1, 1], float32; bytes stand for such."""
    return images / 127.5 - 1 if images.dtype == torch.uint8 else images.float().clamp(-1, 1)


def require_finite(what: str, values: Rows) -> None:
    """Raise UserError naming the first sample (dim 0) with NaN or infinity; `what` names the tensor."""
    bad = torch.cat([~block.flatten(1).sum(1, dtype=torch.float64).isfinite() for (block,) in blocks(values)])
    if bad.any():
        raise UserError(
            f"{what}: sample {int(bad.nonzero()[0])} holds NaN or infinity ({int(bad.sum())} of {len(bad)} "
            "samples do); sample this row again, in float32 or with a smaller cache ratio"
        )


def _same_shape(values: Rows, reference: Rows) -> None:
    if values.shape != reference.shape:
        raise UserError(
            f"deviation: shape {tuple(values.shape)} against {tuple(reference.shape)} of the uncached run; "
            "sample both with the same settings"
        )


def _seen(images: Tensor) -> Tensor:
    """Images as they are shown; bytes are already."""
    return images.clamp(-1, 1) if images.is_floating_point() else images


def _mean_absolute(values: Rows, reference: Rows, device: torch.device | None = None, *, seen: bool = False) -> Tensor:
    return torch.cat([difference.abs().mean(1) for difference in _differences(values, reference, device, seen)])


def _mean_square(values: Rows, reference: Rows, device: torch.device | None = None, *, seen: bool = False) -> Tensor:
    return torch.cat([difference.square().mean(1) for difference in _differences(values, reference, device, seen)])


def _differences(values: Rows, reference: Rows, device: torch.device | None, seen: bool) -> Iterator[Tensor]:
    """Float32 differences [rows, features], block by block; of images as they are `seen`."""
    _same_shape(values, reference)
    for pair in _blocks(values, reference, device):
        a, b = map(_seen, pair) if seen else pair
        yield (a.float() - b.float()).flatten(1) / (127.5 if a.dtype == torch.uint8 else 1.0)


def _blocks(values: Rows, reference: Rows, device: torch.device | None) -> Iterator[tuple[Tensor, Tensor]]:
    for a, b in blocks(values, reference):
        yield a.to(device or a.device), b.to(device or b.device)
