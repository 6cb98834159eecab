"""Train the quantiles of the priors, which bound their integer tables, by CompressAI's auxiliary loss alone, without
data.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

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
    cumulative = [_logits_cumulative(prior) for prior in priors]

    def auxiliary_loss() -> Tensor:
        logits = [of(prior.quantiles) - prior.target for of, prior in zip(cumulative, priors, strict=True)]
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


def _logits_cumulative(prior: Any) -> Callable[[Tensor], Tensor]:
    """Return a prior's `_logits_cumulative` under its present weights: what depends on them alone is made once."""
    if not hasattr(prior, "matrices"):  # EntropyBottleneckVbr names its weights otherwise
        return partial(prior._logits_cumulative, stop_gradient=True)
    matrices = [softplus(one.detach()) for one in prior.matrices]
    biases = [one.detach() for one in prior.biases]
    factors = [torch.tanh(one.detach()) for one in prior.factors]

    def logits_of(values: Tensor) -> Tensor:
        for layer, (matrix, bias) in enumerate(zip(matrices, biases, strict=True)):
            values = torch.matmul(matrix, values) + bias
            if layer < len(factors):
                values = values + factors[layer] * torch.tanh(values)
        return values

    return logits_of
