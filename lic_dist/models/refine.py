"""Latents moved before they are quantized: a few gradient steps of y toward less lmbda 255^2 MSE + bpp of its image.

    x -> g_a -> y ~~ steps ~~> y -> search        means and scales stay those of the z that g_a's y gave

An encoder is one network for all images, and no image's best (Campos et al. 2019, Content Adaptive Optimization for
Neural Image Compression; Yang, Bamler and Mandt 2020, Improving Inference for Neural Image Compression). The decoder
reads the same kind of file, and needs no more time. What a step costs is one pass of g_s forward and one back.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lic_dist.models.stages import Stage

# Of Adam, in units of y, falling to zero in a line: chosen on training crops, for few steps (little momentum).
RATE, BETAS = 0.15, (0.7, 0.99)


@dataclass(frozen=True)
class Refinement:
    """How often y is moved, and the lambda of the loss that it is moved for."""

    steps: int
    lmbda: float


def squared_error_gradient(model: nn.Module, x: Tensor) -> Callable[[Tensor], Tensor]:
    """The gradient, in y, of the squared error of g_s(y) against x, summed over pixels and colours of each image."""

    def gradient(y: Tensor) -> Tensor:
        with torch.enable_grad():
            y = y.detach().requires_grad_(True)
            error = (model.g_s(y) - x).square().sum()  # type: ignore[operator]
        return torch.autograd.grad(error, y)[0]

    return gradient


def refined(
    model: nn.Module, y: Tensor, stage: Stage, gradient: Callable[[Tensor], Tensor], refinement: Refinement
) -> Tensor:
    """y after the steps, float16 [B, M, h, w] as y is; each image for itself.

    The rate is the model's Gaussian likelihood of y itself, as if coded with step 1; `gradient` is that of the squared
    error, as `squared_error_gradient` has it.
    """
    price = refinement.lmbda * 255**2 / 3  # of a unit of squared error, in bits
    moved = y.detach().float().clone()
    optimizer = torch.optim.Adam([moved], lr=RATE, betas=BETAS)
    for step in range(refinement.steps):
        optimizer.param_groups[0]["lr"] = RATE * (1 - step / refinement.steps)
        moved.grad = price * gradient(moved) + _rate_gradient(model, moved, stage)
        optimizer.step()
    return moved.half()


def _rate_gradient(model: nn.Module, y: Tensor, stage: Stage) -> Tensor:
    gaussian: Any = model.gaussian_conditional
    with torch.enable_grad():
        y = y.detach().requires_grad_(True)
        likelihoods = gaussian.likelihood_lower_bound(gaussian._likelihood(y, stage.scales, stage.means))
        bits = likelihoods.log().sum() / -math.log(2)
    return torch.autograd.grad(bits, y)[0]
