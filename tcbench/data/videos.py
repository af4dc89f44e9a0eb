"""Videos in files, as Open-Sora-Plan's annotations list them; clips are chosen, cropped and scaled as it trains."""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from pydantic import BaseModel, BeforeValidator, FiniteFloat, NonNegativeInt, PositiveInt

from tcbench.data.images import Listing, Resize, list_images
from tcbench.errors import UserError
from tcbench.outside.foreign import read_json_as
from tcbench.record.files import digest

if TYPE_CHECKING:  # listing videos must not pay for importing torch
    from torch import Tensor

UNSTEADY = 0.05, 0.5  # by how much frames may be off the video's frame rate on average, and one by itself


@dataclass(frozen=True)
class Clip:
    """A stretch of a video.

    Attributes:
        path: the file.
        caption: what it shows.
        start, stop: numbers of its frames in the file; to the file's end without `stop`.
        rate: frames a second, if the annotation says.
        crop: (left, right, top, bottom) of the picture, if it has margins.
    """

    path: Path
    caption: str
    start: int = 0
    stop: int | None = None
    rate: float | None = None
    crop: tuple[int, int, int, int] | None = None


@dataclass(frozen=True)
class VideoListing:
    """Clips of a folder in the annotation's order, none of them decoded.

    Attributes:
        clips: n of them.
        rate: frames a second that the model is trained at.
    """

    clips: tuple[Clip, ...]
    rate: float
    classes: tuple[int, ...] = ()
    num_classes: int = 0

    def __len__(self) -> int:
        return len(self.clips)

    @property
    def captions(self) -> tuple[str, ...]:
        """What the clips show."""
        return tuple(clip.caption for clip in self.clips)

    @property
    def digest(self) -> str:
        """Identifies the clips, their order and the rate; files by name."""
        return digest(
            [self.rate, *([str(clip.path), clip.start, clip.stop, clip.rate, clip.crop] for clip in self.clips)]
        )

    def read(self, number: int, frames: int, size: tuple[int, int], place: float) -> "Tensor":
        """A clip as the autoencoder sees it, float32 [3, frames, *size] in [-1, 1].

        Args:
            size: height and width.
            place: in [0, 1), which stretch of the clip, from its first to its last.

        Raises:
            UserError: the file is no video, or has too few frames or no steady frame rate; names it.
        """
        return _read(self.clips[number], self.rate, frames, size, place)


def list_media(
    folder: Path, captions: Path | None, rate: float | None, resize: Resize = "once"
) -> Listing | VideoListing:
    """What is in a folder: videos if they are shown at some rate, else images, which become squares by `resize`.

    Raises:
        UserError: as `list_videos` and `list_images`.
    """
    if rate is None or captions is None:
        return list_images(folder, captions, resize)
    return list_videos(folder, captions, rate)


def list_videos(folder: Path, annotations: Path, rate: float) -> VideoListing:
    """The clips that an annotation file of Open-Sora-Plan describes, those without a caption left out as there.

    Args:
        folder: where the paths of the file begin.
        annotations: a JSON list of {"path", "cap"} with "frame_idx" ("first:behind the last", v1.1) or "num_frames",
            "fps", "cut" and "crop" (v1.2 and v1.3); of several captions the first counts.
        rate: frames a second that the model is trained at.

    Raises:
        UserError: the folder or the file is missing or something else, or videos are missing.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: not found; `tcbench validate CONFIG --files` says how to get it")
    entries = read_json_as(annotations, list[_Entry], "annotations of Open-Sora-Plan")
    described = [(entry, caption) for entry in entries if (caption := entry.caption)]
    if not described:
        raise UserError(f"{annotations}: describes no videos; get it again")
    if lacking := [entry.path for entry, _ in described if not os.path.exists(folder / entry.path)]:
        raise UserError(
            f"{folder}: lacks {len(lacking)} of the {len(described)} videos that {annotations} describes, "
            f"{lacking[0]} for one; unpack its archives again"
        )
    return VideoListing(tuple(_clip(folder, entry, caption) for entry, caption in described), rate)


def _parts(text: object) -> object:
    return text.split(":") if isinstance(text, str) else text


class _Entry(BaseModel):
    path: str
    cap: str | list[str] | None = None
    frame_idx: Annotated[tuple[NonNegativeInt, PositiveInt], BeforeValidator(_parts)] | None = None
    num_frames: NonNegativeInt | None = None
    cut: tuple[NonNegativeInt, PositiveInt] | None = None
    fps: FiniteFloat | None = None
    crop: tuple[NonNegativeInt, NonNegativeInt, NonNegativeInt, NonNegativeInt] | tuple[()] | None = None

    @property
    def caption(self) -> str:
        """The first one, "" without."""
        first = self.cap if isinstance(self.cap, str) else next(iter(self.cap or []), "")
        return " ".join(first.split())


def _clip(folder: Path, entry: _Entry, caption: str) -> Clip:
    start, stop = entry.frame_idx or entry.cut or (0, entry.num_frames)
    return Clip(folder / entry.path, caption, start, stop, entry.fps, entry.crop or None)


# --- which frames, and what of them


def frame_numbers(rate: float, wanted_rate: float, start: int, count: int) -> np.ndarray:
    """Of `count` frames from `start` on, those that a video of `rate` frames a second shows at another rate."""
    step = 1.0 if abs(rate - wanted_rate) < 0.1 else rate / wanted_rate
    return np.arange(start, start + count, step).astype(int)


def centred(frames: "Tensor", size: tuple[int, int]) -> "Tensor":
    """The largest centred part of uint8 frames [T, 3, H, W] with the proportions of `size`, scaled to it: float32 in
    [-1, 1]."""
    import torch.nn.functional as F

    height, width = frames.shape[-2:]
    high, wide = min(height, round(width * size[0] / size[1])), min(width, round(height * size[1] / size[0]))
    top, left = round((height - high) / 2), round((width - wide) / 2)
    part = frames[..., top : top + high, left : left + wide].float() / 255
    return 2 * F.interpolate(part, size, mode="bilinear", align_corners=True, antialias=True) - 1


def _read(clip: Clip, wanted_rate: float, frames: int, size: tuple[int, int], place: float) -> "Tensor":
    import av  # slow to import, and most suites do without

    try:
        with av.open(str(clip.path)) as container:
            if not container.streams.video:
                raise UserError(f"{clip.path}: holds no video; get it again")
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            rate, stop = float(clip.rate or stream.average_rate or 0), clip.stop or stream.frames
            if not rate or not stop:
                raise UserError(f"{clip.path}: does not say its frame rate and length; write fps and num_frames for it")
            available = frame_numbers(rate, wanted_rate, clip.start, stop - clip.start)
            if len(available) < frames:
                raise UserError(
                    f"{clip.path}: {len(available)} frames at {wanted_rate:g} a second, and {frames} are needed"
                )
            first = int(place * max(1, len(available) - frames))
            numbers = available[first : first + frames]
            return _pick(clip, rate, container.decode(stream), numbers, size)
    except (av.FFmpegError, OSError) as error:
        raise UserError(f"{clip.path}: not a readable video ({error.strerror}); get it again") from error


def _pick(clip: Clip, rate: float, decoded: Iterable[Any], numbers: np.ndarray, size: tuple[int, int]) -> "Tensor":
    """Frames by number, float32 [3, T, *size]; frames are counted, because times say little in some files."""
    import torch

    pictures, times, count = {}, [], 0
    wanted, last = set(numbers.tolist()), int(numbers[-1])
    for count, frame in enumerate(decoded, 1):
        number = count - 1
        if number >= numbers[0]:
            times.append(np.nan if frame.time is None else frame.time)
        if number in wanted:
            pictures[number] = centred(_upright(clip, frame)[None], size)[0]
        if number == last:
            break
    if len(pictures) < len(wanted):
        raise UserError(f"{clip.path}: ends after {count} frames, and number {last} is needed; get it again")
    off = np.diff(times) * rate - 1
    if len(off) and not (abs(off.mean()) <= UNSTEADY[0] and abs(off).max() <= UNSTEADY[1]):
        raise UserError(f"{clip.path}: its frames do not keep to {rate:g} a second; convert it to a steady frame rate")
    return torch.stack([pictures[number] for number in numbers.tolist()], dim=1)


def _upright(clip: Clip, frame: Any) -> "Tensor":
    """A decoded frame as it is shown, uint8 [3, H, W], without its margins."""
    import torch

    turns, rest = divmod(round(frame.rotation), 90)
    if rest:
        raise UserError(f"{clip.path}: is turned by {frame.rotation:g} degrees; convert it to an upright one")
    picture = np.rot90(frame.to_ndarray(format="rgb24"), turns)
    if clip.crop:
        left, right, top, bottom = clip.crop
        picture = picture[top:bottom, left:right]
    return torch.from_numpy(np.ascontiguousarray(picture)).permute(2, 0, 1)
