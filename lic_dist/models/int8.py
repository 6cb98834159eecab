"""Layers with 8-bit weights and activations that compute in exact integers: the same pixels on every machine, whatever
its threads, strips, batch or backend.

Sun et al. quantize the transforms of learned codecs so, and retrain them layer by layer ("End-to-end Learned Image
Compression with Fixed Point Weight Quantization", 2020, arXiv 2007.04684; "Learned Image Compression with Fixed-point
Arithmetic", 2021).

The definition. Between layers a value stands for an integer X, x = X 2^-12; round() is to the nearest, a half to the
even one; u = 2^(q/4) is the unit of a channel that a layer reads, v that of the sums of a channel that it makes, q an
integer. Units, inverses and products with them are of float32, or of float64 where sums are, each rounded once.

    codes       a convolution reads A = clamp(round(x 1/u)) of 8 bits, -128 .. 127. The two layers of 1x1 that turn
                blocks into others, through which all of the picture passes, and those of h_s, whose ranges differ from
                photo to photo a hundredfold, read 16 bits, as two bytes
    fine        channels whose noise would weigh most (fine.py) are read in two codes: A = clamp(round(x 16/u)) / 16
                within -128 .. 128 - 1/16, H = floor(A) and L = 16 (A - H), 0 .. 15
    sums        W = clamp(round(w (u 1/v))) within -127 .. 127, w float32; B = clamp(round(b 1/v)) within -2^22 .. 2^22
                x = clamp(round((B + S) (2^12 v))) 2^-12 within -2^10 .. 2^10, of the last layer of a residual
                block within -2^9 .. 2^9: what a block adds to its input needs no clamp, 32 bits hold the sum.
                S is the sum of W A; where channels are fine, that of W H, and of W L over those, by 16, rounded
    GELU        x = u A', u of each channel, A' of a table of 2048: A = clamp(round(x 4/u)) within -1024 .. 1023,
                A' = round(GELU(u A / 4) / u) from the least of them on 256 values, which are the codes of 8 bits that
                the next layer reads; GELU(x) = x from 6 on, below that none is near a half. Of fine channels A =
                clamp(round(x 16/u)) within -4096 .. 4095, A' = round(16 GELU(u A / 16) / u) / 16, H of 256 values
    Gain        x = clamp(round(2^12 (gain y_hat))) 2^-12 within -2^10 .. 2^10, the product of float32
    LeakyReLU, DenormalizeGaussians    as models/integer.py has them

All of these are held by float32 exactly, and sums below 2^24 too, in any order: the shape of a layer bounds them. A
layer that could exceed that, or reads 16 bits, sums in float64. Sums are matrix products, for which TF32 and bf16 hold
codes and weights exactly. Where each channel reads itself they lie below 2^19, and are rounded: so even a convolution
by a transform, whose error is far below a half then, is exact. In training gradients pass rounding as if it were not
there (straight through), and a clamp where they lead back; a GELU has its own, as if its table had no end; sums of 16
bits are then those of float32.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lic_dist.models.integer import SLOPE_BITS, UNIT_BITS, IntegerGaussians, Taps, leaky
from lic_dist.models.layers import DenormalizeGaussians, FullPrecision, Gain, Residual, bounded

QUANTIZING = "quantizing to 8 bits"  # of an entry of a checkpoint's history: `what`
UNITS = 1 << UNIT_BITS  # in 1
REACH, BODY_REACH = 1 << 10, 1 << 9  # of what a layer makes, and the last one of a residual block
LARGEST_WEIGHT, LARGEST_BIAS = 127, 1 << 22
FINE = 16  # parts of a unit that the second code of a channel counts
LEAST_GELU, MOST_GELU = -36, 4  # q of the codes that a GELU makes
MOST_QUARTERS = 4 * 28  # the largest q, of either sign, of layers in files


class _Rounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        return values.round()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0]


class _Replaced(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, by: Tensor) -> Tensor:
        return by.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


def clamped(values: Tensor, largest: int, least: int | None = None) -> Tensor:
    """Return round(values), clamped to `least` (by default -largest) .. `largest`; differentiable, else in place."""
    least = -largest if least is None else least
    if values.requires_grad:
        rounded: Tensor = _Rounded.apply(values)
        return bounded(rounded, least, largest)
    return values.round_().clamp_(least, largest)


def units(quarters: Tensor) -> Tensor:
    """Return 2^(quarters/4), float32."""
    return _roots(quarters.device)[quarters.long() + 2 * MOST_QUARTERS]


@cache
def _roots(device: torch.device) -> Tensor:
    fractions = 1.0, math.sqrt(math.sqrt(2)), math.sqrt(2), math.sqrt(math.sqrt(8))
    exponents = range(-2 * MOST_QUARTERS, 2 * MOST_QUARTERS + 1)
    return torch.tensor([math.ldexp(fractions[q % 4], q // 4) for q in exponents], device=device)


def _planes(values: Tensor) -> Tensor:
    return values[:, None, None]


class Convolving(nn.Module):
    """What convolutions of 8 bits share: `reads` int32 [in] and `makes` int32 [out] are the q of the module's text,
    `fine` bool [in] says which channels are; it is None where all codes have 16 bits.

    `bits` are those of the codes; None where the input is a GELU's, codes already. A state_dict may have the W, int8,
    for the weight.
    """

    weight: Any
    bias: Any
    reads: Tensor
    makes: Tensor
    fine: Tensor | None
    groups: Any
    kernel_size: Any
    stride: Any
    padding: Any
    output_padding: Any
    in_channels: Any
    out_channels: Any

    def _begin(self, bits: int | None, reach: int) -> None:
        self.bits, self.reach = bits, reach
        self.register_buffer("reads", torch.zeros(self.in_channels, dtype=torch.int32))
        self.register_buffer("makes", torch.zeros(self.out_channels, dtype=torch.int32))
        self.register_buffer("fine", None if bits == 16 else torch.zeros(self.in_channels, dtype=torch.bool))
        transposed = isinstance(self, nn.ConvTranspose2d)
        taps = math.prod(-(-k // s) if transposed else k for k, s in zip(self.kernel_size, self.stride, strict=True))
        largest = 255 if bits is None else 1 << (bits - 1)
        most = self.in_channels // self.groups * taps * LARGEST_WEIGHT * largest + LARGEST_BIAS
        self.single = most < 1 << 24  # float32 holds every sum

    def scales(self) -> Tensor:
        """Return u / v of every weight, float32, to broadcast over the weight."""
        reads, makes = units(self.reads), units(-self.makes)
        if self.groups > 1:
            both = (makes * reads)[:, None]
        elif isinstance(self, nn.ConvTranspose2d):
            both = reads[:, None] * makes
        else:
            both = makes[:, None] * reads
        return both[:, :, None, None]

    def by_output(self, weight: Tensor) -> Tensor:
        """Return a weight as [out, in, taps]; of a depthwise layer `in` is 1."""
        return (weight.transpose(0, 1) if isinstance(self, nn.ConvTranspose2d) else weight).flatten(2)

    def integers(self) -> tuple[Tensor, Tensor]:
        """Return W and B, float32, of the shapes of weight and bias; differentiable."""
        W = clamped(self.weight * self.scales(), LARGEST_WEIGHT)
        return W, clamped(self.bias * units(-self.makes), LARGEST_BIAS)

    def codes(self, x: Tensor) -> Tensor:
        """Return A, float32, of x float32 [B, in, h, w]."""
        per_unit, largest = _planes(units(-self.reads)), 1 << (self.bits or 9) - 1
        A, at = clamped(x * per_unit, largest - 1, -largest), self.fine_channels()
        if len(at):
            finer = clamped(x[:, at] * (FINE * per_unit[at]), FINE * largest - 1, -FINE * largest) / FINE
            A = A.index_copy(1, at, finer) if A.requires_grad else A.index_copy_(1, at, finer)
        return A

    def fine_channels(self) -> Tensor:
        """Return the numbers of the channels that are read in two codes, int64."""
        return self.reads.new_zeros(0).long() if self.fine is None else self.fine.nonzero()[:, 0]

    def forward(self, x: Tensor) -> Tensor:
        """[B, in, h, w] float32 -> [B, out, ., .] float32, multiples of 2^-12."""
        with torch.autocast(x.device.type, enabled=False):
            A, (W, B) = self.codes(x.float()), self.integers()
            shift = _planes(units(4 * UNIT_BITS + self.makes))
            if A.requires_grad or W.requires_grad:
                return clamped(self._near(A, W, B) * shift, self.reach * UNITS) / UNITS
            return clamped(self._exact(A, W, B).mul_(shift), self.reach * UNITS).float().div_(UNITS)

    def _near(self, A: Tensor, W: Tensor, B: Tensor) -> Tensor:
        """Return B + sum of W A, differentiable; exact as far as float32 is."""
        if isinstance(self, nn.ConvTranspose2d):
            return F.conv_transpose2d(A, W, B, self.stride, self.padding, self.output_padding)  # type: ignore[arg-type]  # tuples
        return F.conv2d(A, W, B, self.stride, self.padding, groups=self.groups)

    def _exact(self, A: Tensor, W: Tensor, B: Tensor) -> Tensor:
        """Return B + S; in place of A."""
        if not self.single:
            return self._sums(A.double(), W.double(), B.double())
        at = self.fine_channels()
        if not len(at):
            return self._sums(A, W, B)
        fine = A[:, at]
        high = fine.floor()
        sums = self._sums(A.index_copy_(1, at, high), W, B)
        low = fine.sub_(high).mul_(FINE)
        if self.groups > 1:
            return sums.index_add_(1, at, self._sums(low, W[at], None).div_(FINE).round_())
        return sums.add_(self._sums(low, W[:, at], None).div_(FINE).round_())

    def _sums(self, A: Tensor, W: Tensor, B: Tensor | None) -> Tensor:
        """Return the sums of W A, and B where it is given."""
        if self.groups > 1:
            sums = F.conv2d(A, W, None, self.stride, self.padding, groups=len(W)).round_()
            return sums if B is None else sums.add_(_planes(B))
        if self.kernel_size == (1, 1):
            if A.stride(1) == 1 and A.shape[1] > 1:  # channels last
                return F.linear(A.permute(0, 2, 3, 1), W[:, :, 0, 0], B).permute(0, 3, 1, 2)
            sums = (W[:, :, 0, 0] @ A.flatten(2)).unflatten(2, A.shape[2:])
            return sums if B is None else sums.add_(_planes(B))
        form: Any = self
        start = W.new_zeros(len(self.makes)) if B is None else B
        return Taps(form, W)(A.transpose(0, 1), start[:, None]).transpose(0, 1)

    def settle(self) -> Tensor:
        """Set the weights to what their W stand for; return the W, int8."""
        W = self.integers()[0].detach().to(torch.int8)
        with torch.no_grad():
            self.weight.copy_(W / self.scales())
        return W

    def _load_from_state_dict(self, state: dict[str, Tensor], prefix: str, *rest: Any) -> None:
        weight = state.get(f"{prefix}weight")
        super()._load_from_state_dict(state, prefix, *rest)
        _check_units(self, ("reads", "makes"), -MOST_QUARTERS, MOST_QUARTERS, rest[-1])
        if weight is not None and weight.dtype == torch.int8:
            with torch.no_grad():
                self.weight.div_(self.scales())


def _check_units(layer: nn.Module, names: tuple[str, ...], least: int, most: int, errors: list[str]) -> None:
    """Add an error, and set units to 1, where a state_dict's are out of range."""
    for name in names:
        values = layer.get_buffer(name)
        if bool(((values < least) | (values > most)).any()):
            errors.append(f"{name} of a layer in 8 bits beyond {least} .. {most}")
            values.zero_()


class Convolution8(Convolving, nn.Conv2d):
    """A convolution of stride 1 in 8 bits."""

    def __init__(
        self, inner: int, outer: int, kernel: int, bits: int | None = 8, reach: int = REACH, **more: Any
    ) -> None:
        nn.Conv2d.__init__(self, inner, outer, kernel, **more)
        self._begin(bits, reach)


class Rotation8(Convolving, FullPrecision):
    """A convolution of 1x1 with weights of 8 bits that reads 16."""

    def __init__(self, inner: int, outer: int) -> None:
        nn.Conv2d.__init__(self, inner, outer, 1)
        self._begin(16, REACH)


class Transposed8(Convolving, nn.ConvTranspose2d):  # type: ignore[misc]  # its output has one size
    """A transposed convolution with weights of 8 bits that reads 16; its output is its stride times its input."""

    def __init__(self, inner: int, outer: int, kernel: int, **more: Any) -> None:
        nn.ConvTranspose2d.__init__(self, inner, outer, kernel, **more)
        self._begin(16, REACH)


@cache
def gelu_table(quarters: int, fine: bool) -> Tensor:
    """Return the A' of every A, float32 [2048], of fine channels [8192]; see the module's text."""
    unit, parts, entries = float(units(torch.tensor(quarters))), FINE if fine else 1, 8192 if fine else 2048
    inputs = torch.arange(-entries // 2, entries // 2, dtype=torch.float64) * (unit / (FINE if fine else 4))
    found = (gelu(inputs) * (parts / unit)).round()
    most = parts * (found.min().div(parts).floor() + 256) - 1
    return found.clamp(max=float(most)).div(parts).float()


def gelu(x: Tensor) -> Tensor:
    """Return x times the normal distribution's probability of less; x itself from 6 on, where that is 1 - 10^-9."""
    return torch.where(x >= 6, x, x * 0.5 * torch.special.erfc(-x / math.sqrt(2)))


@cache
def _gelu_tables(device: torch.device) -> Tensor:
    each = range(LEAST_GELU, MOST_GELU + 1)
    return torch.cat([gelu_table(q, fine) for fine in (False, True) for q in each]).to(device)


class Gelu8(nn.GELU):
    """GELU by a table, to codes whose q are `makes` int32 [C]; those of `fine` bool [C] in sixteenths."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("makes", torch.full((channels,), -4, dtype=torch.int32))
        self.register_buffer("fine", torch.zeros(channels, dtype=torch.bool))
        self.makes: Tensor
        self.fine: Tensor

    def _load_from_state_dict(self, state: dict[str, Tensor], prefix: str, *rest: Any) -> None:
        super()._load_from_state_dict(state, prefix, *rest)
        _check_units(self, ("makes",), LEAST_GELU, MOST_GELU, rest[-1])

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, h, w] float32 -> the same shape."""
        unit, parts = _planes(units(self.makes)), _planes(torch.where(self.fine, FINE, 4))
        half = _planes(torch.where(self.fine, 4096, 1024))
        A = (x * (parts * _planes(units(-self.makes)))).detach().round_().clamp_(-half, half - 1)
        numbers = self.makes - LEAST_GELU
        tables = torch.where(self.fine, 8192 * numbers + 2048 * (MOST_GELU + 1 - LEAST_GELU), 2048 * numbers)
        value = _gelu_tables(x.device)[A.int().add_(_planes(tables) + half).long()] * unit
        return _Replaced.apply(F.gelu(x), value) if x.requires_grad else value


class Gain8(Gain):
    """A gain whose product is rounded to a multiple of 2^-12."""

    def forward(self, y: Tensor) -> Tensor:
        """[B, M, h, w] float32 -> the same shape."""
        return clamped((y * _planes(self.gain)) * UNITS, REACH * UNITS) / UNITS


class Residual8(Residual):
    """A residual block in 8 bits, on multiples of 2^-12."""

    def __init__(self, channels: int, expansion: int = 2) -> None:
        nn.Module.__init__(self)
        self.body = nn.Sequential(
            Convolution8(channels, channels, 5, padding=2, groups=channels),
            Convolution8(channels, expansion * channels, 1),
            Gelu8(expansion * channels),
            Convolution8(expansion * channels, channels, 1, bits=None, reach=BODY_REACH),
        )


class LeakyReLU8(nn.LeakyReLU):
    """LeakyReLU on multiples of 2^-12."""

    def forward(self, x: Tensor) -> Tensor:
        """Any shape -> the same."""
        value = leaky(round(self.negative_slope * 2**SLOPE_BITS), x.detach().double() * UNITS).float() / UNITS
        return _Replaced.apply(super().forward(x), value) if x.requires_grad else value


class DenormalizeGaussians8(DenormalizeGaussians):
    """Scales and means that are multiples of 2^-12."""

    def forward(self, said: Tensor) -> Tensor:
        """[B, 2M, h, w] -> the same shape, scales first."""
        X = (said.detach().double() * UNITS).transpose(0, 1)
        value = (IntegerGaussians(self)(X).transpose(0, 1) / UNITS).float()
        return _Replaced.apply(super().forward(said), value) if said.requires_grad else value
