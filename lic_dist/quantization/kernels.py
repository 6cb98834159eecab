"""Compiled loops over [lanes, steps] other than the trellis search: walking the state machine, bits, counts.

All release the GIL and take their tables as arrays.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from lic_dist.quantization.jit import float_of_bits, kernel


@kernel
def _peak_bits(bits: NDArray[Any]) -> np.int32:
    """Return the largest |x| of float32 given as int32, as int32: magnitudes sort as integers, infinity and NaN
    last.
    """
    largest = np.int32(0)
    for position in range(len(bits)):
        largest = max(largest, np.int32(bits[position] & np.int32(0x7FFFFFFF)))
    return largest


def largest_magnitude(x: NDArray[Any]) -> float:
    """Return the largest |x| of float32 [n]; infinite or NaN where one is."""
    return float_of_bits(_peak_bits(x.view(np.int32)))


SIDE_BY_SIDE = 16  # lanes whose states are walked in turn, so that none waits for its own last step


@kernel
def active_quantizers(k: NDArray[Any], quantizer: NDArray[Any], next_state: NDArray[Any]) -> NDArray[Any]:
    """Return the active quantizers, uint8, along each lane of k int16 [lanes, steps]; of the trellis quantizer uint8
    [states] and next_state uint8 [2 states].
    """
    lanes, steps = k.shape
    active = np.empty((lanes, steps), np.uint8)
    state = np.empty(SIDE_BY_SIDE, np.uint8)
    for first in range(0, lanes, SIDE_BY_SIDE):
        count = min(SIDE_BY_SIDE, lanes - first)
        state[:] = 0
        for step in range(steps):
            for lane in range(count):
                active[first + lane, step] = quantizer[state[lane]]
                state[lane] = next_state[state[lane] << 1 | k[first + lane, step] & 1]
    return active


@kernel
def reconstruct(
    k: NDArray[Any], q: NDArray[Any], level: NDArray[Any], shifts: NDArray[Any], step: np.float32, quantizers: int
) -> NDArray[Any]:
    """Return `trellis.levels`, float32 [n], of indices k int16 and their active quantizers q uint8, with the shifts
    float32 of their levels uint8: [n] each.
    """
    value, times = np.empty(len(k), np.float32), np.int32(quantizers)
    for position in range(len(k)):
        one = np.int32(k[position])
        sign = np.int32(np.int32(one > 0) - np.int32(one < 0))
        multiple = np.int32(np.int32(times * one) - np.int32(sign * np.int32(q[position])))
        shifted = np.float32(np.float32(multiple) + np.float32(np.float32(sign) * shifts[level[position]]))
        value[position] = shifted * step
    return value


CELL = 20  # bits of a float32 below its exponent and the first three of its mantissa
_INFINITE = np.int32(0x7F800000)


@kernel
def levels_of_bits(bits: NDArray[Any], first: NDArray[Any], bound: NDArray[Any]) -> NDArray[Any]:
    """Return how many thresholds lie below float32 numbers given as int32 [n]: uint8 [n]; NaN lies above all.

    A cell holds the positive numbers that share all bits from CELL on; of each, int32 [2^(31 - CELL)], `first` is how
    many thresholds lie below the cell, and `bound` the bits of the one in it, or more than any number's.
    """
    found = np.empty(len(bits), np.uint8)
    for position in range(len(bits)):
        one = bits[position]
        if one < 0:  # a negative number, or a NaN
            one = np.int32(0) if np.int32(one & np.int32(0x7FFFFFFF)) <= _INFINITE else np.int32(0x7FFFFFFF)
        cell = np.uint32(one) >> np.uint32(CELL)
        found[position] = np.uint8(np.int32(first[cell] + np.int32(one > bound[cell])))
    return found


@kernel
def symbol_bits(
    k: NDArray[Any], rows: NDArray[Any], bits: NDArray[Any], size: NDArray[Any], offset: NDArray[Any]
) -> NDArray[Any]:
    """Return the bits, float64, of indices k in rows, int32 [n] each; bits [rows, width-1] by symbol, escapes last."""
    result = np.empty(len(k), np.float64)
    for position in range(len(k)):
        row = rows[position]
        symbol = k[position] - offset[row]
        escape = size[row] - 2
        if 0 <= symbol < escape:
            result[position] = bits[row, symbol]
        else:
            value = -2 * symbol - 1 if symbol < 0 else 2 * (symbol - escape)
            nibbles = 0
            while value != 0:
                nibbles += 1
                value >>= 4
            result[position] = bits[row, escape] + 4 + 4 * nibbles
    return result


@kernel
def count_indices(
    k: NDArray[Any],
    level: NDArray[Any],
    quantizer: NDArray[Any],
    next_state: NDArray[Any],
    levels: int,
    width: int,
    signed: bool,
) -> NDArray[Any]:
    """Count |k|, or k where `signed`, by the row of the active quantizer: int64 [quantizers * levels, width].

    k int16 and level, below `levels`, [lanes, steps]. The last column takes every larger |k|; where `signed` 0 is in
    the middle, and the first and last columns take what lies beyond.
    """
    lanes, steps = k.shape
    middle = width // 2 if signed else 0
    counts = np.zeros((int(quantizer.max() + 1) * levels, width), np.int64)
    for lane in range(lanes):
        state = 0
        for step in range(steps):
            index = int(np.int32(k[lane, step]))
            column = min(max((index if signed else abs(index)) + middle, 0), width - 1)
            counts[quantizer[state] * levels + level[lane, step], column] += 1
            state = next_state[state, index & 1]
    return counts


@kernel
def proportional_frequencies(shares: NDArray[Any], weight: NDArray[Any], total: int) -> NDArray[Any]:
    """Return max(1, round(factor shares)), int64 [n], for the largest factor with a weighted sum <= total (64
    bisections).

    shares float64 [n] and weight int64 [n]; halves are rounded up.
    """
    low, high = 0.0, 2.0 * total
    for _ in range(64):
        middle = 0.5 * (low + high)
        spent = 0
        for position in range(len(shares)):
            spent += weight[position] * max(1, int(shares[position] * middle + 0.5))
            if spent > total:
                break
        if spent <= total:
            low = middle
        else:
            high = middle
    frequencies = np.empty(len(shares), np.int64)
    for position in range(len(shares)):
        frequencies[position] = max(1, int(shares[position] * low + 0.5))
    return frequencies
