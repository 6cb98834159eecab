"""Pictures side by side on one sheet, with the window where they differ most enlarged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

FRAME = "#FFC400"
COLUMN, MARGIN, HEAD = 544, 16, 64  # pixels
NAME_SIZE, FIGURES_SIZE = 22, 17


@dataclass(frozen=True)
class Picture:
    """One column of a comparison sheet: a name, a line of figures, pixels uint8 [H, W, 3]."""

    name: str
    figures: str
    pixels: NDArray[np.uint8]


def comparison_sheet(pictures: Sequence[Picture], path: Path, zoom: int = 0) -> None:
    """Pictures side by side, the original first; under each the same window, enlarged.

    The window, `zoom` pixels wide and high (0: a fifth of the shorter side, at least 64), is where the others
    differ most from the original. Raises ValueError where the shapes differ.
    """
    high, wide = pictures[0].pixels.shape[:2]
    if any(picture.pixels.shape != pictures[0].pixels.shape for picture in pictures):
        raise ValueError("the pictures of a sheet have one shape")
    side = min(zoom or max(64, min(high, wide) // 5), high, wide)
    top, left = busiest_window([picture.pixels for picture in pictures], side, side)
    scale = COLUMN / wide
    tall = max(1, round(high * scale))
    sheet = Image.new("RGB", (MARGIN + len(pictures) * (COLUMN + MARGIN), HEAD + tall + COLUMN + 2 * MARGIN), "white")
    draw = ImageDraw.Draw(sheet)
    for index, picture in enumerate(pictures):
        x = MARGIN + index * (COLUMN + MARGIN)
        draw.text((x, 8), _fitting(picture.name, NAME_SIZE), "#111111", ImageFont.load_default(NAME_SIZE))
        draw.text((x, 36), _fitting(picture.figures, FIGURES_SIZE), "#444444", ImageFont.load_default(FIGURES_SIZE))
        whole = Image.fromarray(picture.pixels).resize((COLUMN, tall), Image.Resampling.LANCZOS)
        window = Image.fromarray(np.ascontiguousarray(picture.pixels[top : top + side, left : left + side]))
        sheet.paste(whole, (x, HEAD))
        sheet.paste(window.resize((COLUMN, COLUMN), Image.Resampling.NEAREST), (x, HEAD + tall + MARGIN))
        corner = x + left * scale, HEAD + top * scale
        draw.rectangle((*corner, corner[0] + side * scale, corner[1] + side * scale), outline=FRAME, width=3)
        draw.rectangle((x, HEAD + tall + MARGIN, x + COLUMN, HEAD + tall + MARGIN + COLUMN), outline=FRAME, width=3)
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)


def busiest_window(pixels: Sequence[NDArray[np.uint8]], high: int, wide: int) -> tuple[int, int]:
    """Top and left of the window with most squared error against the first picture (its centre if alone)."""
    height, width = pixels[0].shape[:2]
    if len(pixels) == 1:
        return (height - high) // 2, (width - wide) // 2
    original = pixels[0].astype(np.int32)
    error = sum(np.square(other - original).sum(axis=2) for other in pixels[1:])
    sums = np.pad(np.cumsum(np.cumsum(error, axis=0), axis=1), ((1, 0), (1, 0)))
    windows = sums[high:, wide:] - sums[:-high, wide:] - sums[high:, :-wide] + sums[:-high, :-wide]
    top, left = np.unravel_index(int(np.argmax(windows)), windows.shape)
    return int(top), int(left)


def _fitting(text: str, size: float) -> str:
    """The text, cut to a column's width."""
    font = ImageFont.load_default(size)
    while font.getlength(text) > COLUMN:
        text = text[:-2].rstrip() + "…"
    return text
