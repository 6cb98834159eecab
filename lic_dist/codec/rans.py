"""Entropy coding of index planes in the stream format of CompressAI's rANS (`compressai.ans`), by its own coder.

    k, rows   --encode-->   stream   --decode-->   k
                      level, tables, trellis ---^

A plane is [lanes, steps]; its symbols are coded step by step, all lanes of a step in order. The decoder walks
one state machine a lane: the state says which quantizer's table reads the next symbol, and the symbol's parity
moves the state on. A stream may hold several planes, one after the other: a `Decoder` reads them one by one, so that
the levels of a plane may follow from the planes before it.

Format (compressai/cpp_exts/rans/rans_interface.cpp on ryg_rans' rans64.h): 32-bit little-endian words. The first
two are the coder's state x, low word first, always in [2^31, 2^63). A symbol of frequency f and cumulative
frequency c is the one whose interval [c, c + f) holds x mod 2^16; then x becomes f * (x >> 16) + (x mod 2^16) - c.
Bypass bits are the lowest four of x. Whenever x falls below 2^31 the next word is shifted in from below. An escape
is the row's last symbol, then the number of nibbles that follow (one nibble), then a value v, lowest nibble first:
v even is escape + v/2, v odd is -(v + 1)/2, before the row's offset is added. The encoder started from x = 2^31,
so a whole stream ends there, with no word left over.

An interleaved stream has STATES states, which begin it one after the other and all end at 2^31. They take turns: the
first symbol of the stream is the first state's, the next one the second's, through all planes. Each takes the next word
when it falls below 2^31. A processor works at several of them at once.

A short stream has one state, and lacks the zero bytes at the upper end of the state that it begins with, three at most:
its length, which is a multiple of 4 otherwise, says how many.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lic_dist.codec.kernels import (
    EARLY,
    ESCAPE,
    LOWEST_STATE,
    NO_ROW,
    decode_plane,
    decoder_tables,
    encode_plane,
    encoder_tables,
)
from lic_dist.errors import LicError
from lic_dist.quantization.rates import CdfTables
from lic_dist.quantization.trellis import Trellis

Planes = Sequence[tuple[NDArray[np.int16], NDArray[np.int32]]]  # indices k and their rows of the tables

STATES = 4  # of the coder, in an interleaved stream
INTERLEAVED_FROM = 1 << 18  # bytes of a stream of one state, to which the 24 of three more are less than 0.01 %

CLOSE = 1 << 12  # bytes, far more than the states of both layouts hold
SAMPLED = 1 << 14  # indices of a plane by which the size of its stream is guessed

_FAULTS = {EARLY: "ends early", ESCAPE: "holds an escape that no encoder writes"}


class BitstreamError(LicError):
    """A bitstream that is cut, altered, or of another model."""

    def __init__(self, message: str, hint: str = "the file is damaged, or not one of this program") -> None:
        super().__init__(message, hint)


def encode(k: NDArray[np.int16], rows: NDArray[np.int32], tables: CdfTables, interleaved: bool = False) -> bytes:
    """Code indices k, int16 [lanes, steps], each with its row of the tables, int32 of the same shape.

    Raises ValueError where types or shapes are others, or a row is not in the tables.
    """
    return encode_planes([(k, rows)], tables, interleaved)


def encode_planes(planes: Planes, tables: CdfTables, interleaved: bool = False) -> bytes:
    """Code planes (k, rows), one after the other, into one stream; each as `encode` takes it, and as a `Decoder` with
    the same `interleaved` reads them. They may have different shapes, and some or all may be empty. Raises
    ValueError as `encode` does.
    """
    return encode_parts([(planes, tables)], (LOWEST_STATE,) * (STATES if interleaved else 1))


def encode_parts(parts: Sequence[tuple[Planes, CdfTables]], states: tuple[int, ...]) -> bytes:
    """Code planes with tables of their own, part after part, into one stream, whose end a `Decoder` reaches in these
    states, of at least LOWEST_STATE and below 2^63. Raises ValueError as `encode` does.
    """
    coded = []
    for planes, tables in reversed(parts):
        for k, rows in reversed(planes):
            if k.dtype != np.int16 or rows.dtype != np.int32 or k.shape != rows.shape or k.ndim != 2:
                raise ValueError(
                    f"k {k.dtype} {k.shape}, rows {rows.dtype} {rows.shape}: not int16, int32 [lanes, steps]"
                )
            words = np.empty(2 * k.size, np.uint32)
            given = _plain(k, np.int16), _plain(rows, np.int32), *encoder_tables(tables)
            first, states = encode_plane(*given, words, states)
            if first == NO_ROW:
                raise ValueError(f"rows lie outside 0..{tables.rows - 1}")
            coded.append(words[first:].astype("<u4").tobytes())
    return b"".join([np.array(states, "<u8").tobytes(), *reversed(coded)])


def shortened(stream: bytes) -> bytes:
    """Return a stream of one state without the zero bytes at the upper end of that state, at most three of them."""
    kept = next(size for size in (8, 7, 6, 5) if size == 5 or stream[size - 1])
    return stream[:kept] + stream[8:]


def restored(stream: bytes) -> bytes:
    """Return the stream that `shortened` made another one of. Raises BitstreamError: it is cut, or has zero bytes."""
    kept = 8 - -len(stream) % 4
    if len(stream) < kept:
        raise BitstreamError(f"an entropy-coded stream of {len(stream)} bytes is cut")
    if kept > 5 and not stream[kept - 1]:
        raise _broken("begins longer than an encoder writes it")
    return stream[:kept] + bytes(8 - kept) + stream[kept:]


def encode_by_size(planes: Planes, tables: CdfTables) -> tuple[bytes, bool]:
    """Code planes as `encode_planes` does, interleaved where one state's stream has INTERLEAVED_FROM bytes or more;
    return the stream, and whether it is.

    An estimate by some of the indices says which layout to begin with. The sizes of both differ by less than CLOSE, so
    that the other one is coded only where the estimate was wrong, or the size lies close to the bound.
    """
    found = b""
    if _estimated_bytes(planes, tables) >= INTERLEAVED_FROM:
        found = encode_planes(planes, tables, True)
        if len(found) >= INTERLEAVED_FROM + CLOSE:
            return found, True
    plain = encode_planes(planes, tables)
    if len(plain) < INTERLEAVED_FROM:
        return plain, False
    return found or encode_planes(planes, tables, True), True


def _estimated_bytes(planes: Planes, tables: CdfTables) -> float:
    total = 0.0
    for k, rows in planes:
        every = max(1, k.size // SAMPLED)
        bits = tables.bits(k.ravel()[::every], rows.ravel()[::every])
        total += float(bits.sum()) * k.size / max(1, len(bits)) / 8
    return total


def decode(
    stream: bytes, level: NDArray[np.integer[Any]], tables: CdfTables, trellis: Trellis, interleaved: bool = False
) -> NDArray[np.int16]:
    """Decode indices k, int16 [lanes, steps], of a stream that holds one plane; see `Decoder.decode`.

    Raises:
        BitstreamError: the stream is cut, altered or extended. Nearly all damage changes the coder's last state; damage
            to the raw bits of an escape does not, and is left to the container's checksum.
        ValueError: levels and trellis can ask for a row that is not in the tables.
    """
    decoder = Decoder(stream, interleaved)
    k = decoder.decode(level, tables, trellis)
    decoder.close()
    return k


class Decoder:
    """Reads the planes of a stream of `encode_parts` in their order, and checks at its end that nothing is left.

    Raises:
        BitstreamError: from here, `decode` and `close`: a stream that is cut, altered or extended. A fault in an early
            plane may show in a later one, or at `close` alone; after a fault the decoder is of no more use.
    """

    def __init__(self, stream: bytes, interleaved: bool = False) -> None:
        count = STATES if interleaved else 1
        if len(stream) % 4 or len(stream) < 8 * count:
            raise BitstreamError(f"an entropy-coded stream of {len(stream)} bytes is cut")
        self._words = np.frombuffer(stream, "<u4")
        self._states = tuple(np.frombuffer(stream, "<i8", count).tolist())  # 2^63 and above: negative, and impossible
        self._position = 2 * count

    def decode(self, level: NDArray[np.integer[Any]], tables: CdfTables, trellis: Trellis) -> NDArray[np.int16]:
        """Decode indices k, int16 [lanes, steps], of the next plane, whose levels (integers, same shape) are known.

        The row of an index is q * levels + level, where q is the active quantizer of its lane's state, and `levels` is
        how many the tables have: their rows over the trellis's quantizers. Every lane starts in state 0. With the
        trellis SCALAR the row is the level itself; z is coded so, with its channels as levels. Raises ValueError where
        levels and trellis can ask for a row that is not in the tables.
        """
        count, rest = divmod(tables.rows, trellis.quantizers)
        if level.ndim != 2:
            raise ValueError(f"levels have shape {level.shape}, not [lanes, steps]")
        if rest or (level.size and (level.min() < 0 or level.max() >= count)):
            raise ValueError(f"levels ask for rows outside the {tables.rows} tables of {trellis.quantizers} quantizers")
        if min(self._states) < LOWEST_STATE:
            raise _broken("starts with an impossible state")
        k = np.empty(level.shape, np.int16)
        fault, position, states = decode_plane(
            self._words,
            self._position,
            self._states,
            _plain(level, level.dtype if level.dtype == np.uint8 else np.int32),
            *decoder_tables(tables),
            tables.cdf,
            tables.size,
            tables.offset,
            np.array(trellis.quantizer, np.uint32) * count,
            np.array(trellis.next_state, np.uint8).ravel(),
            k,
        )
        if fault:
            raise _broken(_FAULTS[fault])
        self._position, self._states = position, states
        return k

    def close(self, ends: int = LOWEST_STATE) -> None:
        """Raise BitstreamError unless the planes decoded are the whole stream, which `ends` in this state."""
        if self._position != len(self._words):
            raise _broken("has bytes left over")
        if set(self._states) != {ends}:
            raise _broken("does not end in the encoder's first state")


def _broken(what: str) -> BitstreamError:
    return BitstreamError(f"an entropy-coded stream {what}")


def _plain(array: NDArray[Any], dtype: Any) -> NDArray[Any]:
    """Return a read-only contiguous array of a type: a kernel is compiled once for each kind of arrays it is given."""
    plain: NDArray[Any] = np.ascontiguousarray(array, dtype).view()
    plain.setflags(write=False)
    return plain
