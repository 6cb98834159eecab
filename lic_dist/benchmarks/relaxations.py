"""Refinement of y that relaxes the quantizer away: the baselines of `lic-dist bench refine`.

descent   steps of Adam of y itself, as if it were y_hat: Campos et al. 2019, Content Adaptive Optimization for Neural
          Image Compression
SGA       annealed stochastic rounding: Yang, Bamler and Mandt 2020, Improving Inference for Neural Image Compression,
          section 3.2; y is drawn between floor and ceil in each pass, then rounded
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lic_dist.models.protocol import CodecModel, Sides
from lic_dist.models.refine import Refinement, costs_and_gradient
from lic_dist.models.stages import bits_of, only_stage

RATE, BETAS = 0.15, (0.7, 0.99)  # of descent's Adam, chosen on training crops for few steps
ITERATIONS, WARMEST, COOLING, HELD = 2000, 0.5, 1e-3, 700  # of the paper's schedule of temperatures
ANNEALED_RATE = 0.02  # of Adam; the paper's .005 is for 2000 passes; of .02, .05 and .15 the best for 8
EDGE = 1e-6  # from 0 and 1, where atanh is infinite


def descended(codec: CodecModel, x: Tensor, y: Tensor, sides_hat: Sides, refinement: Refinement) -> Tensor:
    """Return y, float16 [B, M, h, w], after steps of Adam, whose rate falls linearly to zero, towards less lmbda D +
    bits of y in place of y_hat, of pictures x float32 [B, 3, H, W]. Raises LicError for models of several stages.
    """
    stage, moved = only_stage(codec, sides_hat), y.detach().float().clone()

    def loss(y: Tensor) -> Tensor:
        errors = refinement.errors(codec.synthesise(y), x).sum()
        return refinement.error_weight * errors + bits_of(codec.likelihood(y, stage))

    optimizer = torch.optim.Adam([moved], betas=BETAS)
    for step in range(refinement.steps):
        optimizer.param_groups[0]["lr"] = RATE * (1 - step / refinement.steps)
        _, moved.grad = costs_and_gradient(moved, loss)
        optimizer.step()
    return moved.half()


def temperature(part: float) -> float:
    """Return SGA's temperature after a part of the passes: the paper's schedule, over as many as there are."""
    return WARMEST * math.exp(-COOLING * max(ITERATIONS * part - HELD, 0))


def annealed(codec: CodecModel, x: Tensor, y: Tensor, sides_hat: Sides, refinement: Refinement) -> Tensor:
    """Return y after stochastic Gumbel annealing, to be rounded about the means; arguments as of `descended`.

    In each pass y - means is drawn between its floor and its ceil by a Gumbel softmax whose logits are -atanh of the
    distances over the temperature; loss and gradient are those of the draw. Raises LicError for models of several
    stages.
    """
    stage = only_stage(codec, sides_hat)
    moved = y.detach().float().clone()
    optimizer = torch.optim.Adam([moved])
    generator = torch.Generator(device=y.device).manual_seed(0)
    for step in range(refinement.steps):
        tau = temperature(step / refinement.steps)

        def loss(y: Tensor, tau: float = tau) -> Tensor:
            drawn = stage.means + drawn_between(y - stage.means, tau, generator)
            errors = refinement.errors(codec.synthesise(drawn), x).sum()
            return refinement.error_weight * errors + bits_of(codec.likelihood(drawn, stage))

        _, moved.grad = costs_and_gradient(moved, loss)
        optimizer.param_groups[0]["lr"] = ANNEALED_RATE * (1 - step / refinement.steps)
        optimizer.step()
    return moved.half()


def drawn_between(r: Tensor, tau: float, generator: torch.Generator) -> Tensor:
    """Return floor(r) plus a part of one step, drawn by a Gumbel softmax; differentiable in r."""
    low = torch.floor(r.detach())
    distances = torch.stack([r - low, low + 1 - r]).clamp(EDGE, 1 - EDGE)
    noise = -torch.empty_like(distances).exponential_(generator=generator).log()
    _, upper = torch.softmax((-torch.atanh(distances) / tau + noise) / tau, 0)
    return low + upper
