"""Find the quantiles of the factorized priors, which bound their integer tables: where a prior's cumulative logits are
those of half the tail mass, of one half, and of the rest. CompressAI trains them by an auxiliary loss.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

WIDEST = 2.0**20  # no quantile of a prior lies beyond it
HALVINGS = 64  # of twice that: less than float32 tells apart


@torch.no_grad()
def fit_quantiles(model: nn.Module, with_medians: bool = True) -> float:
    """Set the quantiles of all factorized priors of a model by bisection; return CompressAI's auxiliary loss: the sum
    of the logits' distances from their targets.

    `with_medians` False keeps the medians, which a hyper-decoder needs that was trained on z rounded about them.
    """
    priors: list[Any] = [layer for layer in model.modules() if "quantiles" in layer._parameters]
    loss = 0.0
    for prior in priors:
        low, high = torch.full_like(prior.quantiles, -WIDEST), torch.full_like(prior.quantiles, WIDEST)
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            below = prior._logits_cumulative(middle, stop_gradient=True) < prior.target
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        fitted = [0, 1, 2] if with_medians else [0, 2]
        prior.quantiles[..., fitted] = high[..., fitted]
        logits = prior._logits_cumulative(prior.quantiles, stop_gradient=True)
        loss += float((logits - prior.target)[..., fitted].abs().sum())
    return loss
