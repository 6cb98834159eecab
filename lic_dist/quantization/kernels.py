"""Compiled loops over [lanes, steps]: the trellis search, the state machine, bits and counts.

All release the GIL and take their tables as arrays. Float arithmetic is float32 without fused multiply-add
(numba's default, `fastmath=False`, contracts nothing), so `reference.py` in numpy agrees bit for bit.

The search works on blocks of lanes, the inner loops run along the lanes of a block and become SIMD code:

    r, level [lanes, steps] --transposed tiles--> branch costs [4, lane] --add, compare, select--> metrics
    k [lanes, steps]        <--transposed tiles-- traceback over the stored decisions [step, lane]
"""

from __future__ import annotations

import numpy as np
from numba import njit

BLOCK = 256  # lanes searched side by side
TILE = 16  # steps of one transposition
INTERVAL = 64  # steps between two reductions of the path metrics
SATURATION = 1 << 20  # a distortion in 1/256 bit never counts for more
UNREACHED = 1 << 29  # path metric of a state that no path has entered yet
BIT = 256  # cost units in a bit
MASK = 3  # four union levels a candidate set: residues modulo 4


@njit(cache=True, nogil=True)
def search_lanes(
    r: np.ndarray,
    level: np.ndarray,
    weight: np.ndarray,
    inverse_step: np.float32,
    union_costs: np.ndarray,
    zero_costs: np.ndarray,
    reach: np.ndarray,
    flag: np.ndarray,
    previous: np.ndarray,
    residue: np.ndarray,
    k: np.ndarray,
    cost: np.ndarray,
) -> None:
    """Viterbi search of every lane; fills k int16 [lanes, steps] and cost int64 [lanes] (1/256 bit).

    r float32 [lanes, steps]; level uint8 [lanes, steps] below 64; weight float32 [lanes]; union_costs int32
    [64, width], the cost of union level m in the quantizer that owns it; zero_costs int32 [64], the cost of
    the index 0 in Q0 and, 16 bits higher, in Q1; reach, flag int32 [128], of each row: the largest |k| not
    escaped, the cost of the escape's flag; previous, residue int32 [states, 2]: the branches that enter a
    state, the lower previous state first, and which union levels (m modulo 4) a branch may take.
    """
    lanes, steps = r.shape
    states = previous.shape[0]
    chosen = np.empty((steps, BLOCK), np.uint32)  # bit s: state s was entered by its second branch
    element = np.empty((steps, BLOCK), np.int32)  # smallest union level << 2 | zero taken in Q1, Q0
    scaled = np.empty((TILE, BLOCK), np.float32)
    levels = np.empty((TILE, BLOCK), np.uint8)
    indices = np.empty((TILE, BLOCK), np.int16)
    branch = np.empty((4, BLOCK), np.int32)
    column = np.empty(BLOCK, np.int32)
    zero = np.empty(BLOCK, np.int32)
    metric = np.empty((states, BLOCK), np.int32)
    updated = np.empty((states, BLOCK), np.int32)
    state = np.empty(BLOCK, np.int32)
    for first in range(0, lanes, BLOCK):
        size = min(BLOCK, lanes - first)
        block_weight = weight[first : first + size]
        metric[0, :] = 0
        metric[1:, :] = UNREACHED
        for lane in range(size):
            cost[first + lane] = 0
        for start in range(0, steps, TILE):
            length = min(TILE, steps - start)
            for lane in range(size):
                for offset in range(length):
                    scaled[offset, lane] = abs(r[first + lane, start + offset]) * inverse_step
                    levels[offset, lane] = level[first + lane, start + offset]
            for offset in range(length):
                step = start + offset
                _branch_costs(
                    scaled,
                    levels,
                    offset,
                    block_weight,
                    union_costs,
                    zero_costs,
                    reach,
                    flag,
                    branch,
                    element,
                    step,
                    column,
                    zero,
                )
                _select(branch, metric, updated, previous, residue, chosen, step, size)
                metric, updated = updated, metric
            if (start + length) % INTERVAL == 0:
                _reduce(metric, cost[first : first + size])
        _best_final(metric, state[:size], cost[first : first + size])
        for tile in range((steps + TILE - 1) // TILE - 1, -1, -1):
            start = tile * TILE
            length = min(TILE, steps - start)
            for offset in range(length - 1, -1, -1):
                step = start + offset
                _trace(chosen, element, step, previous, residue, state, indices, offset, size)
            for lane in range(size):
                for offset in range(length):
                    negative = r[first + lane, start + offset] < 0
                    magnitude = indices[offset, lane]
                    k[first + lane, start + offset] = -magnitude if negative else magnitude


@njit(cache=True, nogil=True)
def _branch_costs(
    scaled: np.ndarray,
    levels: np.ndarray,
    offset: int,
    weight: np.ndarray,
    union_costs: np.ndarray,
    zero_costs: np.ndarray,
    reach: np.ndarray,
    flag: np.ndarray,
    branch: np.ndarray,
    element: np.ndarray,
    step: int,
    column: np.ndarray,
    zero: np.ndarray,
) -> None:
    """Costs of the four branch classes of one step: the union level congruent to the class, or zero if
    cheaper.

    Class (residue modulo 4) 0 is Q0 with an even index, 2 Q0 odd, 1 Q1 odd, 3 Q1 even.
    """
    lanes = len(weight)
    width = np.int32(union_costs.shape[1])
    last = np.int32(width - np.int32(1))
    saturation = np.float32(SATURATION)
    flat_costs = union_costs.ravel()
    highest = np.int32(0)
    for lane in range(lanes):
        smallest = max(np.int32(1), np.int32(np.int32(scaled[offset, lane]) - np.int32(1)))
        highest = max(highest, smallest)
        element[step, lane] = smallest
    for number in range(4):
        for lane in range(lanes):
            smallest = element[step, lane]
            m = np.int32(smallest + np.int32(np.int32(np.int32(number) - smallest) & np.int32(MASK)))
            difference = scaled[offset, lane] - np.float32(m)
            distortion = difference * difference * weight[lane]
            distortion = distortion if distortion < saturation else saturation
            branch[number, lane] = np.int32(np.rint(distortion))
            column[lane] = np.int32(np.int32(np.int32(levels[offset, lane]) * width) + min(m, last))
        for lane in range(lanes):
            branch[number, lane] += flat_costs[np.uint32(column[lane])]
    if highest + 3 > last:
        for lane in range(lanes):
            for number in range(4):
                m = element[step, lane] + ((number - element[step, lane]) & MASK)
                if m > last:
                    rate = _escape_cost(m, levels[offset, lane], reach, flag)
                    branch[number, lane] += rate - union_costs[levels[offset, lane], last]
    for lane in range(lanes):
        zero[lane] = zero_costs[levels[offset, lane]]
    for lane in range(lanes):
        distortion = scaled[offset, lane] * scaled[offset, lane] * weight[lane]
        distortion = distortion if distortion < saturation else saturation
        rounded = np.int32(np.rint(distortion))
        zero0 = np.int32(rounded + np.int32(zero[lane] & np.int32(0xFFFF)))
        zero1 = np.int32(rounded + np.int32(zero[lane] >> np.int32(16)))
        take0 = np.int32(zero0 <= branch[0, lane])
        take1 = np.int32(np.int32(zero1 <= branch[3, lane]) << np.int32(1))
        branch[0, lane] = min(zero0, branch[0, lane])
        branch[3, lane] = min(zero1, branch[3, lane])
        element[step, lane] = np.int32(np.int32(element[step, lane] << np.int32(2)) | take0 | take1)


@njit(cache=True, nogil=True)
def _escape_cost(m: int, level: int, reach: np.ndarray, flag: np.ndarray) -> int:
    """Cost of union level m past the cost table: the escape's flag, and its nibbles after their number."""
    row = (m & 1) * 64 + level
    value = 2 * (((m + 1) >> 1) - reach[row] - 1)
    nibbles = 0
    while value != 0:
        nibbles += 1
        value >>= 4
    return flag[row] + BIT * (4 + 4 * nibbles)


@njit(cache=True, nogil=True)
def _select(
    branch: np.ndarray,
    metric: np.ndarray,
    updated: np.ndarray,
    previous: np.ndarray,
    residue: np.ndarray,
    chosen: np.ndarray,
    step: int,
    size: int,
) -> None:
    """Add, compare, select: each state keeps its cheaper branch, the first (lower state) on a tie."""
    for lane in range(size):
        chosen[step, lane] = 0
    for state in range(len(previous)):
        lower, upper = previous[state, 0], previous[state, 1]
        lower_class, upper_class = residue[state, 0], residue[state, 1]
        shift = np.uint32(state)
        for lane in range(size):
            first = np.int32(metric[lower, lane] + branch[lower_class, lane])
            second = np.int32(metric[upper, lane] + branch[upper_class, lane])
            chosen[step, lane] |= np.uint32(np.uint32(second < first) << shift)
            updated[state, lane] = min(first, second)


@njit(cache=True, nogil=True)
def _reduce(metric: np.ndarray, cost: np.ndarray) -> None:
    """Subtract the least path metric of each lane from its states and add it to the lane's cost."""
    for lane in range(len(cost)):
        least = metric[0, lane]
        for state in range(1, len(metric)):
            least = min(least, metric[state, lane])
        for state in range(len(metric)):
            metric[state, lane] -= least
        cost[lane] += least


@njit(cache=True, nogil=True)
def _best_final(metric: np.ndarray, state: np.ndarray, cost: np.ndarray) -> None:
    """The final state of least metric (the lower on a tie), whose metric completes the lane's cost."""
    for lane in range(len(cost)):
        best = 0
        for candidate in range(1, len(metric)):
            if metric[candidate, lane] < metric[best, lane]:
                best = candidate
        state[lane] = best
        cost[lane] += metric[best, lane]


@njit(cache=True, nogil=True)
def _trace(
    chosen: np.ndarray,
    element: np.ndarray,
    step: int,
    previous: np.ndarray,
    residue: np.ndarray,
    state: np.ndarray,
    indices: np.ndarray,
    offset: int,
    size: int,
) -> None:
    """One step back: the branch that entered each lane's state names the class, the class the index |k|."""
    for lane in range(size):
        current = state[lane]
        entered = (chosen[step, lane] >> np.uint32(current)) & 1
        number = residue[current, entered]
        smallest = element[step, lane] >> 2
        m = smallest + ((number - smallest) & MASK)
        taken = element[step, lane]
        zero = (number == 0 and taken & 1 != 0) or (number == 3 and taken & 2 != 0)
        indices[offset, lane] = 0 if zero else (m + 1) >> 1
        state[lane] = previous[current, entered]


@njit(cache=True, nogil=True)
def active_quantizers(k: np.ndarray, quantizer: np.ndarray, next_state: np.ndarray) -> np.ndarray:
    """The active quantizers, uint8, along each lane of k int16 [lanes, steps]."""
    lanes, steps = k.shape
    active = np.empty((lanes, steps), np.uint8)
    for lane in range(lanes):
        state = 0
        for step in range(steps):
            active[lane, step] = quantizer[state]
            state = next_state[state, k[lane, step] & 1]
    return active


@njit(cache=True, nogil=True)
def symbol_bits(k: np.ndarray, rows: np.ndarray, bits: np.ndarray, size: np.ndarray, offset: np.ndarray) -> np.ndarray:
    """Bits, float64, of indices k in rows, int32 [n] each; bits [rows, width-1] by symbol, escapes last."""
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


@njit(cache=True, nogil=True)
def count_magnitudes(k: np.ndarray, rows: np.ndarray, row_count: int, width: int) -> np.ndarray:
    """Counts int64 [row_count, width] of |k| by row; the last column takes every larger |k|."""
    counts = np.zeros((row_count, width), np.int64)
    for position in range(len(k)):
        magnitude = abs(np.int32(k[position]))
        column = magnitude if magnitude < width else width - 1
        counts[rows[position], column] += 1
    return counts
