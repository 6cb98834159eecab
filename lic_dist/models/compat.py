"""The one place that imports compressai, and mends torchvision beside a CPU build of torch."""

from __future__ import annotations

import importlib
from types import ModuleType

_keep_alive: list[object] = []  # a torch.library.Library undoes its definitions when it is collected

_TORCHVISION_OPERATORS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)


def import_compressai() -> ModuleType:
    """Import and return `compressai` with its submodules `ans`, `models` and `entropy_models`.

    compressai imports torchvision to register the names of transforms. PyPI's torchvision is linked against
    CUDA: beside a CPU torch its compiled part stays out and the import fails with "operator torchvision::nms
    does not exist". Where it does, the two operators are declared (never defined: nothing here calls them).
    """
    try:
        importlib.import_module("torchvision")
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
        _declare_torchvision_operators()
        importlib.import_module("torchvision")
    for name in ("ans", "entropy_models", "models"):
        importlib.import_module(f"compressai.{name}")
    return importlib.import_module("compressai")


def _declare_torchvision_operators() -> None:
    import sys

    import torch

    library = torch.library.Library("torchvision", "FRAGMENT")
    for schema in _TORCHVISION_OPERATORS:
        library.define(schema)
    _keep_alive.append(library)
    for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        del sys.modules[name]
