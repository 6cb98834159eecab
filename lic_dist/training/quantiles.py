"""Train the quantiles of the priors, which bound their integer tables, by CompressAI's auxiliary loss alone, without
data.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

AUXILIARY_SMALL = 0.02  # per channel of a prior
QUANTILE_PHASES = 10


def train_quantiles(model: nn.Module, steps: int, with_medians: bool = True, rate: float = 1e-1) -> float:
    """Train the quantiles of all factorized priors of a model until the auxiliary loss is small; return the loss.

    Runs phases of `steps` steps, each with its own cosine schedule, until the loss is below AUXILIARY_SMALL a channel:
    priors with long tails need quantiles far from where they start. `with_medians` False keeps the medians, which a
    hyper-decoder needs that was trained on z rounded about them.
    """
    priors: list[Any] = [layer for layer in model.modules() if "quantiles" in layer._parameters]
    model.requires_grad_(False)
    quantiles = [prior.quantiles.requires_grad_(True) for prior in priors]
    optimizer = torch.optim.Adam(quantiles, lr=rate)
    trained = [0, 1, 2] if with_medians else [0, 2]

    def auxiliary_loss() -> Tensor:
        logits = [prior._logits_cumulative(prior.quantiles, stop_gradient=True) - prior.target for prior in priors]
        return torch.cat(logits).abs()[..., trained].sum()

    for _ in range(QUANTILE_PHASES):
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = rate * (1e-3 + (1 - 1e-3) * 0.5 * (1 + math.cos(math.pi * step / steps)))
            optimizer.zero_grad()
            auxiliary_loss().backward()
            optimizer.step()
        if (loss := float(auxiliary_loss().detach())) < AUXILIARY_SMALL * sum(map(len, quantiles)):
            break
    return loss
