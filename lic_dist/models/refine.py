"""What refinement lowers, and refinement of z.

    L = lmbda D + bpp,  D = w_mse 255^2 MSE + w_ms-ssim (1 - MS-SSIM)        the weights of `Refinement.distortion`

An encoder is one network for all images and optimal for none (Campos et al. 2019, Content Adaptive Optimization for
Neural Image Compression; Yang, Bamler and Mandt 2020, Improving Inference for Neural Image Compression). y is refined
with the search that quantizes it, see codec/refine.py; z before that, by the bits alone, here. File format and decoding
time do not change.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lic_dist.errors import LicError
from lic_dist.models.distortion import mirrored, one_less_ms_ssim
from lic_dist.models.protocol import CodecModel, Stage
from lic_dist.models.stages import bits_of, only_side

Z_RATE, Z_BETAS = 0.05, (0.7, 0.99)  # Adam's rate in coded integers, falling linearly to zero, for few steps
BALANCED = 1.0  # bits a pixel that `balanced` weighs 1 - MS-SSIM by, at every lambda: MS-SSIM does not fall
MOST_POSITIONS = 1 << 16  # of y, 16 megapixels, whose contexts are held whole: up to 80 KB a position


@dataclass(frozen=True)
class Refinement:
    """The number of steps of y, the lambda of the loss that they lower, and the weights of its distortion: of mse
    (255^2 MSE), of ms-ssim (1 - MS-SSIM), or of both; whether z is refined first.
    """

    steps: int
    lmbda: float
    distortion: Mapping[str, float] = field(default_factory=lambda: {"mse": 1.0})
    z: bool = False

    @property
    def z_steps(self) -> int:
        """The number of steps of z."""
        return self.steps if self.z else 0

    @property
    def error_weight(self) -> float:
        """Bits that a unit of `errors` is worth."""
        return self.lmbda * 255**2 / 3

    def errors(self, x_hat: Tensor, x: Tensor) -> Tensor:
        """Return D of pictures x_hat against x, float32 [B, 3, H, W] in [0, 1] of any size, in units of a squared error
        summed over pixels and colours: [B].

        MS-SSIM takes a side below 161 pixels continued by its mirror image. Where a scale of a picture is of no
        likeness at all, which leaves MS-SSIM without a gradient, that term moves nothing.
        """
        terms = []
        if weight := self.distortion.get("mse"):
            terms.append(weight * (x_hat - x).square().sum((1, 2, 3)))
        if weight := self.distortion.get("ms-ssim"):
            part = x_hat.view_as(x_hat)
            if part.requires_grad:
                part.register_hook(lambda gradient: gradient.nan_to_num(0, 0, 0))
            values = one_less_ms_ssim(mirrored(part), mirrored(x))
            terms.append(weight * 3 / 255**2 * x[0, 0].numel() * values)
        return torch.stack(terms).sum(0) if len(terms) > 1 else terms[0]


def weights_of(distortion: str | Mapping[Any, float], lmbda: float) -> dict[str, float]:
    """Return the weights of a distortion: a name, weights by name, or "balanced": MSE, and `BALANCED` bits a pixel."""
    if distortion == "balanced":
        return {"mse": 1.0, "ms-ssim": BALANCED / lmbda}
    return {distortion: 1.0} if isinstance(distortion, str) else {str(key): one for key, one in distortion.items()}


def costs_and_gradient(values: Tensor, costs: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """Return costs of values, a number for each of a batch, [B], and the gradient of their sum in the values, also
    where gradients are off, without gradients of parameters.
    """
    with torch.enable_grad():
        values = values.detach().requires_grad_(True)
        found = costs(values)
        (gradient,) = torch.autograd.grad(found.sum(), values)
    return found.detach(), gradient


def fast_bfloat16(device: torch.device) -> bool:
    """Return whether a device multiplies matrices faster in bfloat16 than in float32. A CPU does by AMX; with AVX-512
    alone, its BF16 included, a pass of g_s there and back takes 1.2 times as long.
    """
    if device.type == "cpu":
        capabilities: Callable[[], dict[str, Any]] = getattr(torch.cpu, "get_capabilities", dict)  # not in older ones
        return bool(capabilities().get("amx_bf16", False))
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def decoded(codec: CodecModel, y_hat: Tensor) -> Tensor:
    """Return x_hat, float32 [B, 3, H, W], not clamped, of y_hat float32 [B, M, h, w], to steer by: in the precision and
    the memory layout that this device is fastest with, there and back.
    """
    y_hat = y_hat.contiguous(memory_format=torch.channels_last)
    with torch.autocast(y_hat.device.type, torch.bfloat16, enabled=fast_bfloat16(y_hat.device)):
        x_hat = codec.synthesise(y_hat)
    return x_hat.float()


@torch.no_grad()
def refine_z(codec: CodecModel, y: Tensor, steps: int) -> Tensor:
    """Return z, int32 [B, N, hz, wz], after `steps` of gradient descent of the bits of y and z, each image for itself.

    z begins as h_a gives it, before rounding. It is rounded in each step, and its gradient passes through the
    rounding; its bits are those of its prior, those of y the model's likelihood of y itself under means and scales that
    follow z. The networks of the entropy model run over whole pictures.

    Raises:
        LicError: see `require_refinement`; or y has more than MOST_POSITIONS.
    """
    require_refinement(codec, z=True)
    height, width = y.shape[2:]
    if height * width > MOST_POSITIONS:
        raise LicError(
            f"y of {height}x{width} positions is too large to refine z",
            hint=f"quantizer.refine_z: false, or pictures of at most {MOST_POSITIONS} positions",
        )
    side, y = only_side(codec), y.detach().float()
    z = side.centred(codec.hyper_analyse(y)[0]).contiguous()
    optimizer = torch.optim.Adam([z], betas=Z_BETAS)

    def bits(z: Tensor) -> Tensor:
        z_hat = side.dequantize(z + (torch.round(z) - z).detach())
        given = codec.given((z_hat,), y)
        return bits_of(codec.likelihood(y, Stage(given.means, given.scales))) + bits_of(side.likelihood(z_hat))

    for step in range(steps):
        optimizer.param_groups[0]["lr"] = Z_RATE * (1 - step / steps)
        _, z.grad = costs_and_gradient(z, bits)
        optimizer.step()
    return torch.round(z).int()


def require_refinement(codec: CodecModel, z: bool = False) -> None:
    """Raise LicError where a family does not support refinement, or has no z that could move."""
    codec.require("refinement")
    if z and not only_side(codec).channels:
        raise LicError(f"{codec.name} has no z to refine", hint="quantizer.refine_z: false")
