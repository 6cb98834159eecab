"""The stages of an entropy model: what it knows, and when, for search, coding and rate alike.

    z_hat -> stages(model, z_hat) -> GaussianStage(means, scales) -> caller sends y_hat of that stage -> next one ...

A hyperprior model has one stage. Channel-slice, checkerboard and raster-scan models have more: the generator is sent
each stage's y_hat before it yields the next.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lic_dist.models.parts import medians


@dataclass(frozen=True)
class GaussianStage:
    """Gaussian parameters of the elements of y that a stage covers, float32 [B, M, h, w] each."""

    means: Tensor
    scales: Tensor

    def to_lanes(self, values: Tensor) -> NDArray[Any]:
        """Reshape [B, M, h, w] to [lanes, steps] = [B*M, h*w]: one lane a channel, its positions in raster order."""
        batch, channels = values.shape[:2]
        return values.detach().reshape(batch * channels, -1).cpu().numpy()

    def from_lanes(self, values: NDArray[np.float32]) -> Tensor:
        """Invert `to_lanes`, on the device of the means."""
        return torch.from_numpy(values).reshape(self.means.shape).to(self.means.device)


def stages(model: nn.Module, z_hat: Tensor) -> Generator[GaussianStage, Tensor, None]:
    """Yield each stage's means and scales; see the module's text. z_hat: float32 [B, Nz, hz, wz].

    z_hat is copied to one memory layout: an encoder's z_hat (channels last) and a decoder's would otherwise select
    other convolution kernels, whose results differ in the last bit.
    """
    yield gaussians(model.h_s(z_hat.flatten().view(z_hat.shape)), model.M)  # type: ignore[operator,arg-type]


def gaussians(parameters: Tensor, M: int) -> GaussianStage:
    """Split a hyper-decoder's output float32 [B, M or 2M, h, w] into means and scales; a scale hyperprior's means
    are 0.
    """
    if parameters.shape[1] == M:
        return GaussianStage(torch.zeros_like(parameters), parameters)
    scales, means = parameters.chunk(2, 1)
    return GaussianStage(means, scales)


def gaussian_likelihoods(model: nn.Module, y: Tensor, stage: GaussianStage) -> Tensor:
    """Return CompressAI's likelihood of each element of y, for a cell of step 1 about it, with its lower bound."""
    gaussian: Any = model.gaussian_conditional
    likelihoods: Tensor = gaussian.likelihood_lower_bound(gaussian._likelihood(y, stage.scales, stage.means))
    return likelihoods


def bits_of(likelihoods: Tensor) -> Tensor:
    """Return the sum of -log2 of likelihoods."""
    return likelihoods.log().sum() / -math.log(2)


def run_stages(model: nn.Module, z_hat: Tensor, make_y_hat: Callable[[GaussianStage], Tensor]) -> Tensor:
    """Run every stage in turn; `make_y_hat` returns a stage's y_hat, float32 [B, M, h, w]. Return the last y_hat."""
    generator = stages(model, z_hat)
    stage = next(generator)
    while True:
        y_hat = make_y_hat(stage)
        try:
            stage = generator.send(y_hat)
        except StopIteration:
            return y_hat


def to_input(pixels: Tensor, device: torch.device) -> Tensor:
    """Convert uint8 [B, 3, H, W] to float32 in [0, 1], channels last, on the device."""
    return pixels.to(device).float().div(255).contiguous(memory_format=torch.channels_last)


def hyper_analyse(model: nn.Module, y: Tensor) -> Tensor:
    """Return z before rounding: CompressAI's scale hyperprior feeds |y| to h_a, the mean-scale one feeds y."""
    z: Tensor = model.h_a(torch.abs(y) if type(model).__name__ == "ScaleHyperprior" else y)  # type: ignore[operator]
    return z


def rounded_z(model: nn.Module, y: Tensor) -> Tensor:
    """Return z about the medians, rounded, still float32 [B, Nz, hz, wz]."""
    return torch.round(hyper_analyse(model, y) - medians(model))


@torch.no_grad()
def analyse(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return (y float16 [B, M, h, w] as caches store it, z int32 about the medians) of x float32 [B, 3, H, W] in [0,
    1].

    An overflow of float16 raises nothing: it becomes infinity, which the caller checks for.
    """
    y = model.g_a(x)  # type: ignore[operator]
    return y.half(), rounded_z(model, y).int()


def dequantize_z(model: nn.Module, z: Tensor) -> Tensor:
    """Return z_hat = z + medians, in the model's type: float32."""
    middle = medians(model)
    return z.to(middle.dtype) + middle
