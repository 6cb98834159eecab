"""Which channels of a decoder in 8 bits (int8.py) are read in two codes: those whose noise would weigh most in the
picture for what a second code costs.

What the codes of a channel would err by in 8 bits is measured on samples; how much of an error reaches the picture, as
in the sensitivities of latents: the squared gradient of v^T x_hat, v of random signs, summed over positions (Hutchinson
1990). In the first order errors of channels add up.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from lic_dist.models.int8 import Convolving, Gelu8, units
from lic_dist.models.layers import Residual
from lic_dist.models.protocol import CodecModel
from lic_dist.models.ranges import best_gelu, best_units, rows_of, some_of


class _Read(NamedTuple):
    """What a layer of 8 bits reads: the values [n, C, h, w] of floats; the GELU that makes them, and what it reads."""

    layer: Convolving
    values: Tensor
    gelu: Gelu8 | None
    before: Tensor


def choose_fine(made: CodecModel, parent: CodecModel, y_hat: Tensor, share: float) -> None:
    """Set which channels of g_s of `made` are fine, so that of all multiplications by codes of 8 bits a `share` is done
    twice. y_hat float32 [n, M, h, w].
    """
    x, reads = y_hat, list[_Read]()
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        for layer_8, layer in zip(made.nets["g_s"].children(), parent.nets["g_s"].children(), strict=True):
            x = _through(layer_8, layer, x, reads) if isinstance(layer, Residual) else layer(x)
        signs = torch.randint(0, 2, x.shape, generator=torch.Generator().manual_seed(0)).to(x) * 2 - 1
        gradients = torch.autograd.grad(x, [one.values for one in reads], signs)
    weighs, costs = [], []
    for one, gradient in zip(reads, gradients, strict=True):
        reaching = rows_of(gradient).square().sum(1)
        weighs.append(_error(one) * reaching)
        positions = gradient[:, 0].numel()
        costs.append(torch.full_like(reaching, one.layer.weight.numel() / one.layer.in_channels * positions))
    cost = torch.cat(costs)
    order = (torch.cat(weighs) / cost).argsort(descending=True)
    taken = torch.zeros_like(order, dtype=torch.bool)
    taken[order] = cost[order].cumsum(0) <= share * cost.sum()
    for one, fine in zip(reads, taken.split([len(each) for each in costs]), strict=True):
        for layer in (one.layer, one.gelu) if one.gelu else (one.layer,):
            layer.get_buffer("fine").copy_(fine)


def _through(block_8: nn.Module, block: Residual, x: Tensor, reads: list[_Read]) -> Tensor:
    """Return what a residual block makes of x; add what its convolutions read."""
    inner = before = x
    gelu = None
    for layer_8, layer in zip(block_8.get_submodule("body").children(), block.body, strict=True):
        if isinstance(layer_8, Convolving | Gelu8):
            layer_8.get_buffer("fine").zero_()  # errors are those of 8 bits
        if isinstance(layer_8, Convolving):
            inner = inner * 1  # a branch of its own: what is read here alone
            reads.append(_Read(layer_8, inner, gelu, before))
        gelu, before = layer_8 if isinstance(layer_8, Gelu8) else None, inner
        inner = layer(inner)
    return x + inner


@torch.no_grad()
def _error(one: _Read) -> Tensor:
    """Return the mean square of what codes of 8 bits err by, [C]."""
    if one.gelu:
        values = some_of(rows_of(one.before))
        one.gelu.makes.copy_(best_gelu(one.gelu, values))
        return (one.gelu(values[None, :, None])[0, :, 0] - nn.functional.gelu(values)).square().mean(1)
    values = some_of(rows_of(one.values))
    one.layer.reads.copy_(best_units(one.layer, values))
    codes = one.layer.codes(values[None, :, None])[0, :, 0]
    return (codes * units(one.layer.reads)[:, None] - values).square().mean(1)
