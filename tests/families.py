"""Two small families whose y has two stages: a checkerboard, and slices with predicted residuals."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lic_dist.models.compat import import_compressai
from lic_dist.models.families.hyperprior import MeanScaleHyperprior
from lic_dist.models.protocol import Elements, Run, Sides, Stage, one_layout

import_compressai()
import compressai.models  # noqa: E402
from compressai.layers import CheckerboardMaskedConv2d  # noqa: E402

CHECKERED, SLICED = "tests.families:Checkered", "tests.families:Sliced"


class CheckeredModule(compressai.models.MeanScaleHyperprior):
    """As CompressAI's Cheng2020AnchorCheckerboard, on the transforms of `mbt2018-mean`."""

    def __init__(self, N: int, M: int) -> None:
        super().__init__(N, M)
        self.context_prediction = CheckerboardMaskedConv2d(M, 2 * M, kernel_size=5, padding=2)
        self.entropy_parameters = nn.Sequential(nn.Conv2d(4 * M, 3 * M, 1), nn.LeakyReLU(), nn.Conv2d(3 * M, 2 * M, 1))


class Checkered(MeanScaleHyperprior):
    """Half of the positions without a context, the other half with theirs."""

    name = "checkered"
    module_class = CheckeredModule
    parts = {**MeanScaleHyperprior.parts, "context": ("context_prediction.", "entropy_parameters.")}
    supports = frozenset()

    @classmethod
    def fits(cls, state: Any) -> bool:
        return "context_prediction.mask" in state

    @property
    def nets(self) -> dict[str, nn.Module]:
        more = {name: getattr(self.module, name) for name in ("context_prediction", "entropy_parameters")}
        return {**super().nets, **more}

    def layout(self, height: int, width: int) -> tuple[Elements, ...]:
        parity = np.add.outer(np.arange(height), np.arange(width)).ravel() % 2
        return tuple(Elements(positions=np.flatnonzero(parity == one)) for one in (1, 0))

    def walk(self, sides_hat: Sides, run: Run) -> Generator[Stage, Tensor, Tensor]:
        features = run("h_s", one_layout(sides_hat[0]))
        context = torch.zeros_like(features)
        y_hat = features.new_zeros(len(features), self.channels, *features.shape[2:])
        for elements in self.layout(*features.shape[2:]):
            scales, means = run("entropy_parameters", one_layout(torch.cat((features, context), 1))).chunk(2, 1)
            value = yield Stage(elements.take(means), elements.take(scales), elements)
            y_hat = y_hat.clone()  # networks before saw the former
            elements.put(y_hat, value)
            context = run("context_prediction", one_layout(y_hat))
        return y_hat


class SlicedModule(compressai.models.MeanScaleHyperprior):
    """Two slices of channels with a prediction of each one's residual, as in ChARM (Minnen and Singh 2020)."""

    def __init__(self, N: int, M: int) -> None:
        super().__init__(N, M)
        self.second = nn.Conv2d(2 * M + M // 2, M, 1)
        self.residual = nn.Conv2d(M // 2, M // 2, 1)
        self.residual_second = nn.Conv2d(M, M // 2, 1)


class Sliced(MeanScaleHyperprior):
    name = "sliced"
    module_class = SlicedModule
    parts = {**MeanScaleHyperprior.parts, "context": ("second.", "residual.", "residual_second.")}
    supports = frozenset({"refinement"})

    @classmethod
    def fits(cls, state: Any) -> bool:
        return "residual_second.weight" in state

    @property
    def nets(self) -> dict[str, nn.Module]:
        return {**super().nets, **{name: getattr(self.module, name) for name in ("second", *RESIDUALS)}}

    def layout(self, height: int, width: int) -> tuple[Elements, ...]:
        half = self.channels // 2
        return Elements(slice(0, half)), Elements(slice(half, 2 * half))

    def walk(self, sides_hat: Sides, run: Run) -> Generator[Stage, Tensor, Tensor]:
        features, done = run("h_s", one_layout(sides_hat[0])), []
        for elements, residual in zip(self.layout(1, 1), RESIDUALS, strict=True):
            if done:
                scales, means = run("second", one_layout(torch.cat((features, *done), 1))).chunk(2, 1)
            else:
                scales, means = (elements.take(one) for one in features.chunk(2, 1))
            value = yield Stage(means, scales, elements)
            done.append(value + 0.5 * torch.tanh(run(residual, one_layout(torch.cat((*done, value), 1)))))
        return torch.cat(done, 1)


RESIDUALS = ("residual", "residual_second")
