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


@kernel
def active_quantizers(k: NDArray[Any], quantizer: NDArray[Any], next_state: NDArray[Any]) -> NDArray[Any]:
    """Return the active quantizers, uint8, along each lane of k int16 [lanes, steps]."""
    lanes, steps = k.shape
    active = np.empty((lanes, steps), np.uint8)
    for lane in range(lanes):
        state = 0
        for step in range(steps):
            active[lane, step] = quantizer[state]
            state = next_state[state, k[lane, step] & 1]
    return active


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
def count_magnitudes(k: NDArray[Any], rows: NDArray[Any], row_count: int, width: int) -> NDArray[Any]:
    """Count |k| by row: int64 [row_count, width]; the last column takes every larger |k|."""
    counts = np.zeros((row_count, width), np.int64)
    for position in range(len(k)):
        magnitude = abs(np.int32(k[position]))
        column = magnitude if magnitude < width else width - 1
        counts[rows[position], column] += 1
    return counts


@kernel
def count_signed(k: NDArray[Any], rows: NDArray[Any], row_count: int, width: int) -> NDArray[Any]:
    """Count k by row: int64 [row_count, width], k = 0 in the middle; the first and last columns take what lies
    beyond.
    """
    counts = np.zeros((row_count, width), np.int64)
    for position in range(len(k)):
        column = min(max(int(k[position]) + width // 2, 0), width - 1)
        counts[rows[position], column] += 1
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
