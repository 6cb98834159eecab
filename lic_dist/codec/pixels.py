"""Pixels of 8 bits to what g_a reads, and what g_s writes to pixels of 8 bits: each in one pass over them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lic_dist.quantization.jit import kernel


def window(
    image: NDArray[np.uint8], rows: slice, columns: slice, corner: tuple[int, int], device: torch.device
) -> Tensor:
    """Return a window of an image [H, W, 3] or [H, W] with zeros about it: float32 [1, 3, ., .] in [0, 1], channels
    last.

    `rows` and `columns` count from the upper left end of the padding, the image begins at `corner`; a grey one is
    repeated to three colours.
    """
    whole = np.zeros((rows.stop - rows.start, columns.stop - columns.start, 3), np.float32)
    taken, inside = [], []
    for part, start, length in zip((rows, columns), corner, image.shape, strict=False):
        first = min(max(part.start - start, 0), length)
        last = max(first, min(part.stop - start, length))
        taken.append(slice(first, last))
        inside.append(slice(first + start - part.start, last + start - part.start) if last > first else slice(0))
    colours = image[tuple(taken)]
    np.divide(colours[..., None] if image.ndim == 2 else colours, 255, out=whole[tuple(inside)], dtype=np.float32)
    return torch.from_numpy(whole).to(device).permute(2, 0, 1)[None]


def to_pixels(x_hat: Tensor, out: NDArray[np.uint8]) -> bool:
    """Round x_hat float32 [3, h, w] in [0, 1], clamped, to 8 bits: to `out` [h, w, 3], or [h, w] of grey, the mean of
    the colours, rounded once. Return whether all of it is finite.
    """
    if out.ndim == 3:
        return bool(_rounded(x_hat.detach().cpu().contiguous().numpy(), out))
    if not bool(torch.isfinite(x_hat).all()):
        return False
    out[...] = x_hat.clamp(0, 1).permute(1, 2, 0).mean(2).mul(255).round().to(torch.uint8).cpu().numpy()
    return True


@kernel
def _rounded(x: NDArray[Any], out: NDArray[Any]) -> bool:
    colours, height, width = x.shape
    line = np.empty((colours, width), np.uint8)
    odd = np.int32(0)
    for row in range(height):
        for colour in range(colours):
            source, target = x[colour, row], line[colour]
            for column in range(width):
                one = source[column]
                odd |= np.int32(one - one != np.float32(0))
                one = min(max(one, np.float32(0)), np.float32(1))
                target[column] = np.uint8(np.int32(np.rint(one * np.float32(255))))
        for column in range(width):
            for colour in range(colours):
                out[row, column, colour] = line[colour, column]
    return bool(odd == 0)
