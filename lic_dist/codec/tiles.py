"""Run the networks over large images part by part, without seams, and with bounded memory for activations.

The transforms go over it in strips (strips.py). For the networks of the entropy model a fixed grid cuts the image into
equal shares of at most TILE pixels a side, the last one smaller. Each computes each share of its output from its
receptive field (fields.py); inputs further out cannot change it. So the result is that of the whole image, except for
the last bits: convolutions of other shapes sum in another order. Encoder and decoder use the same grid, which is
therefore part of the format: the networks of the entropy model see the same shapes on both sides. An image of one tile
goes through the networks whole, which is all that families without tiles are served with.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from lic_dist.codec.fields import is_pointwise, receptive_field
from lic_dist.codec.strips import Pool, first_rows, in_strips
from lic_dist.models.protocol import CodecModel, Run, Strides, one_layout
from lic_dist.models.refine import Refinement, costs_and_gradient, decoded
from lic_dist.models.stages import rounded_z

TILE = 1024  # pixels a side
STRIP = 1 << 19  # pixels, about, of a strip as wide as the image
ALONE = Pool(1)
_OUT_OF_RANGE = 2.0**30  # clamps a z that int32 cannot hold, alike on every device


@dataclass(frozen=True)
class Span:
    """One share along an axis: the inputs it reads, its place in their outputs, and its place in the whole output."""

    source: slice
    kept: slice
    target: slice


@dataclass(frozen=True)
class Grid:
    """The tiles of an image of `high` x `wide` units, each of `strides.multiple` pixels a side."""

    high: int
    wide: int
    strides: Strides = Strides()

    @classmethod
    def of(cls, height: int, width: int, strides: Strides) -> Grid:
        """Return the grid of an image of this size in pixels."""
        return cls(-(-height // strides.multiple), -(-width // strides.multiple), strides)

    @property
    def pixel(self) -> int:
        """Pixels a unit, along an axis."""
        return self.strides.multiple

    @property
    def latent(self) -> int:
        """Positions of y a unit."""
        return self.strides.multiple // self.strides.y

    @property
    def side(self) -> int:
        """Positions of z a unit."""
        return self.strides.multiple // self.strides.side

    @property
    def latents(self) -> tuple[int, int]:
        """Height and width of y, in positions."""
        return self.latent * self.high, self.latent * self.wide

    @property
    def is_one_tile(self) -> bool:
        """Whether the networks see the image whole."""
        return max(self.high, self.wide) * self.pixel <= TILE

    def tiles(self, codec: CodecModel, name: str, reads: int, writes: int) -> Iterator[tuple[Span, Span]]:
        """Yield the tiles of the network of a name as rows and columns; `reads` and `writes` are its inputs and outputs
        a unit.

        Raises:
            LicError: there are several, and the family does not support tiles.
        """
        if not self.is_one_tile:
            codec.require("tiles", f", which pictures above {TILE} pixels a side need")
        for rows in spans(codec.nets[name], self.high, reads, writes, self.pixel):
            for columns in spans(codec.nets[name], self.wide, reads, writes, self.pixel):
                yield rows, columns


def spans(network: nn.Module, length: int, reads: int, writes: int, unit: int) -> list[Span]:
    """Return the shares of one axis of `length` units, of `unit` pixels each."""
    count = -(-length * unit // TILE)
    if count == 1:
        return [Span(slice(0, reads * length), slice(0, writes * length), slice(0, writes * length))]
    share = -(-length // count)
    step = max(1, reads // writes)  # a source begins at a multiple of the network's stride
    result = []
    for begin in range(0, length, share):
        target = writes * begin, writes * min(begin + share, length)
        first, last = receptive_field(network, *target)
        first, last = max(0, first // step * step), min(reads * length, -(-last // step) * step)
        origin = first * writes // reads
        result.append(Span(slice(first, last), slice(target[0] - origin, target[1] - origin), slice(*target)))
    return result


def strip_edges(codec: CodecModel, grid: Grid, name: str, reads: int) -> list[int]:
    """Return the rows, in units, between which lie the strips of the network of a name, which reads `reads` rows a
    unit.

    Raises:
        LicError: there are several, and the family does not support tiles.
    """
    if grid.is_one_tile:
        return [0, grid.high]
    codec.require("tiles", f", which pictures above {TILE} pixels a side need")
    units = max(1, STRIP // (grid.wide * grid.pixel**2))
    first = max(units, -(-first_rows(codec.nets[name]) // reads))
    return [0, *range(first, grid.high - units // 2, units), grid.high]


def _stripped(
    codec: CodecModel,
    grid: Grid,
    name: str,
    reads: int,
    source: Callable[[slice], Tensor],
    work: Callable[[CodecModel, Tensor], Tensor],
    pool: Pool,
) -> Iterator[tuple[slice, Tensor]]:
    """Yield the output of the network of a name strip by strip, with its rows: `work` runs it, in the model it is
    given, on the strips that `source` returns, of `reads` rows a unit.
    """
    edges, done = strip_edges(codec, grid, name, reads), 0
    if not grid.is_one_tile or (pool.threads > 1 and "tiles" in codec.supports):
        codec = in_strips(codec, name, reads * grid.high, pool)
    for begin, end in pairwise(edges):
        part = work(codec, source(slice(reads * begin, reads * end)))
        yield slice(done, done + part.shape[2]), part
        done += part.shape[2]


def analyse(
    codec: CodecModel, grid: Grid, pixels: Callable[[slice, slice], Tensor], pool: Pool = ALONE
) -> tuple[Tensor, Tensor]:
    """Run `models.stages.analyse` in strips: y float16 [1, M, h, w], z int32 [1, N, hz, wz].

    `pixels` returns a window of the padded image, float32 [1, 3, ., .] in [0, 1], channels last.
    """
    y = z = torch.empty(0)
    columns = slice(0, grid.pixel * grid.wide)
    work = type(codec).analyse
    for rows, part in _stripped(codec, grid, "g_a", grid.pixel, lambda rows: pixels(rows, columns), work, pool):
        y = _placed(y, part, rows, grid.latents)
    for rows, part in _stripped(
        codec, grid, "h_a", grid.latent, lambda rows: _channels_last(y[:, :, rows]), rounded_z, pool
    ):
        whole = part.nan_to_num(nan=_OUT_OF_RANGE).clamp(-_OUT_OF_RANGE, _OUT_OF_RANGE).int()
        z = _placed(z, whole, rows, (grid.side * grid.high, grid.side * grid.wide))
    return y.half(), z


def _placed(whole: Tensor, part: Tensor, rows: slice, size: tuple[int, int]) -> Tensor:
    """Write some rows into a tensor [1, C, *size], which is made, channels last, where it is empty; return it."""
    if part.shape[2:] == size:
        return part
    if not len(whole):
        whole = _channels_last(part.new_empty(1, part.shape[1], *size))
    whole[:, :, rows] = part
    return whole


def run_in_tiles(
    codec: CodecModel, grid: Grid, form: Callable[[str], Callable[[Tensor], Tensor]], pool: Pool = ALONE
) -> Run:
    """Return the `run` of `CodecModel.walk` over a whole image, its tiles side by side; every network that it runs is
    pointwise, or writes positions of y.

    `form` returns what computes the network of a name, on a window of its input [1, C, ., .].
    """

    nets = codec.nets

    def run(name: str, values: Tensor) -> Tensor:
        network, whole = form(name), torch.empty(0)
        if is_pointwise(nets[name]):
            return network(values)
        reads = values.shape[2] // grid.high
        tiles = list(grid.tiles(codec, name, reads, grid.latent))
        sources = [(..., rows.source, columns.source) for rows, columns in tiles]
        parts = pool.map(lambda source: network(one_layout(values[source])), sources)
        for (rows, columns), part in zip(tiles, parts, strict=True):
            if not len(whole):
                whole = part.new_empty(1, part.shape[1], *grid.latents)
            whole[..., rows.target, columns.target] = part[..., rows.kept, columns.kept]
        return whole

    return run


def synthesise(codec: CodecModel, grid: Grid, y_hat: Tensor, pool: Pool = ALONE) -> Iterator[tuple[slice, Tensor]]:
    """Run g_s in strips: yield rows of the padded image, and x_hat float32 [1, 3, ., W] there."""
    work = type(codec).synthesise
    yield from _stripped(codec, grid, "g_s", grid.latent, lambda rows: y_hat[:, :, rows].contiguous(), work, pool)


def answer(
    codec: CodecModel,
    grid: Grid,
    pixels: Callable[[slice, slice], Tensor],
    inside: tuple[slice, slice],
    refinement: Refinement,
    y_hat: Tensor,
    gradient: bool,
) -> tuple[Tensor, Tensor | None]:
    """Compute a decoder's `refine.Answer` in tiles, for y_hat float32 [1, M, h, w]; `pixels` as for `analyse`.

    `inside` are the rows and columns of the padded image that the picture covers; the padding outside causes no error.
    The error is the sum of the tiles': of MS-SSIM, their mean by pixels, whose windows do not reach over the seams.
    """
    total, slope = y_hat.new_zeros(1), torch.zeros_like(y_hat) if gradient else None
    for rows, columns in grid.tiles(codec, "g_s", grid.latent, grid.pixel):
        visible = (..., _intersection(rows.target, inside[0]), _intersection(columns.target, inside[1]))

        def of_tile(part: Tensor, rows: Span = rows, columns: Span = columns, visible: Any = visible) -> Tensor:
            x_hat = decoded(codec, part)[..., rows.kept, columns.kept]
            return refinement.errors(x_hat[visible], pixels(rows.target, columns.target)[visible])

        source = (..., rows.source, columns.source)
        part = y_hat[source]
        if slope is None:
            total += of_tile(part)
        else:
            errors, by_tile = costs_and_gradient(part, of_tile)
            total += errors
            slope[source] += by_tile
    return total, slope


def _intersection(part: slice, inside: slice) -> slice:
    """Return the intersection of two slices, counted from the first one's start."""
    return slice(max(inside.start - part.start, 0), max(min(inside.stop, part.stop) - part.start, 0))


def _channels_last(values: Tensor) -> Tensor:
    return values.contiguous(memory_format=torch.channels_last)
