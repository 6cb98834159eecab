"""The architectures served, and how to build a module, and to see it as its family does."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import cache
from importlib import import_module
from typing import Any

from torch import nn

from lic_dist.errors import UsageError
from lic_dist.models.compat import import_compressai
from lic_dist.models.protocol import CodecModel

ARCHITECTURES = {
    "block-transform": "lic_dist.models.families.hyperprior:BlockTransform",
    "bmshj2018-hyperprior": "lic_dist.models.families.hyperprior:ScaleHyperprior",
    "mbt2018-mean": "lic_dist.models.families.hyperprior:MeanScaleHyperprior",
}
"""Architectures, by CompressAI's names where it has them, and their families."""


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


@cache
def family(architecture: str) -> type[CodecModel]:
    """Return the family of a name.

    Raises:
        UsageError: an architecture that is not served.
    """
    if architecture not in ARCHITECTURES:
        raise UsageError(f"unknown architecture '{architecture}'", hint=f"one of: {', '.join(sorted(ARCHITECTURES))}")
    found: type[CodecModel] = _imported(ARCHITECTURES[architecture])
    return found


def adapt(module: nn.Module) -> CodecModel:
    """Return a module as its family sees it, told by the module's class.

    Raises:
        UsageError: a class of no family.
    """
    for name in ARCHITECTURES:
        if type(module) is module_class(family(name)):
            return family(name)(module)
    raise UsageError(f"no family of models wraps a {type(module).__name__}")


@cache
def module_class(of: type[CodecModel]) -> type[nn.Module]:
    """Return the class of the modules that a family wraps, imported where it is named."""
    import_compressai()
    found: type[nn.Module] = _imported(of.module_class) if isinstance(of.module_class, str) else of.module_class
    return found


def build(architecture: str, N: int, M: int) -> nn.Module:
    """Return a freshly initialised model.

    Raises:
        UsageError: an architecture that is not served.
    """
    return module_class(family(architecture))(N=N, M=M)


def _imported(path: str) -> Any:
    module, name = path.split(":")
    return getattr(import_module(module), name)
