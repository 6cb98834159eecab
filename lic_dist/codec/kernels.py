"""The compiled loops of rANS: the indices of a plane to words and back (rans.py has the format).

A plane [lanes, steps] is walked in tiles of some steps, transposed, so that the lanes of a step lie side by side. What
does not depend on the coder's state is computed for all lanes of a step before the coder comes to them, so that little
is left in the loop in which each index waits for the one before it.

The coder's states, which lie below 2^63, are a tuple of one or of several that take turns: an index then waits for the
one so many before it. A kernel is compiled for either length.

What is done for each index lies in functions that are given addresses instead of arrays, of which numba would count the
references. With numba's bounds checks, or without its compiler, these addresses are the arrays themselves.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic
from numpy.typing import NDArray

from lic_dist.quantization.candidates import shift_right
from lic_dist.quantization.jit import kernel, pointer_to
from lic_dist.quantization.rates import TOTAL, CdfTables

LOWEST_STATE = 1 << 31  # RANS64_L: where the encoder starts and the decoder must end
MOST_NIBBLES = 5  # an int16 lies within 2 * 65535 < 16^5 of any escape of a table over int16
EARLY, ESCAPE = 1, 2  # faults of a stream: it ends early, or holds an escape that no encoder writes
NO_ROW = -1  # no word has this number
TILE = 16  # steps transposed at a time: with hundreds of lanes they stay in the first cache
_ESCAPE_BIT = 40  # bit of a `form` that says so
_U = np.uint64  # numba makes a float of a signed and an unsigned integer
_W = np.uint32  # numba widens 32-bit arithmetic: every result is narrowed again to keep the SIMD width
_config: Any = numba.config
_CHECKED = bool(_config.BOUNDSCHECK or _config.DISABLE_JIT)
_FEW = 0 if _CHECKED else 8  # states of a trellis whose moves are nibbles of two words


def _address_of(typing: Any, array: Any) -> Any:
    """Return the address of an array's first element, to be indexed as the array is."""

    def generate(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        return context.make_array(signature.args[0])(context, builder, given[0]).data

    return pointer_to(array.dtype)(array), generate


def _rarely(typing: Any, condition: Any) -> Any:
    """Return a condition of which the compiler is to take it that it is false."""

    def generate(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        bit = ir.IntType(1)
        expect = builder.module.declare_intrinsic("llvm.expect", [bit], ir.FunctionType(bit, [bit, bit]))
        return builder.call(expect, [given[0], ir.Constant(bit, 0)])

    return types.boolean(types.boolean), generate


def _square(typing: Any, source: Any, first: Any, second: Any, target: Any) -> Any:
    """Write source[first : first + TILE, second : second + TILE] transposed to target[second :, first :], in as many
    rounds as TILE has bits, each of which shuffles rows half a square apart into each other.
    """

    def generate(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        item = context.get_data_type(source.dtype)
        row, byte = ir.VectorType(item, TILE).as_pointer(), ir.IntType(8).as_pointer()

        def at(array: int, line: Any, column: Any, number: int) -> Any:
            made = context.make_array(signature.args[array])(context, builder, given[array])
            skipped = builder.mul(builder.extract_value(made.strides, 0), builder.add(line, line.type(number)))
            begun = builder.bitcast(builder.gep(builder.bitcast(made.data, byte), [skipped]), made.data.type)
            return builder.bitcast(builder.gep(begun, [column]), row)

        rows = []
        for number in range(TILE):
            rows.append(builder.load(at(0, given[1], given[2], number)))
            rows[-1].align = context.get_abi_sizeof(item)
        order = [number // 2 + TILE * (number % 2) for number in range(2 * TILE)]
        halves = [ir.VectorType(ir.IntType(32), TILE)(order[half : half + TILE]) for half in (0, TILE)]
        for _ in range(TILE.bit_length() - 1):
            pairs = [(rows[number], rows[number + TILE // 2]) for number in range(TILE // 2)]
            rows = [builder.shuffle_vector(*pair, half) for pair in pairs for half in halves]
        for number, one in enumerate(rows):
            builder.store(one, at(3, given[2], given[1], number)).align = context.get_abi_sizeof(item)
        return context.get_dummy_value()

    return types.void(source, first, second, target), generate


_pointer: Any = njit(lambda array: array) if _CHECKED else intrinsic(_address_of)
_rare: Any = njit(lambda condition: condition) if _CHECKED else intrinsic(_rarely)
_transpose_square: Any = intrinsic(_square)


@lru_cache(maxsize=16)
def encoder_tables(tables: CdfTables) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Return what `encode_plane` takes of tables: rows, reciprocals and forms.

    rows int32 [rows, 3]: number of the row's first symbol among those of all rows, offset, and the row's escape. By
    symbol, uint64: the reciprocal (2^(64 + shift) - 1) / frequency, rounded down, and frequency | start << 16 | shift
    << 32, with a bit _ESCAPE_BIT; the shift is log2 frequency, rounded down, and `_divided` exact below 2^63.
    """
    in_use = np.arange(tables.cdf.shape[1] - 1) < tables.size[:, None] - 1
    start, frequency = (one[in_use].astype(np.uint64) for one in (tables.cdf[:, :-1], np.diff(tables.cdf)))
    escape = tables.size - 2
    first = np.cumsum(escape + 1) - (escape + 1)
    shift = np.frexp(frequency)[1].astype(np.uint64) - _U(1)
    high, rest = np.divmod((_U(1) << shift + _U(32)) - _U(1), frequency)
    reciprocal = high << _U(32) | (rest << _U(32) | _U(0xFFFFFFFF)) // frequency
    form = frequency | start << _U(16) | shift << _U(32)
    form[first + escape] |= _U(1 << _ESCAPE_BIT)
    return np.stack((first, tables.offset, escape), axis=1).astype(np.int32), reciprocal, form


@kernel
def encode_plane(
    k: NDArray[Any],
    rows: NDArray[Any],
    of_row: NDArray[Any],
    reciprocal: NDArray[Any],
    form: NDArray[Any],
    words: NDArray[Any],
    states: tuple[Any, ...],
) -> tuple[int, tuple[int, ...]]:
    """Code k int16 [lanes, steps] with its rows, int32, both backwards; return the number of the first word, or NO_ROW
    where a row is not in the tables, and the coder's states, of which the last one takes the next index.

    Words are written before each other, from the end of `words`, uint32, which has two for each index: it takes 40 bits
    at most.
    """
    lanes, steps = k.shape
    tile = min(TILE, steps)
    indices, row = np.empty((tile, lanes), np.int16), np.empty((tile, lanes), np.int32)
    symbol = np.empty(lanes, np.uint32)
    position = len(words)
    for begin in range((steps - 1) // TILE * TILE, -1, -TILE):
        count = min(TILE, steps - begin)
        _transpose(k[:, begin : begin + count], indices)
        _transpose(rows[:, begin : begin + count], row)
        for step in range(count - 1, -1, -1):
            for lane in range(lanes):
                one = np.uint32(row[step, lane])
                if one >= len(of_row):
                    return NO_ROW, states
                value, escape = indices[step, lane] - of_row[one, 1], of_row[one, 2]
                symbol[lane] = of_row[one, 0] + (value if 0 <= value < escape else escape)
            for lane in range(lanes - 1, -1, -1):
                x = _U(states[-1])
                coded = form[symbol[lane]]
                if coded >> _U(_ESCAPE_BIT):
                    one = np.uint32(row[step, lane])
                    value, escape = indices[step, lane] - of_row[one, 1], of_row[one, 2]
                    bypass = -2 * value - 1 if value < 0 else 2 * (value - escape)
                    nibbles = 0
                    while bypass >> 4 * nibbles:
                        nibbles += 1
                    bypass = bypass << 4 | nibbles
                    for place in range(nibbles, -1, -1):
                        if x >= _U(1 << 59):
                            position -= 1
                            words[position] = x & _U(0xFFFFFFFF)
                            x >>= _U(32)
                        x = x << _U(4) | _U(bypass >> 4 * place & 15)
                frequency = coded & _U(0xFFFF)
                if x >= frequency << _U(47):
                    position -= 1
                    words[position] = x & _U(0xFFFFFFFF)
                    x >>= _U(32)
                quotient = _divided(x, reciprocal[symbol[lane]], coded >> _U(32) & _U(31))
                x += (coded >> _U(16) & _U(0xFFFF)) + quotient * (_U(TOTAL) - frequency)
                states = (np.int64(x),) + states[:-1]
    return position, states


@njit(nogil=True)
def _divided(x: Any, reciprocal: Any, shift: Any) -> Any:
    """Return x / frequency, rounded down, of x below 2^63: the upper half of (x + 1) * reciprocal, shifted; all uint64.

    The compiler makes one multiplication of the four.
    """
    half, low = _U(32), _U(0xFFFFFFFF)
    x += _U(1)
    middle = (x >> half) * (reciprocal & low) + ((x & low) * (reciprocal & low) >> half)
    carried = (x & low) * (reciprocal >> half) + (middle & low)
    return (x >> half) * (reciprocal >> half) + (middle >> half) + (carried >> half) >> shift


@lru_cache(maxsize=16)
def decoder_tables(tables: CdfTables) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return what `decode_plane` takes of tables beside them: cells int64 [256 rows] and likeliest int64 [rows].

    A cell is 256 values of x mod 2^16 in a row. Where they are all the same symbol's, and it is no escape, the cell is
    start | frequency << 16 | index << 32; otherwise first symbol | last symbol << 32. `likeliest` is the cell of the
    row's likeliest symbol, or 0 where that is an escape.
    """
    in_use = np.arange(tables.cdf.shape[1]) < tables.size[:, None]
    rows, escape = np.arange(tables.rows)[:, None], tables.size[:, None] - 2
    rising = (tables.cdf + rows * (TOTAL + 1))[in_use]  # the rows one above the other
    begin = np.cumsum(tables.size)[:, None] - tables.size[:, None]
    values = np.arange(0, TOTAL, 256) + rows * (TOTAL + 1)
    first, last = (np.searchsorted(rising, one, "right") - 1 - begin for one in (values, values + 255))

    def whole(symbol: NDArray[Any]) -> NDArray[Any]:
        start, end = (np.take_along_axis(tables.cdf, one, axis=1).astype(np.int64) for one in (symbol, symbol + 1))
        index = symbol + tables.offset[:, None].astype(np.int64)
        plain = (symbol < escape) & (index >= -32768) & (index <= 32767)
        return np.where(plain, start | end - start << 16 | index << 32, 0)

    cells = np.where(first == last, whole(first), 0)
    likeliest = whole(np.argmax(np.where(in_use[:, 1:], np.diff(tables.cdf), 0), axis=1)[:, None])
    return np.where(cells, cells, first | last << 32).ravel(), likeliest.ravel()


@kernel
def decode_plane(
    words: NDArray[Any],
    position: int,
    states: tuple[int, ...],
    level: NDArray[Any],
    cells: NDArray[Any],
    likeliest: NDArray[Any],
    cdf: NDArray[Any],
    size: NDArray[Any],
    offset: NDArray[Any],
    first_row: NDArray[Any],
    next_state: NDArray[Any],
    k: NDArray[Any],
) -> tuple[int, int, tuple[int, ...]]:
    """Fill k int16 [lanes, steps] from words and levels of that shape; return 0 or the number of a fault, then the
    number of the next word and the coder's states, of which the first one holds the next index.

    Of the trellis, first_row uint32 [states] is the first row of a state's quantizer, next_state uint8 [2 states].
    """
    lanes, steps = k.shape
    tile = min(TILE, steps)
    levels, indices = np.empty((tile, lanes), level.dtype), np.empty((tile, lanes), np.int16)
    state, row, fault = np.zeros(lanes, np.uint32), np.empty(lanes, np.uint32), np.zeros(1, np.int64)
    source = _pointer(words), len(words), _pointer(fault)
    flat = cdf.ravel()
    tables = _pointer(cells), _pointer(likeliest), _pointer(flat), cdf.shape[1], _pointer(size), _pointer(offset)
    few = len(first_row) <= _FEW
    even, odd, second = _moves(first_row, next_state) if few else (_W(0), _W(0), _W(0))
    if few and first_row[0]:
        state[:] = _W(8)
    for begin in range(0, steps, TILE):
        count = min(TILE, steps - begin)
        _transpose(level[:, begin : begin + count], levels)
        for step in range(count):
            of_step, found = levels[step], indices[step]
            if few:
                for lane in range(lanes):
                    row[lane] = _W(_W(_W(0) - shift_right(state[lane], _W(3))) & second) + of_step[lane]
            else:
                for lane in range(lanes):
                    row[lane] = first_row[state[lane]] + of_step[lane]
            position, states = _decode_step(source, tables, _pointer(row), lanes, position, states, _pointer(found))
            if fault[0]:
                return fault[0], position, states
            if few and len(first_row) > 1:
                for lane in range(lanes):
                    parity = _W(_W(0) - _W(_W(found[lane]) & _W(1)))
                    moves = _W(even ^ _W(_W(even ^ odd) & parity))
                    state[lane] = shift_right(moves, _W(_W(state[lane] & _W(7)) << _W(2))) & _W(15)
            elif len(first_row) > 1:
                for lane in range(lanes):
                    state[lane] = next_state[state[lane] << 1 | found[lane] & 1]
        _transpose(indices[:count], k[:, begin : begin + count])
    return 0, position, states


@njit(nogil=True)
def _moves(first_row: NDArray[Any], next_state: NDArray[Any]) -> tuple[Any, Any, Any]:
    """Return where an even and where an odd index lead from each of up to eight states, as nibbles by state, 8 more
    where the second quantizer is active; and that one's first row.
    """
    even = odd = second = _W(0)
    for state in range(len(first_row)):
        second = max(second, first_row[state])
        to_even, to_odd = _W(next_state[2 * state]), _W(next_state[2 * state + 1])
        even |= _W((to_even | (_W(8) if first_row[to_even] else _W(0))) << _W(4 * state))
        odd |= _W((to_odd | (_W(8) if first_row[to_odd] else _W(0))) << _W(4 * state))
    return even, odd, second


@njit(nogil=True)
def _decode_step(
    source: Any, tables: Any, row: Any, lanes: int, position: int, states: tuple[int, ...], indices: Any
) -> tuple[int, tuple[int, ...]]:
    """Decode the indices of all lanes of a step, whose rows are known; return the next word's number, and the states.

    `source` are the words, how many there are, and a fault, which is set where one is found; what is decoded behind it
    means nothing. `tables` are cells, likeliest, the cumulative table and its width, sizes and offsets.
    """
    whole = lanes - lanes % len(states)
    for begin in range(0, whole, len(states)):
        for turn in range(len(states)):  # is unrolled: the states stay where they are
            lane = begin + turn
            x, position, indices[lane] = _decode_index(source, tables, row[lane], position, states[0], len(states) == 1)
            states = states[1:] + (x,)
    for lane in range(whole, lanes):
        x, position, indices[lane] = _decode_index(source, tables, row[lane], position, states[0], False)
        states = states[1:] + (x,)
    return position, states


@njit(nogil=True)
def _decode_index(source: Any, tables: Any, row: Any, position: int, x: Any, guessed: bool) -> tuple[Any, int, Any]:
    """Return a state after its next index, the next word's number, and the index."""
    share = x & 0xFFFF
    cell = tables[1][row]  # a guess: where it is right, nothing waits for the cell
    if not guessed or not 0 <= share - (cell & 0xFFFF) < cell >> 16 & 0xFFFF:
        cell = tables[0][np.int64(row) << 8 | share >> 8]
    start, frequency = cell & 0xFFFF, cell >> 16 & 0xFFFF
    if _rare(frequency == 0):
        return _search_index(source, tables, np.int64(row), position, x, start, cell >> 32)
    x = frequency * (x >> 16) + share - start
    if _rare(x < LOWEST_STATE):
        x, position = _refilled(source, position, x)
    return x, position, cell >> 32


@njit(nogil=True)
def _refilled(source: Any, position: int, x: Any) -> tuple[Any, int]:
    """Return a state with the next word shifted in, and the number of the word behind that."""
    words, count, fault = source
    if position == count:
        fault[0] = fault[0] or EARLY
        return x, position
    return x << 32 | np.int64(words[position]), position + 1


@njit(nogil=True)
def _search_index(
    source: Any, tables: Any, row: Any, position: int, x: Any, symbol: Any, last: Any
) -> tuple[Any, int, Any]:
    """Decode an index whose symbol lies between two, or is the escape."""
    fault = source[2]
    cdf, width, size, offset = tables[2:]
    start_of, share = row * width, x & 0xFFFF
    while last - symbol > 1:  # without a branch that nothing foretells
        middle = (symbol + last) >> 1
        before = (share - np.int64(cdf[start_of + middle])) >> 63  # all bits where the symbol lies before the middle
        symbol, last = symbol & before | middle & ~before, middle & before | last & ~before
    if last > symbol:
        symbol += 1 + ((share - np.int64(cdf[start_of + last])) >> 63)
    start = np.int64(cdf[start_of + symbol])
    x = (cdf[start_of + symbol + 1] - start) * (x >> 16) + share - start
    if x < LOWEST_STATE:
        x, position = _refilled(source, position, x)
    value, escape = symbol, np.int64(size[row]) - 2
    if symbol == escape:
        nibbles: Any = np.int64(0)
        coded = nibble = np.int64(0)
        place = -1
        while place < nibbles:  # the first nibble is the number of nibbles
            nibble = x & 15
            x >>= 4
            if x < LOWEST_STATE:
                x, position = _refilled(source, position, x)
            if place >= 0:
                coded |= nibble << 4 * place
            elif nibble <= MOST_NIBBLES:
                nibbles = nibble
            else:
                fault[0] = fault[0] or ESCAPE
            place += 1
        if nibbles > 0 and nibble == 0:  # the highest nibble of a number is not 0
            fault[0] = fault[0] or ESCAPE
        value = -(coded + 1) >> 1 if coded & 1 else escape + (coded >> 1)
    value += offset[row]
    if value < -32768 or value > 32767:
        fault[0] = fault[0] or ESCAPE
    return x, position, value


@njit(nogil=True)
def _transpose(source: NDArray[Any], target: NDArray[Any]) -> None:
    """Write source [a, b] to the beginning of target [b or more, a]. Along the last axis both are contiguous."""
    rows, columns = source.shape
    for row in range(0, rows, TILE):
        for column in range(0, columns, TILE):
            if not _CHECKED and row + TILE <= rows and column + TILE <= columns:
                _transpose_square(source, row, column, target)
            else:
                for one in range(row, min(row + TILE, rows)):
                    for other in range(column, min(column + TILE, columns)):
                        target[other, one] = source[one, other]
