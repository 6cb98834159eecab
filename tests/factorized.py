"""Models whose y has a factorized prior, with distributions that are skewed about medians other than 0."""

from __future__ import annotations

import copy
from functools import cache

import torch

from lic_dist.models.checkpoint import Checkpoint
from tests.codec.test_families import made

NAMES = ("bmshj2018-factorized", "bmshj2018-factorized-relu")


@cache
def skewed(name: str = NAMES[0]) -> Checkpoint:
    """`made`, with a prior whose tails differ: y of each channel is scaled to roughly what it says."""
    loaded = copy.deepcopy(made(name))
    prior = loaded.model.entropy_bottleneck
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for one in (*prior.biases, *prior.factors):
            one.copy_(0.8 * torch.randn(one.shape, generator=generator))
        for one in prior.matrices:
            one.add_(0.6 * torch.rand(one.shape, generator=generator))
        prior._update_quantiles()
        loaded.model.g_a[6].bias.add_(prior.quantiles[:, 0, 1])
    loaded.model.update(force=True)
    return loaded
