"""Layers that models of lic_dist have in addition to those of torch and CompressAI."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

MOST_MEAN = 6.0  # deviations; without a bound, rare photos led h_s to means of 36,000
LEAST_LOG_SCALE, MOST_LOG_SCALE = -9.0, 5.0  # of a scale in deviations, natural logarithm


class Residual(nn.Module):
    """x + a small network of x, [B, C, h, w]: depthwise 5x5, 1x1 to `expansion` C, GELU, 1x1 to C; it starts as the
    identity.
    """

    def __init__(self, channels: int, expansion: int = 2) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, channels, 5, padding=2, groups=channels),
            nn.Conv2d(channels, expansion * channels, 1),
            nn.GELU(),
            nn.Conv2d(expansion * channels, channels, 1),
        )
        nn.init.zeros_(self.body[-1].weight)  # type: ignore[arg-type]
        nn.init.zeros_(self.body[-1].bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, h, w] -> the same shape."""
        out: Tensor = x + self.body(x)
        return out


class FullPrecision(nn.Conv2d):
    """A convolution that computes in float32 under autocast too: what rotates pixels of 8 bits into y and back."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, h, w] -> what a convolution makes of it."""
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x.float())


class Gain(nn.Module):
    """A trained factor for each channel of [B, M, h, w]; its size sets the quantization step that lambda asks for."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(channels))

    def forward(self, y: Tensor) -> Tensor:
        """[B, M, h, w] -> the same shape."""
        return y * self.gain[:, None, None]


class HalfTanh(nn.Module):
    """tanh(x) / 2, which bounds a predicted residual by the error of rounding (Minnen and Singh 2020)."""

    def forward(self, x: Tensor) -> Tensor:
        """Any shape -> the same."""
        return 0.5 * torch.tanh(x)


class PositionLayers(nn.Sequential):
    """Linear layers, convolutions of 1x1 and activations on the channels of each position by itself, computed as matrix
    products of positions, the fastest at few.
    """

    pointwise = True

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, h, w] -> [B, C of the last layer, h, w]."""
        rows = x.flatten(2).transpose(1, 2)
        for layer in self:
            if isinstance(layer, nn.Conv2d):
                rows = nn.functional.linear(rows, layer.weight.flatten(1), layer.bias)
            else:
                rows = layer(rows)
        return rows.transpose(1, 2).unflatten(2, x.shape[2:])


def one_by_one(weight: Tensor, bias: nn.Parameter | None) -> nn.Conv2d:
    """Return the frozen convolution of 1x1 of a weight [out, in] and a bias [out]."""
    found = nn.utils.skip_init(nn.Conv2d, weight.shape[1], len(weight), 1, device=weight.device)
    found.weight, found.bias = nn.Parameter(weight.detach()[:, :, None, None], requires_grad=False), bias
    return found


class NormalizeChannels(nn.Module):
    """Divide y [B, M, h, w] by `deviation` float32 [M], the standard deviation of each channel of y."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("deviation", torch.ones(channels))
        self.deviation: Tensor

    def forward(self, y: Tensor) -> Tensor:
        """[B, M, h, w] -> the same shape."""
        return y / self.deviation[:, None, None]


class _Bounded(torch.autograd.Function):
    """A clamp whose gradient passes where a step along it leads back between the bounds.

    It does what CompressAI's LowerBound does for one bound: what a plain clamp cuts off stays there for good.
    """

    @staticmethod
    def forward(ctx: Any, values: Tensor, least: float, most: float) -> Tensor:
        """Return the values, clamped."""
        ctx.save_for_backward(values)
        ctx.bounds = least, most
        return values.clamp(least, most)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        """Return the gradient, without what leads farther away."""
        (values,), (least, most), (gradient,) = ctx.saved_tensors, ctx.bounds, gradients
        away = ((values < least) & (gradient > 0)) | ((values > most) & (gradient < 0))
        return gradient.masked_fill(away, 0), None, None


def bounded(values: Tensor, least: float, most: float) -> Tensor:
    """Return values clamped to least..most; see `_Bounded` for their gradient."""
    found: Tensor = _Bounded.apply(values, least, most)
    return found


class DenormalizeGaussians(NormalizeChannels):
    """Turn h_s's output, log scales and means in units of the deviation [B, 2M, h, w], into scales and means of y."""

    def forward(self, said: Tensor) -> Tensor:
        """[B, 2M, h, w] -> the same shape, in CompressAI's order: scales first."""
        log_scales, means = said.chunk(2, 1)
        deviation = self.deviation[:, None, None]
        scales = bounded(log_scales, LEAST_LOG_SCALE, MOST_LOG_SCALE).exp() * deviation
        return torch.cat((scales, bounded(means, -MOST_MEAN, MOST_MEAN) * deviation), 1)
