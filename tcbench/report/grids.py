"""Grids of samples: a row per method, a column per noise, so that a column shows what caching changed."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from tcbench.errors import UserError
from tcbench.record.files import sealed

TILE = 64  # pixels; smaller images are enlarged by a whole factor to at least this
GAP = 4
FONT_SIZE = 16


def grid(
    images: Sequence[np.ndarray], row_labels: Sequence[str], column_labels: Sequence[str] | None = None
) -> Image.Image:
    """One picture of R methods times n samples.

    Args:
        images: R arrays uint8 [n, H, W] or [n, H, W, 3], equal in shape; column j of every row starts from
            the same noise.
        row_labels: R labels, drawn on the left.
        column_labels: n labels, drawn on top (e.g. classes).

    Raises:
        UserError: arrays that are not uint8, differ in shape, or do not match the labels.
    """
    shapes = sorted({(str(array.dtype), array.shape) for array in images})
    if len(shapes) != 1 or shapes[0][0] != "uint8" or len(shapes[0][1]) not in (3, 4):
        raise UserError(f"a grid needs uint8 arrays [n, H, W] or [n, H, W, 3] of one shape, got {shapes}")
    if len(row_labels) != len(images) or len(column_labels or images[0]) != len(images[0]):
        raise UserError(
            f"a grid of {len(images)} rows and {len(images[0])} columns needs a label for each, "
            f"got {len(row_labels)} and {len(column_labels or images[0])}"
        )
    images_RNHW = np.stack(images)
    factor = -(-TILE // images_RNHW.shape[2])
    images_RNHW = images_RNHW.repeat(factor, axis=2).repeat(factor, axis=3)  # nearest neighbour: pixels stay pixels
    rows, columns, height, width = images_RNHW.shape[:4]

    font = ImageFont.load_default(FONT_SIZE)
    left = round(max(font.getlength(label) for label in row_labels)) + 3 * GAP
    top = FONT_SIZE + 3 * GAP if column_labels else GAP
    mode = "L" if images_RNHW.ndim == 4 else "RGB"
    picture = Image.new(mode, (left + columns * (width + GAP), top + rows * (height + GAP)), "white")
    draw = ImageDraw.Draw(picture)
    for row, label in enumerate(row_labels):
        y = top + row * (height + GAP)
        draw.text((left - 2 * GAP, y + height / 2), label, fill="black", font=font, anchor="rm")
        for column in range(columns):
            picture.paste(Image.fromarray(images_RNHW[row, column]), (left + column * (width + GAP), y))
    for column, label in enumerate(column_labels or ()):
        x = left + column * (width + GAP) + width / 2
        draw.text((x, top - 2 * GAP), label, fill="black", font=font, anchor="ms")
    return picture


def save_grid(picture: Image.Image, path: Path, of: Mapping[str, str] | None = None) -> None:
    """Write the picture as PNG, which says what it is `of`."""
    with sealed(path, of) as temporary:
        picture.save(temporary, format="PNG", optimize=True)
