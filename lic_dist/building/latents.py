"""Latents in memory, and what quantizers make of them.

Of a model of one stage, residuals and scale levels of y are the same for every quantizer: `QuantizerInput`. Where means
depend on y_hat, of earlier stages, or y_hat is corrected in the end, each quantizer walks the stages: `WalkedInput`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lic_dist.codec import walk
from lic_dist.codec.refine import answer_of, refine, refinement_of
from lic_dist.models.architectures import adapt
from lic_dist.models.protocol import CodecModel
from lic_dist.models.refine import refine_z
from lic_dist.models.stages import analyse, known_stage, only_side, only_stage, to_input
from lic_dist.quantization.adaptation import Part, factorized_record, gaussian_record
from lic_dist.quantization.quantize import Quantizer
from lic_dist.quantization.record import QuantizerRecord

DECODED = 4  # crops that are decoded at a time: what g_s makes of more leaves a core's cache


@dataclass(frozen=True)
class Latents:
    """Samples as a cache stores them: pixels uint8 [n, 3, s, s], y float16 [n, M, h, w], z int16 [n, Nz, hz, wz],
    where Nz may be 0.
    """

    pixels: NDArray[np.uint8]
    y: NDArray[np.float16]
    z: NDArray[np.int16]

    def __len__(self) -> int:
        return len(self.y)

    def part(self, chosen: slice) -> Latents:
        """Return a run of the samples."""
        return Latents(self.pixels[chosen], self.y[chosen], self.z[chosen])


class Quantized(NamedTuple):
    """What a quantizer made of samples: k int16 and y_hat float32 as g_s takes it, [n, M, h, w] both; of each channel,
    [n, M] float64, the estimated bits and the squared error of y_hat before corrections.
    """

    k: NDArray[np.int16]
    y_hat: NDArray[np.float32]
    bits: NDArray[np.float64]
    error: NDArray[np.float64]


@dataclass(frozen=True)
class QuantizerInput:
    """What any quantizer takes of a model of one stage, and the means that the residuals are about.

    residual float32 and level (see `walk.levels`), both [n*M, h*w] (lanes are image-major); means float32 [n, M, h, w].
    """

    residual: NDArray[np.float32]
    level: NDArray[np.integer[Any]]
    means: NDArray[np.float32]

    @property
    def arrays(self) -> tuple[NDArray[Any], ...]:
        """All that `quantize` depends on besides the quantizer."""
        return self.residual, self.level, self.means

    def part(self, chosen: slice) -> QuantizerInput:
        """Return a run of the samples."""
        first, last, _ = chosen.indices(len(self.means))
        lanes = slice(first * self.means.shape[1], last * self.means.shape[1])
        return QuantizerInput(self.residual[lanes], self.level[lanes], self.means[chosen])

    def quantize(self, quantizer: Quantizer) -> Quantized:
        """Quantize all samples. Raises LicError as `Quantizer.quantize` does."""
        shape = self.means.shape
        k, level, bits, error = quantize_lanes(quantizer, self.residual, self.level, shape[1])
        return Quantized(k.reshape(shape), self.means + level.reshape(shape), bits, error)

    def rounded(self, count: int) -> NDArray[np.float32]:
        """Return y_hat of SQ of the first samples, at most `count`."""
        whole: NDArray[np.float32] = np.rint(self.residual).reshape(self.means.shape) + self.means
        return whole[:count]

    def unquantized(self, y: NDArray[np.float16]) -> NDArray[np.float32]:
        """Return what g_s would take if the samples' y were not quantized, float32 [n, M, h, w]."""
        return y.astype(np.float32)

    def parts(self, record: QuantizerRecord) -> list[Part]:
        """Return what the tables of a record are adapted on."""
        return [(self.residual, self.level)]


@dataclass(frozen=True, eq=False)
class WalkedInput:
    """The same of a model whose means depend on y_hat, or that corrects it: every quantizer walks the stages.

    y float16 [n, M, h, w] and z int16 [n, Nz, hz, wz] are walked in batches of a fixed size on the model's device.
    """

    model: nn.Module
    y: NDArray[np.float16]
    z: NDArray[np.int16]
    batch: int

    @property
    def arrays(self) -> tuple[NDArray[Any], ...]:
        """All that `quantize` depends on besides quantizer and model."""
        return self.y, self.z, np.array(self.batch)

    def part(self, chosen: slice) -> WalkedInput:
        """Return a run of the samples."""
        return WalkedInput(self.model, self.y[chosen], self.z[chosen], self.batch)

    @torch.no_grad()
    def quantize(self, quantizer: Quantizer) -> Quantized:
        """Quantize all samples, stage by stage. Raises LicError as `Quantizer.quantize` does."""
        codec, made = adapt(self.model), []
        for count, y, z_hat in _batches(codec, self.y, self.z, self.batch):
            coded = walk.search(codec, (z_hat,), y, quantizer)
            k, level, y_hat, error = (one[:count].cpu() for one in coded[:4])
            bits = walk.channel_bits(codec, quantizer, k, level)
            made.append(Quantized(k.numpy(), y_hat.numpy(), bits, error.numpy()))
        return Quantized(*map(np.concatenate, zip(*made, strict=True)))

    def rounded(self, count: int) -> NDArray[np.float32]:
        """Return y_hat of SQ of the first samples, at most `count`."""
        ones, prior = np.ones(self.y.shape[1]), adapt(self.model).prior
        record = factorized_record("sq", 1, ones, 1, prior.cdf) if prior else gaussian_record("sq", 1, ones, 1)
        return self.part(slice(count)).quantize(Quantizer(record)).y_hat

    @torch.no_grad()
    def unquantized(self, y: NDArray[np.float16]) -> NDArray[np.float32]:
        """Return what g_s would take if the samples' y were not quantized, float32 [n, M, h, w]."""
        codec = adapt(self.model)
        given = [
            codec.given((z_hat,), values).y_hat[:count].cpu().numpy()
            for count, values, z_hat in _batches(codec, y, self.z, self.batch)
        ]
        return np.concatenate(given)

    @torch.no_grad()
    def parts(self, record: QuantizerRecord) -> list[Part]:
        """Return what the tables of a record are adapted on: the residuals of a walk with it, whose y_hat are held."""
        codec, found = adapt(self.model), []
        for count, y, z_hat in _batches(codec, self.y, self.z, self.batch):
            quantizer = _Recorder(record)
            walk.search(codec, (z_hat,), y, quantizer)
            found += [_of_first(part, count, self.batch) for part in quantizer.parts]
        return found


Inputs = QuantizerInput | WalkedInput


class _Recorder(Quantizer):
    """A quantizer that keeps what it quantizes: a `Part` a stage, on the CPU."""

    def __init__(self, record: QuantizerRecord) -> None:
        super().__init__(record)
        self.parts: list[Part] = []

    def quantize(self, r: Any, level: Any, threads: int = 1, channels: Any = None) -> Any:
        lanes = r.cpu().numpy(), level.cpu().numpy()
        self.parts.append(lanes if channels is None else (*lanes, channels))
        return super().quantize(r, level, threads, channels)


def _of_first(part: Part, count: int, batch: int) -> Part:
    """Return the lanes of the first images of a batch."""
    r, level, *channels = part
    lanes = len(r) // batch * count
    if not channels:
        return r[:lanes], level[:lanes]
    (of_lanes,) = channels
    return r[:lanes], level[:lanes], of_lanes if of_lanes.ndim == 2 else of_lanes[:lanes]


def quantize_lanes(
    quantizer: Quantizer, residual: NDArray[np.float32], level: NDArray[np.integer[Any]], channels: int
) -> tuple[NDArray[np.int16], NDArray[np.float32], NDArray[np.float64], NDArray[np.float64]]:
    """Quantize lanes [n*M, h*w] of whole images: k and the levels of reconstruction in lanes, and of each channel,
    [n, M], the estimated bits and the squared error.
    """
    k = quantizer.quantize(residual, level)
    found = quantizer.dequantize(k, level)
    error = np.square(residual.astype(np.float64) - found).sum(axis=1)
    return k, found, quantizer.bits(k, level).reshape(-1, channels), error.reshape(-1, channels)


@torch.no_grad()
def encode(
    model: nn.Module, pixels: NDArray[np.uint8], batch: int, z_steps: int = 0
) -> tuple[Latents, NDArray[np.bool_]]:
    """Run the frozen encoder over uint8 [n, 3, s, s] in batches of a fixed size, the last one padded with zeros.

    z is refined in `z_steps`. Returns the latents and which samples overflowed their types (float16 y, int16 z); those
    are stored as zeros.
    """
    device = next(model.parameters()).device
    ys, zs = [], []
    for first in range(0, len(pixels), batch):
        part = pixels[first : first + batch]
        y, z = analyse(model, to_input(torch.from_numpy(_padded(part, batch)), device))
        if z_steps:
            z = refine_z(adapt(model), y, z_steps)
        ys.append(y[: len(part)].cpu().numpy())
        zs.append(z[: len(part)].cpu().numpy())
    y_all, z_all = np.concatenate(ys), np.concatenate(zs)
    axes = (1, 2, 3)
    overflow = ~np.isfinite(y_all).all(axis=axes) | (np.abs(z_all.astype(np.int64)) > 32767).any(axis=axes)
    y_all[overflow], z_all[overflow] = 0, 0
    return Latents(pixels, y_all, z_all.astype(np.int16)), overflow


def refined(
    model: nn.Module,
    pixels: NDArray[np.uint8],
    y: NDArray[np.float16],
    z: NDArray[np.int16],
    quantizer: Quantizer,
    batch: int,
) -> NDArray[np.float16]:
    """Return what the quantizer's search should aim at in place of y of these samples (codec/refine.py), in batches of
    a fixed size; y itself where its record asks for no refinement.
    """
    refinement, codec = refinement_of(quantizer.record), adapt(model)
    if not refinement.steps:
        return y
    device, targets = next(model.parameters()).device, []
    for number, (count, values, z_hat) in enumerate(_batches(codec, y, z, batch)):
        x = to_input(torch.from_numpy(_padded(pixels[number * batch : (number + 1) * batch], batch)), device)
        target = refine(codec, (z_hat,), values, quantizer, answer_of(codec, x, refinement), refinement)
        targets.append(target[:count].cpu().numpy())
    return np.concatenate(targets)


def _padded(part: NDArray[Any], count: int) -> NDArray[Any]:
    """Return samples followed by zeros up to this count."""
    whole = np.zeros((count, *part.shape[1:]), part.dtype)
    whole[: len(part)] = part
    return whole


@torch.no_grad()
def in_one_stage(codec: CodecModel, y_size: tuple[int, ...], z_size: tuple[int, ...]) -> bool:
    """Return whether a model codes y of this height and width in one stage, and leaves y_hat as that makes it."""
    side, device = only_side(codec), next(codec.module.parameters()).device
    z_hat = side.dequantize(torch.zeros(1, side.channels, *z_size, device=device))
    return known_stage(codec, (z_hat,), y_size) is not None


def inputs_of(model: nn.Module, y: NDArray[np.float16], z: NDArray[np.int16], batch: int) -> Inputs:
    """Return what quantizers take of cached latents, whose networks run in batches of a fixed size."""
    if in_one_stage(adapt(model), y.shape[2:], z.shape[2:]):
        return quantizer_input(model, y, z, batch)
    return WalkedInput(model, y, z, batch)


def _batches(
    codec: CodecModel, y: NDArray[np.float16], z: NDArray[np.int16], batch: int
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yield y float32 and z_hat on the model's device, always `batch` samples, the last of them zeros, with the number
    of the others.
    """
    side, device = only_side(codec), next(codec.module.parameters()).device
    for first in range(0, len(y), batch):
        part_y, part_z = (torch.from_numpy(_padded(one[first : first + batch], batch)).to(device) for one in (y, z))
        yield len(y[first : first + batch]), part_y.float(), side.dequantize(part_z)


@torch.no_grad()
def quantizer_input(model: nn.Module, y: NDArray[np.float16], z: NDArray[np.int16], batch: int) -> QuantizerInput:
    """Compute means and scales of cached latents in batches of a fixed size, and the residuals about the means.

    Raises LicError for a model of several stages, or that corrects y_hat: see `inputs_of`.
    """
    codec, residuals, levels, means = adapt(model), [], [], []
    for count, values, z_hat in _batches(codec, y, z, batch):
        stage = only_stage(codec, (z_hat,))
        lanes = count * codec.channels
        residuals.append(stage.to_lanes(values - stage.means)[:lanes])
        levels.append(walk.levels(stage, "nearest").cpu().numpy()[:lanes])
        means.append(stage.means[:count].cpu().numpy())
    return QuantizerInput(np.concatenate(residuals), np.concatenate(levels), np.concatenate(means))


@torch.no_grad()
def squared_error(model: nn.Module, y_hat: NDArray[np.float32], pixels: NDArray[np.uint8]) -> float:
    """Return the mean squared error of g_s(y_hat), clamped to [0, 1], against pixels/255."""
    device = next(model.parameters()).device
    codec, total = adapt(model), 0.0
    for first in range(0, len(pixels), DECODED):
        x = to_input(torch.from_numpy(pixels[first : first + DECODED]), device)
        x_hat = codec.synthesise(to_decode(y_hat[first : first + DECODED], device)).clamp(0, 1)
        total += float((x_hat - x).double().square().sum())
    return total / pixels.size


def to_decode(y_hat: NDArray[np.float32], device: torch.device) -> Tensor:
    """Return y_hat as a tensor that g_s decodes fastest on a CPU, with its channels last."""
    return torch.from_numpy(y_hat).to(device).contiguous(memory_format=torch.channels_last)
