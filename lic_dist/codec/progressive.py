"""Progressive files: the bit planes of y, in units of falling slope, of which every prefix decodes.

    y -> |k|, sign -> planes, by slope of each element's next symbol -> units -> rANS -> container (units.py)

After "Learned progressive image compression with dead-zone quantizers" (Li et al. 2023), with the order of elements by
what a bit of each gains (as in DPICT, Lee et al. 2022), which both sides compute from scales, S_c and what is known. A
unit states a slope. In rounds, every element whose next symbol has that slope or more gives it, in raster order of
[M, h, w], until there is none; each round is a plane of the unit's stream, which ends by itself.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lic_dist.codec import rans
from lic_dist.codec.codec import DecodedLatents, EncodedImage, ImageCodec, channel_rows, require_model
from lic_dist.codec.rans import BitstreamError
from lic_dist.codec.records import known_records
from lic_dist.codec.strips import Pool
from lic_dist.codec.tiles import Grid
from lic_dist.codec.units import MOST_FALL, MOST_UNITS, Progressive, Unit
from lic_dist.codec.walk import other_scales
from lic_dist.errors import LicError
from lic_dist.models.checkpoint import Checkpoint
from lic_dist.models.protocol import Sides, Stage
from lic_dist.models.stages import known_stage
from lic_dist.quantization.embedded import gains, planes, point_of, slope_of
from lic_dist.quantization.planes import NEVER, TOP, Nodes
from lic_dist.quantization.rates import level_index
from lic_dist.quantization.record import QuantizerRecord
from lic_dist.quantization.trellis import SCALAR

UNITS = 16
BEYOND = 1.0  # octaves of slope below the model's own price of a bit at which a file ends
SMALLEST_UNIT = 256  # bytes, about: a unit costs 9
PREVIEW = 4  # a preview has a file's first bytes, one in so many
_RUN = 1 << 20  # elements
_LARGEST = 1 << 20  # |r| that int32 and float32 hold in steps


def identity(record: QuantizerRecord) -> bytes:
    """Return the four bytes by which a progressive file identifies bit planes, gains and tables of z of a record, and
    its points where it has some.
    """
    whole = hashlib.sha256(planes().digest.encode())
    tables = record.z_tables
    for array in (gains(record.weights), tables.cdf, tables.size, tables.offset):
        whole.update(np.ascontiguousarray(array, "<i4").tobytes())
    if record.points is not None:
        whole.update(np.ascontiguousarray(record.points, "<f4").tobytes())
    return whole.digest()[:4]


def record_of(checkpoint: Checkpoint, stated: bytes) -> QuantizerRecord:
    """Return the record of a checkpoint that a progressive file was made with, by the `identity` that it states.

    Raises:
        BitstreamError: the checkpoint carries none of this identity.
    """
    for record in known_records(checkpoint).values():
        if not record.by_channel and identity(record) == stated:
            return record
    raise BitstreamError(
        f"this progressive file was made with another S_c than the quantizers of {checkpoint.source} have",
        hint="name its quantizer with --quantizer RECORD, or decode with the version of lic_dist that made it",
    )


class Known:
    """What is known of all elements of a picture, and which give their next symbols: both sides' state.

    `level` uint8 [M, positions] are the levels of their scales, `gain` int16 [M] is that of `gains`.
    """

    def __init__(self, level: NDArray[np.uint8], gain: NDArray[np.int16]) -> None:
        self._shape, self._level, self._gain = level.shape, level.ravel(), gain
        self._nodes, self._slope = Nodes.unknown(self._level.shape), np.full(level.size, NEVER, np.int16)
        for some in _runs(level.size):
            self._place(some, self._taken(some))

    @property
    def highest(self) -> int:
        """The largest slope of an element's next symbol."""
        return int(self._slope.max(initial=NEVER))

    def due(self, slope: int) -> NDArray[np.int64]:
        """Return the elements whose next symbol has this slope or more, by rising number, int64."""
        return np.flatnonzero(self._slope >= slope)

    def rows(self, due: NDArray[np.int64]) -> NDArray[np.int32]:
        """Return the rows of the next symbols of elements, int32."""
        found: NDArray[np.int32] = planes().rows[planes().numbers(self._level[due], self._taken(due))]
        return found

    def symbols(self, due: NDArray[np.int64], k: NDArray[np.int32], negative: NDArray[np.bool_]) -> NDArray[np.int32]:
        """Return the next symbols, int32, of elements with these |k| and signs."""
        return planes().symbols(self._level[due], self._taken(due), k, negative)

    def tell(self, due: NDArray[np.int64], symbols: NDArray[np.integer[Any]]) -> bool:
        """Take the next symbols of elements; return whether they can be such."""
        found = planes().next(self._level[due], self._taken(due), symbols)
        if found is not None:
            self._place(due, found)
        return found is not None

    def values(self, points: NDArray[np.float32] | None = None) -> NDArray[np.float32]:
        """Return what r is taken to be, float32 [M, positions], with a record's points."""
        further = None if points is None else (1 + points).ravel()
        found = np.empty(self._level.shape, np.float32)
        for some in _runs(len(found)):
            level, nodes = self._level[some], self._taken(some)
            found[some] = planes().values(level, nodes)
            if further is not None:
                found[some] *= further[point_of(level.astype(np.int32), nodes.plane, nodes.magnitude)]
        return found.reshape(self._shape)

    def indices(self) -> NDArray[np.int16]:
        """Return k of the finest quantizer with zeros for bits that are not known, int16 [M, positions]."""
        magnitude = np.where(self._nodes.plane > TOP, 0, self._nodes.magnitude << np.minimum(self._nodes.plane, TOP))
        k: NDArray[np.int16] = (self._nodes.sign * np.minimum(magnitude, 32767)).astype(np.int16)
        return k.reshape(self._shape)

    def _taken(self, some: NDArray[np.int64]) -> Nodes:
        return Nodes(self._nodes.plane[some], self._nodes.sign[some], self._nodes.magnitude[some])

    def _place(self, some: NDArray[np.int64], nodes: Nodes) -> None:
        self._nodes.plane[some] = nodes.plane
        self._nodes.sign[some] = nodes.sign
        self._nodes.magnitude[some] = nodes.magnitude
        slope = planes().slopes[planes().numbers(self._level[some], nodes)].astype(np.int32)
        gain = self._gain[some // self._shape[1]]
        self._slope[some] = np.where(slope == NEVER, NEVER, slope + gain)


def _runs(count: int) -> Iterator[NDArray[np.int64]]:
    """Yield the numbers of so many elements, _RUN at a time, which bounds the memory for what is computed of them."""
    for first in range(0, count, _RUN):
        yield np.arange(first, min(first + _RUN, count))


def encode_units(
    level: NDArray[np.uint8],
    gain: NDArray[np.int16],
    r: NDArray[np.float32],
    least: int,
    count: int = UNITS,
) -> tuple[list[Unit], Known]:
    """Return the units of residuals r float32 [M, positions] down to a slope, about `count`, and what they tell.

    Raises:
        LicError: a latent that is not finite, or does not fit 16-bit indices.
    """
    if not bool((np.abs(r) < _LARGEST).all()):
        raise _unfit()
    k, negative = planes().magnitudes(r.ravel()), r.ravel() < 0
    units = []
    known = Known(level, gain)
    slope = known.highest + 1
    for lowest in _slopes(level, gain, k, negative, least, count):
        rounds = []
        for symbols, rows in _rounds(known, k, negative, lowest):
            rounds.append((symbols[:, None].astype(np.int16), rows[:, None]))
        units.append(Unit(slope - lowest, rans.encode_planes(rounds, planes().tables)))
        slope = lowest
    return units, known


def _slopes(
    level: NDArray[np.uint8],
    gain: NDArray[np.int16],
    k: NDArray[np.int32],
    negative: NDArray[np.bool_],
    least: int,
    count: int,
) -> list[int]:
    """Return the slopes of about `count` units of equal size, falling to `least`."""
    known = Known(level, gain)
    slopes, sizes = [], []
    least = max(least, known.highest + 1 - MOST_FALL)
    while (slope := known.highest) >= least:
        bits = 0.0
        for symbols, rows in _rounds(known, k, negative, slope):
            bits += float(planes().tables.bits(symbols, rows).sum())
        slopes.append(slope)
        sizes.append(bits / 8)
    wanted = max(sum(sizes) / min(count, MOST_UNITS), SMALLEST_UNIT)
    found, size = [], 0.0
    for slope, own in zip(slopes, sizes, strict=True):
        size += own
        if size >= wanted:
            found.append(slope)
            size = 0.0
    if slopes and (not found or found[-1] != slopes[-1]):
        found[-1 if found and size < SMALLEST_UNIT else len(found) :] = [slopes[-1]]
    return found


def _rounds(
    known: Known, k: NDArray[np.int32], negative: NDArray[np.bool_], slope: int
) -> Iterator[tuple[NDArray[np.int32], NDArray[np.int32]]]:
    """Tell what a unit of a slope tells: yield symbols and rows of each round."""
    while len(due := known.due(slope)):
        symbols, rows = known.symbols(due, k[due], negative[due]), known.rows(due)
        if np.abs(symbols).max() > 32767:
            raise _unfit()
        known.tell(due, symbols)
        yield symbols, rows


def _unfit() -> LicError:
    return LicError("a latent does not fit 16-bit indices", hint="is this the checkpoint of a trained model?")


def decode_units(level: NDArray[np.uint8], gain: NDArray[np.int16], units: Sequence[Unit]) -> Known:
    """Return what units tell, in their order.

    Raises:
        BitstreamError: a stream that no encoder writes.
    """
    known = Known(level, gain)
    slope = known.highest + 1
    for unit in units:
        decoder, slope = rans.Decoder(unit.stream), slope - unit.fall
        while len(due := known.due(slope)):
            rows = known.rows(due)
            if not known.tell(due, decoder.decode(rows[:, None], planes().tables, SCALAR)[:, 0]):
                raise BitstreamError("an entropy-coded stream holds a symbol that no encoder writes")
        decoder.close()
    return known


@dataclass(frozen=True)
class ProgressiveImage(EncodedImage):
    """One coded image. `ends` are the sizes in bytes of its file's prefixes that hold the head alone, one unit, two
    units and so on; k has zeros for the bits that the file does not hold.
    """

    ends: tuple[int, ...] = ()


class ProgressiveCodec(ImageCodec):
    """A codec of progressive files; of the record it takes S_c, the tables of z, and lambda, which says where a file
    ends: where an embedded record is cut, else BEYOND that price of a bit. What it inherits of bits that are estimated
    is of files that are read whole.

    Raises:
        LicError: as ImageCodec; or y is coded in several stages, or without scales.
    """

    progressive = True

    def __init__(
        self, model: nn.Module, record: QuantizerRecord, integer: bool = False, threads: int | None = None
    ) -> None:
        super().__init__(model, replace(record, refine=0, scale_offsets=False), integer, threads)
        if record.by_channel or len(self._codec.layout(4, 4)) > 1:
            raise LicError(
                f"progressive files need a model of one stage with scales, {self._codec.name} is none",
                hint="a hyperprior, such as the shipped bases",
            )
        self.record_id, self._gains = identity(record), gains(record.weights)
        price = 3 / (record.lmbda * 255**2) / 2**BEYOND
        self._least = slope_of(record.lambda_q if record.kind.embedded else price)

    @torch.no_grad()
    def encode(self, image: NDArray[np.uint8], units: int = UNITS) -> ProgressiveImage:
        """Code an image, uint8 [H, W, 3] or [H, W], in about so many units; see `ImageCodec.encode`."""
        with Pool(self.threads) as pool:
            grid, y, z = self._latents(image, pool)
            sides_hat = self._sides_hat(z, grid, self.integer)
            stage, level = self._stage(sides_hat, grid, self.integer, pool)
        r = stage.elements.lanes(y.to(stage.means) - stage.means).cpu().numpy()
        coded, known = encode_units(level, self._gains, r, self._least, units)
        height, width = image.shape[:2]
        z_stream = rans.encode(z, channel_rows(z.shape), self.record.z_tables)
        identities = self.model_id, self.record_id, zlib.crc32(level.data)
        flags = image.ndim == 2, self.integer
        data = Progressive(height, width, *identities, z_stream, tuple(coded), *flags).pack()
        y_hat, ends = _y_hat(stage, known, self.record.points), Progressive.unpack(data).ends
        return ProgressiveImage(image.shape, z, level, known.indices(), y_hat, b"", data, ends)

    @torch.no_grad()
    def decode_latents(self, data: bytes) -> DecodedLatents:
        """Return the result of entropy decoding, before g_s, of a file or of a prefix of one.

        Raises:
            BitstreamError: altered, cut before the end of its head, of another model or quantizer, or decoded on a
                machine that computes other scales.
        """
        container = Progressive.unpack(data)
        require_model(container.model, self.model_id)
        if container.record != self.record_id:
            raise BitstreamError("this file was made with other bit planes or another S_c", hint="give its quantizer")
        grid = self.grid(container.height, container.width)
        with Pool(self.threads) as pool:
            sides_hat = self._sides_hat(self._decode_z(container.z, grid), grid, container.integer)
            stage, level = self._stage(sides_hat, grid, container.integer, pool)
        if zlib.crc32(level.data) != container.levels:
            raise other_scales()
        known = decode_units(level, self._gains, container.units)
        shape = (container.height, container.width) if container.grey else (container.height, container.width, 3)
        return DecodedLatents(shape, known.indices(), _y_hat(stage, known, self.record.points))

    def _stage(self, sides_hat: Sides, grid: Grid, integer: bool, pool: Pool) -> tuple[Stage, NDArray[np.uint8]]:
        """Return the stage of y, and the levels of its scales, uint8 [M, positions]."""
        stage = known_stage(self._codec, sides_hat, grid.latents, self._run(grid, integer, pool))
        if stage is None or stage.scales is None:
            raise LicError(f"progressive files need means and scales alone: {self._codec.name} corrects y_hat")
        level = stage.elements.lanes(level_index(stage.scales, "nearest"))
        return stage, np.ascontiguousarray(level.cpu().numpy())


def _y_hat(stage: Stage, known: Known, points: NDArray[np.float32] | None) -> Tensor:
    values = torch.from_numpy(known.values(points)).to(stage.means)
    return stage.means + stage.elements.from_lanes(values, stage.means)


def preview_size(data: bytes) -> int:
    """Return how many bytes of a progressive file a preview takes: the units in its first of PREVIEW parts, one at
    least.

    Raises:
        BitstreamError: as `Progressive.unpack`.
    """
    ends = Progressive.unpack(data).ends
    return max(end for end in ends if end <= max(ends[-1] // PREVIEW, *ends[:2]))
