"""Drive the walk over a model's stages, and turn pictures into latents; see protocol.py for what a stage is."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from lic_dist.errors import LicError
from lic_dist.models.architectures import adapt
from lic_dist.models.protocol import CodecModel, Run, Side, Sides, Stage


def only_stage(codec: CodecModel, sides_hat: Sides, run: Run | None = None) -> Stage:
    """Return the stage of a model that has one; `run` is that of `CodecModel.walk`, by default `CodecModel.run`.

    Raises:
        LicError: the model has several stages, or corrects y_hat after the last, so that means and scales do not do.
    """
    found, y_hat = codec.drive(sides_hat, lambda stage: stage.means, run)
    if len(found) > 1:
        raise LicError(f"{codec.name} codes y in several stages, which is not served yet")
    if y_hat is not found[0].means:
        raise LicError(f"{codec.name} corrects y_hat after its stages, which is not served yet")
    return found[0]


def known_stage(codec: CodecModel, sides_hat: Sides, size: tuple[int, ...], run: Run | None = None) -> Stage | None:
    """Return the stage of a model that codes y of this height and width in one, and leaves y_hat as that makes it; None
    of others, whose networks are not run where they have several stages.
    """
    if len(codec.layout(*size)) > 1:
        return None
    stages, y_hat = codec.drive(sides_hat, lambda stage: stage.means, run)
    return stages[0] if y_hat is stages[0].means else None


def only_side(codec: CodecModel) -> Side:
    """Return the side latent of a model that has one, or its `NoSide`. Raises LicError where it has several."""
    if len(codec.sides) != 1:
        raise LicError(f"{codec.name} has {len(codec.sides)} side latents; one is served")
    return codec.sides[0]


def bits_of(likelihoods: Tensor) -> Tensor:
    """Return the sum of -log2 of likelihoods."""
    return likelihoods.log().sum() / -math.log(2)


def to_input(pixels: Tensor, device: torch.device) -> Tensor:
    """Convert uint8 [B, 3, H, W] to float32 in [0, 1], channels last, on the device."""
    return pixels.to(device).float().div(255).contiguous(memory_format=torch.channels_last)


def rounded_z(codec: CodecModel, y: Tensor) -> Tensor:
    """Return z about the medians, rounded, still float32 [B, N, hz, wz]."""
    (z,) = codec.hyper_analyse(y)
    return torch.round(only_side(codec).centred(z))


@torch.no_grad()
def analyse(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return (y float16 [B, M, h, w] as caches store it, z int32 about the medians) of x float32 [B, 3, H, W] in [0,
    1].

    An overflow of float16 raises nothing: it becomes infinity, which the caller checks for.
    """
    codec = adapt(model)
    y = codec.analyse(x)
    return y.half(), rounded_z(codec, y).int()


def dequantize_z(model: nn.Module, z: Tensor) -> Tensor:
    """Return z_hat = z + medians, in the model's type: float32."""
    return only_side(adapt(model)).dequantize(z)
