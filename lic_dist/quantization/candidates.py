"""The costs of one step of the trellis search: candidates, their rates, branch costs; compiled, SIMD along the lanes.

An element's candidates are the union levels m0..m0+3, m0 = max(1, floor(|r|/D) - 1), and zero. The four levels fall
into the four branch classes, m modulo 4: the quantizer and the parity of the index. Zero competes in the classes 0 and
3.

    r, level [lane, step] --tile_candidates--> |r|/D, position of the rates --look_up, transposed--> [step, lane]
                          --branch_costs--> costs [class, lane] of two steps, and which classes took zero
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic
from numpy.typing import NDArray

BLOCK = 128  # lanes searched side by side at most
TILE = 64  # steps between two reductions of the path metrics; r is read in runs of so many
PANEL = 32  # steps of one transposition
SATURATION = np.float32(1 << 20)  # largest distortion, in 1/256 bit
BIT = 256  # cost units in a bit

_I = np.int32  # numba widens int32 arithmetic to int64, which halves the SIMD width: every result is narrowed again


@njit(nogil=True)
def tile_candidates(
    r: NDArray[Any],
    level: NDArray[Any],
    start: int,
    end: int,
    inverse_step: np.float32,
    quads: NDArray[Any],
    position: NDArray[Any],
    index: NDArray[Any],
    row: NDArray[Any],
) -> np.int32:
    """Fill in for a tile, [lane, step]: |r|/D, the index of its candidates' rates in quads, and the level.

    Returns the largest |r|/D as its bits, which sort as the numbers do, infinity and NaN last. Candidates beyond the
    table get the index of its last column.
    """
    columns = _I(quads.shape[1])
    last = _I(columns - 1)
    flat_r, flat_level = r.ravel(), level.ravel()
    flat_position, flat_index, flat_row = position.ravel(), index.ravel(), row.ravel()
    bits = position.view(np.int32).ravel()
    largest = _I(0)
    for lane in range(len(r)):
        base, to = lane * r.shape[1] + start, lane * TILE
        for offset in range(end - start):
            value = abs(flat_r[np.uint64(base + offset)]) * inverse_step
            smallest = smallest_level(value)
            flat_position[np.uint64(to + offset)] = value
            at = flat_level[np.uint64(base + offset)]
            flat_index[np.uint64(to + offset)] = _I(_I(_I(at) * columns) + min(smallest, last))
            flat_row[np.uint64(to + offset)] = at
        for offset in range(end - start):
            largest = max(largest, bits[np.uint64(to + offset)])
    return largest


@njit(nogil=True)
def look_up(
    position: NDArray[Any],
    index: NDArray[Any],
    row: NDArray[Any],
    start: int,
    size: int,
    quads: NDArray[Any],
    zero_pairs: NDArray[Any],
    scaled: NDArray[Any],
    low: NDArray[Any],
    high: NDArray[Any],
    zero: NDArray[Any],
) -> None:
    """Transpose a panel of a tile into [step, lane]: |r|/D, its candidates' rates by class, and the rates of zero.

    Two lanes are handled at once, their 32-bit values stored as one word, because stores to many cache lines dominate
    the time.
    """
    flat_position, flat_index = position.view(np.int32).ravel(), index.ravel()
    flat_row, flat_quads = row.ravel(), quads.ravel()
    words_scaled, words_zero = scaled.view(np.int64).ravel(), zero.view(np.int64).ravel()
    words_low, words_high = low.view(np.int64).ravel(), high.view(np.int64).ravel()
    lower = np.int64(0xFFFFFFFF)
    for pair in range((size + 1) // 2):
        for offset in range(PANEL):
            at = np.uint64(2 * pair * TILE + start + offset)
            beside, to = at + np.uint64(TILE), np.uint64(offset * (BLOCK // 2) + pair)
            one, other = flat_quads[np.uint32(flat_index[at])], flat_quads[np.uint32(flat_index[beside])]
            words_low[to] = (one & lower) | (other << 32)
            words_high[to] = ((one >> 32) & lower) | (other & ~lower)
            words_zero[to] = _pack_word(zero_pairs[np.uint32(flat_row[at])], zero_pairs[np.uint32(flat_row[beside])])
            words_scaled[to] = _pack_word(flat_position[at], flat_position[beside])


@njit(nogil=True)
def _pack_word(lower: np.int32, upper: np.int32) -> np.int64:
    """Pack two 32-bit values into one word, the lower one first."""
    return np.int64(np.uint32(lower)) | (np.int64(upper) << 32)


@njit(nogil=True)
def look_up_escapes(
    position: NDArray[Any],
    row: NDArray[Any],
    start: int,
    size: int,
    quads: NDArray[Any],
    reach: NDArray[Any],
    flag: NDArray[Any],
    low: NDArray[Any],
    high: NDArray[Any],
) -> None:
    """Correct the rates of candidates beyond the table, all four of which are escapes."""
    for lane in range(size):
        for offset in range(PANEL):
            smallest = smallest_level(position[lane, start + offset])
            if smallest >= quads.shape[1]:
                quad = _escaped(smallest, row[lane, start + offset], len(quads), reach, flag)
                low[offset, lane], high[offset, lane] = quad, quad >> 32


@njit(nogil=True)
def smallest_level(position: np.float32) -> np.int32:
    """Return the smallest union level of the candidates, m0."""
    return max(_I(_I(position) - _I(1)), _I(1))


@njit(nogil=True)
def candidate_level(smallest: np.int32, number: np.int32) -> np.int32:
    """Return the union level of a branch class among m0..m0+3."""
    return _I(_I(_I(smallest + _I(3) - number) & _I(-4)) + number)


@njit(nogil=True)
def _escaped(smallest: np.int32, level: int, levels: int, reach: NDArray[Any], flag: NDArray[Any]) -> np.int64:
    """Return the rates of four escapes, packed by class: the cost of the flag, and of the nibbles."""
    packed = np.int64(0)
    for number in range(4):
        m = candidate_level(_I(smallest), _I(number))
        packed |= np.int64(escape_cost((m & 1) * levels + level, (m + 1) >> 1, reach, flag)) << (16 * number)
    return packed


@njit(nogil=True)
def escape_cost(row: Any, magnitude: Any, reach: NDArray[Any], flag: NDArray[Any]) -> Any:
    """Return the cost of |k| = magnitude, at least 2 beyond the row's reach: the escape's flag, and its nibbles."""
    value, nibbles = 2 * (magnitude - reach[row] - 1), 0
    while value > 0:  # a negative value comes from NaN, which the caller of the search refuses afterwards
        nibbles += 1
        value >>= 4
    return flag[row] + BIT * (4 + 4 * nibbles)


def _rint(typing: Any, value: Any) -> Any:
    """Round half to even in one instruction. numba's own `np.rint` is a call, which keeps loops from being SIMD."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        function = builder.module.declare_intrinsic("llvm.rint", [ir.FloatType()])
        return builder.call(function, arguments)

    return types.float32(types.float32), generate


rint: Any = intrinsic(_rint)


def _shift_right(typing: Any, value: Any, count: Any) -> Any:
    """Shift a 32-bit word right by less than 32. numba's own shift has 64 bits, half the SIMD width where LLVM does not
    see that 32 would do.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.lshr(*arguments)

    return types.uint32(types.uint32, types.uint32), generate


shift_right: Any = intrinsic(_shift_right)


@njit(nogil=True)
def distortion(difference: np.float32, weight: np.float32) -> np.int32:
    """Return the rounded distortion in 1/256 bit of a difference in steps D."""
    distortion = difference * difference * weight
    return _I(rint(distortion if distortion < SATURATION else SATURATION))


@njit(nogil=True)
def _step_costs(
    position: np.float32, weight: np.float32, low: np.int32, high: np.int32, zero: np.int32
) -> tuple[np.int32, np.int32, np.int32, np.int32, np.uint8]:
    """Return the costs of one latent's four branch classes, and a nibble of which of them take zero (0 and 3 can)."""
    smallest = smallest_level(position)
    cost0 = _I(distortion(position - np.float32(candidate_level(smallest, _I(0))), weight) + _I(low & _I(0xFFFF)))
    cost1 = _I(distortion(position - np.float32(candidate_level(smallest, _I(1))), weight) + _I(low >> _I(16)))
    cost2 = _I(distortion(position - np.float32(candidate_level(smallest, _I(2))), weight) + _I(high & _I(0xFFFF)))
    cost3 = _I(distortion(position - np.float32(candidate_level(smallest, _I(3))), weight) + _I(high >> _I(16)))
    none = distortion(position, weight)
    zero0, zero1 = _I(none + _I(zero & _I(0xFFFF))), _I(none + _I(zero >> _I(16)))
    taken = np.uint8(np.uint8(zero0 <= cost0) | np.uint8(np.uint8(zero1 <= cost3) * np.uint8(8)))
    return min(zero0, cost0), cost1, cost2, min(zero1, cost3), taken


@njit(nogil=True)
def branch_costs(
    scaled: NDArray[Any],
    low: NDArray[Any],
    high: NDArray[Any],
    zero: NDArray[Any],
    weight: NDArray[Any],
    branch: NDArray[Any],
    zeros: NDArray[Any],
) -> None:
    """Fill in the branch costs of two steps, [2, 4, lane], and in a byte the two nibbles of the classes that took
    zero. The weights are those of the two steps, [2, lane].
    """
    width = weight.shape[1]
    first_weight, second_weight = weight[0], weight[1]
    first_low, second_low, first_high, second_high = low[0], low[1], high[0], high[1]
    first_scaled, second_scaled, first_zero, second_zero = scaled[0], scaled[1], zero[0], zero[1]
    for lane in range(width):
        a, b, c, d, even = _step_costs(
            first_scaled[lane], first_weight[lane], first_low[lane], first_high[lane], first_zero[lane]
        )
        branch[lane], branch[lane + BLOCK], branch[lane + 2 * BLOCK], branch[lane + 3 * BLOCK] = a, b, c, d
        a, b, c, d, odd = _step_costs(
            second_scaled[lane], second_weight[lane], second_low[lane], second_high[lane], second_zero[lane]
        )
        branch[lane + 4 * BLOCK], branch[lane + 5 * BLOCK] = a, b
        branch[lane + 6 * BLOCK], branch[lane + 7 * BLOCK] = c, d
        zeros[lane] = np.uint8(even | np.uint8(odd * np.uint8(16)))
