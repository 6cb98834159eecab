"""Models that code y in slices of channels, and predict what rounding took from each: ChARM and its descendants.

    z_hat -> h_mean_s, h_scale_s                             once
    those, y_hat of the first max_support_slices slices      -> cc_mean, cc_scale -> means, scales of slice i
    what cc_mean read, y_hat of slice i                      -> lrp; y_hat += tanh(lrp) / 2, which later slices see

Minnen and Singh 2020, Channel-wise Autoregressive Entropy Models. A slice is a stage. Modules of public repositories
that have these names fit without a change: STF's (Googolxx/STF: WACNN; SymmetricalTransFormer, whose transforms are no
modules, wants `nets` of its adapter's own), LIC_TCM's (jmliu206/LIC_TCM: TCM, whose supports pass window attention
first) and their forks. They cut means and scales to the size of y, which does nothing here: pictures are padded so that
y has a whole number of positions for each of z.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from lic_dist.models.layers import HalfTanh
from lic_dist.models.protocol import CodecModel, Elements, Run, Side, Sides, Stage, one_layout


class ChannelSlices(CodecModel):
    """Base of the families whose module has `g_a`, `g_s`, `h_a`, `h_mean_s`, `h_scale_s`, lists of a network for each
    slice, `max_support_slices` (negative: all), `entropy_bottleneck` and `gaussian_conditional`.

    LRP is of the context part: cached k depend on it, through the means and scales of later slices.
    """

    mean_nets: ClassVar[tuple[str, ...]] = ("cc_mean_transforms",)
    """The module's lists of networks that make the means of a slice, one after another; LRP reads what the last of
    them reads. ("atten_mean", "cc_mean_transforms") in TCM."""
    scale_nets: ClassVar[tuple[str, ...]] = ("cc_scale_transforms",)
    """Those that make its scales."""
    residual_net: ClassVar[str] = "lrp_transforms"
    parts = {
        "encoder": ("g_a.", "h_a."),
        "decoder": ("g_s.",),
        "hyper": ("h_mean_s.", "h_scale_s."),
        "context": ("cc_mean_transforms.", "cc_scale_transforms.", "lrp_transforms."),
        "prior": ("entropy_bottleneck.",),
    }
    supports = frozenset({"refinement", "tiles"})

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        sizes = [_channels_out(net) for net in getattr(self.module, self.mean_nets[-1])]
        ends = np.cumsum([0, *sizes]).tolist()
        self._slices = [Elements(slice(*ends[number : number + 2])) for number in range(len(sizes))]
        self._channels = ends[-1]
        self._nets = {name: getattr(self.module, name) for name in ("g_a", "h_a", "g_s", "h_mean_s", "h_scale_s")}
        for name in (*self.mean_nets, *self.scale_nets, self.residual_net):
            self._nets |= {f"{name}_{number}": net for number, net in enumerate(getattr(self.module, name))}
        for number in range(len(sizes)):
            name = f"{self.residual_net}_{number}"
            self._nets[name] = nn.Sequential(self._nets[name], HalfTanh())

    @classmethod
    def sizes(cls, state: Mapping[str, Tensor]) -> dict[str, Any]:
        """Return N, the channels of the first convolution of g_a, and M, those of all slices together."""
        return {"N": weights(state, "g_a.")[0].size(0), "M": sum(slice_sizes(state, cls.mean_nets[-1]))}

    @property
    def sides(self) -> tuple[Side, ...]:
        return (Side("z", self.module.entropy_bottleneck),)

    @property
    def channels(self) -> int:
        return int(self._channels)

    @property
    def nets(self) -> Mapping[str, nn.Module]:
        return self._nets

    def layout(self, height: int, width: int) -> tuple[Elements, ...]:
        return tuple(self._slices)

    def walk(self, sides_hat: Sides, run: Run) -> Generator[Stage, Tensor, Tensor]:
        (z_hat,) = sides_hat
        of_means, of_scales = (run(name, one_layout(z_hat)) for name in ("h_mean_s", "h_scale_s"))
        most = self.module.max_support_slices
        y_hat: list[Tensor] = []  # of each slice, corrected
        for number, elements in enumerate(self._slices):
            known = y_hat if most < 0 else y_hat[:most]
            support, means = _chain(run, self.mean_nets, number, torch.cat((of_means, *known), 1))
            _, scales = _chain(run, self.scale_nets, number, torch.cat((of_scales, *known), 1))
            sent = yield Stage(means, scales, elements)
            y_hat.append(sent + run(f"{self.residual_net}_{number}", one_layout(torch.cat((support, sent), 1))))
        return torch.cat(y_hat, 1)


class Minnen2020Charm(ChannelSlices):
    """The convolutional codec of `models/channel_slices.py`."""

    name = "minnen2020-charm"
    module_class = "lic_dist.models.channel_slices:ChannelSliceModel"
    supports = frozenset({"deterministic", "refinement", "tiles"})

    @classmethod
    def build(cls, **sizes: Any) -> nn.Module:
        if sizes["M"] % sizes.get("num_slices", 10):
            raise TypeError("M is a multiple of num_slices, which is 10 where it is not given")
        return super().build(**sizes)

    @classmethod
    def fits(cls, state: Mapping[str, Tensor]) -> bool:
        return all(f"{name}.weight" in state for name in ("g_a.0", "g_a.6", "lrp_transforms.0.4", "h_mean_s.4"))

    @classmethod
    def sizes(cls, state: Mapping[str, Tensor]) -> dict[str, Any]:
        found, slices = super().sizes(state), slice_sizes(state, "cc_mean_transforms")
        last = state[f"cc_mean_transforms.{len(slices) - 1}.0.weight"]
        own = {"num_slices": len(slices), "max_support_slices": (last.size(1) - found["M"]) // slices[0]}
        return {**found, **own}


def weights(state: Mapping[str, Tensor], prefix: str) -> list[Tensor]:
    """Return the weights of the convolutions, [., ., k, k] each, whose names begin so, in the order of the module."""
    return [value for name, value in state.items() if name.startswith(prefix) and value.dim() == 4]


def slice_sizes(state: Mapping[str, Tensor], name: str) -> list[int]:
    """Return the channels that each network of a list of this name ends in."""
    sizes: list[int] = []
    while found := weights(state, f"{name}.{len(sizes)}."):
        sizes.append(found[-1].size(0))
    return sizes


def _channels_out(net: nn.Module) -> int:
    return [layer.out_channels for layer in net.modules() if isinstance(layer, nn.Conv2d)][-1]


def _chain(run: Run, names: tuple[str, ...], number: int, values: Tensor) -> tuple[Tensor, Tensor]:
    """Run the networks of a slice one after another; return what the last one reads, and what it gives."""
    for name in names[:-1]:
        values = run(f"{name}_{number}", one_layout(values))
    return values, run(f"{names[-1]}_{number}", one_layout(values))
