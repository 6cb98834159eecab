"""The architectures served, and how to build and recognise them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib import import_module
from typing import Any

from torch import Tensor, nn

from lic_dist.errors import UsageError
from lic_dist.models.compat import import_compressai

ARCHITECTURES = {
    "block-transform": "lic_dist.models.block_transform:BlockTransform",
    "bmshj2018-hyperprior": "compressai.models:ScaleHyperprior",
    "mbt2018-mean": "compressai.models:MeanScaleHyperprior",
}
"""Architectures, by CompressAI's names where it has them, and their classes. All are hyperprior models of one stage."""


@dataclass(frozen=True)
class ModelSpec:
    """What is needed to build a model again; lmbda is the weight of distortion in the loss that it was trained with."""

    architecture: str
    N: int
    M: int
    lmbda: float

    def as_dict(self) -> dict[str, Any]:
        """Return the spec as plain data, as checkpoints carry it."""
        return asdict(self)


def build(architecture: str, N: int, M: int) -> nn.Module:
    """Return a freshly initialised model.

    Raises:
        UsageError: an architecture that is not served.
    """
    if architecture not in ARCHITECTURES:
        raise UsageError(f"unknown architecture '{architecture}'", hint=f"one of: {', '.join(sorted(ARCHITECTURES))}")
    import_compressai()
    module, name = ARCHITECTURES[architecture].split(":")
    model: nn.Module = getattr(import_module(module), name)(N=N, M=M)
    return model


def sizes_of(state: Mapping[str, Tensor]) -> tuple[int, int]:
    """Return (N, M), read off a hyperprior's weights as CompressAI's `from_state_dict` does."""
    if "h_a.0.deviation" in state:
        return state["h_a.1.weight"].size(0), state["h_a.1.weight"].size(1)
    return state["g_a.0.weight"].size(0), state["g_a.6.weight"].size(0)
