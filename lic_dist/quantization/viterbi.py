"""The trellis search on CPUs: a Viterbi search with loops compiled for each state machine, side by side over the lanes.

    r, level [lanes, steps] --tiles, transposed--> |r|/D, rates --two steps a time--> branch costs [4, lane]
                                                                 --add, compare, select--> metrics [state, lane]
    k [lanes, steps]        <--tiles, transposed-- path         <--traceback-- decisions, zeros

A block of lanes is searched at once, and the loops along its lanes become SIMD code. Of the machine's tables the
add-compare-select and the traceback are generated, as source text with every state spelled out, and called by their
addresses; the rest is compiled once for all machines.
What a lane keeps until the traceback is one bit a state and four bits a latent: which branch entered each state, and
which of the four branch classes took zero. The candidates themselves are found again from r.

Costs are integers in 1/256 bit. Float arithmetic is float32 without fused multiply-add (numba contracts nothing), so
`reference.py` agrees bit for bit. Nothing here holds the GIL.
"""

from __future__ import annotations

from functools import lru_cache
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
from lic_dist.quantization.jit import call_pointer, float_of_bits, kernel, search_inputs
from lic_dist.quantization.selection import digest, field, named, select, steps_at_once, words
from lic_dist.quantization.traceback import trace
from lic_dist.quantization.trellis import Trellis

UNREACHED = 1 << 29  # path metric of a state that no path has entered yet
SIMD = 16  # a block is padded to a multiple of this many lanes

_I = np.int32  # numba widens 32-bit arithmetic: every result is narrowed again to keep the SIMD width


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
    states = trellis.states
    memory = decision_memory(width, steps, states)
    machine = states, (words(states), field(states), steps_at_once(states)), machine_loops(trellis)[1]
    tables = (quads, zero_pairs, reach, flag)
    return float_of_bits(search(*search_inputs(r, level, weight), inverse_step, *tables, *memory, *machine, k, cost))


def block_width(lanes: int) -> int:
    """Return how many lanes are searched side by side: even shares of at most BLOCK, a multiple of the SIMD width."""
    blocks = max(1, -(-lanes // BLOCK))
    return max(1, -(-lanes // (blocks * SIMD))) * SIMD


def decision_memory(width: int, steps: int, states: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return the memory that the traceback reads: decisions, a bit a state, as many steps a row as a word of 32 bits
    holds; and zeros, a nibble a step, two steps a row.
    """
    rows = words(states) * -(-steps * field(states) // 32)
    return np.empty((rows, width), np.uint32), np.empty(((steps + 1) // 2, width), np.uint8)


@lru_cache(maxsize=64)
def machine_loops(trellis: Trellis) -> tuple[tuple[Any, Any, Any, Any], tuple[int, int, int, int]]:
    """Return the loops of a machine, compiled or loaded from disk, and their addresses: add-compare-select of
    `steps_at_once` and of one step, then the traceback of so many.
    """
    more = steps_at_once(trellis.states)
    loops = select(trellis, more), select(trellis, 1), trace(trellis, more), trace(trellis, 1)
    return loops, (loops[0].address, loops[1].address, loops[2].address, loops[3].address)


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
    decisions: NDArray[Any],
    zeros: NDArray[Any],
    states: int,
    fields: tuple[int, int, int],
    loops: tuple[int, int, int, int],
    k: NDArray[Any],
    cost: NDArray[Any],
) -> np.int32:
    """Search as `search_lanes` does; `fields` are `words`, `field` and `steps_at_once` of so many states, `loops` the
    addresses of `machine_loops`. Arrays that are handed on by address are named once more behind the call.
    """
    in_word, field_bits, at_once = fields
    select_more, select_one, trace_more, trace_one = loops
    odd = 1 if at_once == 1 else 0
    lanes, steps = r.shape
    width = zeros.shape[1]
    metric = np.empty((2, states * BLOCK), np.int32)  # from one to the other and back by odd steps, or all in the first
    branch = np.empty(4 * max(2, at_once) * BLOCK, np.int32)
    position, index = np.zeros((BLOCK, TILE), np.float32), np.zeros((BLOCK, TILE), np.int32)
    row = np.zeros((BLOCK, TILE), np.uint16)
    scaled, none = np.zeros((PANEL, BLOCK), np.float32), np.zeros((PANEL, BLOCK), np.int32)
    low, high = np.zeros((PANEL, BLOCK), np.int32), np.zeros((PANEL, BLOCK), np.int32)
    path, by_lane = np.zeros((TILE // 4, width), np.uint32), np.empty((width, TILE), np.uint8)  # a byte a step
    state, least = np.zeros(width, np.uint32), np.zeros(BLOCK, np.int32)
    block_weight = np.zeros(2 * width, np.float32)  # of two steps
    peak, tile_peak = _I(0), np.zeros(1, np.int32)
    metric_at, branch_at, decisions_at = metric.ctypes.data, branch.ctypes.data, decisions.ctypes.data
    zeros_at, state_at, path_at = zeros.ctypes.data, state.ctypes.data, path.ctypes.data
    for first in range(0, lanes, width):
        size = min(width, lanes - first)
        padded = (size + SIMD - 1) // SIMD * SIMD
        weights = block_weight[: 2 * padded].reshape(2, padded)
        block_r, block_level = r[first : first + size], level[first : first + size]
        block_wide = wide_level[first : first + size]
        for lane in range(size):  # numba takes seconds to compile an assignment of slices
            cost[first + lane] = 0
            if not by_step:
                weights[0, lane] = weights[1, lane] = weight[first + lane]
        for one in range(states * BLOCK):
            metric[0, one] = 0 if one < BLOCK else UNREACHED
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
                look_up(position, index, row, panel - start, size, quads, zero_pairs, scaled, low, high, none)
                if escapes:
                    look_up_escapes(position, row, panel - start, size, quads, reach, flag, low, high)
                for step in range(panel, min(panel + PANEL, end), 2):
                    at, ahead = step - panel, step % at_once  # steps whose branch costs wait for these
                    if by_step:
                        for lane in range(padded):
                            weights[0, lane] = weight[step]
                            weights[1, lane] = weight[min(step + 1, steps - 1)]
                    branch_costs(
                        scaled[at : at + 2],
                        low[at : at + 2],
                        high[at : at + 2],
                        none[at : at + 2],
                        weights,
                        branch[4 * ahead * BLOCK :],
                        zeros[step >> 1],
                    )
                    last = min(step + 2, end)
                    if at_once > 1 and last % at_once == 0:
                        kept = decisions_at + 4 * padded * (step * field_bits >> 5)
                        call_pointer(select_more, (metric_at, metric_at, branch_at, kept, kept, padded))
                    elif at_once == 1 or last == steps:
                        for each in range(step - ahead, last):
                            kept = decisions_at + 4 * padded * in_word * (each * field_bits >> 5)
                            costs = branch_at + 16 * (each - step + ahead) * BLOCK
                            old = metric_at + 4 * states * BLOCK * (each & odd)
                            fresh = metric_at + 4 * states * BLOCK * ((each + 1) & odd)
                            upper = kept + 4 * padded * (in_word - 1)
                            call_pointer(select_one, (old, fresh, costs, kept, upper, padded))
            _reduce(metric[end & odd], least, cost[first : first + size])
        _best_final(metric[steps & odd], state, cost[first : first + size])
        for start in range((steps - 1) // TILE * TILE, -1, -TILE):
            end = min(start + TILE, steps)
            step = end
            while step > start:
                last = step - 1
                step -= 1 if step % at_once else at_once
                kept = decisions_at + 4 * padded * in_word * (step * field_bits >> 5)
                behind = min(last | (32 // field_bits - 1), steps - 1) - last
                decided = (kept, kept + 4 * padded * (in_word - 1), field_bits * behind)
                zero = (zeros_at + width * (step >> 1), zeros_at + width * (last >> 1), 4 * (step & 1))
                back = trace_more if last > step else trace_one
                call_pointer(back, (*decided, *zero, state_at, path_at + 4 * width * (step - start >> 2), padded))
            _indices(block_r, start, end, inverse_step, path, by_lane, k[first : first + size])
    return peak


search: Any = kernel(named(_search, f"search_{digest('candidates.py', 'jit.py')}"))


@njit(nogil=True)
def _reduce(metric: NDArray[Any], least: NDArray[Any], cost: NDArray[Any]) -> None:
    """Subtract the least path metric of each lane from its states and add it to the lane's cost."""
    least[:] = np.iinfo(np.int32).max
    for state in range(0, len(metric), BLOCK):
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
def _indices(
    r: NDArray[Any],
    start: int,
    end: int,
    inverse_step: np.float32,
    path: NDArray[Any],
    by_lane: NDArray[Any],
    k: NDArray[Any],
) -> None:
    """Fill in the indices of a tile from r and each lane's path, four steps a word: the class, plus 4 for zero."""
    words_by_lane = by_lane.view(np.uint32)
    for lane in range(len(r)):
        for four in range(len(path)):
            words_by_lane[lane, four] = path[four, lane]
    for lane in range(len(r)):
        row_r, row_k, classes = r[lane, start:end], k[lane, start:end], by_lane[lane]
        for offset in range(end - start):
            number = _I(_I(classes[offset]) & _I(3))
            m = candidate_level(smallest_level(abs(row_r[offset]) * inverse_step), number)
            magnitude = _I(0) if classes[offset] > number else _I(_I(m + _I(1)) >> _I(1))
            row_k[offset] = -magnitude if row_r[offset] < 0 else magnitude
