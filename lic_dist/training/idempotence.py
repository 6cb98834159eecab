"""The idempotence term of a distortion: that a decoded picture, coded again, gives the latents that it was made of.

What drifts from generation to generation is the way from y_hat through the picture back to y (Kim et al. 2022,
"Successive learned image compression: comprehensive analysis of instability"): a codec of which g_a(g_s(y_hat)) is
y_hat changes a picture once and never again. The frozen encoder analyses x_hat, and

    I = 255^2 sum S_c (g_a(x_hat) - y_hat)^2 / (3 pixels)

is what its error would cost the next picture by the quantizer's own weights, in the units of 255^2 MSE.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lic_dist.models.architectures import adapt
from lic_dist.quantization.record import QuantizerRecord


class Idempotence:
    """I of a model with frozen encoder; `weight` is that of the term beside 255^2 MSE."""

    def __init__(self, weight: float, model: nn.Module, record: QuantizerRecord, device: torch.device) -> None:
        self.weight, self._codec = weight, adapt(model)
        self._weights = torch.tensor(record.weights, device=device).reshape(1, -1, 1, 1)

    def __call__(self, x_hat: Tensor, y_hat: Tensor) -> Tensor:
        """Return the weighted term of pictures x_hat [B, 3, s, s], as they are shown, and the y_hat [B, M, h, w] that
        they were made of: a scalar, differentiable in x_hat.
        """
        again = self._codec.analyse(x_hat.clamp(0, 1))
        error = (self._weights * (again - y_hat.detach()).square()).sum()
        return self.weight * 255**2 * error / x_hat.numel()
