"""A slim model of a larger one: the `block-transform` with fewer residual blocks, and fewer channels within each.

Of the residual blocks in a row the first are kept: without the first one on the grid of 8x8 pixels g_s is 13 dB worse
on screenshots, without another one there 5 dB. Of the channels within a block those are kept that weigh most: the norm
of what makes a channel times the norm of what is made of it, after Li et al. 2017 ("Pruning filters for efficient
ConvNets", arXiv 1608.08710). With pictures at hand the last layer of each row is then fitted by least squares, so that
the row makes of them what the larger model's row does. The slim model is to be trained all the same.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from lic_dist.errors import LicError
from lic_dist.models.layers import Residual

DEPTH, EXPANSION = 3, 2  # of the usual size: blocks on each grid, each way; channels within each by its own
RIDGE = 1e-4  # of least squares, as a part of the features' mean energy
_WITHIN = re.compile(r"g_s\.\d+\.body\.1\.weight")


def slimness(state: Mapping[str, Tensor]) -> dict[str, int]:
    """Return `depth` and `expansion` of a block transform's state_dict; nothing of one with other residual blocks."""
    within = [value for name, value in state.items() if _WITHIN.fullmatch(name)]
    if len(within) < 2:
        return {}
    return {"depth": len(within) // 2, "expansion": within[0].size(0) // within[0].size(1)}


@torch.no_grad()
def take_from(small: Any, large: Any, x: Tensor | None = None) -> None:
    """Set the weights of a block transform to those of a larger one, as far as it has room for them; fit them to it on
    pictures x [n, 3, H, W] in [0, 1], where these are given.

    Raises:
        LicError: it is larger in something, or has other channels of y or z.
    """
    if (small.N, small.M) != (large.N, large.M):
        raise LicError(f"a slim model has the N={large.N} and M={large.M} of the one that it starts from")
    for name in ("h_a", "h_s"):
        getattr(small, name).load_state_dict(getattr(large, name).state_dict())
    bottlenecks = (model.entropy_bottleneck.parameters() for model in (small, large))  # its tables are made later
    for value, source in zip(*bottlenecks, strict=True):
        value.copy_(source)
    for name in ("g_a", "g_s"):
        for ours, theirs in zip(_rows(getattr(small, name)), _rows(getattr(large, name)), strict=True):
            if len(ours) > len(theirs):
                raise LicError(f"a slim model has at most depth {len(theirs)}, as the one that it starts from")
            for layer, source in zip(ours, theirs, strict=False):
                if isinstance(layer, Residual):
                    _take_channels(layer.body, source.body)
                else:
                    layer.load_state_dict(source.state_dict())
    if x is not None:
        _fit(small.g_a, large.g_a, x)
        _fit(small.g_s, large.g_s, large.g_a(x).round())


def _fit(small: nn.Module, large: nn.Module, x: Tensor) -> None:
    """Fit the rows of residual blocks of a network to those of a larger one, one after another, each on what the rows
    before it make of x.
    """
    ours = theirs = x
    for row, source in zip(_rows(small), _rows(large), strict=True):
        theirs = nn.Sequential(*source)(theirs)
        for number, layer in enumerate(row):
            if isinstance(layer, Residual) and number == len(row) - 1:
                _solve(layer.body[3], layer.body[:3](ours), theirs - ours)
            ours = layer(ours)


def _solve(layer: Any, features: Tensor, target: Tensor) -> None:
    """Set a convolution of 1x1 to the one that makes the target [n, C, h, w] of features [n, D, h, w], nearly."""
    columns = nn.functional.pad(features.transpose(0, 1).flatten(1).double(), (0, 0, 0, 1), value=1.0)
    moments = columns @ columns.T
    moments.diagonal().add_(RIDGE * moments.diagonal().mean())
    found = torch.linalg.solve(moments, columns @ target.transpose(0, 1).flatten(1).double().T).float()
    layer.weight.copy_(found[:-1].T[:, :, None, None])
    layer.bias.copy_(found[-1])


def _rows(net: nn.Module) -> list[list[Any]]:
    """Return the layers of a network: residual blocks that follow each other in a row, and others in rows too."""
    return [list(row) for _, row in groupby(net.children(), lambda layer: isinstance(layer, Residual))]


def _take_channels(ours: Any, theirs: Any) -> None:
    """Set a residual block's layers to those of one with at least as many channels within."""
    count, into, out_of = len(ours[1].weight), theirs[1].weight, theirs[3].weight
    if count > len(into):
        raise LicError("a slim model has at most the expansion of the one that it starts from")
    kept = (into.flatten(1).norm(dim=1) * out_of.flatten(1).norm(dim=0)).topk(count).indices.sort().values
    ours[0].load_state_dict(theirs[0].state_dict())
    ours[1].weight.copy_(into[kept])
    ours[1].bias.copy_(theirs[1].bias[kept])
    ours[3].weight.copy_(out_of[:, kept])
    ours[3].bias.copy_(theirs[3].bias)
