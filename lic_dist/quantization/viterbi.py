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

import hashlib
from collections.abc import Callable
from functools import lru_cache
from types import FunctionType
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from lic_dist.quantization.trellis import Trellis

BLOCK = 128  # lanes searched side by side at most
TILE = 16  # steps of one transposition
INTERVAL = 64  # steps between two reductions of the path metrics
SATURATION = np.float32(1 << 20)  # a distortion in 1/256 bit never counts for more
UNREACHED = 1 << 29  # path metric of a state that no path has entered yet
BIT = 256  # cost units in a bit
MOST_STATES = 32
_PACKED = 8  # states whose branches fit 32-bit words
_FUSED = 16  # states up to which two steps in one loop are the faster
_SIMD = 16  # a block is padded to a multiple of this many lanes

_I = np.int32  # numba widens int32 arithmetic to int64, which halves the SIMD width: every result is narrowed again
_U = np.uint32


def search_lanes(
    r: np.ndarray,
    level: np.ndarray,
    weight: np.ndarray,
    inverse_step: np.float32,
    quads: np.ndarray,
    zero_pairs: np.ndarray,
    reach: np.ndarray,
    flag: np.ndarray,
    trellis: Trellis,
    k: np.ndarray,
    cost: np.ndarray,
) -> None:
    """Search every lane; fills k int16 [lanes, steps] and cost int64 [lanes] (1/256 bit).

    r float32 [lanes, steps]; level, unsigned, [lanes, steps]; weight float32 [lanes]; quads int64 [levels, width]:
    at the smallest candidate m0 the rates of the four candidates by branch class, 16 bits each; zero_pairs int32
    [levels]: the rate of zero in Q0 and, 16 bits higher, in Q1; reach, flag int32 [2 levels], of each row: the largest
    |k| not escaped, the cost of the escape's flag.
    """
    lanes, steps = r.shape
    width = block_width(lanes)
    decisions, zeros = decision_memory(width, steps, trellis.states)
    compiled(trellis)(
        r, level, weight, inverse_step, quads, zero_pairs, reach, flag, _branches(trellis), decisions, zeros, k, cost
    )


def block_width(lanes: int) -> int:
    """How many lanes are searched side by side: even shares of at most BLOCK, a multiple of the SIMD width."""
    blocks = max(1, -(-lanes // BLOCK))
    return max(1, -(-lanes // (blocks * _SIMD))) * _SIMD


def decision_memory(width: int, steps: int, states: int) -> tuple[np.ndarray, np.ndarray]:
    """What the traceback reads, two steps a row: decisions, a bit a state, and zeros, a nibble a step."""
    pairs = (steps + 1) // 2
    dtype = np.uint8 if states <= 8 else np.uint16 if states <= 16 else np.uint32
    rows = pairs if states <= 4 else 2 * pairs  # the bits of two steps of up to four states share a byte
    return np.empty((rows, width), dtype), np.empty((pairs, width), np.uint8)


@lru_cache(maxsize=64)
def compiled(trellis: Trellis) -> Callable[..., None]:
    """The search of a machine, compiled at its first call and kept in numba's cache on disk."""
    if trellis.quantizers != 2 or trellis.states > MOST_STATES:
        raise ValueError(f"{trellis.name} has no trellis to search: two quantizers, 2 to {MOST_STATES} states")
    two, one = _select(trellis, 2), _select(trellis, 1)
    trace = _trace_packed if trellis.states <= _PACKED else _trace
    own = {**globals(), "STATES": trellis.states, "select_two": two, "select_one": one, "trace": trace}
    return _njit(FunctionType(_search.__code__, own), f"search_{_identity(trellis)}")


def _njit(function: Any, name: str) -> Any:
    """Compile with a cache on disk: numba tells functions apart by their qualified name, which holds the tables."""
    function.__name__ = function.__qualname__ = name
    return njit(cache=True, nogil=True)(function)


def _identity(trellis: Trellis) -> str:
    tables = repr((trellis.quantizer, trellis.next_state))
    return f"{trellis.states}_{hashlib.sha256(tables.encode()).hexdigest()[:16]}"


@lru_cache(maxsize=64)
def _branches(trellis: Trellis) -> np.ndarray:
    """The branches that enter a state, as the traceback reads them.

    Int32 [2 states]: at 2 s + bit the previous state << 2 | class. Of up to eight states uint32 [4]: the previous
    states by the first and the second branch, then the classes, four bits for each s.
    """
    entering = [branch for pair in trellis.predecessors() for branch in pair]
    table = np.array([state << 2 | trellis.branch_class(state, parity) for state, parity in entering], np.int32)
    if trellis.states <= _PACKED:
        fields = (table[0::2] >> 2, table[1::2] >> 2, table[0::2] & 3, table[1::2] & 3)
        table = np.array([sum(int(one) << 4 * s for s, one in enumerate(field)) for field in fields], np.uint32)
    table.setflags(write=False)
    return table


def _select(trellis: Trellis, steps: int) -> Any:
    """Add, compare, select for one or two steps of a block: generated, every state a variable of its own.

    Each state keeps its cheaper branch, the first (from the lower state) on a tie; a bit says that it was the second.
    """
    states = trellis.states
    lines = ["def select(metric, branch, first, second):", "    for lane in range(len(first)):"]
    lines += [f"        m{state} = metric[lane + {state * BLOCK}]" for state in range(states)]
    for step in range(steps):
        lines += [f"        b{number} = branch[lane + {(4 * step + number) * BLOCK}]" for number in range(4)]
        for state, ((lower, even), (upper, odd)) in enumerate(trellis.predecessors()):
            lines += [
                f"        x = _I(m{lower} + b{trellis.branch_class(lower, even)})",
                f"        y = _I(m{upper} + b{trellis.branch_class(upper, odd)})",
                f"        n{state} = min(x, y)",
                f"        d{state} = np.uint32({1 << state}) if y < x else np.uint32(0)",
            ]
        lines += [f"        m{state} = n{state}" for state in range(states)]
        lines += [f"        taken{step} = " + " | ".join(f"d{state}" for state in range(states))]
    lines += [f"        metric[lane + {state * BLOCK}] = m{state}" for state in range(states)]
    if states <= 4:
        both = "taken0 | taken1 << np.uint32(4)" if steps == 2 else "taken0"
        lines += [f"        first[lane] = {both}"]
    else:
        lines += ["        first[lane] = taken0"]
        lines += ["        second[lane] = taken1"] if steps == 2 else []
    namespace: dict[str, Any] = {"np": np, "_I": _I, "__name__": __name__}
    exec(compile("\n".join(lines), __file__, "exec"), namespace)  # this file's name: where numba puts its cache
    return _njit(namespace["select"], f"select{steps}_{_identity(trellis)}")


STATES = 0  # `compiled` puts a machine's own in the place of these four
select_two: Any = None
select_one: Any = None
trace: Any = None


def _search(
    r: np.ndarray,
    level: np.ndarray,
    weight: np.ndarray,
    inverse_step: np.float32,
    quads: np.ndarray,
    zero_pairs: np.ndarray,
    reach: np.ndarray,
    flag: np.ndarray,
    branches: np.ndarray,
    decisions: np.ndarray,
    zeros: np.ndarray,
    k: np.ndarray,
    cost: np.ndarray,
) -> None:
    lanes, steps = r.shape
    width = zeros.shape[1]
    metric = np.empty(STATES * BLOCK, np.int32)
    branch = np.empty(8 * BLOCK, np.int32)
    scaled = np.zeros((TILE, width), np.float32)
    low, high = np.zeros((TILE, width), np.int32), np.zeros((TILE, width), np.int32)
    zero = np.zeros((TILE, width), np.int32)
    classes = np.empty((TILE, width), np.uint8)
    state = np.zeros(width, np.uint32)
    block_weight = np.zeros(width, np.float32)
    position, index = np.zeros(TILE, np.float32), np.zeros(TILE, np.int32)
    level_row = np.zeros(TILE, level.dtype)
    for first in range(0, lanes, width):
        size = min(width, lanes - first)
        block_r, block_level = r[first : first + size], level[first : first + size]
        block_weight[:size] = weight[first : first + size]
        metric[:BLOCK] = 0
        metric[BLOCK:] = UNREACHED
        cost[first : first + size] = 0
        for start in range(0, steps, TILE):
            length = min(TILE, steps - start)
            _look_up(
                block_r, block_level, start, length, inverse_step, quads, zero_pairs, reach, flag,
                position, index, level_row, scaled, low, high, zero,
            )  # fmt: skip
            for step in range(start, start + length, 2):
                at, half = step - start, step >> 1
                _branch_costs(
                    scaled[at : at + 2],
                    low[at : at + 2],
                    high[at : at + 2],
                    zero[at : at + 2],
                    block_weight,
                    branch,
                    zeros[half],
                )
                row = half if STATES <= 4 else step
                if step + 1 == steps:
                    select_one(metric, branch, decisions[row], decisions[row])
                elif STATES <= _FUSED:
                    select_two(metric, branch, decisions[row], decisions[row + (STATES > 4)])
                else:
                    select_one(metric, branch, decisions[step], decisions[step])
                    select_one(metric, branch[4 * BLOCK :], decisions[step + 1], decisions[step + 1])
            if (start + length) % INTERVAL == 0:
                _reduce(metric, cost[first : first + size])
        _best_final(metric, state, cost[first : first + size])
        for start in range((steps - 1) // TILE * TILE, -1, -TILE):
            length = min(TILE, steps - start)
            for step in range(start + length - 1, start - 1, -1):
                nibble = 4 * (step & 1)
                row, shift = (step >> 1, nibble) if STATES <= 4 else (step, 0)
                trace(decisions[row], shift, zeros[step >> 1], nibble, branches, state, classes[step - start])
            _indices(block_r, start, length, inverse_step, classes, k[first : first + size])


@njit(nogil=True)
def _look_up(
    r: np.ndarray,
    level: np.ndarray,
    start: int,
    length: int,
    inverse_step: np.float32,
    quads: np.ndarray,
    zero_pairs: np.ndarray,
    reach: np.ndarray,
    flag: np.ndarray,
    position: np.ndarray,
    index: np.ndarray,
    row: np.ndarray,
    scaled: np.ndarray,
    low: np.ndarray,
    high: np.ndarray,
    zero: np.ndarray,
) -> None:
    """Transpose a tile into [step, lane]: |r|/D, and the rates of its candidates and of zero."""
    columns = _I(quads.shape[1])
    last = _I(columns - 1)
    flat_quads, flat_r, flat_level = quads.ravel(), r.ravel(), level.ravel()
    width = scaled.shape[1]
    flat_scaled, flat_zero, flat_low, flat_high = scaled.ravel(), zero.ravel(), low.ravel(), high.ravel()
    for lane in range(len(r)):
        base = lane * r.shape[1] + start
        highest = _I(0)
        for offset in range(length):
            at = np.uint64(base + offset)
            position[offset] = abs(flat_r[at]) * inverse_step
            smallest = _smallest(position[offset])
            highest = max(highest, smallest)
            index[offset] = _I(_I(flat_level[at]) * columns) + min(smallest, last)
            row[offset] = flat_level[at]
        for offset in range(TILE):
            at = np.uint64(offset * width + lane)
            flat_scaled[at] = position[offset]
            quad = flat_quads[np.uint32(index[offset])]
            flat_low[at], flat_high[at] = quad, quad >> 32
            flat_zero[at] = zero_pairs[np.uint32(row[offset])]
        if highest > last:  # far beyond every table: each candidate is an escape
            for offset in range(length):
                smallest = _smallest(position[offset])
                if smallest > last:
                    quad = _escaped(smallest, level[lane, start + offset], len(quads), reach, flag)
                    low[offset, lane], high[offset, lane] = quad, quad >> 32


@njit(nogil=True)
def _smallest(position: np.float32) -> np.int32:
    """The smallest union level of the candidates, m0."""
    return max(_I(_I(position) - _I(1)), _I(1))


@njit(nogil=True)
def _member(smallest: np.int32, number: np.int32) -> np.int32:
    """The union level of a branch class among m0..m0+3."""
    return _I(_I(_I(smallest + _I(3) - number) & _I(-4)) + number)


@njit(nogil=True)
def _escaped(smallest: np.int32, level: int, levels: int, reach: np.ndarray, flag: np.ndarray) -> np.int64:
    """Rates of four escapes, packed by class: the flag's cost, and the nibbles after their number."""
    packed = np.int64(0)
    for number in range(4):
        m = _member(_I(smallest), _I(number))
        row = (m & 1) * levels + level
        value = 2 * (((m + 1) >> 1) - reach[row] - 1)
        nibbles = 0
        while value != 0:
            nibbles += 1
            value >>= 4
        packed |= np.int64(flag[row] + BIT * (4 + 4 * nibbles)) << (16 * number)
    return packed


def _rint(typing: Any, value: Any) -> Any:
    """Round half to even, as one instruction: numba's own `np.rint` is a call, which keeps loops from being SIMD."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        function = builder.module.declare_intrinsic("llvm.rint", [ir.FloatType()])
        return builder.call(function, arguments)

    return types.float32(types.float32), generate


rint: Any = intrinsic(_rint)


@njit(nogil=True)
def _distortion(difference: np.float32, weight: np.float32) -> np.int32:
    """Rounded distortion in 1/256 bit of a difference in steps D."""
    distortion = difference * difference * weight
    return _I(rint(distortion if distortion < SATURATION else SATURATION))


@njit(nogil=True)
def _step_costs(
    position: np.float32, weight: np.float32, low: np.int32, high: np.int32, zero: np.int32
) -> tuple[np.int32, np.int32, np.int32, np.int32, np.uint8]:
    """Costs of the four branch classes of one latent, and a nibble: which of them take zero (0 and 3 can)."""
    smallest = _smallest(position)
    cost0 = _I(_distortion(position - np.float32(_member(smallest, _I(0))), weight) + _I(low & _I(0xFFFF)))
    cost1 = _I(_distortion(position - np.float32(_member(smallest, _I(1))), weight) + _I(low >> _I(16)))
    cost2 = _I(_distortion(position - np.float32(_member(smallest, _I(2))), weight) + _I(high & _I(0xFFFF)))
    cost3 = _I(_distortion(position - np.float32(_member(smallest, _I(3))), weight) + _I(high >> _I(16)))
    none = _distortion(position, weight)
    zero0, zero1 = _I(none + _I(zero & _I(0xFFFF))), _I(none + _I(zero >> _I(16)))
    taken = np.uint8(np.uint8(zero0 <= cost0) | np.uint8(np.uint8(zero1 <= cost3) * np.uint8(8)))
    return min(zero0, cost0), cost1, cost2, min(zero1, cost3), taken


@njit(nogil=True)
def _branch_costs(
    scaled: np.ndarray,
    low: np.ndarray,
    high: np.ndarray,
    zero: np.ndarray,
    weight: np.ndarray,
    branch: np.ndarray,
    zeros: np.ndarray,
) -> None:
    """Branch costs of two steps, [2, 4, lane], and the two nibbles of what took zero, in a byte."""
    width = len(weight)
    first_low, second_low, first_high, second_high = low[0], low[1], high[0], high[1]
    first_scaled, second_scaled, first_zero, second_zero = scaled[0], scaled[1], zero[0], zero[1]
    for lane in range(width):
        a, b, c, d, even = _step_costs(
            first_scaled[lane], weight[lane], first_low[lane], first_high[lane], first_zero[lane]
        )
        branch[lane], branch[lane + BLOCK], branch[lane + 2 * BLOCK], branch[lane + 3 * BLOCK] = a, b, c, d
        a, b, c, d, odd = _step_costs(
            second_scaled[lane], weight[lane], second_low[lane], second_high[lane], second_zero[lane]
        )
        branch[lane + 4 * BLOCK], branch[lane + 5 * BLOCK] = a, b
        branch[lane + 6 * BLOCK], branch[lane + 7 * BLOCK] = c, d
        zeros[lane] = np.uint8(even | np.uint8(odd * np.uint8(16)))


@njit(nogil=True)
def _reduce(metric: np.ndarray, cost: np.ndarray) -> None:
    """Subtract the least path metric of each lane from its states and add it to the lane's cost."""
    for lane in range(len(cost)):
        least = metric[lane]
        for state in range(BLOCK, len(metric), BLOCK):
            least = min(least, metric[lane + state])
        for state in range(0, len(metric), BLOCK):
            metric[lane + state] -= least
        cost[lane] += least


@njit(nogil=True)
def _best_final(metric: np.ndarray, state: np.ndarray, cost: np.ndarray) -> None:
    """The final state of least metric (the lower on a tie), whose metric completes the lane's cost."""
    for lane in range(len(cost)):
        best = 0
        for other in range(1, len(metric) // BLOCK):
            if metric[lane + other * BLOCK] < metric[lane + best * BLOCK]:
                best = other
        state[lane] = best
        cost[lane] += metric[lane + best * BLOCK]


@njit(nogil=True)
def _trace(
    taken: np.ndarray, shift: int, zeros: np.ndarray, zero_shift: int, branches: np.ndarray, state: np.ndarray,
    classes: np.ndarray,
) -> None:  # fmt: skip
    """One step back in each lane, along the branch that entered its state; classes: nibble << 2 | class."""
    for lane in range(len(state)):
        current = np.uint64(state[lane])
        bit = (np.uint64(taken[lane]) >> (current + np.uint64(shift))) & np.uint64(1)
        entered = branches[current + current + bit]
        state[lane] = entered >> 2
        classes[lane] = np.uint8((entered & 3) | ((np.int64(zeros[lane]) >> zero_shift) << 2))


@njit(nogil=True)
def _trace_packed(
    taken: np.ndarray, shift: int, zeros: np.ndarray, zero_shift: int, packed: np.ndarray, state: np.ndarray,
    classes: np.ndarray,
) -> None:  # fmt: skip
    """As `_trace` for up to eight states, whose branches fit four words, looked up by a shift: SIMD along the lanes."""
    lower, upper, lower_class, upper_class = packed[0], packed[1], packed[2], packed[3]
    state_shift, nibble_shift = _U(shift), _U(zero_shift)
    for lane in range(len(state)):
        bit = _U(_U(_U(taken[lane]) >> _U(state[lane] + state_shift)) & _U(1))
        at = _U(state[lane] << _U(2))
        before = _U(_U(upper if bit else lower) >> at)
        number = _U(_U(upper_class if bit else lower_class) >> at)
        state[lane] = _U(before & _U(7))
        classes[lane] = np.uint8(_U(_U(number & _U(3)) | _U(_U(_U(zeros[lane]) >> nibble_shift) << _U(2))))


@njit(nogil=True)
def _indices(
    r: np.ndarray, start: int, length: int, inverse_step: np.float32, classes: np.ndarray, k: np.ndarray
) -> None:
    """Indices of a tile from r and the classes [step, lane] of each lane's path."""
    flat, width = classes.ravel(), classes.shape[1]
    row_classes = np.empty(TILE, np.uint8)
    for lane in range(len(r)):
        row_r, row_k = r[lane, start : start + length], k[lane, start : start + length]
        for offset in range(TILE):
            row_classes[offset] = flat[np.uint64(offset * width + lane)]
        for offset in range(length):
            number = _I(row_classes[offset] & np.uint8(3))
            zero = _I(_I(_I(row_classes[offset]) >> _I(number + _I(2))) & _I(1))
            m = _member(_smallest(abs(row_r[offset]) * inverse_step), number)
            magnitude = _I(_I(_I(m + _I(1)) >> _I(1)) * _I(_I(1) - zero))
            row_k[offset] = -magnitude if row_r[offset] < 0 else magnitude
