"""What CompressAI's cheng2020 models have in common, whatever their context."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from lic_dist.models.protocol import CodecModel


class ChengSizes(CodecModel):
    """A mixin: y and z and all layers have the same number of channels, N, which is all that the class takes."""

    @classmethod
    def build(cls, **sizes: Any) -> nn.Module:
        if sizes["N"] != sizes["M"]:
            raise TypeError("N and M are the same")
        return super().build(**{key: value for key, value in sizes.items() if key != "M"})

    @classmethod
    def sizes(cls, state: Mapping[str, Tensor]) -> dict[str, Any]:
        return dict.fromkeys(("N", "M"), state["g_a.0.conv1.weight"].size(0))
