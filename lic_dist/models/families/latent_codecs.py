"""Models built of CompressAI's latent codecs: a hyperprior, groups of channels, checkerboards of positions.

    z_hat -> h_s -> side                                    for all groups
    y_hat of earlier groups -> channel context, side        -> parameters of group k
    y_hat of the group's anchors -> spatial context, those  -> parameters of its other positions

He et al. 2021, Checkerboard Context Model for Efficient Learned Image Compression; He et al. 2022, ELIC. A group is two
stages, anchors and the others; the context of anchors is zero. Parameter networks are pointwise.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lic_dist.models.families.cheng import ChengSizes
from lic_dist.models.protocol import CodecModel, Elements, Run, Side, Sides, Stage, one_layout

HYPER, LATENT = "latent_codec.hyper.", "latent_codec.y."


@dataclass(frozen=True)
class _Group:
    """A group of channels, and CompressAI's codec of its checkerboard."""

    number: int
    channels: slice
    codec: Any


class LatentCodecs(CodecModel):
    """Base of the families whose module has a `latent_codec` of "hyper" and "y"."""

    parts = {
        "encoder": ("g_a.", f"{HYPER}h_a."),
        "decoder": ("g_s.",),
        "hyper": (f"{HYPER}h_s.",),
        "context": (LATENT,),
        "prior": (f"{HYPER}entropy_bottleneck.",),
    }
    supports = frozenset({"deterministic", "tiles", "refinement"})

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        self._hyper, self._y = self.module.latent_codec["hyper"], self.module.latent_codec["y"]
        codecs = [one for name, one in getattr(self._y, "latent_codec", {}).items() if name != "y"] or [self._y]
        sizes = getattr(self._y, "groups", None) or [codecs[0].context_prediction.in_channels]
        ends = np.cumsum([0, *sizes]).tolist()
        self._groups = [_Group(number, slice(*ends[number : number + 2]), codec) for number, codec in enumerate(codecs)]
        self._channels = ends[-1]

    @property
    def sides(self) -> tuple[Side, ...]:
        return (Side("z", self._hyper.entropy_bottleneck),)

    @property
    def channels(self) -> int:
        return int(self._channels)

    @property
    def gaussian(self) -> Any:
        return self._groups[0].codec.latent_codec["y"].gaussian_conditional

    @property
    def nets(self) -> Mapping[str, nn.Module]:
        found = {"g_a": self.module.g_a, "h_a": self._hyper.h_a, "g_s": self.module.g_s, "h_s": self._hyper.h_s}
        for group in self._groups:
            if group.number:
                found[f"channel_context_{group.number}"] = self._y.channel_context[f"y{group.number}"]
            found[f"context_{group.number}"] = group.codec.context_prediction
            found[f"parameters_{group.number}"] = group.codec.entropy_parameters
        return found

    def layout(self, height: int, width: int) -> tuple[Elements, ...]:
        return tuple(
            Elements(group.channels, positions)
            for group in self._groups
            for positions in checkerboard(height, width, group.codec.anchor_parity == "odd")
        )

    def walk(self, sides_hat: Sides, run: Run) -> Generator[Stage, Tensor, Tensor]:
        (z_hat,) = sides_hat
        side = run("h_s", one_layout(z_hat))
        size = side.shape[2], side.shape[3]
        y_hat: list[Tensor] = []  # of each group
        for group in self._groups:
            known = side
            if group.number:
                earlier = run(f"channel_context_{group.number}", one_layout(self._y.merge_y(*y_hat)))
                known = torch.cat((earlier, side), 1)
            anchors, others = checkerboard(*size, group.codec.anchor_parity == "odd")
            count = group.codec.context_prediction.out_channels
            zero = known.new_zeros(len(known), count, len(anchors))
            sent = yield self._stage(run, group, anchors, zero, known)
            half = known.new_zeros(len(known), sent.shape[1], size[0] * size[1])
            half = half.index_copy(2, _tensor(anchors, half), sent)
            if len(others):  # a single position has none
                context = run(f"context_{group.number}", one_layout(half.unflatten(2, size))).flatten(2)
                sent = yield self._stage(run, group, others, context[..., _tensor(others, half)], known)
                half = half.index_copy(2, _tensor(others, half), sent)
            y_hat.append(half.unflatten(2, size))
        return torch.cat(y_hat, 1)

    def _stage(self, run: Run, group: _Group, positions: NDArray[np.int64], context: Tensor, known: Tensor) -> Stage:
        """Return a stage's means and scales, of its spatial context and of what is known of all positions."""
        here = known.flatten(2)[..., _tensor(positions, known)]
        parameters = run(f"parameters_{group.number}", one_layout(torch.cat((context, here), 1)[:, :, None]))[:, :, 0]
        scales, means = group.codec.latent_codec["y"]._chunk(parameters)
        return Stage(means, scales, Elements(group.channels, positions))


class Cheng2020AnchorCheckerboard(ChengSizes, LatentCodecs):
    """CompressAI's `cheng2020-anchor-checkerboard`: one group."""

    name = "cheng2020-anchor-checkerboard"
    module_class = "compressai.models.sensetime:Cheng2020AnchorCheckerboard"

    @classmethod
    def fits(cls, state: Mapping[str, Tensor]) -> bool:
        return f"{LATENT}context_prediction.weight" in state and "g_a.0.conv1.weight" in state


class Elic2022Official(LatentCodecs):
    """CompressAI's `elic2022-official`: groups of unequal size, each of which sees all earlier ones."""

    name = "elic2022-official"
    module_class = "compressai.models.sensetime:Elic2022Official"

    @classmethod
    def fits(cls, state: Mapping[str, Tensor]) -> bool:
        return _is_elic(state) and _h_s_out(state)[0] * 2 == 3 * state["g_a.0.weight"].size(0)

    @classmethod
    def sizes(cls, state: Mapping[str, Tensor]) -> dict[str, Any]:
        groups: list[int] = []
        while (weight := state.get(f"{LATENT}latent_codec.y{len(groups)}.context_prediction.weight")) is not None:
            groups.append(weight.size(1))
        M = sum(groups)
        own = {} if groups == [16, 16, 32, 64, M - 128] else {"groups": groups}
        return {"N": state["g_a.0.weight"].size(0), "M": M, **own}


class Elic2022Chandelier(Elic2022Official):
    """CompressAI's `elic2022-chandelier`: a group sees the first and the last before it."""

    name = "elic2022-chandelier"
    module_class = "compressai.models.sensetime:Elic2022Chandelier"

    @classmethod
    def fits(cls, state: Mapping[str, Tensor]) -> bool:
        return _is_elic(state) and _h_s_out(state)[1] * 2 == 3 * state["g_a.0.weight"].size(0)


@cache
def checkerboard(height: int, width: int, odd: bool) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the positions of the anchors, where row + column is even (`odd`: odd), and of the others, in raster
    order.
    """
    parity = np.add.outer(np.arange(height), np.arange(width)).ravel() % 2
    return np.flatnonzero(parity == odd), np.flatnonzero(parity != odd)


def _tensor(positions: NDArray[np.int64], like: Tensor) -> Tensor:
    return torch.from_numpy(positions).to(like.device)


def _is_elic(state: Mapping[str, Tensor]) -> bool:
    return f"{LATENT}channel_context.y1.0.weight" in state and "g_a.0.weight" in state


def _h_s_out(state: Mapping[str, Tensor]) -> tuple[int, int]:
    """Return the first two sizes of the weight that h_s ends with: [in, out] of a transposed convolution."""
    weight = state[f"{HYPER}h_s.4.weight"]
    return weight.size(0), weight.size(1)
