"""Models with a raster context: means and scales of a position follow from z and from y_hat of positions before it.

    z_hat -> h_s -----------------------------> parameters -> means, scales of a position's channels
    y_hat above and to the left -> context ---/

Minnen et al. 2018, Joint Autoregressive and Hierarchical Priors. A context of 5x5 reaches two columns to the right in
the rows above, so that all positions of a wave, column + 3 row = t, are known at once: a stage is a wave. Its trellises
run along the channels of a position. The context is computed where it is needed, from its live taps alone.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from lic_dist.models.families.cheng import ChengSizes
from lic_dist.models.families.hyperprior import MeanScaleHyperprior
from lic_dist.models.layers import PositionLayers, one_by_one
from lic_dist.models.protocol import Elements, Given, Run, Sides, Stage, one_layout

MARGIN = 2  # positions that the context reaches to each side, and upward
LIVE = 12  # live taps of the 5x5: those before its centre, in raster order


class Taps(nn.Module):
    """A masked 5x5 convolution at single positions: reads [B, taps * M, 1, P], the values under its live taps."""

    pointwise = True

    def __init__(self, convolution: Any) -> None:
        super().__init__()
        self.convolution = convolution
        self._held: tuple[int, Tensor] = (-1, torch.empty(0))  # version of the weight, and its live taps

    def weight(self) -> Tensor:
        """Return the live taps, [2M, taps * M]."""
        weight = self.convolution.weight
        if torch.is_grad_enabled() and weight.requires_grad:
            return _live(weight)
        if self._held[0] != weight._version or self._held[1].device != weight.device:
            self._held = weight._version, _live(weight.detach())
        return self._held[1]

    def as_convolution(self) -> nn.Conv2d:
        """Return the convolution of 1x1 that this is."""
        return one_by_one(self.weight(), self.convolution.bias)

    def forward(self, values: Tensor) -> Tensor:
        return _columns(nn.functional.linear(_rows(values), self.weight(), self.convolution.bias))


class Wave(NamedTuple):
    """A stage of y, and where its positions are, int64: in y, [P]; in y with a margin above and at both sides, [P];
    and there under the live taps of each, [P * LIVE].
    """

    elements: Elements
    positions: Tensor
    padded: Tensor
    windows: Tensor


class JointAutoregressive(MeanScaleHyperprior):
    """CompressAI's `mbt2018`."""

    name = "mbt2018"
    module_class = "compressai.models:JointAutoregressiveHierarchicalPriors"
    parts = {**MeanScaleHyperprior.parts, "context": ("context_prediction.", "entropy_parameters.")}
    supports = frozenset({"deterministic", "tiles", "refinement"})

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        self._taps = Taps(self.module.context_prediction)
        self._parameters = PositionLayers(*self.module.entropy_parameters)

    @classmethod
    def fits(cls, state: Mapping[str, Tensor]) -> bool:
        names = "context_prediction.weight", "g_a.6.weight", "g_a.0.weight"
        return all(name in state for name in names) and "Gain" not in state

    @property
    def nets(self) -> Mapping[str, nn.Module]:
        return {**super().nets, "context_prediction": self._taps, "entropy_parameters": self._parameters}

    def layout(self, height: int, width: int) -> tuple[Elements, ...]:
        return tuple(wave.elements for wave in waves(height, width, torch.device("cpu")))

    def walk(self, sides_hat: Sides, run: Run) -> Generator[Stage, Tensor, Tensor]:
        (z_hat,) = sides_hat
        side = run("h_s", one_layout(z_hat))
        size = side.shape[2:]
        high, wide = (length + MARGIN for length in (size[0], size[1] + MARGIN))
        padded = side.new_zeros(len(side), high * wide, self.channels)
        of_side = side.flatten(2).transpose(1, 2).contiguous()  # as all below, a row a position, for matrix products
        for wave in waves(*size, side.device):
            under = padded.index_select(1, wave.windows).view(len(side), len(wave.padded), -1)
            context = _rows(run("context_prediction", _columns(under)))
            here = of_side.index_select(1, wave.positions)
            parameters = run("entropy_parameters", _columns(torch.cat((here, context), 2)))
            scales, means = parameters[:, :, 0].chunk(2, 1)
            sent = yield Stage(means, scales, wave.elements)
            write = padded.index_copy if torch.is_grad_enabled() else padded.index_copy_
            padded = write(1, wave.padded, sent.transpose(1, 2))
        return padded.transpose(1, 2).unflatten(2, (high, wide))[..., MARGIN:, MARGIN:-MARGIN]

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


@lru_cache(maxsize=64)
def waves(height: int, width: int, device: torch.device) -> tuple[Wave, ...]:
    """Return the waves of y of this height and width in positions, each in raster order."""
    time = np.add.outer((MARGIN + 1) * np.arange(height), np.arange(width)).ravel()
    order, wide = np.argsort(time, kind="stable"), width + 2 * MARGIN
    taps = np.array([wide, 1]) @ np.divmod(np.arange(LIVE), 2 * MARGIN + 1)
    found = []
    for positions in np.split(order, np.flatnonzero(np.diff(time[order])) + 1):
        corners = np.array([wide, 1]) @ np.divmod(positions, width)  # of the windows
        places = positions, corners + MARGIN * (wide + 1), np.add.outer(corners, taps).ravel()
        elements = Elements(positions=positions, along="channels")
        found.append(Wave(elements, *(torch.from_numpy(each).to(device) for each in places)))
    return tuple(found)


def _rows(values: Tensor) -> Tensor:
    """Return values of positions [B, C, 1, P] as [B, P, C], in which memory holds them."""
    return values[:, :, 0].transpose(1, 2)


def _columns(rows: Tensor) -> Tensor:
    """Invert `_rows`."""
    return rows.transpose(1, 2)[:, :, None]


def _live(weight: Tensor) -> Tensor:
    return weight.flatten(2)[..., :LIVE].transpose(1, 2).flatten(1)


def _is_cheng(state: Mapping[str, Tensor]) -> bool:
    return "context_prediction.weight" in state and "g_a.0.conv1.weight" in state


def _has_attention(state: Mapping[str, Tensor]) -> bool:
    return any("conv_b" in name for name in state)
