"""The loss L = lmbda * 255^2 * MSE + bpp (Balle et al. 2018, CompressAI's weights)."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor


def bits_of(likelihoods: Tensor) -> Tensor:
    """Sum of -log2 of likelihoods."""
    return likelihoods.log().sum() / -math.log(2)


def combine(lmbda: float, mse: Tensor, bpp: Tensor) -> Tensor:
    """L from the mean squared error of [0, 1] pixels and the rate in bits per pixel."""
    return lmbda * 255**2 * mse + bpp


def psnr(mse: float) -> float:
    """dB from the mean squared error of [0, 1] pixels."""
    return -10 * math.log10(max(mse, 1e-12))


@dataclass(frozen=True)
class Figures:
    """Means over held-out pictures: L, bits per pixel, and the PSNR in dB of the mean squared error."""

    L: float
    bpp: float
    psnr: float


def figures_of(lmbda: float, mse: float, bpp: float) -> Figures:
    """Figures from the mean squared error of [0, 1] pixels and the rate."""
    return Figures(lmbda * 255**2 * mse + bpp, bpp, psnr(mse))
