"""The loss L = lmbda * D + bpp (Balle et al. 2018; D of training/distortion.py), and held-out figures."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from lic_dist.training.distributed import Ranks

P = TypeVar("P")


def psnr(mse: float) -> float:
    """Return the PSNR in dB for a mean squared error of pixels in [0, 1]."""
    return -10 * math.log10(max(mse, 1e-12))


@dataclass(frozen=True)
class HeldOut:
    """Means over held-out pictures: L, bits per pixel, and the PSNR in dB of the mean squared error."""

    L: float
    bpp: float
    psnr: float


@torch.no_grad()
def held_out_figures(
    parts: Sequence[P],
    decode: Callable[[P], tuple[Tensor, Tensor, Tensor]],
    distortion: Callable[[Tensor, Tensor], Tensor],
    lmbda: float,
    ranks: Ranks,
) -> HeldOut:
    """Compute figures over parts of the held-out pictures, which are divided among the ranks.

    `decode` gives x, x_hat (clamped here), float32 [B, 3, s, s], and the bits of a part. Sums are taken in the order of
    the parts, so that the figures are equal on every rank and for any number of ranks.
    """
    mine = []
    for part in parts[ranks.rank :: ranks.world]:
        x, x_hat, bits = decode(part)
        x_hat = x_hat.clamp(0, 1)
        squared = float((x_hat - x).double().square().sum())
        mine.append((len(x) * float(distortion(x_hat, x)), squared, float(bits), len(x), x.numel()))
    gathered = ranks.gather(mine)
    rows = [gathered[number % ranks.world][number // ranks.world] for number in range(len(parts))]
    error, squared, bits, pictures, values = (sum(column) for column in zip(*rows, strict=True))
    bpp = bits / (values / 3)
    return HeldOut(lmbda * error / pictures + bpp, bpp, psnr(squared / values))
