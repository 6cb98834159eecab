"""What a progressive file tells of y where it is cut: the planes of `planes.py`, down to the slope of a record's price.

    r = y - means --BitPlanes.magnitudes--> |k| --every symbol of this slope or more--> nodes --> level, bits

A record of this kind is a cut: its elements give their symbols as long as a bit of the next one lowers the picture's
squared error by a bit's price, 3 / (lmbda 255^2). The smaller its lambda, the less is known. k are those of the finest
quantizer with zeros for the bits that are not known; which these are follows from k, since a symbol's slope depends on
the symbols before it alone. A file holds just this, in whichever units it was written (codec/progressive.py), where it
has come down to this slope.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lic_dist.quantization.planes import FRACTION, NEVER, OCTAVE, TOP, BitPlanes
from lic_dist.quantization.rates import CdfTables
from lic_dist.quantization.record import POINT_MAGNITUDES, POINT_PLANES, POINTS, QuantizerRecord


@cache
def planes() -> BitPlanes:
    """Return the bit planes of the format."""
    return BitPlanes()


def gains(weights: NDArray[np.float32]) -> NDArray[np.int16]:
    """Return by how many slopes the S_c of each channel, float32 [M], raises those of its elements, int16 [M]."""
    octaves = np.log2(np.maximum(weights.astype(np.float64), 2.0**-40))
    found: NDArray[np.int16] = np.rint(OCTAVE * np.minimum(octaves, 40)).astype(np.int16)
    return found


def slope_of(price: float) -> int:
    """Return the least slope of symbols that are worth a price of a bit, in squared error summed over the colours."""
    return int(np.floor(OCTAVE * np.log2(price)))


def point_of(level: Any, plane: Any, magnitude: Any) -> Any:
    """Return the places in a record's points, flattened, of nodes: arrays or tensors of integers, level of 32 bits."""
    plane = plane.clip(0, POINT_PLANES - 1)
    return (level * POINT_PLANES + plane) * POINT_MAGNITUDES + magnitude.clip(1, POINT_MAGNITUDES) - 1


class TableBits(nn.Module):
    """The bits of integer tables, as `CdfTables.bits` counts them, on any device."""

    def __init__(self, tables: CdfTables) -> None:
        super().__init__()
        self.width = tables.symbol_bits.shape[1]
        for name, values in (("bits", tables.symbol_bits), ("escape", tables.size - 2), ("offset", tables.offset)):
            self.register_buffer(name, torch.from_numpy(values.copy()).flatten(), persistent=False)
        self.bits: Tensor
        self.escape: Tensor
        self.offset: Tensor

    def forward(self, k: Tensor, row: Tensor) -> Tensor:
        """Return the bits of each element, float64, of integers k coded with rows, int64 of the same shape."""
        symbol, escape = k.long() - self.offset[row], self.escape[row].long()
        beyond = torch.where(symbol < 0, -2 * symbol - 1, 2 * (symbol - escape))
        escaped = (symbol < 0) | (symbol >= escape)
        nibbles = sum((beyond >= 16**power).long() for power in range(5))
        symbol_bits = self.bits[row * self.width + torch.where(escaped, escape, symbol)]
        return symbol_bits + torch.where(escaped, 4 + 4 * nibbles, 0)


class Embedded(nn.Module):
    """The cut of a record, on any device. Methods take r float32, or k int16, and the levels of the scales, both
    [..., M, h, w] or lanes of whole images, [n*M, steps]; and return that shape.
    """

    first: Tensor
    base: Tensor
    last: Tensor
    slopes: Tensor
    rows: Tensor
    means: Tensor
    gain: Tensor
    points: Tensor

    def __init__(self, record: QuantizerRecord) -> None:
        super().__init__()
        made = planes()
        self.least, self.step, self.zero = slope_of(record.lambda_q), made.step, made.zero
        tables = {"first": made.first, "base": made.base, "last": made.last, "slopes": made.slopes, "rows": made.rows}
        tables |= {"means": made.means, "gain": gains(record.weights)}
        for name, values in tables.items():
            self.register_buffer(name, torch.from_numpy(values.astype(np.int32)).flatten(), persistent=False)
        points = np.zeros(POINTS, np.float32) if record.points is None else record.points
        self.register_buffer("points", torch.from_numpy(1 + points).flatten(), persistent=False)
        self.table_bits = TableBits(made.tables)

    def quantize(self, r: Tensor, level: Tensor) -> Tensor:
        """Return k, int16, of residuals r float32 below 32767."""
        steps = r.abs() * float(np.float32(1 / self.step))
        whole = torch.floor((steps + float(np.float32(1 - self.zero))).clamp(min=0)).int()  # `BitPlanes.magnitudes`
        plane, magnitude = self.known(whole, level)
        return (torch.sign(r).int() * (magnitude << plane.clamp(max=TOP))).to(torch.int16)

    def values(self, k: Tensor, level: Tensor) -> Tensor:
        """Return what r is taken to be, float32: `BitPlanes.values`, as much further out as the record's points say."""
        plane, magnitude = self.known(k, level)
        number, last = self._number(level.long(), plane, magnitude)
        found = self.means[number].float() / FRACTION
        far = (magnitude + 0.5) * torch.exp2(plane.float()) * self.step + (self.zero - 1) * self.step
        further = self.points[point_of(level.long(), plane, magnitude)]
        return torch.sign(k.float()) * torch.where((magnitude >= last) & (magnitude > 0), far, found) * further

    def bits(self, k: Tensor, level: Tensor) -> Tensor:
        """Return the bits of all symbols of each element, float64."""
        total = torch.zeros(k.numel(), dtype=torch.float64, device=k.device)
        sign = torch.sign(k.int()).flatten()
        for of, number, before, _, magnitude in self._rounds(k, level):
            symbol = torch.where(before > 0, magnitude & 1, sign[of] * magnitude)
            total[of] += self.table_bits(symbol, self.rows[number].long())
        return total.view(k.shape)

    def known(self, k: Tensor, level: Tensor) -> tuple[Tensor, Tensor]:
        """Return plane and m of each element's node, int32."""
        plane = torch.full((k.numel(),), TOP + 1, dtype=torch.int32, device=k.device)
        known = torch.zeros_like(plane)
        for of, _, _, following, magnitude in self._rounds(k, level):
            plane[of], known[of] = following, magnitude
        return plane.view(k.shape), known.view(k.shape)

    def _rounds(self, k: Tensor, level: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """Yield of the first, second, ... symbol the elements that give it, int64; the numbers of their nodes before,
        and m before; plane and m after. Few elements give a second one.
        """
        gain = self.gain.view(-1, 1, 1) if k.ndim > 2 else self.gain.repeat(len(k) // len(self.gain)).view(-1, 1)
        of = torch.arange(k.numel(), device=k.device)
        whole, level, gain = k.int().abs().flatten(), level.long().flatten(), gain.expand(k.shape).flatten()
        plane, magnitude = torch.full_like(whole, TOP + 1), torch.zeros_like(whole)
        while True:
            number, _ = self._number(level, plane, magnitude)
            slope = self.slopes[number]
            given = torch.nonzero((slope != NEVER) & (slope + gain >= self.least))[:, 0]
            if not len(given):
                return
            of, number, whole, level, gain, plane, before = (
                one[given] for one in (of, number, whole, level, gain, plane, magnitude)
            )
            plane = torch.where(plane > TOP, self.first[level], plane - 1)
            magnitude = whole >> plane
            yield of, number, before, plane, magnitude

    def _number(self, level: Tensor, plane: Tensor, magnitude: Tensor) -> tuple[Tensor, Tensor]:
        """Return the numbers of nodes, and the m that stands for all that are larger."""
        place = level * (TOP + 2) + plane
        last = self.last[place]
        return self.base[place] + torch.minimum(magnitude, last), last
