"""Latents moved before they are quantized: a few gradient steps of y toward less lmbda 255^2 MSE + bpp of its image.

    x -> g_a -> y ~~ steps ~~> y -> search        means and scales stay those of the z that g_a's y gave

An encoder is one network for all images, and no image's best (Campos et al. 2019, Content Adaptive Optimization for
Neural Image Compression; Yang, Bamler and Mandt 2020, Improving Inference for Neural Image Compression). The decoder
reads the same kind of file, and needs no more time. What a step costs is one pass of g_s forward and one back.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lic_dist.models.stages import GaussianStage, bits_of, gaussian_likelihoods

# Of Adam, in units of y, falling to zero in a line: chosen on training crops, for few steps (little momentum).
RATE, BETAS = 0.15, (0.7, 0.99)


@dataclass(frozen=True)
class Refinement:
    """How often y is moved, and the lambda of the loss that it is moved for."""

    steps: int
    lmbda: float


def gradient_at(y: Tensor, cost: Callable[[Tensor], Tensor]) -> Tensor:
    """The gradient of a cost, a scalar, at y, also where gradients are off; those of parameters are not made."""
    with torch.enable_grad():
        y = y.detach().requires_grad_(True)
        return torch.autograd.grad(cost(y), y)[0]


def squared_error_gradient(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """The gradient, in y, of the squared error of g_s(y) against x, summed over images, pixels and colours."""
    return gradient_at(y, lambda y: (model.g_s(y) - x).square().sum())  # type: ignore[operator]


def refine_latents(
    model: nn.Module, y: Tensor, stage: GaussianStage, gradient: Callable[[Tensor], Tensor], refinement: Refinement
) -> Tensor:
    """y after the steps, float16 [B, M, h, w] as y is; each image for itself.

    The rate is the model's Gaussian likelihood of y itself, as if coded with step 1; `gradient` is that of the squared
    error, as `squared_error_gradient` has it of its last argument.
    """
    error_weight = refinement.lmbda * 255**2 / 3  # of a unit of squared error, in bits
    moved = y.detach().float().clone()
    optimizer = torch.optim.Adam([moved], lr=RATE, betas=BETAS)
    for step in range(refinement.steps):
        optimizer.param_groups[0]["lr"] = RATE * (1 - step / refinement.steps)
        rate = gradient_at(moved, lambda y: bits_of(gaussian_likelihoods(model, y, stage)))
        moved.grad = error_weight * gradient(moved) + rate
        optimizer.step()
    return moved.half()
