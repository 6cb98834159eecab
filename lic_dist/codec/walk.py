"""Quantize y, or decode it, along the stages of a model: each is told y_hat of the stages before it.

    z_hat -> walk -> Stage -> r = y - means -> search -> k -> means + level -> walk -> next Stage ... -> y_hat whole

Every lane begins in state 0 at each stage. Carrying the state over gains nothing: the search has to commit to the k of
a stage before the means of the next one are known, so only the start state would differ.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import replace
from itertools import groupby
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lic_dist.codec.offsets import choose
from lic_dist.codec.rans import BitstreamError, Decoder
from lic_dist.models.protocol import CodecModel, Elements, Run, Sides, Stage
from lic_dist.quantization.quantize import Quantizer
from lic_dist.quantization.rates import LEVELS, level_index

OTHER_SCALES = "this machine computes other scales than the encoder's"
OTHER_SCALES_HINT = "decode with the encoder's backend, or encode with --deterministic"


class Plane(NamedTuple):
    """The indices of a stage, in lanes: k int16 and levels, [lanes, steps] both."""

    elements: Elements
    k: NDArray[np.int16]
    level: NDArray[Any]


class Reader(Protocol):
    """What reads the indices of y from a stream, plane by plane."""

    def take(self, level: NDArray[Any], last: bool) -> NDArray[np.int16]:
        """Return k int16 of the next plane, of levels [lanes, steps], which is the last one or not. Raises
        BitstreamError.
        """

    def close(self) -> None:
        """Raise BitstreamError unless the whole stream was read."""


class LevelsFirst:
    """Reads y from the whole of a stream of its own, and looks at the checksum of all levels, `planes_checksum`, before
    the last plane.
    """

    def __init__(self, decoder: Decoder, planes: int, quantizer: Quantizer) -> None:
        self.decoder, self.planes, self.quantizer = decoder, planes, quantizer
        self.checksum = 0
        self.close = decoder.close

    def take(self, level: NDArray[Any], last: bool) -> NDArray[np.int16]:
        """See `Reader`."""
        self.checksum = zlib.crc32(np.ascontiguousarray(level).data, self.checksum)
        if last and self.checksum != self.planes:
            raise other_scales()
        try:
            return self.decoder.decode(level, self.quantizer.record.y_tables, self.quantizer.trellis)
        except BitstreamError:
            if last:
                raise
            raise other_scales() from None  # the container is whole: see there


def other_scales() -> BitstreamError:
    """Return the error that the entropy model was computed otherwise than by the encoder."""
    return BitstreamError(OTHER_SCALES, hint=OTHER_SCALES_HINT)


class Coded(NamedTuple):
    """y as it is quantized: indices k int16 and levels (see `levels`), [B, M, h, w] both, y_hat as `synthesise` takes
    it, float32 [B, M, h, w], the squared error of y_hat before corrections, summed over positions, float64 [B, M]; and
    of each stage its elements, k and levels as they were searched, in lanes. `apart`, where it was asked for, is y less
    the points of the search's lattice that k stands for, float32 [B, M, h, w].
    """

    k: Tensor
    level: Tensor
    y_hat: Tensor
    error: Tensor
    stages: list[tuple[Elements, Tensor, Tensor]]
    apart: Tensor | None = None

    def planes(self) -> list[Plane]:
        """Return the planes of all stages, in the order of coding, on the CPU."""
        return [Plane(elements, k.cpu().numpy(), level.cpu().numpy()) for elements, k, level in self.stages]


def search(
    codec: CodecModel,
    sides_hat: Sides,
    y: Tensor,
    quantizer: Quantizer,
    run: Run | None = None,
    offsets: NDArray[np.int8] | None = None,
    threads: int = 1,
    errors: bool = True,
    apart: bool = False,
    known: Stage | None = None,
) -> Coded:
    """Quantize y, float16 or float32 [B, M, h, w], stage by stage, on the device of y; `run` is that of
    `CodecModel.walk`, `offsets` are those of the levels of each channel, int8 [M]. A CPU's search shares out the lanes
    to `threads`. Without `errors` those of the result are 0; `apart` asks for that field of `Coded`. The networks need
    not run where the model has a `known_stage`, and it is given.

    Raises:
        LicError: a latent is not finite, or does not fit 16-bit indices.
    """
    error = torch.zeros(y.shape[:2], dtype=torch.float64, device=y.device)
    stages: list[tuple[Elements, Tensor, Tensor]] = []
    parts: list[tuple[Elements, list[Tensor]]] = []

    def quantize(stage: Stage) -> Tensor:
        elements, lanes = stage.elements, levels(stage, quantizer.record.level_rule, offsets)
        part = elements.take(y).float() - stage.means
        r = elements.lanes(part)
        found = quantizer.quantize(r, lanes, threads, elements.lane_channels(*y.shape[:2]))
        value = quantizer.dequantize(found, lanes)
        stages.append((elements, found, lanes))
        kept = [found, lanes, *([(r.double() - value).square()] if errors else [])]
        kept += [r - quantizer.lattice(found)] if apart else []
        parts.append((elements, [elements.from_lanes(one, part) for one in kept]))
        return stage.means + elements.from_lanes(value, part)

    y_hat = codec.drive(sides_hat, quantize, run)[1] if known is None else quantize(known)
    if len(parts) == 1 and not (errors or apart) and parts[0][1][0].shape == y.shape:
        k, level = parts[0][1]
        return Coded(k, level, y_hat, error, stages)
    types = torch.int16, torch.uint16 if quantizer.record.by_channel else torch.uint8
    k, level = (torch.zeros(y.shape, dtype=dtype, device=y.device) for dtype in types)
    from_lattice = torch.zeros(y.shape, device=y.device) if apart else None
    for elements, (of_k, of_level, *rest) in _joined(parts):
        elements.put(k, of_k)
        elements.put(level, of_level)
        if errors:
            error[:, elements.channels] += rest[0].flatten(2).sum(2)
        if from_lattice is not None:
            elements.put(from_lattice, rest[-1])
    return Coded(k, level, y_hat, error, stages, from_lattice)


def _joined(parts: list[tuple[Elements, list[Tensor]]]) -> Iterator[tuple[Elements, list[Tensor]]]:
    """Join the elements of stages in a row that have the same channels, and what `Elements.take` returns of them:
    writing a few positions costs as much as writing all.
    """
    for _, group in groupby(parts, lambda part: (part[0].channels.start, part[0].channels.stop)):
        all_elements, values = zip(*group, strict=True)
        first = all_elements[0]
        if len(all_elements) == 1:
            yield first, values[0]
        else:
            positions = np.concatenate([elements.positions for elements in all_elements])
            yield replace(first, positions=positions), [torch.cat(one, 2) for one in zip(*values, strict=True)]


def dequantize(codec: CodecModel, sides_hat: Sides, k: Tensor, quantizer: Quantizer, run: Run | None = None) -> Tensor:
    """Return y_hat, float32 [B, M, h, w], of indices k int16 [B, M, h, w] that are known."""
    return codec.drive(sides_hat, lambda stage: _reconstruct(stage, k, quantizer), run)[1]


def decode(
    codec: CodecModel,
    sides_hat: Sides,
    size: tuple[int, int],
    reader: Reader,
    quantizer: Quantizer,
    run: Run | None = None,
    offsets: NDArray[np.int8] | None = None,
) -> tuple[Tensor, Tensor]:
    """Read y, of `size` in positions, to the end of its stream: indices k int16 and y_hat float32, [1, M, h, w] both;
    `offsets` as for `search`.

    Raises:
        BitstreamError: a stream that is cut, altered or extended, or this machine computes other scales.
    """
    record = quantizer.record
    last = len(codec.layout(*size))
    k, count = torch.zeros(1, codec.channels, *size, dtype=torch.int16), 0

    def read(stage: Stage) -> Tensor:
        nonlocal count
        count += 1
        level = levels(stage, record.level_rule, offsets).cpu().numpy()
        found = reader.take(level, count == last)
        part = stage.elements.from_lanes(torch.from_numpy(found), stage.means)
        stage.elements.put(k, part.cpu())
        value = quantizer.dequantize(torch.from_numpy(found), level)
        return stage.means + stage.elements.from_lanes(value, stage.means)

    _, y_hat = codec.drive(sides_hat, read, run)
    reader.close()
    return k, y_hat


def likelihood_bits(
    codec: CodecModel, sides_hat: Sides, k: Tensor, quantizer: Quantizer, run: Run | None = None
) -> float:
    """Return the sum of -log2 of the model's likelihoods of indices k [B, M, h, w], with cells of step 1."""
    total = 0.0

    def known(stage: Stage) -> Tensor:
        nonlocal total
        value = _reconstruct(stage, k, quantizer)
        total -= float(codec.likelihood(value, stage).double().log2().sum())
        return value

    codec.drive(sides_hat, known, run)
    return total


def lanes(codec: CodecModel, k: Tensor, level: Tensor) -> list[Plane]:
    """Return the planes of indices and levels [B, M, h, w], in the order of coding, on the CPU."""
    return [
        Plane(one, *(one.to_lanes(one.take(values)) for values in (k, level)))
        for one in codec.layout(k.shape[2], k.shape[3])
    ]


def planes_checksum(planes: list[Plane]) -> int:
    """Return the CRC-32 of the levels of all planes, by which a decoder knows that it computes the same scales."""
    checksum = 0
    for plane in planes:
        checksum = zlib.crc32(np.ascontiguousarray(plane.level).data, checksum)
    return checksum


def channel_bits(codec: CodecModel, quantizer: Quantizer, k: Tensor, level: Tensor) -> NDArray[np.float64]:
    """Return the estimated bits, escapes included, of indices and levels [B, M, h, w]: float64 [B, M]."""
    total = np.zeros(k.shape[:2])
    for plane in lanes(codec, k, level):
        bits = quantizer.record.y_tables.bits(plane.k, quantizer.rows(plane.k, plane.level))
        like = plane.elements.take(k)
        total[:, plane.elements.channels] += plane.elements.from_lanes(bits, like).flatten(2).sum(2).cpu().numpy()
    return total


def _reconstruct(stage: Stage, k: Tensor, quantizer: Quantizer) -> Tensor:
    """Return y_hat of a stage's elements before corrections, of indices k [B, M, h, w]."""
    lanes = stage.elements.lanes(stage.elements.take(k))
    value = quantizer.dequantize(lanes, levels(stage, quantizer.record.level_rule))
    return stage.means + stage.elements.from_lanes(value, stage.means)


def levels(stage: Stage, rule: str, offsets: NDArray[np.int8] | None = None) -> Tensor:
    """Return the levels of a stage in lanes, [lanes, steps]: those of its scales, uint8, by a rule of LEVEL_RULES, or
    where there are none, because y has a factorized prior, the channels, uint16. `offsets` int8 [M] are added to the
    levels of each channel.
    """
    if stage.scales is None:
        return stage.elements.lanes(stage.elements.channel_plane(stage.means))
    level: Tensor = level_index(stage.scales, rule)
    if offsets is not None:
        own = torch.from_numpy(offsets[stage.elements.channels]).to(level.device)
        level = moved(level, own.reshape(-1, *(1 for _ in level.shape[2:])))
    return stage.elements.lanes(level)


def moved(level: Tensor, offset: Tensor | int) -> Tensor:
    """Return levels of scales, uint8, moved by whole numbers, at most to the first and the last one."""
    return (level.to(torch.int16) + offset).clamp(0, LEVELS - 1).to(torch.uint8)


def best_offsets(codec: CodecModel, quantizer: Quantizer, coded: Coded) -> NDArray[np.int8]:
    """Return the scale offsets int8 [M] that one picture's indices are cheapest with, those of no use zero."""
    return choose(lambda one: channel_bits(codec, quantizer, coded.k, moved(coded.level, one))[0])
