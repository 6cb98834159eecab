"""The start of a block transform: the Karhunen-Loeve transform of training pictures, in two steps.

    8x8 blocks, less the mean value -> their principal axes -> 2x2 of these -> the M first principal axes -> gain -> y

The synthesis is the transpose. The gain makes rounding to integers the quantization step that lambda asks for at high
rates: a step D costs D^2 / 12 of squared error a value and 3 log2(1 / D) bits a pixel, and

    d/dD (lmbda 255^2 D^2 / 12 - 3 log2 D) = 0    at    D^2 = 18 / (ln 2 lmbda 255^2)
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lic_dist.errors import LicError

LEAST_DEVIATION = 0.15  # of a channel of y, in quantization steps
FIRST_LOG_SCALE = -0.7  # of the scales that h_s begins with, natural logarithm, in deviations
DAMPING = 0.3  # of the last layer of h_s, so that it begins near that
BATCH = 16  # pictures at once


@torch.no_grad()
def start_as_klt(model: Any, x: Tensor, lmbda: float) -> None:
    """Set the weights of a fresh `BlockTransform` to the transform of pictures x [n, 3, H, W] in [0, 1].

    Residual blocks begin as the identity. h_s begins with means of zero and scales of half a channel's deviation.

    Raises:
        LicError: more channels of y than 2x2 blocks have coefficients.
    """
    inner, outer = (layer for layer in model.g_a if isinstance(layer, nn.Conv2d))
    outer_back, inner_back = (layer for layer in model.g_s if isinstance(layer, nn.Conv2d))
    colours, channels = inner.out_channels, outer.out_channels
    if channels > 4 * colours:
        raise LicError(f"M is {channels}: the transform of pictures has {4 * colours} channels", hint="a smaller M")
    blocks, pairs = (layer for layer in model.g_a if isinstance(layer, nn.PixelUnshuffle))
    parts, middle = x.split(BATCH), x.double().mean().float()
    axes, _ = _principal_axes(blocks(part - middle) for part in parts)
    inner.weight.copy_(axes.T[:, :, None, None])
    inner.bias.copy_(-middle * axes.sum(0))  # type: ignore[union-attr]
    inner_back.weight.copy_(axes[:, :, None, None])
    inner_back.bias.fill_(middle)  # type: ignore[union-attr]
    axes, variances = _principal_axes(pairs(inner(blocks(part))) for part in parts)
    outer.weight.copy_(axes.T[:channels, :, None, None])
    outer_back.weight.copy_(axes[:, :channels, None, None])
    for layer in (outer, outer_back):
        layer.bias.zero_()  # type: ignore[union-attr]
    gain = math.sqrt(math.log(2) * lmbda * 255**2 / 18)  # 1 / D
    model.g_a[-1].gain.fill_(gain)
    model.g_s[0].gain.fill_(1 / gain)
    for layer in (model.h_a[0], model.h_s[-1]):
        layer.deviation.copy_((variances[:channels].clamp(min=0).sqrt() * gain).clamp(min=LEAST_DEVIATION))
    last = model.h_s[-2]
    last.weight.mul_(DAMPING)
    last.bias[:channels] = FIRST_LOG_SCALE
    last.bias[channels:] = 0


def _principal_axes(parts: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """Return the eigenvectors, as columns, and eigenvalues of the second moments of [n, C, h, w], the largest first."""
    moments, count = torch.zeros((), dtype=torch.float64), 0
    for part in parts:
        vectors = part.transpose(0, 1).flatten(1).double()
        moments, count = moments.to(part.device) + vectors @ vectors.T, count + vectors.size(1)
    values, axes = torch.linalg.eigh(moments / count)
    return axes.flip(1).float(), values.flip(0).float()
