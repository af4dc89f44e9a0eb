"""Per-sample numbers that are more than a function of features: they look at captions, or at several frames."""

from collections.abc import Callable, Sequence

from torch import Tensor

Scorer = Callable[[Tensor, Sequence[str]], Tensor]
"""(uint8 images [n, C, H, W] or videos [n, C, T, H, W], n captions) -> float32 [n] on the CPU."""


def rgb(images: Tensor) -> Tensor:
    """Images or videos with three channels [n, 3, ...]: grey ones repeat theirs."""
    return images.expand(-1, 3, *images.shape[2:])


def frames(videos_BCTHW: Tensor) -> Tensor:
    """All frames in order, [B * T, C, H, W]."""
    return videos_BCTHW.transpose(1, 2).flatten(0, 1)


def temporal_flickering(videos_BCTHW: Tensor) -> Tensor:
    """VBench's dimension of that name, float32 [B] in 0..1: 1 - mean absolute difference of neighbouring frames / 255.

    The package's formula on uint8 videos; it reads them from lossy .mp4 files, and its protocol keeps static scenes
    only (RAFT's optical flow decides). A video that moves must lose some, so compare with real videos.
    """
    difference = videos_BCTHW[:, :, 1:].float() - videos_BCTHW[:, :, :-1].float()
    return 1 - difference.abs().flatten(1).mean(1) / 255


def load_temporal_flickering(device: object) -> Scorer:
    """`temporal_flickering` as a scorer; it reads no captions and runs where the videos are."""
    return lambda videos, captions: temporal_flickering(videos)
