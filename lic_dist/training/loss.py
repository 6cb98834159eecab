"""The loss L = lmbda * 255^2 * MSE + bpp (Balle et al. 2018, CompressAI's weights)."""

from __future__ import annotations

import math

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
