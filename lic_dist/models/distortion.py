"""MS-SSIM as a distortion, of training and of refinement (Wang, Simoncelli and Bovik 2003)."""

from __future__ import annotations

import torch
from torch import Tensor

LEAST_MS_SSIM = 161  # pixels a side: five scales of an 11-tap window


def one_less_ms_ssim(x_hat: Tensor, x: Tensor) -> Tensor:
    """Return 1 - MS-SSIM of each of the pictures, float32 [B, 3, H, W] in [0, 1], sides of at least 161: [B]."""
    from pytorch_msssim import ms_ssim

    value: Tensor = ms_ssim(x_hat, x, data_range=1.0, size_average=False)
    return 1 - value


def mirrored(x: Tensor, least: int = LEAST_MS_SSIM) -> Tensor:
    """Return pictures [B, 3, H, W] whose sides below `least` pixels are continued to it by their mirror images."""
    for axis in (2, 3):
        length = x.shape[axis]
        if length < least:
            places = torch.arange(least, device=x.device) % (2 * length)
            x = x.index_select(axis, torch.minimum(places, 2 * length - 1 - places))
    return x
