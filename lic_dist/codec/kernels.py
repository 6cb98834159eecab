"""The compiled loops of rANS: the indices of a plane to words and back (rans.py has the format).

A plane [lanes, steps] is walked in tiles of some steps, transposed, so that the lanes of a step lie side by side. What
does not depend on the coder's state is computed for all lanes of a step before the coder comes to them, so that little
is left in the loop in which each index waits for the one before it.

The coder's states, which lie below 2^63, are a tuple of one or of several that take turns: an index then waits for the
one so many before it. A kernel is compiled for either length.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from lic_dist.quantization.jit import kernel
from lic_dist.quantization.rates import TOTAL, CdfTables

LOWEST_STATE = 1 << 31  # RANS64_L: where the encoder starts and the decoder must end
MOST_NIBBLES = 5  # an int16 lies within 2 * 65535 < 16^5 of any escape of a table over int16
EARLY, ESCAPE = 1, 2  # faults of a stream: it ends early, or holds an escape that no encoder writes
NO_ROW = -1  # no word has this number
TILE = 16  # steps transposed at a time: with hundreds of lanes they stay in the first cache
_ESCAPE_BIT = 40  # bit of a `form` that says so
_U = np.uint64  # numba makes a float of a signed and an unsigned integer


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
    state, row = np.zeros(lanes, np.uint8), np.empty(lanes, np.uint32)
    for begin in range(0, steps, TILE):
        count = min(TILE, steps - begin)
        _transpose(level[:, begin : begin + count], levels)
        for step in range(count):
            for lane in range(lanes):
                row[lane] = first_row[state[lane]] + levels[step, lane]
            for lane in range(lanes):
                x = states[0]
                share = x & 0xFFFF
                cell = likeliest[row[lane]]  # a guess: where it is right, nothing waits for the cell
                if len(states) > 1 or not 0 <= share - (cell & 0xFFFF) < cell >> 16 & 0xFFFF:
                    cell = cells[row[lane] << 8 | share >> 8]
                start, frequency, value = cell & 0xFFFF, cell >> 16 & 0xFFFF, cell >> 32
                if frequency:
                    x = frequency * (x >> 16) + share - start
                    if x < LOWEST_STATE:
                        if position == len(words):
                            return EARLY, position, states
                        x = x << 32 | np.int64(words[position])
                        position += 1
                else:
                    of_row, symbol, last = row[lane], start, value
                    while symbol < last:
                        middle = (symbol + last + 1) >> 1
                        if cdf[of_row, middle] <= share:
                            symbol = middle
                        else:
                            last = middle - 1
                    start = np.int64(cdf[of_row, symbol])
                    x = (cdf[of_row, symbol + 1] - start) * (x >> 16) + share - start
                    if x < LOWEST_STATE:
                        if position == len(words):
                            return EARLY, position, states
                        x = x << 32 | np.int64(words[position])
                        position += 1
                    value = symbol
                    escape = np.int64(size[of_row]) - 2
                    if symbol == escape:
                        nibbles = coded = nibble = np.int64(0)
                        place = -1
                        while place < nibbles:  # the first nibble is the number of nibbles
                            nibble = x & 15
                            x >>= 4
                            if x < LOWEST_STATE:
                                if position == len(words):
                                    return EARLY, position, states
                                x = x << 32 | np.int64(words[position])
                                position += 1
                            if place < 0:
                                nibbles = nibble
                                if nibbles > MOST_NIBBLES:
                                    return ESCAPE, position, states
                            else:
                                coded |= nibble << 4 * place
                            place += 1
                        if nibbles > 0 and nibble == 0:  # the highest nibble of a number is not 0
                            return ESCAPE, position, states
                        value = -(coded + 1) >> 1 if coded & 1 else escape + (coded >> 1)
                    value += offset[of_row]
                    if value < -32768 or value > 32767:
                        return ESCAPE, position, states
                indices[step, lane] = value
                states = states[1:] + (x,)
            for lane in range(lanes):
                state[lane] = next_state[state[lane] << 1 | indices[step, lane] & 1]
        _transpose(indices[:count].T, k[:, begin : begin + count].T)
    return 0, position, states


@njit(nogil=True)
def _transpose(source: NDArray[Any], target: NDArray[Any]) -> None:
    """Write source [a, b] to the beginning of target [b or more, a]."""
    for one in range(len(source)):
        line = source[one]
        for other in range(len(line)):
            target[other, one] = line[other]
