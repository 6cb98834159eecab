"""Adapters: few parameters beside a model's own, which train in their place and become a pack (packs.py).

Each weight W that a part names computes as W + A, where A is low-rank, of matrices (a convolution of k x k is one, of
its first axis by all others), and free of vectors, kernels of single channels and matrices that are too small to save
by it. That a codec follows a domain of 25 pictures by small convolutional and low-rank adapters, its own weights fixed,
is shown by Zhang et al. ("Few-Shot Domain Adaptation for Learned Image Compression", arXiv 2409.11111), who put them
between the layers of both transforms. Here the encoder stays, and an adapter lies within a weight (low-rank adaptation,
Hu et al. 2021, arXiv 2106.09685): merged, it costs no time, and nothing else needs to know of it.

    names = attach(model, {"decoder": 32, "hyper": 8}, seed=0)      # zero at the start; train these alone
    deltas = detach(model)                                          # the model is as before, the deltas in integers
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lic_dist.models.packs import Delta
from lic_dist.models.parts import trainable

SPREAD = 0.05  # standard deviation of the right factors at the start, where the left ones are zero
PACE = 10  # factors move so many times as fast as free numbers: what is added is a product of two, both small
SAVES = 2  # low rank takes at most this part of the numbers


class LowRank(nn.Module):
    """W + PACE^2 left right, the factors [rows, rank] and [rank, columns]."""

    def __init__(self, weight: Tensor, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        columns = math.prod(weight.shape[1:])
        self.left = nn.Parameter(torch.zeros(len(weight), rank, device=weight.device))
        right = SPREAD / PACE * torch.randn(rank, columns, generator=generator)
        self.right = nn.Parameter(right.to(weight.device))

    def forward(self, weight: Tensor) -> Tensor:
        """Any shape -> the same."""
        return weight + (PACE**2 * self.left @ self.right).view(weight.shape)

    def delta(self, shape: tuple[int, ...]) -> Delta:
        """Return A in integers."""
        return Delta.of_factors(shape, PACE * self.left, PACE * self.right)


class Free(nn.Module):
    """W + values, of W's shape."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.values = nn.Parameter(torch.zeros_like(weight))

    def forward(self, weight: Tensor) -> Tensor:
        """Any shape -> the same."""
        return weight + self.values

    def delta(self, shape: tuple[int, ...]) -> Delta:
        """Return A in integers."""
        return Delta.free(self.values)


def attach(model: nn.Module, ranks: Mapping[str, int], seed: int) -> tuple[str, ...]:
    """Put adapters of these ranks beside the weights of parts, as `trainable` names them; return the names of their
    parameters. Of two parts with one weight the first counts. Weights under a mask (raster-scan contexts) stay as they
    are.

    Raises:
        UsageError: nothing is named so.
    """
    generator = torch.Generator().manual_seed(seed)
    rank_of: dict[str, int] = {}
    for part, rank in ranks.items():
        rank_of = dict.fromkeys(trainable(model, (part,)), rank) | rank_of
    for name, rank in rank_of.items():
        path, _, attribute = name.rpartition(".")
        owner = model.get_submodule(path)
        weight = getattr(owner, attribute).detach()
        if isinstance(getattr(owner, "mask", None), Tensor) and attribute == "weight":
            continue
        rows, columns = len(weight), math.prod(weight.shape[1:])
        small = SAVES * rank * (rows + columns) > rows * columns or getattr(owner, "groups", 1) > 1
        adapter = Free(weight) if weight.dim() < 2 or small else LowRank(weight, rank, generator)
        parametrize.register_parametrization(owner, attribute, adapter)
    return tuple(name for name, _ in model.named_parameters() if _is_adapters(name))


def _is_adapters(name: str) -> bool:
    return ".parametrizations." in name and not name.endswith(".original")


def _attached(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """Yield each weight with an adapter: its name, its module, and the attribute of that."""
    for path, owner in list(model.named_modules()):
        for attribute in list(getattr(owner, "parametrizations", ())):
            yield f"{path}.{attribute}".lstrip("."), owner, attribute


def detach(model: nn.Module) -> dict[str, Delta]:
    """Take the adapters off a model, whose own weights are as they were; return them in integers, by weight, but
    for those that add nothing.
    """
    found: dict[str, Delta] = {}
    for name, owner, attribute in _attached(model):
        held: Any = owner.parametrizations
        delta = held[attribute][0].delta(tuple(held[attribute].original.shape))
        found |= {} if delta.is_zero else {name: delta}
        parametrize.remove_parametrizations(owner, attribute, leave_parametrized=False)
    return found
