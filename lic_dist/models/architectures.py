"""The architectures served, and how to build and recognise them."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor, nn

from lic_dist.errors import UsageError
from lic_dist.models.compat import import_compressai

ARCHITECTURES = {"bmshj2018-hyperprior": "ScaleHyperprior", "mbt2018-mean": "MeanScaleHyperprior"}
"""CompressAI's names of architectures, and its classes. All are hyperprior models of one stage."""


@dataclass(frozen=True)
class ModelSpec:
    """What is needed to build a model again; lmbda is the loss's weight of distortion it was trained with."""

    architecture: str
    N: int
    M: int
    lmbda: float

    def as_dict(self) -> dict[str, Any]:
        """The spec as plain data, as checkpoints carry it."""
        return asdict(self)


def build(architecture: str, N: int, M: int) -> nn.Module:
    """A freshly initialised model.

    Raises:
        UsageError: an architecture that is not served.
    """
    if architecture not in ARCHITECTURES:
        raise UsageError(f"unknown architecture '{architecture}'", hint=f"one of: {', '.join(sorted(ARCHITECTURES))}")
    model: nn.Module = getattr(import_compressai().models, ARCHITECTURES[architecture])(N=N, M=M)
    return model


def sizes_of(state: dict[str, Tensor]) -> tuple[int, int]:
    """(N, M) read off a hyperprior's weights, as CompressAI's `from_state_dict` does."""
    return state["g_a.0.weight"].size(0), state["g_a.6.weight"].size(0)
