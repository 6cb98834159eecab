"""Factorized priors: of side latents, and of y in models that have no side latent."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn


@dataclass(frozen=True)
class Side:
    """A side latent z, coded by a factorized prior, a CompressAI EntropyBottleneck with integer tables after `update`;
    or y where it is coded so itself (`CodecModel.prior`).
    """

    name: str
    prior: Any
    step: Tensor | float = 1.0
    """What a coded integer counts."""

    @property
    def channels(self) -> int:
        """N, the number of its channels."""
        return int(self.prior.channels)

    def medians(self) -> Tensor:
        """Return the medians of the prior, from which the coded integers count: [1, N, 1, 1]."""
        quantiles: Tensor = self.prior.quantiles
        return quantiles.detach()[:, 0, 1].reshape(1, -1, 1, 1)

    def centred(self, z: Tensor) -> Tensor:
        """Return z about the medians and in steps of the coded integers, to which it is rounded."""
        return (z - self.medians()) / self.step

    def dequantize(self, z: Tensor) -> Tensor:
        """Return z_hat, step z + medians, of the coded integers z of any type, [B, N, hz, wz]."""
        middle = self.medians()
        return z.to(middle.dtype) * self.step + middle

    def relaxed(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Return z with uniform noise, or rounded about the medians where the module is in evaluation mode, and the
        likelihood of that.
        """
        if not self.prior.training:
            rounded: tuple[Tensor, Tensor] = self.prior(z)
            return rounded
        rows = z.transpose(0, 1).contiguous()  # what the prior's own forward does, which would wait for a GPU
        values = rows.reshape(rows.size(0), 1, -1)
        values = values + torch.empty_like(values).uniform_(-0.5, 0.5)
        likelihood = self.prior.likelihood_lower_bound(self.prior._likelihood(values)[0])
        noisy, likelihood = (found.reshape(rows.shape).transpose(0, 1).contiguous() for found in (values, likelihood))
        return noisy, likelihood

    def likelihood(self, z: Tensor) -> Tensor:
        """Return the probability of the cell of one step about each element of z, z_hat or another, at least
        CompressAI's bound of 1e-9.
        """
        return self.probability(z - 0.5 * self.step, z + 0.5 * self.step)

    def probability(self, lower: Tensor, upper: Tensor) -> Tensor:
        """Return the probability of the interval of each element, [B, N, hz, wz], with the same bound."""
        below, above = (
            self.prior._logits_cumulative(edge.transpose(0, 1).flatten(1)[:, None], stop_gradient=False)
            for edge in (lower, upper)
        )
        found = self.prior.likelihood_lower_bound(torch.sigmoid(above) - torch.sigmoid(below))
        return found.view(lower.transpose(0, 1).shape).transpose(0, 1).contiguous()

    @torch.no_grad()
    def cdf(self, channel: NDArray[np.int64], value: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return P(z - median <= value) of each channel of an array [n, 1], for values [n, m]: both float64.

        It is the `Cdf` that index distributions are integrated from (quantization/distributions.py).
        """
        exact = copy.deepcopy(self.prior).cpu().double()
        for parameters in (exact.matrices, exact.biases, exact.factors):
            for one in parameters:
                one.data = one.data[channel[:, 0]]
        about = torch.from_numpy(value) + self.medians().cpu().double()[0, channel[:, 0], :, 0]
        found: NDArray[np.float64] = torch.sigmoid(exact._logits_cumulative(about[:, None], True))[:, 0].numpy()
        return found


class NoSide(Side):
    """What stands for the side latent of a model without one: z has no channels, is of y's size, and costs no bits.

    It is made with the factorized prior of y.
    """

    @property
    def channels(self) -> int:
        return 0

    def medians(self) -> Tensor:
        return super().medians()[:, :0]

    def relaxed(self, z: Tensor) -> tuple[Tensor, Tensor]:
        return z, z

    def likelihood(self, z: Tensor) -> Tensor:
        return z


class NoChannels(nn.Module):
    """What stands for h_a of a model without a side latent: from y [B, M, h, w] to z [B, 0, h, w]."""

    pointwise = True

    def forward(self, y: Tensor) -> Tensor:
        return y[:, :0]
