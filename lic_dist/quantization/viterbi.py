"""The trellis search on CPUs: a Viterbi search compiled for each state machine, side by side over the lanes.

    r, level [lanes, steps] --tiles, transposed--> |r|/D, rates --two steps a time--> branch costs [4, lane]
                                                                 --add, compare, select--> metrics [state, lane]
    k [lanes, steps]        <--tiles, transposed-- classes      <--traceback-- decisions, zeros

A block of lanes is searched at once, and the loops along its lanes become SIMD code. Of the machine's tables only
the add-compare-select is generated, as source text with every state spelled out; the rest is shared. What a lane
keeps until the traceback is one bit a state and four bits a latent: which branch entered each state, and which of
the four branch classes took zero. The candidates themselves are found again from r.

Costs are integers in 1/256 bit. Float arithmetic is float32 without fused multiply-add (numba contracts nothing), so
`reference.py` agrees bit for bit. Nothing here holds the GIL.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from types import FunctionType
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from lic_dist.quantization.candidates import (
    BLOCK,
    PANEL,
    TILE,
    branch_costs,
    candidate_level,
    look_up,
    look_up_escapes,
    smallest_level,
    tile_candidates,
)
from lic_dist.quantization.jit import float_of_bits, search_inputs
from lic_dist.quantization.selection import compiled, identity, select, words
from lic_dist.quantization.trellis import Trellis

UNREACHED = 1 << 29  # path metric of a state that no path has entered yet
_PACKED = 8  # states whose branches fit 32-bit words
_FUSED = 16  # states up to which two steps in one loop are the faster
SIMD = 16  # a block is padded to a multiple of this many lanes

_I, _U = np.int32, np.uint32  # numba widens 32-bit arithmetic: every result is narrowed again to keep the SIMD width


def search_lanes(
    r: NDArray[Any],
    level: NDArray[Any],
    weight: NDArray[Any],
    inverse_step: np.float32,
    quads: NDArray[Any],
    zero_pairs: NDArray[Any],
    reach: NDArray[Any],
    flag: NDArray[Any],
    trellis: Trellis,
    k: NDArray[Any],
    cost: NDArray[Any],
) -> float:
    """Search every lane; fill k int16 [lanes, steps] and cost int64 [lanes] (1/256 bit).

    r float32 [lanes, steps]; level uint8 or uint16 [lanes, steps]; weight float32 [lanes] or [1, steps]; quads int64
    [levels, width]: at the smallest candidate m0 the rates of the four candidates by branch class, 16 bits each;
    zero_pairs int32 [levels]: the rate of zero in Q0 and, 16 bits higher, in Q1; reach, flag int32 [2 levels], of each
    row: the largest |k| not escaped, the cost of the escape's flag. Returns the largest |r|/D; where it is not finite,
    or too large for int16 indices, k and cost are meaningless.
    """
    lanes, steps = r.shape
    width = block_width(lanes)
    decisions, zeros = decision_memory(width, steps, trellis.states)
    search = compile_search(trellis)
    tables = (quads, zero_pairs, reach, flag, _branches(trellis))
    return float_of_bits(search(*search_inputs(r, level, weight), inverse_step, *tables, decisions, zeros, k, cost))


def block_width(lanes: int) -> int:
    """Return how many lanes are searched side by side: even shares of at most BLOCK, a multiple of the SIMD width."""
    blocks = max(1, -(-lanes // BLOCK))
    return max(1, -(-lanes // (blocks * SIMD))) * SIMD


def decision_memory(width: int, steps: int, states: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return the memory that the traceback reads, two steps a row: decisions, a bit a state, and zeros, a nibble a
    step.
    """
    pairs = (steps + 1) // 2
    dtype = np.uint8 if states <= 8 else np.uint16 if states <= 16 else np.uint32
    rows = pairs if states <= 4 else 2 * pairs * words(states)  # two steps of up to four states share a byte
    return np.empty((rows, width), dtype), np.empty((pairs, width), np.uint8)


@lru_cache(maxsize=64)
def compile_search(trellis: Trellis) -> Callable[..., np.int32]:
    """Return the search of a machine, compiled at its first call and kept in numba's cache on disk."""
    two, one = select(trellis, 2), select(trellis, 1)
    trace = _trace_packed if trellis.states <= _PACKED else _trace
    own = {
        **globals(),
        "STATES": trellis.states,
        "WORDS": words(trellis.states),
        "select_two": two,
        "select_one": one,
        "trace": trace,
    }
    search: Callable[..., np.int32] = compiled(FunctionType(_search.__code__, own), f"search_{identity(trellis)}")
    return search


@lru_cache(maxsize=64)
def _branches(trellis: Trellis) -> NDArray[Any]:
    """Return the branches that enter each state, in the form that the traceback reads.

    Int32 [2 states]: at 2 s + bit the previous state << 2 | class. For up to eight states uint32 [4]: the previous
    states by the first and the second branch, then the classes, four bits for each s.
    """
    table = np.array([state << 2 | number for pair in trellis.entering_branches() for state, number in pair], np.int32)
    if trellis.states <= _PACKED:
        fields = (table[0::2] >> 2, table[1::2] >> 2, table[0::2] & 3, table[1::2] & 3)
        table = np.array([sum(int(one) << 4 * s for s, one in enumerate(field)) for field in fields], np.uint32)
    table.setflags(write=False)
    return table


STATES = WORDS = 0  # `compile_search` puts a machine's own in the place of these five
select_two: Any = None
select_one: Any = None
trace: Any = None


def _search(
    r: NDArray[Any],
    level: NDArray[Any],
    wide_level: NDArray[Any],
    weight: NDArray[Any],
    by_step: bool,
    inverse_step: np.float32,
    quads: NDArray[Any],
    zero_pairs: NDArray[Any],
    reach: NDArray[Any],
    flag: NDArray[Any],
    branches: NDArray[Any],
    decisions: NDArray[Any],
    zeros: NDArray[Any],
    k: NDArray[Any],
    cost: NDArray[Any],
) -> np.int32:
    lanes, steps = r.shape
    width = zeros.shape[1]
    metric = np.empty(WORDS * STATES * BLOCK, np.int32)  # of two words, a step's new metrics lie behind the old
    branch = np.empty(8 * BLOCK, np.int32)
    position, index = np.zeros((BLOCK, TILE), np.float32), np.zeros((BLOCK, TILE), np.int32)
    row = np.zeros((BLOCK, TILE), np.uint16)
    scaled, zero = np.zeros((PANEL, BLOCK), np.float32), np.zeros((PANEL, BLOCK), np.int32)
    low, high = np.zeros((PANEL, BLOCK), np.int32), np.zeros((PANEL, BLOCK), np.int32)
    class_by_step, class_by_lane = np.empty((TILE, width), np.uint8), np.empty((width, TILE), np.uint8)
    state, least = np.zeros(width, np.uint32), np.zeros(BLOCK, np.int32)
    block_weight = np.zeros(2 * width, np.float32)  # of two steps
    peak, tile_peak = _I(0), np.zeros(1, np.int32)
    for first in range(0, lanes, width):
        size = min(width, lanes - first)
        padded = (size + SIMD - 1) // SIMD * SIMD
        taken = decisions.ravel()[: len(decisions) * padded].reshape(len(decisions), padded)
        weights = block_weight[: 2 * padded].reshape(2, padded)
        block_r, block_level = r[first : first + size], level[first : first + size]
        block_wide = wide_level[first : first + size]
        if not by_step:
            for lane in range(size):  # numba takes seconds to compile an assignment of slices
                weights[0, lane] = weights[1, lane] = weight[first + lane]
        metric[:BLOCK] = 0
        metric[BLOCK:] = UNREACHED
        cost[first : first + size] = 0
        for start in range(0, steps, TILE):
            end = min(start + TILE, steps)
            tile = (start, end, inverse_step, quads, position, index, row)
            if len(block_wide):
                tile_peak[0] = tile_candidates(block_r, block_wide, *tile)
            else:
                tile_peak[0] = tile_candidates(block_r, block_level, *tile)
            peak = max(peak, tile_peak[0])
            escapes = smallest_level(tile_peak.view(np.float32)[0]) >= quads.shape[1]
            for panel in range(start, end, PANEL):
                look_up(position, index, row, panel - start, size, quads, zero_pairs, scaled, low, high, zero)
                if escapes:
                    look_up_escapes(position, row, panel - start, size, quads, reach, flag, low, high)
                for step in range(panel, min(panel + PANEL, end), 2):
                    at, half = step - panel, step >> 1
                    if by_step:
                        weights[0, :] = weight[step]
                        weights[1, :] = weight[min(step + 1, steps - 1)]
                    branch_costs(
                        scaled[at : at + 2],
                        low[at : at + 2],
                        high[at : at + 2],
                        zero[at : at + 2],
                        weights,
                        branch,
                        zeros[half],
                    )
                    kept = half if STATES <= 4 else WORDS * step
                    if step + 1 == steps:
                        select_one(metric, branch, taken[kept], taken[kept + WORDS - 1])
                    elif STATES <= _FUSED:
                        select_two(metric, branch, taken[kept], taken[kept + (STATES > 4)])
                    else:
                        select_one(metric, branch, taken[kept], taken[kept + WORDS - 1])
                        select_one(metric, branch[4 * BLOCK :], taken[kept + WORDS], taken[kept + 2 * WORDS - 1])
            _reduce(metric[: STATES * BLOCK], least, cost[first : first + size])
        _best_final(metric[: STATES * BLOCK], state, cost[first : first + size])
        for start in range((steps - 1) // TILE * TILE, -1, -TILE):
            end = min(start + TILE, steps)
            for step in range(end - 1, start - 1, -1):
                nibble = 4 * (step & 1)
                kept, shift = (step >> 1, nibble) if STATES <= 4 else (WORDS * step, 0)
                trace(
                    taken[kept : kept + WORDS].ravel(),
                    shift,
                    zeros[step >> 1],
                    nibble,
                    branches,
                    state[:padded],
                    class_by_step[step - start],
                )
            _indices(block_r, start, end, inverse_step, class_by_step, class_by_lane, k[first : first + size])
    return peak


@njit(nogil=True)
def _reduce(metric: NDArray[Any], least: NDArray[Any], cost: NDArray[Any]) -> None:
    """Subtract the least path metric of each lane from its states and add it to the lane's cost."""
    least[:] = metric[:BLOCK]
    for state in range(BLOCK, len(metric), BLOCK):
        row = metric[state : state + BLOCK]
        for lane in range(BLOCK):
            least[lane] = min(least[lane], row[lane])
    for state in range(0, len(metric), BLOCK):
        row = metric[state : state + BLOCK]
        for lane in range(BLOCK):
            row[lane] = _I(row[lane] - least[lane])
    for lane in range(len(cost)):
        cost[lane] += least[lane]


@njit(nogil=True)
def _best_final(metric: NDArray[Any], state: NDArray[Any], cost: NDArray[Any]) -> None:
    """Find the final state of least metric (the lower on a tie), and add its metric to the lane's cost."""
    for lane in range(len(cost)):
        best = 0
        for other in range(1, len(metric) // BLOCK):
            if metric[lane + other * BLOCK] < metric[lane + best * BLOCK]:
                best = other
        state[lane] = best
        cost[lane] += metric[lane + best * BLOCK]


@njit(nogil=True)
def _trace(
    taken: NDArray[Any],
    shift: int,
    zeros: NDArray[Any],
    zero_shift: int,
    branches: NDArray[Any],
    state: NDArray[Any],
    classes: NDArray[Any],
) -> None:
    """Step back in each lane along the branch that entered its state; `classes` gets its class, plus 4 where it
    takes zero.
    """
    for lane in range(len(state)):
        current = np.uint64(state[lane])
        word = np.uint64(taken[lane + np.int64(current >> np.uint64(5)) * len(state)])
        bit = (word >> ((current & np.uint64(31)) + np.uint64(shift))) & np.uint64(1)
        entered = branches[current + current + bit]
        state[lane] = entered >> 2
        number = entered & 3
        classes[lane] = np.uint8(number | (((np.int64(zeros[lane]) >> (zero_shift + number)) & 1) << 2))


@njit(nogil=True)
def _trace_packed(
    taken: NDArray[Any],
    shift: int,
    zeros: NDArray[Any],
    zero_shift: int,
    packed: NDArray[Any],
    state: NDArray[Any],
    classes: NDArray[Any],
) -> None:
    """Step back as `_trace` does, for up to eight states, whose branches fit four words: a shift instead of a
    look-up, SIMD.
    """
    lower, upper, lower_class, upper_class = packed[0], packed[1], packed[2], packed[3]
    state_shift, nibble_shift = _U(shift), _U(zero_shift)
    for lane in range(len(state)):
        bit = _U(_U(_U(taken[lane]) >> _U(state[lane] + state_shift)) & _U(1))
        at = _U(state[lane] << _U(2))
        before = _U(_U(upper if bit else lower) >> at)
        number = _U(_U(_U(upper_class if bit else lower_class) >> at) & _U(3))
        zero = _U(_U(_U(zeros[lane]) >> _U(number + nibble_shift)) & _U(1))
        state[lane] = _U(before & _U(7))
        classes[lane] = np.uint8(_U(number | _U(zero << _U(2))))


@njit(nogil=True)
def _indices(
    r: NDArray[Any],
    start: int,
    end: int,
    inverse_step: np.float32,
    by_step: NDArray[Any],
    by_lane: NDArray[Any],
    k: NDArray[Any],
) -> None:
    """Fill in the indices of a tile from r and the class of each lane's path, to which 4 is added where it takes zero.

    The classes come as bytes [step, lane], eight to a word, and are transposed first.
    """
    _transpose(by_step.view(np.uint64), by_lane.view(np.uint64))
    for lane in range(len(r)):
        row_r, row_k, classes = r[lane, start:end], k[lane, start:end], by_lane[lane]
        for offset in range(end - start):
            number = _I(_I(classes[offset]) & _I(3))
            m = candidate_level(smallest_level(abs(row_r[offset]) * inverse_step), number)
            magnitude = _I(0) if classes[offset] > number else _I(_I(m + _I(1)) >> _I(1))
            row_k[offset] = -magnitude if row_r[offset] < 0 else magnitude


@njit(nogil=True)
def _transpose(by_step: NDArray[Any], by_lane: NDArray[Any]) -> None:
    """Transpose bytes [step, lane] to [lane, step], eight by eight as words: exchange halves, quarters, eighths."""
    bytes_, pairs, halves = np.uint64(0x00FF00FF00FF00FF), np.uint64(0x0000FFFF0000FFFF), np.uint64(0x00000000FFFFFFFF)
    for step in range(by_lane.shape[1]):
        rows = by_step[8 * step : 8 * step + 8]
        for lane in range(by_step.shape[1]):
            a, b = _exchange(rows[0, lane], rows[1, lane], np.uint64(8), bytes_)
            c, d = _exchange(rows[2, lane], rows[3, lane], np.uint64(8), bytes_)
            e, f = _exchange(rows[4, lane], rows[5, lane], np.uint64(8), bytes_)
            g, h = _exchange(rows[6, lane], rows[7, lane], np.uint64(8), bytes_)
            a, c = _exchange(a, c, np.uint64(16), pairs)
            b, d = _exchange(b, d, np.uint64(16), pairs)
            e, g = _exchange(e, g, np.uint64(16), pairs)
            f, h = _exchange(f, h, np.uint64(16), pairs)
            first = 8 * lane
            by_lane[first, step], by_lane[first + 4, step] = _exchange(a, e, np.uint64(32), halves)
            by_lane[first + 1, step], by_lane[first + 5, step] = _exchange(b, f, np.uint64(32), halves)
            by_lane[first + 2, step], by_lane[first + 6, step] = _exchange(c, g, np.uint64(32), halves)
            by_lane[first + 3, step], by_lane[first + 7, step] = _exchange(d, h, np.uint64(32), halves)


@njit(nogil=True)
def _exchange(a: np.uint64, b: np.uint64, shift: np.uint64, mask: np.uint64) -> tuple[np.uint64, np.uint64]:
    """Exchange the upper parts of a with the lower parts of b, which transposes 2x2 blocks."""
    changed = ((a >> shift) ^ b) & mask
    return a ^ (changed << shift), b ^ changed
