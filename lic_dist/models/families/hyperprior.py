"""Hyperprior models of one stage: means and scales of all of y follow from one z by h_s."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lic_dist.models import slim
from lic_dist.models.klt import start_as_klt
from lic_dist.models.protocol import TRANSFORMS, CodecModel, Run, Side, Sides, Stage, one_layout


class MeanScaleHyperprior(CodecModel):
    """CompressAI's `mbt2018-mean`, and the base of whatever has its names (g_a, h_a, h_s, g_s, entropy_bottleneck,
    gaussian_conditional): h_s gives scales and means, [B, 2M, h, w], in this order.
    """

    name = "mbt2018-mean"
    module_class: ClassVar[type[nn.Module] | str] = "compressai.models:MeanScaleHyperprior"
    parts = {
        "encoder": ("g_a.", "h_a."),
        "decoder": ("g_s.",),
        "hyper": ("h_s.",),
        "context": (),
        "prior": ("entropy_bottleneck.",),
    }
    supports = frozenset({"deterministic", "tiles", "refinement"})

    @classmethod
    def fits(cls, state: Mapping[str, Tensor]) -> bool:
        return _channels_of_h_s(state) == 2

    @classmethod
    def sizes(cls, state: Mapping[str, Tensor]) -> dict[str, Any]:
        return {"N": state["g_a.0.weight"].size(0), "M": state["g_a.6.weight"].size(0)}

    @property
    def sides(self) -> tuple[Side, ...]:
        return (Side("z", self.module.entropy_bottleneck),)

    @property
    def nets(self) -> Mapping[str, nn.Module]:
        return {name: getattr(self.module, name) for name in ("g_a", "h_a", "g_s", "h_s")}

    def walk(self, sides_hat: Sides, run: Run) -> Generator[Stage, Tensor, Tensor]:
        (z_hat,) = sides_hat
        return (yield self.stage(run("h_s", one_layout(z_hat))))

    def stage(self, parameters: Tensor) -> Stage:
        """Return the stage of what h_s gives."""
        scales, means = parameters.chunk(2, 1)
        return Stage(means, scales)

    @torch.no_grad()
    def rescale(self, factor: float) -> None:
        if {*self.nets} != {*TRANSFORMS, "h_s"}:  # other networks of a subclass know y too
            return super().rescale(factor)
        ends: dict[str, list[Any]] = {
            name: [one for one in net.children() if hasattr(one, "weight")] for name, net in self.nets.items()
        }
        for layer in (ends["g_a"][-1], ends["h_s"][-1]):
            layer.weight.mul_(factor)
            layer.bias.mul_(factor)
        for layer in (ends["g_s"][0], ends["h_a"][0]):
            layer.weight.div_(factor)


class ScaleHyperprior(MeanScaleHyperprior):
    """CompressAI's `bmshj2018-hyperprior`: h_a reads |y|, h_s gives scales alone, [B, M, h, w], and all means are 0."""

    name = "bmshj2018-hyperprior"
    module_class = "compressai.models:ScaleHyperprior"

    @classmethod
    def fits(cls, state: Mapping[str, Tensor]) -> bool:
        return _channels_of_h_s(state) == 1

    def hyper_analyse(self, y: Tensor) -> Sides:
        return super().hyper_analyse(torch.abs(y))

    def stage(self, parameters: Tensor) -> Stage:
        return Stage(torch.zeros_like(parameters), parameters)


class BlockTransform(MeanScaleHyperprior):
    """The light codec of `models/block_transform.py`."""

    name = "block-transform"
    module_class = "lic_dist.models.block_transform:BlockTransform"

    @classmethod
    def fits(cls, state: Mapping[str, Tensor]) -> bool:
        return "h_a.0.deviation" in state and _EIGHT not in state

    @classmethod
    def sizes(cls, state: Mapping[str, Tensor]) -> dict[str, Any]:
        return {**dict(zip("NM", state["h_a.1.weight"].shape, strict=False)), **_slimness(state)}

    def start(self, x: Tensor, lmbda: float) -> None:
        start_as_klt(self.module, x, lmbda)

    def take_from(self, larger: CodecModel, x: Tensor | None = None) -> None:
        slim.take_from(self.module, larger.module, x)

    @torch.no_grad()
    def rescale(self, factor: float) -> None:
        module = self.module
        for values in (module.g_a[-1].gain, module.h_a[0].deviation, module.h_s[-1].deviation):
            values.mul_(factor)
        module.g_s[0].gain.div_(factor)


class BlockTransformInt8(BlockTransform):
    """The light codec with a decoder in 8 bits, `models/block_transform_int8.py`."""

    name = "block-transform-int8"
    module_class = "lic_dist.models.block_transform_int8:BlockTransformInt8"
    exact = True

    @classmethod
    def fits(cls, state: Mapping[str, Tensor]) -> bool:
        return _EIGHT in state

    def packed(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        layers = {name: layer for name, layer in self.module.named_modules() if hasattr(layer, "settle")}
        return {**state, **{f"{name}.weight": layer.settle().cpu() for name, layer in layers.items()}}


_EIGHT = "h_s.0.makes"


def _slimness(state: Mapping[str, Tensor]) -> dict[str, int]:
    """Return what a slim block transform is built with, which one of the usual size is not: subclasses need not take
    it.
    """
    found = slim.slimness(state)
    return {} if found == {"depth": slim.DEPTH, "expansion": slim.EXPANSION} else found


def _channels_of_h_s(state: Mapping[str, Tensor]) -> float:
    """Return how many channels h_s ends in for each channel of y, by CompressAI's names; 0 without these, or with a
    context or gains.
    """
    last, y = state.get("h_s.4.weight"), state.get("g_a.6.weight")
    more = "context_prediction.weight" in state or "Gain" in state
    return 0 if last is None or y is None or more else last.size(0) / y.size(0)
