"""CompressAI's variable-rate models: y is multiplied by a gain before it is rounded, and divided by it after.

    y' = gain y,  means' = gain means,  scales' = gain scales,  x_hat = g_s(y_hat' / gain)
    y_hat' = means' + level + sign(level) offset(scales', gain), where k is not 0

Kamisli et al. 2024, Variable-Rate Learned Image Compression with Multi-Objective Optimization and
Quantization-Reconstruction Offsets. At one gain such a model is as one of a fixed rate, whose y_hat is corrected; here
y, means and scales are those with a dash. Contexts see the corrected y_hat. With `vr_entbttlnck` the step that z is
rounded with follows from the gain too, 0.5 or more.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lic_dist.errors import UsageError
from lic_dist.models.families.hyperprior import MeanScaleHyperprior, ScaleHyperprior
from lic_dist.models.families.raster import JointAutoregressive
from lic_dist.models.lambdas import LAMBDAS
from lic_dist.models.layers import PositionLayers
from lic_dist.models.protocol import CodecModel, Given, Rate, Run, Side, Sides, Stage, one_layout

ZERO = 0.25  # |level| below it is that of k = 0, whose means have moved, or whose rounding is relaxed

LARGEST = 1 << 20  # elements of y whose offsets are computed at once


class SteppedSide(Side):
    """A side latent whose coded integers count steps of another size than 1, a scalar tensor."""

    def relaxed(self, z: Tensor) -> tuple[Tensor, Tensor]:
        if self.prior.training:
            z_hat = z + torch.empty_like(z).uniform_(-0.5, 0.5) * self.step
        else:
            z_hat = self.dequantize(torch.round(self.centred(z)))
        return z_hat, self.likelihood(z_hat)


class VariableRate(MeanScaleHyperprior):
    """A mixin before the family of the same networks at a fixed rate."""

    supports = frozenset({"deterministic", "tiles", "refinement"})

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        self._offsets = PositionLayers(*self.module.QuantABCD)

    @classmethod
    def fits(cls, state: Mapping[str, Tensor]) -> bool:
        return "Gain" in state and super().fits({name: value for name, value in state.items() if name != "Gain"})

    @classmethod
    def sizes(cls, state: Mapping[str, Tensor]) -> dict[str, Any]:
        stepped = {"vr_entbttlnck": True} if "gayn2zqstep.0.weight" in state else {}
        return {**super().sizes(state), **stepped}

    @classmethod
    def build(cls, **sizes: Any) -> nn.Module:
        gain = sizes.pop("gain", None)
        module: Any = super().build(**sizes)
        module.Gain.requires_grad_(False)  # CompressAI trains it neither
        module.gain = None if gain is None else float(gain)
        return module

    @classmethod
    def rates(cls, state: Mapping[str, Tensor]) -> tuple[Rate, ...]:
        gains = (float(str(gain)) for gain in state["Gain"].detach().abs().cpu().numpy())
        return tuple(map(Rate, gains, LAMBDAS["mse"]))

    @property
    def gain(self) -> float | None:
        gain: float | None = self.module.gain
        return gain

    def take_gain(self, gain: float | None) -> None:
        self.module.gain = gain

    @property
    def sides(self) -> tuple[Side, ...]:
        if self.gain is None or not self.module.vr_entbttlnck:
            return super().sides
        step = (1 / self._gain).double().view(1)  # in float64, so that every machine rounds to the same float32
        for layer in self.module.gayn2zqstep:
            linear = isinstance(layer, nn.Linear)
            step = nn.functional.linear(step, layer.weight.double(), layer.bias.double()) if linear else layer(step)
        return (SteppedSide("z", self.module.entropy_bottleneck, self.module.lower_bound_zqstep(step.float())[0]),)

    @property
    def nets(self) -> Mapping[str, nn.Module]:
        return {**super().nets, "QuantABCD": self._offsets}

    def analyse(self, x: Tensor) -> Tensor:
        return super().analyse(x) * self._gain

    def hyper_analyse(self, y: Tensor) -> Sides:
        return super().hyper_analyse(y * (1 / self._gain))

    def synthesise(self, y_hat: Tensor) -> Tensor:
        return super().synthesise(y_hat * (1 / self._gain))

    def walk(self, sides_hat: Sides, run: Run) -> Generator[Stage, Tensor, Tensor]:
        gain, walk = self._gain, super().walk(sides_hat, run)
        found = next(walk)
        while True:
            assert found.scales is not None  # y is Gaussian
            stage = Stage(found.means * gain, found.scales * gain, found.elements)
            sent = yield stage
            try:
                found = walk.send(self._corrected(stage, sent, run) * (1 / gain))
            except StopIteration as done:
                return done.value * gain

    def _corrected(self, stage: Stage, sent: Tensor, run: Run) -> Tensor:
        """Return y_hat of a stage with the offset of each element, of what is sent, means + level."""
        scales = self.gaussian.lower_bound_scale(stage.scales).flatten(2)  # [B, C, P]
        inputs = torch.stack((scales, self._gain.expand(scales.shape)), 1)
        parts = inputs.split(max(1, LARGEST // scales.shape[2]), 2)  # of channels, for less memory at once
        offset = torch.cat([run("QuantABCD", one_layout(part))[:, 0] for part in parts], 1).view(sent.shape)
        level = (sent - stage.means).detach()
        return sent - torch.where(level.abs() < ZERO, 0, level.sign() * offset)

    def given(self, sides_hat: Sides, y_hat: Tensor) -> Given:
        """Return what a walk finds: a context needs the offsets, which follow from the scales that it makes."""
        return CodecModel.given(self, sides_hat, y_hat)

    def update(self) -> None:
        self.module.update(force=True, scale=None if self.gain is None else self._gain)

    @property
    def _gain(self) -> Tensor:
        """The gain as a scalar tensor. Raises UsageError where none is chosen."""
        if self.gain is None:
            raise UsageError(f"a gain of this {self.name} is not chosen", hint="name the checkpoint as FILE@GAIN")
        return torch.tensor(self.gain, device=self.module.Gain.device)


def _parts(of: type[CodecModel], **more: tuple[str, ...]) -> dict[Any, tuple[str, ...]]:
    """Return the parts of a family with more in them; the step of z is the encoder's, because z is stored in it."""
    more = {"encoder": ("Gain", "gayn2zqstep."), **more}
    return {part: (*prefixes, *more.get(part, ())) for part, prefixes in of.parts.items()}


class ScaleHyperpriorVbr(VariableRate, ScaleHyperprior):
    """CompressAI's `bmshj2018-hyperprior-vbr`."""

    name = "bmshj2018-hyperprior-vbr"
    module_class = "compressai.models.vbr:ScaleHyperpriorVbr"
    parts = _parts(ScaleHyperprior, decoder=("QuantABCD.",))


class MeanScaleHyperpriorVbr(VariableRate, MeanScaleHyperprior):
    """CompressAI's `mbt2018-mean-vbr`."""

    name = "mbt2018-mean-vbr"
    module_class = "compressai.models.vbr:MeanScaleHyperpriorVbr"
    parts = _parts(MeanScaleHyperprior, decoder=("QuantABCD.",))


class JointAutoregressiveVbr(VariableRate, JointAutoregressive):
    """CompressAI's `mbt2018-vbr`: the context is moved by what the gain makes of it, and sees the corrected y_hat."""

    name = "mbt2018-vbr"
    module_class = "compressai.models.vbr:JointAutoregressiveHierarchicalPriorsVbr"
    parts = _parts(JointAutoregressive, context=("scale_to_context.", "QuantABCD."))

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        self._moves = PositionLayers(self.module.scale_to_context)

    @property
    def nets(self) -> Mapping[str, nn.Module]:
        return {**super().nets, "scale_to_context": self._moves}

    def walk(self, sides_hat: Sides, run: Run) -> Generator[Stage, Tensor, Tensor]:
        moved = run("scale_to_context", self._gain.view(1, 1, 1, 1))

        def with_gain(name: str, values: Tensor) -> Tensor:
            return run(name, values) + moved if name == "context_prediction" else run(name, values)

        return super().walk(sides_hat, with_gain)
