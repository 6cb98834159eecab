"""A decoder in 8 bits made of a trained one: its units fitted to the cache, then retrained layer by layer.

Sun et al. 2021 ("Learned Image Compression with Fixed-point Arithmetic") retrain so. A layer is asked for the output of
the floats' layer, on what the quantized layers before it made. Layers of 1x1 and the residual blocks are solved
(models/ranges.py), the wider ones of h_s take some steps each, before the job's own phases train all as one.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from lic_dist.config.training import Int8
from lic_dist.errors import UsageError
from lic_dist.models.architectures import adapt, build
from lic_dist.models.checkpoint import CDF, Checkpoint, update_tables
from lic_dist.models.fine import choose_fine
from lic_dist.models.int8 import QUANTIZING, Convolving
from lic_dist.models.parts import model_digest
from lic_dist.models.ranges import fit
from lic_dist.quantization.quantize import Quantizer
from lic_dist.training.decoding import Decoding, Turns
from lic_dist.training.loop import PhasePlan
from lic_dist.training.parent import Source
from lic_dist.training.samples import Batch, Layout, Samples

FORMS: Mapping[str, str] = {"block-transform": "block-transform-int8"}


def require_form(architecture: str) -> None:
    """Raise UsageError for a family whose decoder has no form in 8 bits."""
    if architecture not in FORMS:
        raise UsageError(f"{architecture} has no decoder in 8 bits", hint=f"such families: {', '.join(FORMS)}")


def converted(source: Source, section: Int8, layout: Layout) -> tuple[Checkpoint, Checkpoint]:
    """Return the parent with a decoder in 8 bits, of the nearest weights and of those that are retrained layer by layer
    where that needs no steps, on training samples of the cache.
    """
    parent, group = source.parent, source.groups[0]
    spec = replace(parent.spec, architecture=FORMS[parent.spec.architecture])
    weights = {name: value for name, value in parent.model.state_dict().items() if not name.endswith(CDF)}
    every = np.concatenate(source.cache.parts(held_out=False))
    chosen = every[:: max(1, len(every) // section.samples)][: section.samples]
    samples = Samples(source.cache, {group.name: Quantizer(group.record)}, chosen, False, layout)
    (z_hat,), y_hat = Decoding(parent.model, group.record).latents(samples.batch(np.arange(len(chosen))))
    entry = {"what": QUANTIZING, "of": parent.source, "model": model_digest(parent.model), "samples": len(chosen)}

    begun = build(spec.architecture, spec.N, spec.M, **spec.options)
    begun.load_state_dict({**begun.state_dict(), **weights})
    choose_fine(adapt(begun), parent.codec, y_hat, section.fine)

    def made(retrained: bool) -> Checkpoint:
        model = copy.deepcopy(begun)
        fit(adapt(model), parent.codec, z_hat, y_hat, retrained)
        update_tables(model)
        return Checkpoint(model.eval(), spec, parent.quantizers, [*parent.history, entry], parent.source)

    return made(False), made(True)


class Layer(NamedTuple):
    """A layer that is retrained by itself: its network, and its number there."""

    net: str
    number: int


class ByLayer(nn.Module):
    """The forward pass of a job whose first phases retrain one layer each, all others being those of `turns`.

    `teacher` are the forward passes of the floats' model.
    """

    def __init__(self, turns: Turns, model: nn.Module, teacher: Turns) -> None:
        super().__init__()
        self.turns, self._nets = turns, adapt(model).nets
        self._teacher = [teacher.requires_grad_(False)]  # no module of this one: its weights are not the job's
        self.layers = [
            Layer(net, number)
            for net in ("h_s", "g_s")
            for number, layer in enumerate(self._nets[net].children())
            if isinstance(layer, Convolving) and layer.kernel_size != (1, 1)  # the others are solved
        ]

    def phases(self, section: Int8) -> list[PhasePlan]:
        """Return the phases of the layers."""
        found = []
        for net, number in self.layers:
            layer = self._nets[net].get_submodule(str(number))
            names = tuple(f"{net}.{number}.{name}" for name, _ in layer.named_parameters())
            units = [1 / one.scales().median() for one in layer.modules() if isinstance(one, Convolving)]
            found.append(PhasePlan(names, section.steps, section.lr * float(min(units))))
        return found

    def forward(self, batch: Batch, turn: int, phase: int | None = None) -> Any:
        """Return what `Turns` does or, for one of the first phases, the error of its layer."""
        if phase is None or phase >= len(self.layers):
            return self.turns(batch, turn)
        net, number = self.layers[phase]
        teacher: Any = self._teacher[0].decodings[turn]
        with torch.no_grad():
            (z_hat,), y_hat = teacher.latents(batch)
            read = aim = z_hat if net == "h_s" else y_hat
            layers, theirs = (list(nets[net].children()) for nets in (self._nets, teacher.codec.nets))
            for layer, other in zip(layers[:number], theirs, strict=False):
                read, aim = layer(read), other(aim)
            aim = theirs[number](aim)
        return (layers[number](read) - aim).square().mean() / aim.var()
