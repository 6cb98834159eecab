"""Families of models by name: those served here, those of installed packages, and those that a user names.

mbt2018-mean                     a name of ARCHITECTURES
my-codec                         an entry point of the group `lic_dist.families`
my_package.my_module:MyCodec     a subclass of `CodecModel`, imported because a user named it
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

from torch import nn

from lic_dist.errors import UsageError
from lic_dist.models.compat import import_compressai
from lic_dist.models.protocol import CodecModel

ARCHITECTURES = {
    "block-transform": "lic_dist.models.families.hyperprior:BlockTransform",
    "block-transform-int8": "lic_dist.models.families.hyperprior:BlockTransformInt8",
    "bmshj2018-factorized": "lic_dist.models.families.factorized:FactorizedPrior",
    "bmshj2018-factorized-relu": "lic_dist.models.families.factorized:FactorizedPriorReLU",
    "bmshj2018-hyperprior": "lic_dist.models.families.hyperprior:ScaleHyperprior",
    "bmshj2018-hyperprior-vbr": "lic_dist.models.families.variable_rate:ScaleHyperpriorVbr",
    "cheng2020-anchor": "lic_dist.models.families.raster:Cheng2020Anchor",
    "cheng2020-anchor-checkerboard": "lic_dist.models.families.latent_codecs:Cheng2020AnchorCheckerboard",
    "cheng2020-attn": "lic_dist.models.families.raster:Cheng2020Attention",
    "elic2022-chandelier": "lic_dist.models.families.latent_codecs:Elic2022Chandelier",
    "elic2022-official": "lic_dist.models.families.latent_codecs:Elic2022Official",
    "mbt2018": "lic_dist.models.families.raster:JointAutoregressive",
    "mbt2018-mean": "lic_dist.models.families.hyperprior:MeanScaleHyperprior",
    "mbt2018-mean-vbr": "lic_dist.models.families.variable_rate:MeanScaleHyperpriorVbr",
    "mbt2018-vbr": "lic_dist.models.families.variable_rate:JointAutoregressiveVbr",
    "minnen2020-charm": "lic_dist.models.families.slices:Minnen2020Charm",
}
"""Architectures served here, by CompressAI's names where it has them, and their families."""

GROUP = "lic_dist.families"  # of entry points


@dataclass(frozen=True)
class ModelSpec:
    """What is needed to build a model again; lmbda is the weight of distortion in the loss that it was trained with.

    `options` are arguments of the module's class beyond N and M, where they were given.
    """

    architecture: str
    N: int
    M: int
    lmbda: float
    options: dict[str, Any] = field(default_factory=dict, repr=False, hash=False)

    def as_dict(self) -> dict[str, Any]:
        """Return the spec as plain data, as checkpoints carry it: without options where there are none."""
        return {key: value for key, value in asdict(self).items() if key != "options" or value}


@cache
def installed() -> dict[str, str]:
    """Return the families of installed packages: name -> "package.module:Class"."""
    return {one.name: one.value for one in entry_points(group=GROUP) if one.name not in ARCHITECTURES}


@cache
def family(architecture: str) -> type[CodecModel]:
    """Return the family of a name, or of a "package.module:Class", which is imported.

    Raises:
        UsageError: an architecture that is not served, or a class that cannot be imported or is no CodecModel.
    """
    path = ARCHITECTURES.get(architecture) or installed().get(architecture, architecture)
    if ":" not in path:
        known = ", ".join(sorted([*ARCHITECTURES, *installed()]))
        raise UsageError(f"unknown architecture '{architecture}'", hint=f"one of: {known}; or package.module:Class")
    module, _, name = path.partition(":")
    if architecture not in ARCHITECTURES:
        import_compressai()  # so that the module may import it as usual
        if os.getcwd() not in sys.path:  # as under `python -m`
            sys.path.append(os.getcwd())
    try:
        found = getattr(import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise UsageError(
            f"architecture {architecture}: {error}", hint="its module is installed, or lies in the folder you are in"
        ) from None
    if not (isinstance(found, type) and issubclass(found, CodecModel)):
        raise UsageError(f"architecture {architecture} is no subclass of CodecModel", hint="see docs/families.md")
    _NAMED[architecture] = found
    return found


_NAMED: dict[str, type[CodecModel]] = {}  # all that `family` has returned


def adapt(module: nn.Module) -> CodecModel:
    """Return a module as its family sees it, told by the module's class.

    Raises:
        UsageError: a class of no family.
    """
    for one in _families():
        if type(module) is one.module_type():
            return one(module)
    raise UsageError(f"no family of models wraps a {type(module).__name__}", hint="see docs/families.md")


def _families() -> Iterator[type[CodecModel]]:
    yield from map(family, ARCHITECTURES)
    yield from list(_NAMED.values())
    yield from map(family, installed())


def build(architecture: str, N: int, M: int, **options: Any) -> nn.Module:
    """Return a freshly initialised model; `options` are arguments of its class beyond N and M.

    Raises:
        UsageError: an architecture that is not served, or options that its class does not take.
    """
    try:
        return family(architecture).build(N=N, M=M, **options)
    except TypeError as error:
        raise UsageError(f"{architecture} with N {N}, M {M}, options {options}: {error}") from None
