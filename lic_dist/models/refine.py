"""Refine latents before they are quantized: a few gradient steps of y toward less lmbda 255^2 MSE + bpp of its image.

    x -> g_a -> y ~~ steps ~~> y -> search        means and scales stay those of the z that g_a's y gave

An encoder is one network for all images and optimal for none (Campos et al. 2019, Content Adaptive Optimization for
Neural Image Compression; Yang, Bamler and Mandt 2020, Improving Inference for Neural Image Compression). File format
and decoding time do not change. A step costs one forward and one backward pass of g_s.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lic_dist.models.protocol import CodecModel, Stage
from lic_dist.models.stages import bits_of

# Adam's rate in units of y, falling linearly to zero, and its betas; chosen on training crops for few steps.
RATE, BETAS = 0.15, (0.7, 0.99)


@dataclass(frozen=True)
class Refinement:
    """The number of gradient steps of y, and the lambda of the loss that they reduce."""

    steps: int
    lmbda: float


def gradient_at(y: Tensor, cost: Callable[[Tensor], Tensor]) -> Tensor:
    """Return the gradient of a scalar cost at y, also where gradients are off, without gradients of parameters."""
    with torch.enable_grad():
        y = y.detach().requires_grad_(True)
        return torch.autograd.grad(cost(y), y)[0]


def squared_error_gradient(codec: CodecModel, x: Tensor, y: Tensor) -> Tensor:
    """Return the gradient in y of the squared error of g_s(y) against x, summed over images, pixels and colours."""
    return gradient_at(y, lambda y: (codec.synthesise(y) - x).square().sum())


def refine_latents(
    codec: CodecModel, y: Tensor, stage: Stage, gradient: Callable[[Tensor], Tensor], refinement: Refinement
) -> Tensor:
    """Return y after the steps, float16 [B, M, h, w] like y; each image is refined independently.

    The rate is the model's Gaussian likelihood of y itself, as if coded with step 1. `gradient` returns the gradient of
    the squared error in y, as `squared_error_gradient` does.
    """
    codec.require("refinement")
    error_weight = refinement.lmbda * 255**2 / 3  # of a unit of squared error, in bits
    moved = y.detach().float().clone()
    optimizer = torch.optim.Adam([moved], lr=RATE, betas=BETAS)
    for step in range(refinement.steps):
        optimizer.param_groups[0]["lr"] = RATE * (1 - step / refinement.steps)
        rate = gradient_at(moved, lambda y: bits_of(codec.likelihood(y, stage)))
        moved.grad = error_weight * gradient(moved) + rate
        optimizer.step()
    return moved.half()
