"""Refine latents before they are quantized: a few gradient steps of y toward less lmbda D + bpp of its image.

    x -> g_a -> y ~~ steps ~~> y -> search        z stays the one that g_a's y gave, or moves too: `refine_both`

    D = w_mse 255^2 MSE + w_ms-ssim (1 - MS-SSIM)        the weights of `Refinement.distortion`

An encoder is one network for all images and optimal for none (Campos et al. 2019, Content Adaptive Optimization for
Neural Image Compression; Yang, Bamler and Mandt 2020, Improving Inference for Neural Image Compression). File format
and decoding time do not change. A step costs one forward and one backward pass of g_s, and where means and scales
follow y_hat, of the networks of contexts too, which see y in its place.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lic_dist.errors import LicError
from lic_dist.models.distortion import mirrored, one_less_ms_ssim
from lic_dist.models.protocol import CodecModel, Run, Sides, Stage
from lic_dist.models.stages import bits_of, known_stage, only_side

# Adam's rate in units of y, falling linearly to zero, and its betas; chosen on training crops for few steps.
RATE, BETAS = 0.15, (0.7, 0.99)
Z_RATE = 0.02  # of z, in coded integers: few elements cross to another; at .05 the rate falls more, MS-SSIM with it
BALANCED = 1.0  # bits a pixel that `balanced` weighs 1 - MS-SSIM by, at every lambda: MS-SSIM does not fall
MOST_POSITIONS = 1 << 16  # of y, 16 megapixels, whose contexts are held whole: up to 80 KB a position


Error = Callable[[Tensor, Tensor], Tensor]  # of x_hat against x: a scalar


@dataclass(frozen=True)
class Refinement:
    """The number of gradient steps of y, the lambda of the loss that they reduce, and the weights of its distortion:
    of mse (255^2 MSE), of ms-ssim (1 - MS-SSIM), or of both; whether z moves too.
    """

    steps: int
    lmbda: float
    distortion: Mapping[str, float] = field(default_factory=lambda: {"mse": 1.0})
    z: bool = False

    def __str__(self) -> str:
        moved = " of y and z" if self.steps and self.z else ""
        weights = " + ".join(f"{weight:.6g} {name}" for name, weight in sorted(self.distortion.items()))
        distortion = f" for {weights}" if self.steps and weights != "1 mse" else ""
        return f"{self.steps} steps of refinement{moved}{distortion}"

    @property
    def error_weight(self) -> float:
        """Bits that a unit of `error` is worth."""
        return self.lmbda * 255**2 / 3

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
    stage = known_stage(codec, sides_hat, moved.shape[2:], run)
    if stage is None:
        _require_positions(y, f"under {codec.name}'s contexts")
    sides = tuple(side.float() for side in sides_hat)  # those of networks in integers are float64

    def loss_gradient(y: Tensor) -> Tensor:
        if stage is not None:
            rate = gradient_at(y, lambda y: bits_of(codec.likelihood(y, stage)))
            return refinement.error_weight * gradient(y) + rate
        with torch.enable_grad():
            y = y.detach().requires_grad_(True)
            given = codec.given(sides, y)
            bits = bits_of(codec.likelihood(y, Stage(given.means, given.scales)))
        error = refinement.error_weight * gradient(given.y_hat.detach())
        (total,) = torch.autograd.grad((given.y_hat, bits), y, (error, torch.ones_like(bits)))
        return total

    _descend([(moved, RATE)], refinement.steps, lambda y: (loss_gradient(y),))
    return moved.half()


def refine_both(
    codec: CodecModel, y: Tensor, gradient: Callable[[Tensor], Tensor], refinement: Refinement
) -> tuple[Tensor, Tensor]:
    """Return y, as `refine_latents`, and z, int32 [B, N, hz, wz], after steps that move both.

    z begins as h_a gives it, before rounding. It is rounded in each step, and its gradient passes through the
    rounding; its bits are those of its prior. Means and scales follow both. The networks of the entropy model run over
    whole pictures.

    Raises:
        LicError: see `require_refinement`; or y has more than MOST_POSITIONS.
    """
    require_refinement(codec, refinement)
    _require_positions(y, "together with z")
    side, moved = only_side(codec), y.detach().float().clone()
    with torch.no_grad():
        z = side.centred(codec.hyper_analyse(moved)[0]).contiguous()

    def loss_gradients(y: Tensor, z: Tensor) -> tuple[Tensor, ...]:
        with torch.enable_grad():
            y, z = (one.detach().requires_grad_(True) for one in (y, z))
            z_hat = side.dequantize(z + (torch.round(z) - z).detach())
            given = codec.given((z_hat,), y)
            bits = bits_of(codec.likelihood(y, Stage(given.means, given.scales))) + bits_of(side.likelihood(z_hat))
        error = refinement.error_weight * gradient(given.y_hat.detach())
        return torch.autograd.grad((given.y_hat, bits), (y, z), (error, torch.ones_like(bits)))

    _descend([(moved, RATE), (z, Z_RATE)], refinement.steps, loss_gradients)
    return moved.half(), torch.round(z).int()


def require_refinement(codec: CodecModel, refinement: Refinement) -> None:
    """Raise LicError where a family does not support refinement, or has no z that could move."""
    codec.require("refinement")
    if refinement.z and not only_side(codec).channels:
        raise LicError(f"{codec.name} has no z to refine", hint="quantizer.refine_z: false")


def _require_positions(y: Tensor, why: str) -> None:
    height, width = y.shape[2:]
    if height * width > MOST_POSITIONS:
        raise LicError(
            f"y of {height}x{width} positions is too large to refine {why}",
            hint=f"quantizer.refine: 0, or pictures of at most {MOST_POSITIONS} positions",
        )


def _descend(moved: Sequence[tuple[Tensor, float]], steps: int, gradients: Callable[..., tuple[Tensor, ...]]) -> None:
    """Move tensors, each with its rate of Adam, along their gradients; the rates fall linearly to zero."""
    optimizer = torch.optim.Adam([{"params": [one], "lr": rate} for one, rate in moved], betas=BETAS)
    for step in range(steps):
        found = gradients(*(one for one, _ in moved))
        for group, (one, rate), gradient in zip(optimizer.param_groups, moved, found, strict=True):
            group["lr"] = rate * (1 - step / steps)
            one.grad = gradient
        optimizer.step()
