"""Networks of the entropy model, h_s and those of contexts, in exact integers: the same means and scales on every
machine, whatever its threads, batch, layout or backend.

The definition. Every value is an integer; round() is to the nearest, a half to the even one; floor(v / 2^s) is a shift.

    unit        an activation X stands for X 2^-12; clamp(X) keeps it within -2^24 .. 2^24
    input       of h_s: X = clamp(2^12 z + round(2^12 m)), z the coded integer, m the float32 median of its channel;
                round(2^12 s) z in place of 2^12 z, where z has a float32 step s.
                Of the others: X = clamp(round(2^12 v)), v float32: outputs of networks, gathered and concatenated,
                which that does not change, zeros, and y_hat = means + level, one addition of float32; where it is
                corrected, another one; where y has a gain, a product of float32 with that or with 1 / gain
    layers      one after another, those of a Sequential too. A convolution of stride 1, or a transposed one of stride
                s whose output is s times the input on both axes; odd kernels no smaller than s, zero padding. A weight
                is 0 where a mask is. For each output channel with float32 weights w and bias b:
                    e   the least integer with max |w| < 2^e; 0 where all are 0
                    f = 14 - e, within 1..24
                    W = round(2^f w),  B = round(2^(12+f) b)
                    X = clamp(floor((B + 2^(f-1) + sum of W X) / 2^f)), with X = 0 outside of the picture
                A linear layer is a convolution of 1x1. A layer with `as_convolution` is what that returns: a masked
                convolution at single positions is one of 1x1 over the inputs under its live taps
    PixelShuffle    X at (r i + a, r j + b) of channel c is X at (i, j) of channel r^2 c + r a + b
    ReLU        max(X, 0)
    LeakyReLU   X where X > 0, else floor((S X + 2^18) / 2^19) with S = round(2^19 slope), 5243 for a slope of 0.01
    HalfTanh    the sign of X times the number of v = 1 .. 2048 with |X| > floor(2^12 atanh((2 v - 1) / 2^12))
    DenormalizeGaussians, the last layer of `block-transform`, on a log scale or a mean X with the float32 deviation d:
                    scale X = clamp(floor((2^12 d) (e^(i/64) e^(j/4096)) + 1/2)), 64 i + j = X within -9 2^12 .. 5 2^12
                    and 0 <= j < 64; the powers of e and every result are rounded to float64
                    mean X = clamp(floor(d X + 1/2)), X within -6 2^12 .. 6 2^12
    output      means and scales are X 2^-12, which float32 holds exactly, or float32 products of these with a gain. A
                scale's level is the number of thresholds t of quantization/rates.py, float32, that it is above

Sums are taken in float64, one matrix product a tap of the kernel. The sum of |W| 2^24, with |B| and the half, stays
below 2^53 (checked), so float64 is exact in any order, fused or not; and no library's convolution may choose an inexact
way (Winograd, FFT). W and B follow from the checkpoint by powers of two and roundings alone, without a function that
differs between libraries; powers of e and logarithms are made in decimals and rounded once. IEEE 754 defines the sum
and the products that y_hat is made of, one by one (`levels` of quantization/trellis.py), so that contexts of y_hat are
the same everywhere, stage after stage.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from decimal import Decimal, localcontext
from functools import cache, partial
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lic_dist.errors import LicError
from lic_dist.models.layers import (
    LEAST_LOG_SCALE,
    MOST_LOG_SCALE,
    MOST_MEAN,
    DenormalizeGaussians,
    HalfTanh,
    one_by_one,
)
from lic_dist.models.protocol import Side

UNIT_BITS, WEIGHT_BITS, MOST_BITS, SLOPE_BITS = 12, 14, 24, 19
LARGEST = 1 << 24
_EXACT = 1 << 53
_HINT = "code without --deterministic"


class IntegerNet:
    """The integer form of a network of the entropy model, on its device; see the module's text.

    Raises:
        LicError: a layer without an integer form, or sums that float64 may not hold exactly.
    """

    def __init__(self, net: nn.Module) -> None:
        self._layers = [_layer(layer) for layer in _chain(net)]

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor:
        """Map [B, C, h, w] of any float type, rounded to multiples of 2^-12, to float32 multiples of 2^-12."""
        x = _clamp((x.double() * 2.0**UNIT_BITS).round()).transpose(0, 1)
        for layer in self._layers:
            x = layer(x)
        return (x.transpose(0, 1) * 2.0**-UNIT_BITS).float()


def exact_z_hat(side: Side, z: Tensor) -> Tensor:
    """Return z_hat, float64 [B, N, hz, wz], of medians and step in multiples of 2^-12; exact for z of int32."""
    step, middle = (_in_units(one).to(z.device) for one in (torch.as_tensor(side.step), side.medians()))
    return z.double() * step + middle


def _in_units(values: Tensor) -> Tensor:
    """Return values rounded to multiples of 2^-12, float64."""
    return torch.round(values.detach().double() * 2.0**UNIT_BITS) * 2.0**-UNIT_BITS


class Taps:
    """Sums of a convolution on [channels, B, h, w], one matrix product a tap; output s i + r adds input i - n times the
    weight at padding + r + s n.

    `layer` gives the form, `weight` the numbers, of its shape. The type of both decides what sums are exact.
    """

    def __init__(self, layer: nn.Conv2d | nn.ConvTranspose2d, weight: Tensor) -> None:
        # A plain convolution is a transposed one of stride 1 with its kernel turned round.
        turned = (
            weight.permute(2, 3, 1, 0)
            if isinstance(layer, nn.ConvTranspose2d)
            else weight.permute(2, 3, 0, 1).flip(0, 1)
        ).contiguous()  # [row, column, out, in]
        self._stride, self._padding = layer.stride[0], int(layer.padding[0])
        self._taps: dict[tuple[int, int], list[tuple[int, int, Tensor]]] = {}
        used = turned.count_nonzero((2, 3)).tolist()  # a mask's zeros add nothing
        for row, column in product(range(len(turned)), repeat=2):
            (n, r), (m, q) = (divmod(at - self._padding, self._stride) for at in (row, column))
            taps = self._taps.setdefault((r, q), [])
            if used[row][column]:
                taps.append((n, m, turned[row, column]))

    def __call__(self, x: Tensor, start: Tensor) -> Tensor:
        """Return [out, B, s h, s w] of x [in, B, h, w], from `start` [out, 1] on."""
        (_, batch, high, wide), pad, stride = x.shape, self._padding, self._stride
        around = nn.functional.pad(x, (pad, pad, pad, pad)) if pad else x
        out = x.new_empty(len(start), batch, high, stride, wide, stride)
        for (r, q), taps in self._taps.items():
            total = start.repeat(1, batch * high * wide)
            for n, m, weight in taps:
                part = around[:, :, pad - n : pad - n + high, pad - m : pad - m + wide]
                total.addmm_(weight, part.reshape(len(part), -1))
            out[:, :, :, r, :, q] = total.view(-1, batch, high, wide)
        return out.view(-1, batch, high * stride, wide * stride)


class _Convolution:
    """A convolution on float64 [channels, B, h, w]."""

    def __init__(self, layer: nn.Conv2d | nn.ConvTranspose2d) -> None:
        weight = layer.weight.detach().cpu().numpy().astype(np.float64)
        if isinstance(layer, nn.ConvTranspose2d):
            weight = weight.swapaxes(0, 1)
        bias = np.zeros(layer.out_channels) if layer.bias is None else layer.bias.detach().cpu().numpy()
        _, e = np.frexp(np.abs(weight).max((1, 2, 3)))
        f = np.clip(WEIGHT_BITS - e, 1, MOST_BITS)
        whole = np.rint(np.ldexp(weight, f[:, None, None, None]))
        start = np.rint(np.ldexp(bias.astype(np.float64), UNIT_BITS + f)) + np.ldexp(0.5, f)
        if not (np.abs(whole).sum((1, 2, 3)) * LARGEST + np.abs(start)).max() < _EXACT:  # also refuses NaN
            raise LicError(f"a layer is too wide for exact sums, or its weights too large: {layer}", hint=_HINT)
        if isinstance(layer, nn.ConvTranspose2d):
            whole = whole.swapaxes(0, 1)
        device = layer.weight.device
        self._start, self._unit = (torch.from_numpy(each[:, None]).to(device) for each in (start, np.ldexp(1.0, -f)))
        self._taps = Taps(layer, torch.from_numpy(whole).to(device))

    def __call__(self, x: Tensor) -> Tensor:
        sums = self._taps(x, self._start)
        return _clamp(sums.mul_(self._unit[..., None, None]).floor_(), sums)


class IntegerGaussians:
    """Turn log scales and means in units of the deviation into scales and means: float64 [2M, B, h, w]."""

    def __init__(self, layer: DenormalizeGaussians) -> None:
        self._deviation = layer.deviation.double()[:, None, None, None]
        unit, part = 1 << UNIT_BITS, 64
        self._least, self._most = (round(bound * unit) for bound in (LEAST_LOG_SCALE, MOST_LOG_SCALE))
        coarse = range(self._least // part, self._most // part + 1)
        self._coarse = _exponentials(coarse, unit // part, layer.deviation.device)
        self._fine = _exponentials(range(part), unit, layer.deviation.device)
        self._largest_mean = MOST_MEAN * unit

    def __call__(self, x: Tensor) -> Tensor:
        log_scales, means = x.chunk(2)
        power = (log_scales.clamp(self._least, self._most) - self._least).long()
        scales = self._coarse[power // len(self._fine)] * self._fine[power % len(self._fine)]
        both = (
            scales * self._deviation * 2.0**UNIT_BITS,
            means.clamp(-self._largest_mean, self._largest_mean) * self._deviation,
        )
        return _clamp((torch.cat(both) + 0.5).floor())


def _exponentials(numerators: range, denominator: int, device: torch.device) -> Tensor:
    """Return e^(n / denominator) for each numerator n, correctly rounded to float64."""
    with localcontext(prec=40):
        values = [float((Decimal(n) / denominator).exp()) for n in numerators]
    return torch.tensor(values, dtype=torch.float64, device=device)


def _chain(net: nn.Module) -> Iterator[nn.Module]:
    """Yield the layers of a network in turn."""
    if isinstance(net, nn.Sequential):
        for layer in net:
            yield from _chain(layer)
    else:
        made: Any = getattr(net, "as_convolution", lambda: net)
        yield made()


def _layer(layer: nn.Module) -> Callable[[Tensor], Tensor]:
    if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
        k, s = layer.kernel_size[0], layer.stride[0]
        form = layer.kernel_size, layer.stride, layer.padding, layer.output_padding
        plain = (layer.dilation, layer.groups, layer.padding_mode) == ((1, 1), 1, "zeros")
        if plain and k % 2 and k >= s and form == ((k, k), (s, s), (k // 2, k // 2), (s - 1, s - 1)):
            return _Convolution(layer)
    if isinstance(layer, nn.Linear):
        return _Convolution(one_by_one(layer.weight, layer.bias))
    if isinstance(layer, nn.PixelShuffle):
        return partial(_shuffle, layer)
    if isinstance(layer, nn.ReLU):
        return partial(torch.clamp, min=0)
    if isinstance(layer, nn.LeakyReLU) and 0 <= layer.negative_slope <= 1:
        return partial(leaky, round(layer.negative_slope * 2**SLOPE_BITS))
    if isinstance(layer, HalfTanh):
        return _half_tanh
    if isinstance(layer, DenormalizeGaussians):
        return IntegerGaussians(layer)
    raise LicError(f"the entropy model has a layer without a form in integers: {layer}", hint=_HINT)


def _shuffle(layer: nn.Module, x: Tensor) -> Tensor:
    shuffled: Tensor = layer(x.transpose(0, 1))
    return shuffled.transpose(0, 1)


def leaky(slope: int, x: Tensor) -> Tensor:
    return torch.where(x > 0, x, ((x * slope + 2.0 ** (SLOPE_BITS - 1)) * 2.0**-SLOPE_BITS).floor())


def _half_tanh(x: Tensor) -> Tensor:
    return torch.bucketize(x.abs(), _half_tanh_steps(x.device)) * x.sign()


@cache
def _half_tanh_steps(device: torch.device) -> Tensor:
    """Return the largest X of each half of tanh, 0 .. 2047 units."""
    half = 1 << UNIT_BITS - 1
    with localcontext(prec=40):
        steps = [float((half * (Decimal(2 * half + n) / (2 * half - n)).ln()) // 1) for n in range(1, 2 * half, 2)]
    return torch.tensor(steps, dtype=torch.float64, device=device)


def _clamp(x: Tensor, out: Tensor | None = None) -> Tensor:
    return torch.clamp(x, -LARGEST, LARGEST, out=out)
