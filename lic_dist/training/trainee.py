"""What trains in a retraining: the parent's own weights, adapters beside them, or a decoder in 8 bits made of it.

trainee = trainee_of(source, section)            # refuses what the parent has not
trainee.parameters("decoder+hyper")              # the names that a recipe trains
source = trainee.begin(layout, out, ranks)       # what is costly, once it is known that the job is not done
module = trainee.module(turns)                   # the forward pass; `layers` are phases before the job's own
weights, pack = trainee.finish(best)             # what the model is left with
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lic_dist import config
from lic_dist.models.adapters import attach, detach
from lic_dist.models.checkpoint import save, weights_digest
from lic_dist.models.names import SUFFIX, label
from lic_dist.models.packs import Pack
from lic_dist.models.parts import trainable
from lic_dist.training.decoding import Decoding, Turns
from lic_dist.training.distributed import Ranks
from lic_dist.training.layerwise import ByLayer, converted, require_form
from lic_dist.training.loop import PhasePlan
from lic_dist.training.parent import Source
from lic_dist.training.samples import Layout

CALIBRATED = "calibrated"  # the file of a decoder in 8 bits that is not retrained yet


class Weights:
    """The weights of a copy of the parent."""

    layers: Sequence[PhasePlan] = ()

    def __init__(self, source: Source, section: config.Finetune) -> None:
        self.source, self.section = source, section
        self.model: Any = copy.deepcopy(source.parent.model)

    def parameters(self, recipe: str | Sequence[str]) -> tuple[str, ...]:
        """Return the names of what a recipe trains."""
        return trainable(self.source.parent.model, recipe)

    def begin(self, layout: Layout, out: Path, ranks: Ranks) -> Source:
        """Move the model to its device; return the source whose parent it is compared with."""
        self.model.to(ranks.device)
        return self.source

    def module(self, turns: Turns) -> nn.Module:
        """Return what is called with a batch, the turn, and of `layers` the number of the phase."""
        return turns

    def finish(self, best: dict[str, Tensor]) -> tuple[dict[str, Tensor], Pack | None]:
        """Return the weights that the best ones make of the parent, and the pack that does."""
        return best, None


class Adapters(Weights):
    """Adapters beside the weights. In the end they become integers, which the pack has, and are merged."""

    def __init__(self, source: Source, section: config.Finetune) -> None:
        super().__init__(source, section)
        self.names = attach(self.model, section.adapters, section.seed)

    def parameters(self, recipe: str | Sequence[str]) -> tuple[str, ...]:
        """Return the names of the adapters' parameters: they are the recipe."""
        return self.names

    def finish(self, best: dict[str, Tensor]) -> tuple[dict[str, Tensor], Pack | None]:
        """Return the weights with the model's adapters merged, and these as a pack; `best` are loaded already."""
        parent = self.source.parent
        pack = Pack(weights_digest(parent.model), label(parent.source), detach(self.model))
        return pack.merged(parent.model.state_dict()), pack


class In8Bits(Weights):
    """A decoder in 8 bits, whose wider layers are retrained one by one before all train together."""

    def __init__(self, source: Source, section: config.Finetune) -> None:
        require_form(source.parent.spec.architecture)
        super().__init__(source, section)
        self.floats = self.model

    def begin(self, layout: Layout, out: Path, ranks: Ranks) -> Source:
        """Convert the parent, and save that of the nearest weights; the other one takes the parent's place."""
        assert self.section.int8
        nearest, parent = converted(self.source, self.section.int8, layout)
        if ranks.first:
            save(nearest, out / f"{CALIBRATED}{SUFFIX}")
        self.source = replace(self.source, parent=parent)
        self.floats, self.model = self.floats.to(ranks.device), copy.deepcopy(parent.model)
        return super().begin(layout, out, ranks)

    def module(self, turns: Turns) -> nn.Module:
        """Return the pass that retrains layers, and then is that of `turns`."""
        assert self.section.int8
        theirs = Turns([Decoding(self.floats, one.record) for one in self.source.groups])
        by_layer = ByLayer(turns, self.model, theirs.to(next(self.floats.parameters()).device))
        self.layers = by_layer.phases(self.section.int8)
        return by_layer


def trainee_of(source: Source, section: config.Finetune) -> Weights:
    """Return what a job trains.

    Raises:
        UsageError: the parent's family has no decoder in 8 bits, or nothing of the parts that adapters are asked for.
    """
    if section.int8:
        return In8Bits(source, section)
    return (Adapters if section.packs else Weights)(source, section)
