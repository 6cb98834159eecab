"""Refine latents before they are quantized: a few gradient steps of y toward less lmbda D + bpp of its image.

    x -> g_a -> y ~~ steps ~~> y -> search        z stays the one that g_a's y gave

    D = w_mse 255^2 MSE + w_ms-ssim (1 - MS-SSIM)        the weights of `Refinement.distortion`

An encoder is one network for all images and optimal for none (Campos et al. 2019, Content Adaptive Optimization for
Neural Image Compression; Yang, Bamler and Mandt 2020, Improving Inference for Neural Image Compression). File format
and decoding time do not change. A step costs one forward and one backward pass of g_s, and where means and scales
follow y_hat, of the networks of contexts too, which see y in its place.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lic_dist.errors import LicError
from lic_dist.models.distortion import mirrored, one_less_ms_ssim
from lic_dist.models.protocol import CodecModel, Run, Sides, Stage
from lic_dist.models.stages import bits_of, known_stage

# Adam's rate in units of y, falling linearly to zero, and its betas; chosen on training crops for few steps.
RATE, BETAS = 0.15, (0.7, 0.99)
BALANCED = 1.0  # bits a pixel that `balanced` weighs 1 - MS-SSIM by, at every lambda: MS-SSIM does not fall
MOST_POSITIONS = 1 << 16  # of y, 16 megapixels, whose contexts are held whole: up to 80 KB a position


Error = Callable[[Tensor, Tensor], Tensor]  # of x_hat against x: a scalar


@dataclass(frozen=True)
class Refinement:
    """The number of gradient steps of y, the lambda of the loss that they reduce, and the weights of its distortion:
    of mse (255^2 MSE), of ms-ssim (1 - MS-SSIM), or of both.
    """

    steps: int
    lmbda: float
    distortion: Mapping[str, float] = field(default_factory=lambda: {"mse": 1.0})

    def __str__(self) -> str:
        weights = " + ".join(f"{weight:.6g} {name}" for name, weight in sorted(self.distortion.items()))
        return f"{self.steps} steps of refinement" + (f" for {weights}" if self.steps and weights != "1 mse" else "")

    def error(self, x_hat: Tensor, x: Tensor) -> Tensor:
        """Return D of pictures x_hat against x, float32 [B, 3, H, W] in [0, 1] of any size, in units of a squared error
        summed over pictures, pixels and colours: a scalar.

        MS-SSIM takes a side below 161 pixels continued by its mirror image. Where a scale of a picture is of no
        likeness at all, which leaves MS-SSIM without a gradient, that term moves nothing.
        """
        terms = []
        if weight := self.distortion.get("mse"):
            terms.append(weight * (x_hat - x).square().sum())
        if weight := self.distortion.get("ms-ssim"):
            part = x_hat.view_as(x_hat)
            if part.requires_grad:
                part.register_hook(lambda gradient: gradient.nan_to_num(0, 0, 0))
            value = one_less_ms_ssim(mirrored(part), mirrored(x))
            terms.append(weight * 3 / 255**2 * x[:, 0].numel() * value)
        return torch.stack(terms).sum() if len(terms) > 1 else terms[0]


def weights_of(distortion: str | Mapping[Any, float], lmbda: float) -> dict[str, float]:
    """Return the weights of a distortion: a name, weights by name, or "balanced": MSE, and `BALANCED` bits a pixel."""
    if distortion == "balanced":
        return {"mse": 1.0, "ms-ssim": BALANCED / lmbda}
    return {distortion: 1.0} if isinstance(distortion, str) else {str(key): one for key, one in distortion.items()}


def gradient_at(y: Tensor, cost: Callable[[Tensor], Tensor]) -> Tensor:
    """Return the gradient of a scalar cost at y, also where gradients are off, without gradients of parameters."""
    with torch.enable_grad():
        y = y.detach().requires_grad_(True)
        return torch.autograd.grad(cost(y), y)[0]


def error_gradient(codec: CodecModel, x: Tensor, error: Error, y: Tensor) -> Tensor:
    """Return the gradient in y of an error of g_s(y) against x, as `Refinement.error` is one."""
    return gradient_at(y, lambda y: error(codec.synthesise(y), x))


def refine_latents(
    codec: CodecModel,
    y: Tensor,
    sides_hat: Sides,
    gradient: Callable[[Tensor], Tensor],
    refinement: Refinement,
    run: Run | None = None,
) -> Tensor:
    """Return y after the steps, float16 [B, M, h, w] like y; each image is refined independently.

    The rate is the model's likelihood of y itself, as if coded with step 1: under the means and scales of a single
    stage, found once by `run`, or under those that y gives in place of y_hat, `CodecModel.given`. `gradient` returns
    the gradient of `refinement.error` in what g_s takes, as `error_gradient` does: y with its corrections.

    Raises:
        LicError: the family does not support it, or y has more than MOST_POSITIONS and follows contexts.
    """
    codec.require("refinement")
    moved = y.detach().float().clone()
    size = moved.shape[2], moved.shape[3]
    stage = known_stage(codec, sides_hat, size, run)
    if stage is None and size[0] * size[1] > MOST_POSITIONS:
        raise LicError(
            f"y of {size[0]}x{size[1]} positions is too large to refine under {codec.name}'s contexts",
            hint=f"quantizer.refine: 0, or pictures of at most {MOST_POSITIONS} positions",
        )
    sides = tuple(side.float() for side in sides_hat)  # those of networks in integers are float64
    error_weight = refinement.lmbda * 255**2 / 3  # of a unit of squared error, in bits

    def loss_gradient(y: Tensor) -> Tensor:
        if stage is not None:
            rate = gradient_at(y, lambda y: bits_of(codec.likelihood(y, stage)))
            return error_weight * gradient(y) + rate
        with torch.enable_grad():
            y = y.detach().requires_grad_(True)
            given = codec.given(sides, y)
            bits = bits_of(codec.likelihood(y, Stage(given.means, given.scales)))
        error = error_weight * gradient(given.y_hat.detach())
        (total,) = torch.autograd.grad((given.y_hat, bits), y, (error, torch.ones_like(bits)))
        return total

    optimizer = torch.optim.Adam([moved], lr=RATE, betas=BETAS)
    for step in range(refinement.steps):
        optimizer.param_groups[0]["lr"] = RATE * (1 - step / refinement.steps)
        moved.grad = loss_gradient(moved)
        optimizer.step()
    return moved.half()
