"""Embedded dead-zone quantization: the bit planes of |k|, each coded by what a Gaussian says of it, given the last.

    |k| = 0 for |r| < zero step, else 1 + floor(|r| / step - zero)        the finest quantizer
    |k| >> a                                                             the quantizer of plane a, nested in it

A coarser quantizer has cells twice as wide, and a dead zone that grows by a cell: those of Li et al. 2023, "Learned
progressive image compression with dead-zone quantizers", and of JPEG 2000. What is known of an element is a node: its
plane a and m = |k| >> a. From it the next symbol leads to plane a - 1: of m = 0 it is -1, 0 or 1, the sign included, of
others the next bit. The first symbol is m itself with its sign, at the plane that the level of the element's scale
begins with: the coarsest one at which one in a thousand is not zero.

Of every node the tables say the integer probabilities of its symbol, the mean of r in it, and the slope of its symbol:
by how much the expected distortion falls for a bit. What the dead zone loses of the signal's energy costs a decoder
that was trained on additive noise more than other errors of the same square: 1 + LOST / sigma times (up to 1 + MOST),
as training photos asked for. Such a decoder also takes a share of what it reads for noise of variance 1/12: means lie
1 + 1 / (12 sigma^2) times (up to twice) as far out.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lic_dist.quantization.rates import LEVELS, SCALES, TOTAL, CdfTables, tables_from_pmf

STEP, ZERO = 1.0, 0.7  # of the finest quantizer: units of the latent; half the dead zone, in steps
LOST, MOST = 0.5, 3.0
TOP = 10  # the coarsest plane
OCTAVE = 32  # slopes are integers, so many for a factor of two
LEAST_OCTAVES = 64  # below 1, of the least slope
NEVER = -(1 << 15)  # the slope of what has no next symbol
FRACTION = 1 << 12  # means are integers of this part of a unit
BINARY = 64  # rows for the next bit of an element that is not zero, by the probability of its upper half
_SIGMAS = 7.0  # beyond so many, cells are halved as if r were uniform in them
_SOME = 1e-3  # of elements not zero, at the plane of the first symbol
_LEAST = 1e-14  # probability of a cell that float64 tells of
_WIDEST = 128  # values of |m| in a first symbol's row, before its escape


@dataclass(frozen=True)
class Nodes:
    """What is known of elements, arrays of one shape: `plane` int8, TOP + 1 of those that no symbol told of; `sign`
    int8 and `magnitude` int32, m of that plane.
    """

    plane: NDArray[np.int8]
    sign: NDArray[np.int8]
    magnitude: NDArray[np.int32]

    @staticmethod
    def unknown(shape: tuple[int, ...]) -> Nodes:
        """Return the nodes of elements of which nothing is known."""
        return Nodes(np.full(shape, TOP + 1, np.int8), np.zeros(shape, np.int8), np.zeros(shape, np.int32))


class BitPlanes:
    """The tables of the bit planes of one finest quantizer; two with the same `digest` code the same bits.

    `first` int8 [64]: the plane of a level's first symbol. By number of a node: `slopes` int16, `rows` int32 of
    `tables`, `means` int32 in 1/FRACTION. The nodes of a level's plane follow each other from `base` int32 [64, TOP +
    2], by m up to `last`, which stands for all that are larger; column TOP + 1 is the node before the first symbol.

    Raises ValueError for a step or zero that is not positive, or a dead zone narrower than half a step.
    """

    def __init__(self, step: float = STEP, zero: float = ZERO) -> None:
        if not (0 < step < 64 and 0.5 <= zero <= 1):
            raise ValueError(f"a step is positive, zero between 1/2 and 1 step: not {step}, {zero}")
        self.step, self.zero = float(step), float(zero)
        self.first = np.zeros(LEVELS, np.int8)
        self.base, self.last = np.zeros((2, LEVELS, TOP + 2), np.int32)
        slopes: list[NDArray[Any]] = []
        rows: list[NDArray[Any]] = []
        means: list[NDArray[Any]] = []
        roots = np.zeros((LEVELS, _WIDEST))
        zeros: list[float] = []  # probability that zero stays zero, by row
        count = 0
        for level in range(LEVELS):
            cells = _Cells(float(SCALES[level]), self.step, self.zero)
            first = cells.first_plane()
            self.first[level] = first
            of_first = cells.at(first)[0][:_WIDEST]
            roots[level, : len(of_first)] = of_first / 2
            roots[level, 0] *= 2
            for plane in range(TOP + 2):
                if plane == TOP + 1:
                    one = np.array([cells.first_slope(first)]), np.array([BINARY + level]), np.zeros(1)
                else:
                    split, upper, mean = cells.nodes(plane)
                    binary = np.minimum((upper * 2 * BINARY).astype(np.int64), BINARY - 1)
                    if plane:
                        binary[0] = BINARY + LEVELS + len(zeros)
                        zeros.append(1 - upper[0])
                    one = split, binary, mean
                self.base[level, plane], self.last[level, plane] = count, len(one[0]) - 1
                count += len(one[0])
                for whole, part in zip((slopes, rows, means), one, strict=True):
                    whole.append(part)
        slope = np.concatenate(slopes)
        octaves = np.rint(OCTAVE * np.log2(np.maximum(slope, 2.0**-LEAST_OCTAVES)))
        self.slopes = np.where(slope > 0, octaves, NEVER).astype(np.int16)
        self.rows = np.concatenate(rows).astype(np.int32)
        self.means = np.rint(np.concatenate(means) * FRACTION).astype(np.int32)
        self.tables = _tables(tables_from_pmf(roots), np.array(zeros))

    @cached_property
    def digest(self) -> str:
        """sha256 of all that a decoder reads."""
        whole = hashlib.sha256(f"bit planes 1 {self.step!r} {self.zero!r}".encode())
        tables = self.tables.cdf, self.tables.size, self.tables.offset
        for array in (self.first, self.base, self.last, self.slopes, self.rows, self.means, *tables):
            whole.update(np.ascontiguousarray(array, "<i4").tobytes())
        return whole.hexdigest()

    def magnitudes(self, r: NDArray[np.float32]) -> NDArray[np.int32]:
        """Return |k| of the finest quantizer, int32, of residuals float32 below 2^20."""
        steps = np.abs(r) * np.float32(1 / self.step)
        found: NDArray[np.int32] = np.floor(np.maximum(steps + np.float32(1 - self.zero), 0)).astype(np.int32)
        return found

    def numbers(self, level: NDArray[np.uint8], nodes: Nodes) -> NDArray[np.int32]:
        """Return the numbers of nodes, int32, of elements of these levels."""
        place = level, nodes.plane
        found: NDArray[np.int32] = self.base[place] + np.minimum(nodes.magnitude, self.last[place])
        return found

    def symbols(
        self, level: NDArray[np.uint8], nodes: Nodes, k: NDArray[np.int32], negative: NDArray[np.bool_]
    ) -> NDArray[np.int32]:
        """Return the next symbols, int32, of elements with |k| and sign of the finest quantizer."""
        plane = np.where(nodes.plane > TOP, self.first[level], nodes.plane - 1)
        magnitude = k >> plane
        signed = np.where(negative, -magnitude, magnitude)
        return np.where(nodes.magnitude > 0, magnitude & 1, signed).astype(np.int32)

    def next(self, level: NDArray[np.uint8], nodes: Nodes, symbols: NDArray[np.integer[Any]]) -> Nodes | None:
        """Return the nodes that symbols lead to; None where one of them is none of its node's."""
        symbols = symbols.astype(np.int32)
        known, begun = nodes.magnitude > 0, nodes.plane <= TOP
        if ((symbols < 0) & known | (np.abs(symbols) > 1) & begun).any():
            return None
        plane = np.where(begun, nodes.plane - 1, self.first[level]).astype(np.int8)
        magnitude = np.where(known, 2 * nodes.magnitude + symbols, np.abs(symbols)).astype(np.int32)
        return Nodes(plane, np.where(known, nodes.sign, np.sign(symbols)).astype(np.int8), magnitude)

    def values(self, level: NDArray[np.uint8], nodes: Nodes) -> NDArray[np.float32]:
        """Return what r is taken to be, float32: the mean of its node, further out as the module says."""
        number = self.numbers(level, nodes)
        magnitude = self.means[number].astype(np.float32) / np.float32(FRACTION)
        beyond = nodes.magnitude >= self.last[level, nodes.plane]
        far = np.flatnonzero(beyond & (nodes.magnitude > 0))
        width = np.exp2(nodes.plane.flat[far].astype(np.float32)) * np.float32(self.step)
        middle = (nodes.magnitude.flat[far].astype(np.float32) + np.float32(0.5)) * width
        magnitude.flat[far] = middle + np.float32((self.zero - 1) * self.step)
        found: NDArray[np.float32] = nodes.sign.astype(np.float32) * magnitude
        return found


class _Cells:
    """A Gaussian of one sigma over the finest cells: probability, and integrals of |r| and r^2, both signs together."""

    def __init__(self, sigma: float, step: float, zero: float) -> None:
        self.step, self.reach = step, int(np.ceil(_SIGMAS * sigma / step))
        cells = (self.reach >> TOP) + 2 << TOP
        edges = np.concatenate([[0.0], (zero + np.arange(cells)) * step / sigma])
        tails = torch.erfc(torch.from_numpy(edges / np.sqrt(2.0))).numpy()  # P(|r| > edge)
        density = np.sqrt(2 / np.pi) * np.exp(-np.square(edges) / 2)
        self.sums = [-np.diff(one) for one in (tails, sigma * density, sigma**2 * (tails + edges * density))]
        self.lost = min(LOST / sigma, MOST)
        self.further = min(1 + 1 / (12 * sigma**2), 2.0)

    def at(self, plane: int) -> list[NDArray[Any]]:
        """Return the three by m of a plane."""
        return [one.reshape(-1, 1 << plane).sum(axis=1) for one in self.sums]

    def first_plane(self) -> int:
        """Return the coarsest plane at which not nearly all elements are zero."""
        return max((plane for plane in range(1, TOP + 1) if self.at(plane)[0][0] < 1 - _SOME), default=0)

    def first_slope(self, plane: int) -> float:
        """Return the slope of a first symbol at a plane."""
        p, of_r, of_squares = self.at(plane)
        share = p[p > 0]
        bits = float(share[1:].sum() - (share * np.log2(share)).sum())
        gain = float(_explained(of_r, p)[1:].sum() + self.lost * of_squares[1:].sum())
        return gain / bits if bits > 0 else 0.0

    def nodes(self, plane: int) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
        """Return by m of a plane, the last for all beyond: the slope of the next symbol, the probability that it is not
        the lower one (of m = 0, not zero), and the mean.
        """
        p, of_r, _ = self.at(plane)
        count = min((self.reach >> plane) + 1, len(p))
        p, of_r = p[:count], of_r[:count]
        kept = p > _LEAST
        whole = np.where(kept, p, 1.0)
        mean = np.append(np.where(kept, of_r / whole, 0.0) * self.further, 0.0)
        mean[0] = 0.0
        slope, upper = np.zeros(count + 1), np.full(count + 1, 0.5)
        if plane:
            finer, finer_r, finer_squares = (one[: 2 * count].reshape(count, 2) for one in self.at(plane - 1))
            gain = _explained(finer_r, finer).sum(axis=1) - _explained(of_r, p)
            gain[0] = _explained(finer_r, finer)[0, 1] + self.lost * finer_squares[0, 1]
            upper[:count] = np.where(kept, finer[:, 1] / whole, 0.5)
            bits = _entropy(upper[:count])
            bits[0] += upper[0]
            slope[:count] = np.maximum(
                np.where(kept & (bits > 0), gain / whole / np.where(bits > 0, bits, 1.0), 0.0), 0
            )
            slope[count] = (self.step * (1 << plane)) ** 2 / 16
        return slope, upper, mean


def _explained(of_r: NDArray[Any], p: NDArray[Any]) -> NDArray[Any]:
    """Return p times the squared mean of cells."""
    explained: NDArray[Any] = np.square(of_r) / np.where(p > 0, p, 1.0)
    return explained


def _entropy(p: NDArray[Any]) -> NDArray[Any]:
    safe = np.clip(p, 1e-300, 1 - 1e-16)
    entropy: NDArray[Any] = -(safe * np.log2(safe) + (1 - safe) * np.log2(1 - safe))
    return entropy


def _tables(first: CdfTables, zero: NDArray[Any]) -> CdfTables:
    """Return one table of all rows: BINARY of bits, those of first symbols, and of each probability that zero stays so
    one of -1, 0, 1. Every row ends with the escape, which only a first symbol takes.
    """
    rows = BINARY + first.rows + len(zero)
    cdf = np.zeros((rows, max(5, first.cdf.shape[1])), np.int32)
    bit = np.rint(TOTAL * (1 - (np.arange(BINARY) + 0.5) / (2 * BINARY)))
    cdf[:BINARY, 1:4] = np.stack([bit, np.full(BINARY, TOTAL - 1), np.full(BINARY, TOTAL)], axis=1)
    cdf[BINARY : BINARY + first.rows, : first.cdf.shape[1]] = first.cdf
    side = np.clip(np.rint(TOTAL * (1 - zero) / 2), 1, TOTAL // 2 - 1)
    cdf[BINARY + first.rows :, 1:5] = np.stack(
        [side, TOTAL - 1 - side, np.full(len(zero), TOTAL - 1), np.full(len(zero), TOTAL)], axis=1
    )
    size = np.concatenate([np.full(BINARY, 4), first.size, np.full(len(zero), 5)])
    return CdfTables(cdf, size, np.concatenate([np.zeros(BINARY, np.int32), first.offset, np.full(len(zero), -1)]))
