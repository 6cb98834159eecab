"""Integer rate tables: what an index costs, exactly as the entropy coder charges it.

A table row is the distribution of an index k given the active quantizer Q and the scale level:

    row = Q * LEVELS + level                (for y; for z a row is a channel)

Where y has a factorized prior, its channel takes the place of the level, and a row may charge k and -k differently.

Tables have CompressAI's form (`_quantized_cdf`, `_cdf_length`, `_offset`; 16 bit; the last symbol is an escape), so
that its coder takes them unchanged. The search minimizes costs that are read off the same integers.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lic_dist.quantization import kernels

LEVELS = 64
TOTAL = 1 << 16  # frequencies of a row sum to this (16-bit precision)
COST_UNIT = 256  # integer costs are in 1/256 bit

# CompressAI's get_scale_table(): exp(linspace(log 0.11, log 256, 64)), as numbers so that no library can
# change them.
# fmt: off
SCALES = np.array(
    [
        0.11, 0.124404095, 0.14069438, 0.1591178, 0.1799537, 0.20351797, 0.23016793, 0.2603076,
        0.29439393, 0.33294374, 0.37654155, 0.4258483, 0.4816116, 0.5446769, 0.6160004, 0.69666344,
        0.787889, 0.89106023, 1.0077413, 1.1397015, 1.2889413, 1.4577235, 1.6486071, 1.8644862,
        2.108634, 2.384752, 2.6970267, 3.0501928, 3.4496043, 3.9013174, 4.4121814, 4.9899406,
        5.643354, 6.382331, 7.218075, 8.163255, 9.2322035, 10.441129, 11.808356, 13.354617,
        15.103355, 17.081085, 19.317795, 21.84739, 24.708223, 27.943682, 31.602804, 35.741077,
        40.421238, 45.714252, 51.70038, 58.470337, 66.12683, 74.78591, 84.578835, 95.654144,
        108.17973, 122.34544, 138.36617, 156.48474, 176.9758, 200.15018, 226.35905, 256.0,
    ],
    dtype=np.float32,
)
# fmt: on

# A level begins above its threshold. Nearest in log sigma: between two scales, their geometric mean.
_THRESHOLDS = {
    "nearest": np.sqrt(SCALES[:-1].astype(np.float64) * SCALES[1:].astype(np.float64)).astype(np.float32),
    "above": SCALES[:-1],
}
LEVEL_RULES = (*_THRESHOLDS, "channel")  # the last has no thresholds: the level is the channel

WIDEST_REACH = 4095  # no row holds larger |k|: beyond, escapes
_SMALLEST_REACH = 1  # every row holds 0 and +-1: two counts protect against a wrong scale
# +-k stays in the row while P(k) 2^16 >= this: an escape costs some 6 bits more than count 1
_LEAST_COUNT = 0.25


def level_index(scales: Any, rule: str = "nearest") -> Any:
    """Return the scale level, uint8, of scales (float32, array or tensor; same kind and shape).

    "nearest" is the nearest in log sigma. "above" is CompressAI's `build_indexes`: the next one up, scales below 0.11
    raised to it; it costs 1.17 % rate and serves only rows that must equal `eval_model`.
    """
    if rule not in _THRESHOLDS:
        raise ValueError(f"scales have no level by the rule {rule!r}, but by {' or '.join(_THRESHOLDS)}")
    if isinstance(scales, torch.Tensor) and scales.device.type != "cpu":
        boundaries = torch.from_numpy(_THRESHOLDS[rule].copy()).to(scales.device)
        return torch.bucketize(scales.detach().float().contiguous(), boundaries, out_int32=True).to(torch.uint8)
    given = scales.detach().float().numpy() if isinstance(scales, torch.Tensor) else scales
    numbers = np.ascontiguousarray(given, np.float32)
    found = kernels.levels_of_bits(numbers.view(np.int32).ravel(), *_cells(rule)).reshape(np.shape(given))
    return torch.from_numpy(found) if isinstance(scales, torch.Tensor) else found


@cache
def _cells(rule: str) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Return what `kernels.levels_of_bits` takes of a rule's thresholds, of which no two lie in a cell."""
    thresholds = _THRESHOLDS[rule].view(np.int32)
    least = np.arange(1 << 31 - kernels.CELL, dtype=np.int64) << kernels.CELL
    first = np.searchsorted(thresholds, least).astype(np.int32)
    bound = np.full(len(least), np.iinfo(np.int32).max, np.int32)
    bound[thresholds >> kernels.CELL] = thresholds
    return first, bound


@dataclass(frozen=True, eq=False)
class CdfTables:
    """Integer cumulative tables in CompressAI's form.

    cdf    int32 [rows, width]  row starts at 0, rises strictly, its entry size-1 is 65536; zeros follow
    size   int32 [rows]         entries of the row in use: symbols 0..size-3, then the escape symbol size-2
    offset int32 [rows]         symbol s of the row is the index k = s + offset

    Raises ValueError where a row is not such a table.
    """

    cdf: NDArray[Any]
    size: NDArray[Any]
    offset: NDArray[Any]

    def __post_init__(self) -> None:
        for name, dimensions in (("cdf", 2), ("size", 1), ("offset", 1)):
            array = np.array(getattr(self, name), dtype=np.int32, order="C")
            if array.ndim != dimensions or len(array) != len(self.cdf) or len(array) == 0:
                raise ValueError(f"{name} has shape {array.shape}, not {dimensions}-D with one entry a row")
            array.setflags(write=False)
            object.__setattr__(self, name, array)
        width = self.cdf.shape[1]
        if self.size.min() < 3 or self.size.max() > width:
            raise ValueError("sizes lie between 3 and the width of the table")
        if self.cdf.min() < 0 or self.cdf.max() > TOTAL or np.abs(self.offset.astype(np.int64)).max() > TOTAL:
            raise ValueError("entries lie between 0 and 65536, offsets within them")
        last = np.take_along_axis(self.cdf, self.size[:, None] - 1, axis=1)[:, 0]
        in_use = np.arange(1, width) < self.size[:, None]
        if (self.cdf[:, 0] != 0).any() or (last != TOTAL).any() or (np.diff(self.cdf)[in_use] <= 0).any():
            raise ValueError("a row rises strictly from 0 to 65536")

    @property
    def rows(self) -> int:
        """How many rows the tables have."""
        return len(self.size)

    @property
    def symmetric(self) -> bool:
        """Whether every row charges k and -k alike (except for the escapes' sign, see `magnitude_bypass_bits`)."""
        centre = self.size - 3 + 2 * self.offset
        if (centre != 0).any():
            return False
        frequencies = np.diff(self.cdf)
        return all(
            np.array_equal(row[: size - 2], row[: size - 2][::-1])
            for row, size in zip(frequencies, self.size, strict=True)
        )

    @property
    def holds_zero(self) -> bool:
        """Whether the index 0 is a symbol of every row."""
        return bool(((self.offset <= 0) & (self.offset + self.size - 3 >= 0)).all())

    @cached_property
    def symbol_bits(self) -> NDArray[Any]:
        """-log2 of each symbol's probability, the escape's flag included: float64 [rows, width-1]."""
        frequencies = np.where(np.arange(1, self.cdf.shape[1]) < self.size[:, None], np.diff(self.cdf), TOTAL)
        bits: NDArray[Any] = np.log2(TOTAL) - np.log2(frequencies)
        return bits

    def bits(self, k: NDArray[Any], rows: NDArray[Any]) -> NDArray[Any]:
        """Return the bits, float64, of each index k coded with its row (same shape); escapes with their bypass bits."""
        k32, rows32 = np.ascontiguousarray(k, np.int32), np.ascontiguousarray(rows, np.int32)
        if k32.shape != rows32.shape:
            raise ValueError(f"k has shape {k32.shape}, rows {rows32.shape}")
        if rows32.size and (rows32.min() < 0 or rows32.max() >= self.rows):
            raise ValueError(f"rows lie outside 0..{self.rows - 1}")
        flat = kernels.symbol_bits(k32.ravel(), rows32.ravel(), self.symbol_bits, self.size, self.offset)
        found: NDArray[Any] = flat.reshape(k32.shape)
        return found

    def _magnitude_bits(self, largest: int) -> tuple[NDArray[Any], NDArray[Any]]:
        """Return for |k| = 0..largest the bits of the symbol or of the escape's flag, and the bypass bits: float64."""
        if not self.symmetric:
            raise ValueError("costs by |k| need symmetric tables")
        symbol, bypass = np.empty((self.rows, largest + 1)), np.zeros((self.rows, largest + 1))
        escaped = magnitude_bypass_bits(np.arange(largest + 1))  # of every row alike, counted from its reach
        for row, reach in enumerate(self.reach()):
            kept = min(int(reach), largest) + 1
            symbol[row, :kept] = self.symbol_bits[row, reach : reach + kept]
            symbol[row, kept:] = self.symbol_bits[row, 2 * reach + 1]
            bypass[row, kept:] = escaped[: largest + 1 - kept]
        return symbol, bypass

    def reach(self) -> NDArray[Any]:
        """Return the largest |k| of each symmetric row that is not escaped: int32 [rows]."""
        return (self.size - 3) // 2

    def costs(self, largest: int) -> NDArray[Any]:
        """Return costs by |k| in 1/256 bit, int32 [rows, largest+1]; ValueError for asymmetric tables."""
        symbol, bypass = self._magnitude_bits(largest)
        costs: NDArray[Any] = (np.rint(COST_UNIT * symbol) + COST_UNIT * bypass).astype(np.int32)
        return costs


def magnitude_bypass_bits(beyond: NDArray[Any]) -> NDArray[Any]:
    """Return the bypass bits of an escape by |k| = reach + 1 + beyond, the mean over signs; 0 where beyond is negative.

    CompressAI's coder writes the number of nibbles and then the escaped value v in nibbles: v = 2 beyond for k > 0 and
    2 beyond + 1 for k < 0. The signs differ only for beyond = 0: 4 and 8 bits.
    """
    nibbles = sum((2 * np.maximum(beyond, 0) >= 16**power).astype(np.int64) for power in range(5))
    return np.where(beyond < 0, 0, np.where(beyond == 0, 6, 4 + 4 * nibbles)).astype(np.float64)


def bits_table(tables: CdfTables, largest: int) -> NDArray[Any]:
    """Return -log2 P by |k| = 0..largest, float32 [Q, LEVELS, largest+1], escapes included: the rate for training."""
    symbol, bypass = tables._magnitude_bits(largest)
    bits: NDArray[Any] = (symbol + bypass).astype(np.float32).reshape(-1, LEVELS, largest + 1)
    return bits


@dataclass(frozen=True, eq=False)
class SearchRates:
    """What a search reads: costs in 1/256 bit by |k| up to `largest`, and what extends them to any |k|.

    costs int32 [rows, largest+1]; reach int32 [rows]; flag int32 [rows], the cost of the escape's flag. The table ends
    beyond every row's reach; further out an index costs `flag` and its bypass bits. No cost in the table exceeds 15
    bits. `signed` rates have two rows for each of the tables: of k >= 0, then of k <= 0.
    """

    costs: NDArray[Any]
    reach: NDArray[Any]
    flag: NDArray[Any]
    signed: bool = False

    @property
    def largest(self) -> int:
        """The largest |k| in `costs`."""
        return self.costs.shape[1] - 1

    def search_levels(self, r: Any, level: Any) -> Any:
        """Return what the engines take as levels, array or tensor: `level`, or 2 level + (r < 0) for signed rates.

        All candidates of an element have the sign of r, so the sign decides which of the two rows they are charged by.
        """
        if not self.signed:
            return level
        if isinstance(r, torch.Tensor):
            return 2 * level.int() + (r < 0)
        return (2 * level.astype(np.int32) + (r < 0)).astype(np.uint16)

    @cached_property
    def union_costs(self) -> NDArray[Any]:
        """Costs of the union levels m = 0..2 largest, int32 [levels, .]: of |k| = (m+1)//2 in quantizer m & 1.

        Zero is in both quantizers: column 0 is Q0's.
        """
        m = np.arange(2 * self.largest + 1)
        by_quantizer = self.costs.reshape(2, -1, self.largest + 1)
        return np.ascontiguousarray(by_quantizer[m & 1, :, (m + 1) >> 1].T)

    @cached_property
    def quads(self) -> NDArray[Any]:
        """Costs of the candidates m0..m0+3, by level and m0: int64 [levels, .], 16 bits each at 16 (m modulo 4)."""
        smallest = np.arange(self.union_costs.shape[1] - 3)
        packed = np.zeros((len(self.union_costs), len(smallest)), np.int64)
        for number in range(4):
            m = smallest + ((number - smallest) & 3)
            packed |= self.union_costs[:, m].astype(np.int64) << (16 * number)
        return packed

    @cached_property
    def triples(self) -> NDArray[Any]:
        """Costs of RDOQ's candidates zero, |k| - 1 (zero for zero) and |k|, by row and |k|: int64 [rows, largest+1], 16
        bits each from the lowest.
        """
        costs = np.ascontiguousarray(self.costs, np.int64)
        below = costs[:, np.maximum(np.arange(self.largest + 1) - 1, 0)]
        return np.ascontiguousarray(costs[:, :1] | below << 16 | costs << 32)

    @cached_property
    def zero_pairs(self) -> NDArray[Any]:
        """Costs of the index 0 in Q0 and, 16 bits higher, in Q1: int32 [levels]."""
        in_q0, in_q1 = self.costs[:, 0].reshape(2, -1)
        return np.ascontiguousarray(in_q0 | in_q1 << 16)

    def cost(self, row: int, magnitude: int) -> int:
        """Return the cost of |k| = magnitude in a row, for any magnitude."""
        if magnitude <= self.largest:
            return int(self.costs[row, magnitude])
        bypass = magnitude_bypass_bits(np.array(magnitude - int(self.reach[row]) - 1))
        return int(self.flag[row]) + COST_UNIT * int(bypass)


def search_rates(tables: CdfTables) -> SearchRates:
    """Return the rates of a search from the coder's tables (symmetric ones; ValueError otherwise)."""
    reach = tables.reach()
    largest = int(reach.max()) + 3  # room for whole candidate sets at the table's edge
    return SearchRates(costs=tables.costs(largest), reach=reach.astype(np.int32), flag=_flag_costs(tables))


def signed_rates(tables: CdfTables) -> SearchRates:
    """Return the rates of a search from tables that may be asymmetric; ValueError where a row does not hold 0."""
    if not tables.holds_zero:
        raise ValueError("rates by sign need tables whose rows hold 0")
    reach = np.stack((tables.offset + tables.size - 3, -tables.offset), axis=1)  # of k > 0, of k < 0
    k = np.array([[1], [-1]]) * np.arange(int(reach.max()) + 4)
    shape = (tables.rows, *k.shape)
    rows = np.broadcast_to(np.arange(tables.rows)[:, None, None], shape)
    bits = tables.bits(np.broadcast_to(k, shape), rows).reshape(2 * tables.rows, -1)
    return SearchRates(
        costs=np.rint(COST_UNIT * bits).astype(np.int32),
        reach=reach.reshape(-1).astype(np.int32),
        flag=np.repeat(_flag_costs(tables), 2),
        signed=True,
    )


def _flag_costs(tables: CdfTables) -> NDArray[Any]:
    """Return the cost of the flag of each row's escape in 1/256 bit, int32."""
    bits = np.take_along_axis(tables.symbol_bits, tables.size[:, None] - 2, axis=1)[:, 0]
    costs: NDArray[Any] = np.rint(COST_UNIT * bits).astype(np.int32)
    return costs


def tables_from_pmf(pmf: NDArray[Any]) -> CdfTables:
    """Return symmetric integer tables from P by |k| of one sign, float64 [rows, K+1].

    The escape gets what a row lacks to 1. A row is cut where its tail is not worth a symbol, and always before K (whose
    count is "K or more"). Every symbol and the escape get at least 1; a row sums to 65536. Frequencies minimize the
    expected code length: proportional ones by bisection, and the remainder for the symbols that gain most.
    """
    if pmf.ndim != 2 or pmf.shape[1] < 3 or not ((pmf >= 0) & (pmf <= 1)).all():
        raise ValueError("pmf is [rows, K+1] with K >= 2, each between 0 and 1")
    frequencies = [_half_frequencies(row) for row in pmf]
    width = max(2 * len(half) - 1 for half in frequencies)
    cdf = np.zeros((len(frequencies), width), np.int32)
    reach = np.array([len(half) - 2 for half in frequencies], np.int32)
    for row, half in zip(cdf, frequencies, strict=True):
        symbols = np.concatenate([half[-2:0:-1], half[:-1], half[-1:]])
        row[1 : len(symbols) + 1] = np.cumsum(symbols)
    return CdfTables(cdf=cdf, size=2 * reach + 3, offset=-reach)


def tables_from_signed_pmf(pmf: NDArray[Any]) -> CdfTables:
    """Return integer tables, not symmetric, from P by k = -K..K, float64 [rows, 2K+1]; as `tables_from_pmf` does.

    A row is cut on either side by itself, and holds -1, 0 and 1 at least.
    """
    if pmf.ndim != 2 or pmf.shape[1] < 5 or not pmf.shape[1] & 1 or not ((pmf >= 0) & (pmf <= 1)).all():
        raise ValueError("pmf is [rows, 2K+1] with K >= 2, each between 0 and 1")
    middle = pmf.shape[1] // 2
    frequencies, offset = [], []
    for row in pmf:
        worthwhile = np.flatnonzero(row * TOTAL >= _LEAST_COUNT) - middle
        ends = (-worthwhile[0], worthwhile[-1]) if len(worthwhile) else (0, 0)
        below, above = (min(max(int(end), _SMALLEST_REACH), WIDEST_REACH, middle - 1) for end in ends)
        kept = row[middle - below : middle + above + 1]
        frequencies.append(_shared_out(np.append(kept, max(1.0 - kept.sum(), 0.0)), np.ones(len(kept) + 1, np.int64)))
        offset.append(-below)
    size = np.array([len(symbols) + 1 for symbols in frequencies], np.int32)
    cdf = np.zeros((len(size), int(size.max())), np.int32)
    for entries, symbols in zip(cdf, frequencies, strict=True):
        entries[1 : len(symbols) + 1] = np.cumsum(symbols)
    return CdfTables(cdf=cdf, size=size, offset=np.array(offset, np.int32))


def _half_frequencies(pmf: NDArray[Any]) -> NDArray[Any]:
    """Return integers [f_0, f_1, .., f_reach, f_escape], f_0 + 2 (f_1 + .. + f_reach) + f_escape = 65536."""
    worthwhile = np.flatnonzero(pmf[1:] * TOTAL >= _LEAST_COUNT) + 1
    reach = int(worthwhile[-1]) if len(worthwhile) else 0
    reach = min(max(reach, _SMALLEST_REACH), WIDEST_REACH, len(pmf) - 2)
    tail = 1.0 - pmf[0] - 2.0 * pmf[1 : reach + 1].sum()
    shares = np.append(pmf[: reach + 1], max(tail, 0.0))
    weight = np.full(len(shares), 2)
    weight[[0, -1]] = 1
    return _shared_out(shares, weight)


def _shared_out(shares: NDArray[Any], weight: NDArray[Any]) -> NDArray[Any]:
    """Return integers of at least 1 near TOTAL times the shares, whose sum with these weights (one of them 1) is TOTAL.

    Proportional ones; then what is left goes where it saves most.
    """
    frequencies: NDArray[Any] = kernels.proportional_frequencies(shares, weight, TOTAL)
    left = TOTAL - int((weight * frequencies).sum())
    while left > 0:
        gain = np.where(weight <= left, shares * np.log1p(1.0 / frequencies), -1.0)
        best = int(np.argmax(gain))
        frequencies[best] += 1
        left -= int(weight[best])
    return frequencies
