"""The experiment file: YAML that is checked and read into frozen sections, with templates and sweeps.

In: a file and `--set a.b=c` overrides. Out: `Experiment` with its sections; `expand` for all combinations of a sweep; a
reference of every key. Imports the ground (errors), `models.lambdas` and `models.names`.
"""

from lic_dist.config.experiment import (
    Cache,
    Engine,
    Evaluate,
    Experiment,
    Images,
    Model,
    Quantizer,
    Report,
    bounds,
    load,
    need,
)
from lic_dist.config.training import Finetune, Phase, Section, Train

__all__ = [
    "Cache",
    "Engine",
    "Evaluate",
    "Experiment",
    "Finetune",
    "Images",
    "Model",
    "Phase",
    "Quantizer",
    "Report",
    "Section",
    "Train",
    "bounds",
    "load",
    "need",
]
