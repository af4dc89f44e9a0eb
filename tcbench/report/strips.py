"""Strips: a row's first samples side by side in one small PNG at their own resolution.

They are written once from the samples; grids, figures and the report are made from them, on a machine that never had
the samples. `samples` strips have one line, `steps` strips two: predicted x0 and x_t at some steps of the first sample.
A tile of a video is some of its frames side by side; where these are not all, an animated WebP beside the strip plays
it.

A strip says of which suite, row and samples it is and what it shows, and readers compare that with the row's score, so
that one that lies in another's place, or is older than the score, is not shown. A published folder's list of digests
goes by path and says the same of strips that are older than this.
"""

from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from tcbench.errors import UserError
from tcbench.record.files import check_seal, sealed

Shows = Literal["samples", "steps", "clips"]
QUALITY = 30  # of WebP: eight clips of 93 frames of 128x128 in half a megabyte


def strip_path(folder: Path, row: str, shows: Shows = "samples") -> Path:
    """Where a row's strip is below a suite's folder."""
    return (
        folder
        / "grids"
        / "strips"
        / {"samples": f"{row}.png", "steps": f"{row}-steps.png", "clips": f"{row}.webp"}[shows]
    )


def write_strip(
    folder: Path,
    suite: str,
    row: str,
    samples: str,
    lines: Sequence[np.ndarray],
    labels: Sequence[str] = (),
    shows: Shows = "samples",
) -> None:
    """Write lines of uint8 tiles, each [n, H, W] or [n, H, W, 3] of one shape.

    Args:
        folder: the suite's.
        samples: identifies the row's samples (`samples_digest`).
        labels: names of the n columns.
    """
    picture = np.concatenate([np.concatenate(list(line), axis=1) for line in lines], axis=0)
    header = PngInfo()
    header.add_text("tiles", f"{len(lines)} {len(lines[0])}")
    header.add_text("labels", "\n".join(labels))
    of = {"suite": suite, "row": row, "samples": samples, "shows": shows}
    with sealed(strip_path(folder, row, shows), of) as temporary:
        Image.fromarray(picture).save(temporary, format="PNG", pnginfo=header, optimize=True)


def animated(frames: np.ndarray, rate: float, lossless: bool = False) -> bytes:
    """Frames uint8 [T, H, W] or [T, H, W, 3] as a WebP that plays without end."""
    first, *others = [Image.fromarray(frame).convert("RGB") for frame in frames]
    quality: dict[str, Any] = {"lossless": True} if lossless else {"quality": QUALITY}
    file = BytesIO()
    first.save(file, "WEBP", save_all=True, append_images=others, duration=round(1000 / rate), loop=0, **quality)
    return file.getvalue()


def write_clips(folder: Path, suite: str, row: str, samples: str, clips: Sequence[np.ndarray], rate: float) -> None:
    """Write videos uint8 [T, H, W, 3] of one shape as they play side by side; arguments as of `write_strip`."""
    of = {"suite": suite, "row": row, "samples": samples, "shows": "clips"}
    with sealed(strip_path(folder, row, "clips"), of) as temporary:
        temporary.write_bytes(animated(np.concatenate(list(clips), axis=2), rate))


def read_strip(folder: Path, row: Mapping[str, Any], shows: Shows = "samples") -> tuple[list[np.ndarray], list[str]]:
    """(lines of tiles, labels of the columns) as they were written.

    Args:
        folder: the suite's.
        row: its score (`tcbench.record.score.Score`), which says what the strip should be of; one of an older version
            does not say of which samples it is, and these are then not compared.

    Raises:
        UserError: there is no such strip, or it is damaged, none, or of another row or other samples.
    """
    path = strip_path(folder, row["row"], shows)
    of = {"suite": row["suite"], "row": row["row"], "samples": row.get("samples_digest"), "shows": shows}
    try:
        check_seal(path, {what: value for what, value in of.items() if value is not None})
        with Image.open(path) as image:
            lines, columns = map(int, image.info["tiles"].split())
            labels = [label for label in image.info["labels"].split("\n") if label]
            picture = np.asarray(image)
    except (UserError, OSError, KeyError) as error:
        raise UserError(
            f"{path}: no strip of samples ({error}); run `tcbench score` and `tcbench tables` where the samples are"
        ) from error
    tiles = [np.stack(np.split(line, columns, axis=1)) for line in np.split(picture, lines, axis=0)]
    return tiles, labels
