"""The trellis search on CPUs: a Viterbi search compiled for each state machine, side by side over the lanes.

    r, level [lanes, steps] --tiles, transposed--> |r|/D, rates --two steps a time--> branch costs [4, lane]
                                                                 --add, compare, select--> metrics [state, lane]
    k [lanes, steps]        <--tiles, transposed-- path         <--traceback-- decisions, zeros

A block of lanes is searched at once, and the loops along its lanes become SIMD code. Of the machine's tables the
add-compare-select and the traceback are generated, as source text with every state spelled out; the rest is shared.
What a lane keeps until the traceback is one bit a state and four bits a latent: which branch entered each state, and
which of the four branch classes took zero. The candidates themselves are found again from r.

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
from lic_dist.quantization.selection import compiled, field, identity, select, steps_at_once, words
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
    decisions, zeros = decision_memory(width, steps, trellis.states)
    search = compile_search(trellis)
    tables = (quads, zero_pairs, reach, flag)
    return float_of_bits(search(*search_inputs(r, level, weight), inverse_step, *tables, decisions, zeros, k, cost))


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
def compile_search(trellis: Trellis) -> Callable[..., np.int32]:
    """Return the search of a machine, compiled at its first call and kept in numba's cache on disk."""
    states, at_once = trellis.states, steps_at_once(trellis.states)
    own = {
        **globals(),
        "STATES": states,
        "WORDS": words(states),
        "FIELD": field(states),
        "AT_ONCE": at_once,
        "ODD": int(at_once == 1),
        "select_more": select(trellis, at_once),
        "select_one": select(trellis, 1),
        "trace_more": trace(trellis, at_once),
        "trace_one": trace(trellis, 1),
    }
    search: Callable[..., np.int32] = compiled(FunctionType(_search.__code__, own), f"search_{identity(trellis)}")
    return search


STATES = WORDS = FIELD = AT_ONCE = ODD = 1  # `compile_search` puts a machine's own in the place of these
select_more: Any = None
select_one: Any = None
trace_more: Any = None
trace_one: Any = None


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
    k: NDArray[Any],
    cost: NDArray[Any],
) -> np.int32:
    lanes, steps = r.shape
    width = zeros.shape[1]
    metric = np.empty((2, STATES * BLOCK), np.int32)  # from one to the other and back by odd steps, or all in the first
    branch = np.empty(4 * max(2, AT_ONCE) * BLOCK, np.int32)
    position, index = np.zeros((BLOCK, TILE), np.float32), np.zeros((BLOCK, TILE), np.int32)
    row = np.zeros((BLOCK, TILE), np.uint16)
    scaled, none = np.zeros((PANEL, BLOCK), np.float32), np.zeros((PANEL, BLOCK), np.int32)
    low, high = np.zeros((PANEL, BLOCK), np.int32), np.zeros((PANEL, BLOCK), np.int32)
    path, by_lane = np.zeros((TILE // 4, width), np.uint32), np.empty((width, TILE), np.uint8)  # a byte a step
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
        metric[0, :BLOCK] = 0
        metric[0, BLOCK:] = UNREACHED
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
                look_up(position, index, row, panel - start, size, quads, zero_pairs, scaled, low, high, none)
                if escapes:
                    look_up_escapes(position, row, panel - start, size, quads, reach, flag, low, high)
                for step in range(panel, min(panel + PANEL, end), 2):
                    at, ahead = step - panel, step % AT_ONCE  # steps whose branch costs wait for these
                    if by_step:
                        weights[0, :] = weight[step]
                        weights[1, :] = weight[min(step + 1, steps - 1)]
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
                    if AT_ONCE > 1 and last % AT_ONCE == 0:
                        select_more(metric[0], metric[0], branch, taken[step * FIELD >> 5], taken[0])
                    elif AT_ONCE == 1 or last == steps:
                        for each in range(step - ahead, last):
                            kept = WORDS * (each * FIELD >> 5)
                            costs = branch[4 * (each - step + ahead) * BLOCK :]
                            old, fresh = metric[each & ODD], metric[(each + 1) & ODD]
                            select_one(old, fresh, costs, taken[kept], taken[kept + WORDS - 1])
            _reduce(metric[end & ODD], least, cost[first : first + size])
        _best_final(metric[steps & ODD], state, cost[first : first + size])
        for start in range((steps - 1) // TILE * TILE, -1, -TILE):
            end = min(start + TILE, steps)
            step = end
            while step > start:
                last = step - 1
                step -= 1 if step % AT_ONCE else AT_ONCE
                kept, behind = WORDS * (step * FIELD >> 5), min(last | (32 // FIELD - 1), steps - 1) - last
                decided = (taken[kept], taken[kept + WORDS - 1], FIELD * behind)
                zero = (zeros[step >> 1], zeros[last >> 1], 4 * (step & 1))
                if last > step:
                    trace_more(*decided, *zero, state[:padded], path[(step - start) >> 2, :padded])
                else:
                    trace_one(*decided, *zero, state[:padded], path[(step - start) >> 2, :padded])
            _indices(block_r, start, end, inverse_step, path, by_lane, k[first : first + size])
    return peak


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
