"""Images as one picture: grids, pairs side by side, and a name for each row.

Dims: N images, H height, W width, C channels; of the picture all in screen pixels.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np

_GROUND = 0.25  # grey between images, apart from their black and their white
_SEEN = 48  # screen pixels that an image has at least
_DPI = 100
_LETTERS = 24  # of a row's name


def save_grid(
    images: np.ndarray,
    path: str | os.PathLike[str],
    *,
    columns: int | None = None,
    row_labels: Sequence[str] | None = None,
    title: str = "",
    upscale: int | None = None,
) -> None:
    """Write a PNG of float images (N, H, W, C), C 1 or 3, of [-1, 1] (what lies beyond is cut), row by row.

    `columns`: a square, unless given. A pixel becomes a square of `upscale`, by default as large as makes an image 48
    screen pixels. Raises `ValueError` for other shapes, values that are not finite, and a wrong count of labels.
    """
    _write(_cells(images, upscale), path, columns, row_labels, title)


def pairs_grid(
    images: np.ndarray,
    partners: np.ndarray,
    path: str | os.PathLike[str],
    *,
    columns: int | None = None,
    row_labels: Sequence[str] | None = None,
    title: str = "",
    upscale: int | None = None,
) -> None:
    """As `save_grid`, each image joined to its partner on its right: a reconstruction, or a nearest neighbour."""
    if np.shape(images) != np.shape(partners):
        raise ValueError(f"images are {np.shape(images)}, partners {np.shape(partners)}; expected one shape")
    left, right = _cells(images, upscale), _cells(partners, upscale)
    seam = np.full((*left.shape[:2], 1, 3), _GROUND, np.float32)
    _write(np.concatenate([left, seam, right], axis=2), path, columns, row_labels, title, gap=4)


def _cells(images: np.ndarray, upscale: int | None) -> np.ndarray:
    """Values (N, H, W, 3) in [0, 1], enlarged."""
    images = np.asarray(images, np.float32)
    if images.ndim != 4 or not images.size or images.shape[-1] not in (1, 3):
        raise ValueError(f"images are of shape {images.shape}; expected (N, H, W, 1) or (N, H, W, 3), N at least 1")
    if not np.isfinite(images).all():
        raise ValueError("images hold values that are not finite; the model that made them has diverged")
    if upscale is None:
        upscale = max(1, -(-_SEEN // min(images.shape[1:3])))
    if upscale < 1:
        raise ValueError(f"upscale is {upscale}; it must be at least 1")
    values = np.broadcast_to((images.clip(-1, 1) + 1) / 2, (*images.shape[:3], 3))
    return values.repeat(upscale, axis=1).repeat(upscale, axis=2)


def _write(
    cells: np.ndarray,
    path: str | os.PathLike[str],
    columns: int | None,
    row_labels: Sequence[str] | None,
    title: str,
    gap: int = 2,
) -> None:
    from matplotlib.figure import Figure

    count, height, width, _ = cells.shape
    columns = math.isqrt(count - 1) + 1 if columns is None else columns
    if columns < 1:
        raise ValueError(f"columns is {columns}; it must be at least 1")
    rows = -(-count // columns)
    if row_labels is not None and len(row_labels) != rows:
        raise ValueError(f"{len(row_labels)} row labels are given for {rows} rows; give one for each")
    row_labels = [label if len(label) <= _LETTERS else f"{label[: _LETTERS - 1]}…" for label in row_labels or ()]
    canvas = np.full((rows * (height + gap) + gap, columns * (width + gap) + gap, 3), _GROUND, np.float32)
    for number, cell in enumerate(cells):
        row, column = divmod(number, columns)
        top, left = row * (height + gap) + gap, column * (width + gap) + gap
        canvas[top : top + height, left : left + width] = cell
    margin = 12 + 8 * max(map(len, row_labels)) if row_labels else 0  # 8: a character of the text below
    above = 24 if title else 0
    wide, high = max(canvas.shape[1] + margin, 8 * len(title)), canvas.shape[0] + above
    figure = Figure(figsize=(wide / _DPI, high / _DPI), dpi=_DPI)
    figure.figimage(np.rint(canvas * 255).astype(np.uint8), xo=margin, yo=0, origin="upper", resize=False)
    for row, label in enumerate(row_labels):
        y = 1 - (above + gap + row * (height + gap) + height / 2) / high
        figure.text((margin - 6) / wide, y, label, ha="right", va="center", size=8, parse_math=False)
    if title:
        figure.text((margin + gap) / wide, 1 - above / 2 / high, title, va="center", size=8, parse_math=False)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # a name in another script becomes boxes
        figure.savefig(path, dpi=_DPI, format="png")
