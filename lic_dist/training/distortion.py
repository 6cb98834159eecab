"""The distortion of a picture: MSE, MS-SSIM, LPIPS, or a weighted sum of them.

    D = w_mse * 255^2 * MSE + w_ms-ssim * (1 - MS-SSIM) + w_lpips * LPIPS,    L = lmbda * D + bpp

CompressAI's losses are 255^2 MSE of pixels in [0, 1], and 1 - MS-SSIM, both weighted by lmbda; its MS-SSIM models have
lambdas of another scale. A weight is the value of one unit of a measure beside the others: `{mse: 1, ms-ssim: 1000}`.
Adversarial and idempotence terms (adversary.py, idempotence.py) are of training alone.
Searches and calibration always weigh squared errors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from lic_dist.config.training import TRADES
from lic_dist.errors import LicError, UsageError
from lic_dist.models.distortion import LEAST_MS_SSIM, one_less_ms_ssim

Measure = Callable[[Tensor, Tensor], Tensor]


class Distortion:
    """D of pictures x_hat against x, float32 [B, 3, s, s] in [0, 1]: a scalar, the mean over the pictures.

    Raises:
        UsageError: crops too small for MS-SSIM, or LPIPS without its package.
    """

    def __init__(self, weights: str | Mapping[Any, float], crop: int, device: torch.device) -> None:
        named = {weights: 1.0} if isinstance(weights, str) else weights
        self.weights = {name: weight for name, weight in named.items() if name not in TRADES}
        if "ms-ssim" in self.weights and crop < LEAST_MS_SSIM:
            raise UsageError(
                f"MS-SSIM needs crops of {LEAST_MS_SSIM} pixels or more, these have {crop}",
                hint="larger crops, or distortion: mse",
            )
        measures = {"mse": lambda: _mse, "ms-ssim": lambda: _ms_ssim, "lpips": lambda: _lpips(device)}
        self.measures: dict[str, Measure] = {name: measures[name]() for name in self.weights}

    def __call__(self, x_hat: Tensor, x: Tensor) -> Tensor:
        terms = [weight * self.measures[name](x_hat, x) for name, weight in self.weights.items()]
        return torch.stack(terms).sum()


def _mse(x_hat: Tensor, x: Tensor) -> Tensor:
    return 255**2 * (x_hat - x).square().mean()


def _ms_ssim(x_hat: Tensor, x: Tensor) -> Tensor:
    return one_less_ms_ssim(x_hat, x).mean()


def _lpips(device: torch.device) -> Measure:
    """Return LPIPS with AlexNet (Zhang et al. 2018), its weights frozen."""
    try:
        import lpips
    except ModuleNotFoundError:
        raise UsageError("distortion: lpips needs the package lpips", hint="pip install lpips") from None
    try:
        network: Any = lpips.LPIPS(net="alex", verbose=False).to(device).eval().requires_grad_(False)
    except OSError as error:  # of the network, or of the folder the weights are kept in
        raise LicError(f"the weights of LPIPS are not at hand: {error}", hint="torch.hub fetches them once") from None
    return lambda x_hat, x: network(x_hat, x, normalize=True).mean()
