"""Make the layers of a decoder in 8 bits (int8.py) those of a trained one: units, and weights layer by layer.

A unit is a power of the fourth root of two for each channel, that of the least squared error: from the range that clips
nothing down to an eighth of it; or a larger one, where that makes W less coarse. Weights are the nearest of 8 bits; or,
retrained, those of layers of 1x1 are asked, on what the quantized layers before them make, for the output of the
floats' layers: by least squares, and then rounded channel by channel so that errors cancel. So each layer undoes what
it can of the errors before it (Nagel et al. 2020, "Up or Down? Adaptive Rounding for Post-Training Quantization", arXiv
2004.10568; Li et al. 2021, "BRECQ: Pushing the Limit of Post-Training Quantization by Block Reconstruction"; Frantar et
al. 2022, "GPTQ", arXiv 2210.17323).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from lic_dist.models.int8 import (
    FINE,
    LARGEST_BIAS,
    LARGEST_WEIGHT,
    LEAST_GELU,
    MOST_GELU,
    Convolving,
    Gelu8,
    Residual8,
    units,
)
from lic_dist.models.protocol import CodecModel

STEPS = 12  # units that are tried, a fourth root of two apart
LEAST, MOST = -24, 24  # of units, as powers of two
LEAST_Z = -20  # unit of z: a z that no sample shows, 4 from 0 at most, is read
RARE = 0.05  # of the mean power of channels: what one is taken to have at least, however rarely samples show it
DAMPING = 1e-3  # of the mean power of codes
ROUNDING = 0.3  # what is left of the error of W by rounding them together
TRADES = (8, 4, 4, 2, 2, -2, 1, 1, -1)  # of q
TRIED = 1 << 11  # positions that units are tried on, about


@torch.no_grad()
def fit(made: CodecModel, parent: CodecModel, z_hat: Tensor, y_hat: Tensor, retrained: bool) -> None:
    """Fit `made`, which has the parent's weights, in place, to z_hat [n, N, hz, wz] and y_hat [n, M, h, w], float32."""
    for net, values in (("h_s", z_hat), ("g_s", y_hat)):
        x = x_8 = values
        for layer_8, layer in _pairs(made.nets[net], parent.nets[net]):
            if isinstance(layer_8, Residual8):
                aim = layer(x)
                _fit_body(layer_8, layer, x, x_8, aim, retrained)
            elif isinstance(layer_8, Convolving):
                aim = layer(x)
                best = best_units(layer_8, some_of(rows_of(x_8)))
                best = best.clamp(min=LEAST_Z) if x_8 is z_hat else best
                _fit_convolution(layer_8, layer, x_8, aim if retrained else None, best)
            else:
                aim = layer(x)
            x, x_8 = aim, layer_8(x_8) if retrained else aim


def _pairs(made: nn.Module, parent: nn.Module) -> Iterator[tuple[nn.Module, nn.Module]]:
    yield from zip(made.children(), parent.children(), strict=True)


def _fit_body(block_8: Residual8, block: nn.Module, x: Tensor, x_8: Tensor, aim: Tensor, retrained: bool) -> None:
    """Fit a residual block that makes `aim` of x, and is to make it of x_8."""
    inner, inner_8, gelu = x, x_8, Gelu8(1)
    for layer_8, layer in _pairs(block_8.body, block.get_submodule("body")):
        made = layer(inner)
        if isinstance(layer_8, Gelu8):
            layer_8.makes.copy_(best_gelu(layer_8, some_of(rows_of(inner_8))))
            gelu = layer_8
        elif isinstance(layer_8, Convolving):
            last = layer_8.bits is None
            best = gelu.makes if last else best_units(layer_8, some_of(rows_of(inner_8)))
            wanted = aim - x_8 if last else made
            _fit_convolution(layer_8, layer, inner_8, wanted if retrained else None, best)
            if last:
                gelu.makes.copy_(layer_8.reads)
        inner, inner_8 = made, layer_8(inner_8) if retrained else made


def _fit_convolution(layer_8: Convolving, layer: nn.Module, values: Tensor, aim: Tensor | None, best: Tensor) -> None:
    """Set units and weights of a layer that reads values [n, C, h, w]; those of 1x1 so that it makes `aim`, if given.

    `best` are units that hold the values best.
    """
    rows = rows_of(values)
    pointwise = layer_8.kernel_size == (1, 1)
    layer_8.reads.copy_(_traded(layer_8, rows.square().mean(1), best) if layer_8.groups == 1 else best)
    if pointwise and aim is not None:
        _solve(layer_8, rows, rows_of(aim))
    _fit_weights(layer_8, rows)
    if pointwise and aim is not None:
        _round_together(layer_8, rows)


def _traded(layer: Convolving, moments: Tensor, best: Tensor) -> Tensor:
    """Return the units q of what a layer reads, no less than `best`, of the least error of what it makes.

    The larger the unit of a channel, the larger its W and the smaller its codes: the less weighs the rounding of W, and
    the more that of codes, which are of the second order where they are fine. The largest W of an output sets its unit.
    """
    weight = layer.by_output(layer.weight)
    peaks, moments = weight.abs().amax(2) / LARGEST_WEIGHT, moments + RARE * moments.mean()
    by_codes = weight.square().sum((0, 2))
    if layer.fine is not None:
        by_codes = by_codes / torch.where(layer.fine, FINE**2, 1)
    by_weights = ROUNDING * weight.shape[2] * moments

    def error(quarters: Tensor) -> float:
        unit = units(quarters)
        v = (peaks * unit).amax(1)
        return float((by_codes * unit.square()).sum() + v.square().sum() * (by_weights / unit.square()).sum())

    chosen, least = best.clone(), error(best)
    for step in TRADES:
        for channel in range(len(best)):
            tried = chosen.clone()
            tried[channel] = max(int(best[channel]), int(chosen[channel]) + step)
            found = error(tried)
            if found < least:
                chosen, least = tried, found
    return chosen


def rows_of(values: Tensor) -> Tensor:
    return values.transpose(0, 1).flatten(1)


def some_of(rows: Tensor) -> Tensor:
    return rows[:, :: max(1, rows.shape[1] // TRIED)].contiguous()


def best_units(layer: Convolving, values: Tensor) -> Tensor:
    """Return the units q int32 [C] of the codes in which a layer is to read values [C, positions]."""
    bits = layer.bits or 8
    largest = 1 << (bits - 1)
    fine = layer.fine if layer.fine is not None else torch.zeros_like(layer.reads, dtype=torch.bool)
    parts = torch.where(fine, FINE, 1)[:, None]
    widest = 4 * torch.frexp(values.abs().amax(1) / (largest - 1)).exponent  # above what is divided
    tried = [(widest - step).clamp(4 * LEAST, 4 * MOST) for step in range(STEPS)]
    errors = []
    for quarters in tried:
        part = units(quarters)[:, None] / parts
        codes = torch.minimum((values / part).round().clamp(min=-largest * parts), largest * parts - 1)
        errors.append((codes * part - values).square().mean(1))
    return _least(tried, errors)


def best_gelu(gelu: Gelu8, values: Tensor) -> Tensor:
    """Return the units q int32 [C] of the codes of a GELU for what it makes of values [C, positions]."""
    exact = nn.functional.gelu(values)
    tried = [torch.full_like(gelu.makes, q) for q in range(LEAST_GELU, MOST_GELU + 1)]
    before, errors = gelu.makes.clone(), []
    for quarters in tried:
        gelu.makes.copy_(quarters)
        errors.append((gelu(values[None, :, None])[0, :, 0] - exact).square().mean(1))
    gelu.makes.copy_(before)
    return _least(tried, errors)


def _fit_weights(layer: Convolving, values: Tensor) -> None:
    """Set the unit of each output channel so that the weights' error weighs least in its sums of values [C, positions].

    Weights are left as they are: their nearest ones of 8 bits are meant.
    """
    moments = values.square().mean(1)
    moments = moments + RARE * moments.mean()
    read = units(layer.reads)
    scaled = layer.by_output(layer.weight)  # [out, in, taps]
    apart = (slice(None), None, None) if layer.groups > 1 else (slice(None), None)
    scaled, weighs = scaled * read[apart], (moments / read.square())[apart]
    widest = 4 * torch.frexp(scaled.abs().amax((1, 2)) / LARGEST_WEIGHT).exponent
    least = 4 * torch.frexp(layer.bias.abs() / LARGEST_BIAS).exponent
    tried = [torch.maximum(widest - step, least).clamp(4 * LEAST, 4 * MOST) for step in range(STEPS)]
    errors = []
    for quarters in tried:
        unit = units(quarters)[:, None, None]
        W = (scaled / unit).round().clamp(-LARGEST_WEIGHT, LARGEST_WEIGHT)
        errors.append(((W * unit - scaled).square() * weighs).sum((1, 2)))
    layer.makes.copy_(_least(tried, errors))


def _least(tried: list[Tensor], errors: list[Tensor]) -> Tensor:
    best = torch.stack(errors).argmin(0)
    return torch.stack(tried).gather(0, best[None])[0].int()


def _solve(layer: Convolving, values: Tensor, aim: Tensor) -> None:
    """Set weight and bias of a layer of 1x1 to those that make `aim` [out, positions] of the codes of values."""
    A = layer.codes(values[None, :, None])[0, :, 0].double()
    scale = units(layer.reads).double()
    W = layer.weight[:, :, 0, 0].double() * scale
    missing = aim.double() - W @ A - layer.bias.double()[:, None]
    mean, lacking = A.mean(1, keepdim=True), missing.mean(1, keepdim=True)
    about = A - mean
    change = torch.linalg.solve(_square(about), about @ (missing - lacking).t() / A.shape[1]).t()
    layer.weight.copy_(((W + change) / scale)[:, :, None, None])
    layer.bias.add_((lacking - change @ mean)[:, 0])


def _square(A: Tensor) -> Tensor:
    """Return the mean of A A^T [C, C] over positions, with some power added to each channel."""
    square = A @ A.t() / A.shape[1]
    return square + DAMPING * square.diagonal().mean() * torch.eye(len(square), dtype=A.dtype, device=A.device)


def _round_together(layer: Convolving, values: Tensor) -> None:
    """Round the weights of a layer of 1x1 one channel that it reads after the other, those that are left making up for
    the error so far in its sums of values [C, positions] (GPTQ).
    """
    square = _square(layer.codes(values[None, :, None])[0, :, 0].double())
    order = square.diagonal().argsort(descending=True)
    factor = torch.linalg.cholesky(torch.linalg.inv(square[order][:, order]), upper=True)
    scale = layer.scales()[:, :, 0, 0].double()
    left = (layer.weight[:, :, 0, 0].double() * scale)[:, order]
    for at in range(len(order)):
        rounded = left[:, at].round().clamp(-LARGEST_WEIGHT, LARGEST_WEIGHT)
        error = (left[:, at] - rounded) / factor[at, at]
        left[:, at] = rounded
        left[:, at + 1 :] -= error[:, None] * factor[at, at + 1 :]
    W = torch.empty_like(left)
    W[:, order] = left
    layer.weight.copy_((W / scale)[:, :, None, None])
