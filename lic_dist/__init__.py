"""lic_dist: a distributed dataset-caching finetuning system for learned image compression.

`import lic_dist` loads nothing; the names below are loaded when they are first used. Users' code may rely on them and
on what their docstrings say; other names may move between versions.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lic_dist.version import __version__

if TYPE_CHECKING:
    from lic_dist.building.build import build, requantize
    from lic_dist.cache.reader import LatentCache
    from lic_dist.codec import open_codec, open_decoder
    from lic_dist.config import Experiment
    from lic_dist.config import load as load_experiment
    from lic_dist.errors import LicError
    from lic_dist.evaluation.run import evaluate
    from lic_dist.models.checkpoint import load as load_checkpoint
    from lic_dist.quantization.quantize import Quantizer
    from lic_dist.quantization.record import QuantizerRecord
    from lic_dist.reporting.bd import bd_rate
    from lic_dist.reporting.curves import read_curves
    from lic_dist.reporting.frames import read_results
    from lic_dist.reporting.report import report
    from lic_dist.training.finetune import finetune

_HOMES = {
    "Experiment": "config.Experiment",
    "LatentCache": "cache.reader.LatentCache",
    "LicError": "errors.LicError",
    "Quantizer": "quantization.quantize.Quantizer",
    "QuantizerRecord": "quantization.record.QuantizerRecord",
    "bd_rate": "reporting.bd.bd_rate",
    "build": "building.build.build",
    "evaluate": "evaluation.run.evaluate",
    "finetune": "training.finetune.finetune",
    "load_checkpoint": "models.checkpoint.load",
    "load_experiment": "config.load",
    "open_codec": "codec.open_codec",
    "open_decoder": "codec.open_decoder",
    "read_curves": "reporting.curves.read_curves",
    "read_results": "reporting.frames.read_results",
    "report": "reporting.report.report",
    "requantize": "building.build.requantize",
}

__all__ = [
    "Experiment",
    "LatentCache",
    "LicError",
    "Quantizer",
    "QuantizerRecord",
    "__version__",
    "bd_rate",
    "build",
    "evaluate",
    "finetune",
    "load_checkpoint",
    "load_experiment",
    "open_codec",
    "open_decoder",
    "read_curves",
    "read_results",
    "report",
    "requantize",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'lic_dist' has no attribute '{name}'")
    module, _, attribute = _HOMES[name].rpartition(".")
    return globals().setdefault(name, getattr(import_module(f"lic_dist.{module}"), attribute))


def __dir__() -> list[str]:
    return sorted(__all__)
