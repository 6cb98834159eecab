"""Receptive fields along one axis: which inputs of a network its outputs depend on.

Of chains of convolutions they follow from kernels, strides and paddings. A module with branches, such as a residual or
attention block, is probed once: inputs with one row that is not a number show which outputs that row reaches.
"""

from __future__ import annotations

from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import nn

from lic_dist.errors import LicError
from lic_dist.models.layers import Residual

PROBED, WIDTH = 64, 16  # rows and columns of a probe
_CONVOLUTIONS = (nn.Conv2d, nn.ConvTranspose2d, nn.PixelShuffle, nn.PixelUnshuffle)


class _Field(NamedTuple):
    """The field of a probed module: `reads` rows in for `writes` rows out, and by output row, modulo `writes`, the
    first and the last input row relative to the first row of its unit.
    """

    reads: int
    writes: int
    bounds: tuple[tuple[int, int], ...]


_probed: WeakKeyDictionary[nn.Module, _Field] = WeakKeyDictionary()


def receptive_field(network: nn.Module, first: int, last: int) -> tuple[int, int]:
    """Return the inputs first..last-1 on which outputs first..last-1 depend along one axis; they may exceed the
    borders.

    Raises:
        LicError: a module whose outputs depend on inputs however far away.
    """
    if isinstance(network, nn.PixelUnshuffle):
        return first * network.downscale_factor, last * network.downscale_factor
    if isinstance(network, nn.PixelShuffle):
        return first // network.upscale_factor, -(-last // network.upscale_factor)
    if isinstance(network, nn.ConvTranspose2d):
        kernel, stride, padding = _axis(network)
        return -((kernel - 1 - padding - first) // stride), (last - 1 + padding) // stride + 1
    if isinstance(network, nn.Conv2d):
        kernel, stride, padding = _axis(network)
        return first * stride - padding, (last - 1) * stride - padding + kernel
    if is_pointwise(network):
        return first, last
    if isinstance(network, nn.Sequential | Residual):  # a residual adds its chain to its input
        for layer in reversed(list(network.children())):
            first, last = receptive_field(layer, first, last)
        return first, last
    field = _field(network)
    (low, _), (_, high) = (field.bounds[row % field.writes] for row in (first, last - 1))
    return first // field.writes * field.reads + low, (last - 1) // field.writes * field.reads + high + 1


def scale(layer: nn.Module) -> tuple[int, int]:
    """Return how many rows of its input a layer takes for how many of its output, in lowest terms; for a layer that is
    no chain of others.
    """
    if isinstance(layer, nn.PixelUnshuffle):
        return layer.downscale_factor, 1
    if isinstance(layer, nn.PixelShuffle):
        return 1, layer.upscale_factor
    if isinstance(layer, nn.ConvTranspose2d):
        return 1, _axis(layer)[1]
    if isinstance(layer, nn.Conv2d):
        return _axis(layer)[1], 1
    if isinstance(layer, Residual) or is_pointwise(layer):
        return 1, 1
    field = _field(layer)
    return field.reads, field.writes


def _field(module: nn.Module) -> _Field:
    return _probed.get(module) or _probed.setdefault(module, _probe(module))


def is_pointwise(network: nn.Module) -> bool:
    """Return whether each output depends on the input at its own position alone; a 1x1 convolution is one such."""
    if getattr(network, "pointwise", False):
        return True
    inner = [layer for layer in network.modules() if isinstance(layer, _CONVOLUTIONS)]
    plain = (layer for layer in inner if isinstance(layer, nn.Conv2d))
    return len([one for one in plain if _axis(one) == (1, 1, 0)]) == len(inner)


@torch.no_grad()
def _probe(module: nn.Module) -> _Field:
    """Return the field of a module, of which no output row depends on how far the borders are."""
    convolution = next(layer for layer in module.modules() if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d))
    inputs = torch.zeros(1, convolution.in_channels, PROBED, WIDTH, device=convolution.weight.device)
    rows = module(inputs).shape[2]
    reads, writes = max(1, PROBED // rows), max(1, rows // PROBED)
    middle = PROBED // 2 // reads * reads
    bounds = [(PROBED, -PROBED)] * writes
    for row in range(PROBED):
        inputs[:, :, row] = torch.nan
        reached = module(inputs).isnan().any(3).any(1)[0]
        inputs[:, :, row] = 0
        for number, (low, high) in enumerate(bounds):
            if reached[middle // reads * writes + number]:
                bounds[number] = min(low, row - middle), max(high, row - middle)
    if any(low <= -middle or high >= PROBED - 1 - middle for low, high in bounds):
        raise LicError(f"{type(module).__name__} depends on inputs too far away for tiles", hint="code smaller ones")
    return _Field(reads, writes, tuple(bounds))


def _axis(layer: nn.Conv2d | nn.ConvTranspose2d) -> tuple[int, int, int]:
    """Return kernel, stride and padding, which are the same along both axes in every model served."""
    return layer.kernel_size[0], layer.stride[0], int(layer.padding[0])
