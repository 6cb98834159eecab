"""Models with a raster context: means and scales of a position follow from z and from y_hat of positions before it.

    z_hat -> h_s -----------------------------> parameters -> means, scales of a position's channels
    y_hat above and to the left -> context ---/

Minnen et al. 2018, Joint Autoregressive and Hierarchical Priors. A context of 5x5 reaches two columns to the right in
the rows above, so that all positions of a wave, column + 3 row = t, are known at once: a stage is a wave. Its trellises
run along the channels of a position. The context is computed where it is needed, from its live taps alone.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lic_dist.models.families.cheng import ChengSizes
from lic_dist.models.families.hyperprior import MeanScaleHyperprior
from lic_dist.models.protocol import Elements, Given, Run, Sides, Stage, one_layout

MARGIN = 2  # positions that the context reaches to each side, and upward


class Taps(nn.Module):
    """A masked 5x5 convolution at single positions: reads [B, M * taps, 1, P], the values under its live taps."""

    def __init__(self, convolution: Any) -> None:
        super().__init__()
        self.convolution = convolution
        self._live = convolution.mask[0, 0].flatten().nonzero().flatten()
        self._held: tuple[int, Tensor] = (-1, torch.empty(0))  # version of the weight, and its live taps

    @property
    def pointwise(self) -> bool:
        return True

    def offsets(self) -> NDArray[np.int64]:
        """Return row and column of the live taps in the 5x5 window: int64 [taps, 2]."""
        rows, columns = np.divmod(self._live.cpu().numpy(), self.convolution.kernel_size[1])
        return np.stack([rows, columns], 1)

    def weight(self) -> Tensor:
        """Return the live taps, [2M, M * taps]."""
        weight = self.convolution.weight
        if torch.is_grad_enabled() and weight.requires_grad:
            taps: Tensor = weight.flatten(2)[..., self._live].flatten(1)
            return taps
        if self._held[0] != weight._version or self._held[1].device != weight.device:
            self._held = weight._version, weight.detach().flatten(2)[..., self._live].flatten(1).contiguous()
        return self._held[1]

    def as_convolution(self) -> nn.Conv2d:
        """Return the convolution of 1x1 that this is."""
        weight = self.weight().detach()[:, :, None, None]
        found = nn.utils.skip_init(nn.Conv2d, weight.shape[1], len(weight), 1, device=weight.device)
        found.weight, found.bias = nn.Parameter(weight, requires_grad=False), self.convolution.bias
        return found

    def forward(self, values: Tensor) -> Tensor:
        lanes = values[:, :, 0].transpose(1, 2)
        return nn.functional.linear(lanes, self.weight(), self.convolution.bias).transpose(1, 2)[:, :, None]


class JointAutoregressive(MeanScaleHyperprior):
    """CompressAI's `mbt2018`."""

    name = "mbt2018"
    module_class = "compressai.models:JointAutoregressiveHierarchicalPriors"
    parts = {**MeanScaleHyperprior.parts, "context": ("context_prediction.", "entropy_parameters.")}
    supports = frozenset({"deterministic", "tiles", "refinement"})

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        self._taps = Taps(self.module.context_prediction)

    @classmethod
    def fits(cls, state: Mapping[str, Tensor]) -> bool:
        names = "context_prediction.weight", "g_a.6.weight", "g_a.0.weight"
        return all(name in state for name in names) and "Gain" not in state

    @property
    def nets(self) -> Mapping[str, nn.Module]:
        return {**super().nets, "context_prediction": self._taps, "entropy_parameters": self.module.entropy_parameters}

    def layout(self, height: int, width: int) -> tuple[Elements, ...]:
        return tuple(Elements(positions=wave, along="channels") for wave in waves(height, width))

    def walk(self, sides_hat: Sides, run: Run) -> Generator[Stage, Tensor, Tensor]:
        (z_hat,) = sides_hat
        side = run("h_s", one_layout(z_hat))
        height, width = side.shape[2:]
        wide = width + 2 * MARGIN
        padded = side.new_zeros(len(side), self.channels, (height + MARGIN) * wide)
        taps = self._taps.offsets() @ np.array([wide, 1])
        for wave in waves(height, width):
            rows, columns = np.divmod(wave, width)
            corner = torch.from_numpy(rows * wide + columns).to(side.device)  # of each position's window
            under = padded[..., corner[:, None] + torch.from_numpy(taps).to(side.device)]  # [B, M, P, taps]
            context = run("context_prediction", one_layout(under.transpose(2, 3).flatten(1, 2)[:, :, None]))
            here = side.flatten(2)[:, :, None, torch.from_numpy(wave).to(side.device)]
            parameters = run("entropy_parameters", one_layout(torch.cat((here, context), 1)))[:, :, 0]
            scales, means = parameters.chunk(2, 1)
            sent = yield Stage(means, scales, Elements(positions=wave, along="channels"))
            padded = padded.index_copy(2, corner + MARGIN * wide + MARGIN, sent)
        return padded.unflatten(2, (height + MARGIN, wide))[..., MARGIN:, MARGIN:-MARGIN]

    def given(self, sides_hat: Sides, y_hat: Tensor) -> Given:
        """Return means and scales by one masked convolution over y_hat."""
        (z_hat,) = sides_hat
        side, convolution = self.run("h_s", one_layout(z_hat)), self.module.context_prediction
        weight = convolution.weight * convolution.mask
        context = nn.functional.conv2d(y_hat, weight, convolution.bias, padding=convolution.padding)
        scales, means = self.run("entropy_parameters", torch.cat((side, context), 1)).chunk(2, 1)
        return Given(means, scales, y_hat)


class Cheng2020Anchor(ChengSizes, JointAutoregressive):
    """CompressAI's `cheng2020-anchor`."""

    name = "cheng2020-anchor"
    module_class = "compressai.models:Cheng2020Anchor"

    @classmethod
    def fits(cls, state: Mapping[str, Tensor]) -> bool:
        return _is_cheng(state) and not _has_attention(state)


class Cheng2020Attention(Cheng2020Anchor):
    """CompressAI's `cheng2020-attn`."""

    name = "cheng2020-attn"
    module_class = "compressai.models:Cheng2020Attention"

    @classmethod
    def fits(cls, state: Mapping[str, Tensor]) -> bool:
        return _is_cheng(state) and _has_attention(state)


@cache
def waves(height: int, width: int) -> tuple[NDArray[np.int64], ...]:
    """Return the positions of each wave, in raster order: int64 [P] each."""
    time = np.add.outer((MARGIN + 1) * np.arange(height), np.arange(width)).ravel()
    order = np.argsort(time, kind="stable")
    return tuple(np.split(order, np.flatnonzero(np.diff(time[order])) + 1))


def _is_cheng(state: Mapping[str, Tensor]) -> bool:
    return "context_prediction.weight" in state and "g_a.0.conv1.weight" in state


def _has_attention(state: Mapping[str, Tensor]) -> bool:
    return any("conv_b" in name for name in state)
