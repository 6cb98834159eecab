"""Distortion of 8-bit pictures: PSNR and MS-SSIM of one image."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytorch_msssim
import torch
from numpy.typing import NDArray

SMALLEST_SIDE = 161  # pixels: MS-SSIM halves the picture four times and has a window of 11


def psnr8(a: NDArray[np.uint8], b: NDArray[np.uint8]) -> float:
    """Return the PSNR in dB of two uint8 pictures [H, W, 3], over all pixels and colours; inf where they are equal."""
    _check(a, b)
    squared = np.square(a.astype(np.int32) - b.astype(np.int32)).mean(dtype=np.float64)
    return float(10 * np.log10(255**2 / squared)) if squared > 0 else float("inf")


def ms_ssim8(a: NDArray[np.uint8], b: NDArray[np.uint8]) -> float | None:
    """Return the MS-SSIM (Wang et al. 2003; mean of the colours) of two uint8 pictures [H, W, 3].

    It is None where a side is below SMALLEST_SIDE pixels, because the measure has five scales.
    """
    _check(a, b)
    if min(a.shape[:2]) < SMALLEST_SIDE:
        return None
    x, y = (torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1))[None]).float() for image in (a, b))
    return float(pytorch_msssim.ms_ssim(x, y, data_range=255))


def distortion(original: NDArray[np.uint8], decoded: NDArray[np.uint8]) -> dict[str, Any]:
    """Return the figures of a decoded picture, uint8 [H, W, 3], by their names in `ImageResult`."""
    return {"psnr": psnr8(original, decoded), "ms_ssim": ms_ssim8(original, decoded)}


def _check(a: NDArray[np.uint8], b: NDArray[np.uint8]) -> None:
    if a.shape != b.shape or a.ndim != 3 or a.shape[2] != 3:
        raise ValueError(f"pictures of shapes {a.shape} and {b.shape}: not one [H, W, 3]")
    if a.dtype != np.uint8 or b.dtype != np.uint8:
        raise ValueError(f"pictures of {a.dtype} and {b.dtype}: not uint8")
