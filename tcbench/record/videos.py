"""Generated videos on disk: mp4 as VBench reads it, and the few frames that are kept to the bit. Imports no torch.

A decoded video of 93 frames of 256x256 is 18.3 MB of bytes, and 4 to 6 MB under a lossless codec. So a shard holds
`KEPT` of its frames as they are, which is what paired metrics compare, and all of them as an mp4 of under 1 MB.
"""

from fractions import Fraction
from io import BytesIO
from typing import Any

import numpy as np

KEPT = 6
"""Frames of a video that are kept to the bit, and that pictures show."""
CODEC, CRF = "libx264", "10"
"""H.264 in 4:2:0; the reference's script writes with a quality that is crf 20."""


def kept_frames(length: int) -> np.ndarray:
    """Numbers of the frames that are kept of so many: evenly spaced, the first and the last among them."""
    return np.linspace(0, length - 1, min(KEPT, length)).round().astype(int)


def to_mp4(video: np.ndarray, rate: int) -> bytes:
    """A video of even sides as mp4, the same bytes whatever the number of cores.

    Args:
        video: uint8 [C, T, H, W] of one channel or three, or floats in [-1, 1], rounded as `data.to_uint8` does.
        rate: frames a second.
    """
    import av  # slow to import, and most suites do without

    if video.dtype != np.uint8:
        video = (video * 127.5 + 128).clip(0, 255).astype(np.uint8)
    file = BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream: Any = container.add_stream(CODEC, rate=rate, options={"crf": CRF})
        stream.height, stream.width, stream.pix_fmt = *video.shape[2:], "yuv420p"
        stream.thread_count = 1  # x264's choices depend on it
        for number, pixels in enumerate(np.moveaxis(video.repeat(3 // len(video), axis=0), 0, -1)):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            # ffmpeg's own filter, as imageio writes videos; PyAV's default averages colours otherwise
            frame = frame.reformat(format="yuv420p", interpolation="BICUBIC")
            frame.pts, frame.time_base = number, Fraction(1, rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return file.getvalue()


def from_mp4(content: bytes) -> np.ndarray:
    """All frames of an mp4, uint8 [T, H, W, 3]."""
    import av

    with av.open(BytesIO(content), "r") as container:
        decoded: Any = container.decode(video=0)
        return np.stack([frame.to_ndarray(format="rgb24") for frame in decoded])


def packed(videos: np.ndarray, rate: int) -> dict[str, np.ndarray]:
    """What a shard holds of decoded videos, uint8 [n, C, T, H, W]: the frames that are kept, and mp4s end to end."""
    files = [to_mp4(video, rate) for video in videos]
    return {
        "image": videos[:, :, kept_frames(videos.shape[2])],
        "mp4": np.frombuffer(b"".join(files), np.uint8).copy(),
        "mp4_bytes": np.array([len(file) for file in files]),
    }


def unpacked(tensors: dict[str, Any], rate: int) -> list[bytes]:
    """The mp4 of every video of a shard, as numpy's arrays; made here of videos that are not decoded ones."""
    if "mp4" not in tensors:
        return [to_mp4(video, rate) for video in tensors["image"]]
    ends = np.cumsum(tensors["mp4_bytes"])
    return [
        tensors["mp4"][end - length : end].tobytes() for end, length in zip(ends, tensors["mp4_bytes"], strict=True)
    ]
