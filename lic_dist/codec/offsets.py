"""Scale offsets: a picture's own correction of the scales that h_s says, a whole number of levels for each channel.

h_s is trained on many pictures; of one picture it may say the scales of a channel too large or too small throughout
(the amortization gap: Balcilar, Damodaran and Hellier 2022). Bits spent on offsets come back as cheaper indices; a
decoder adds them to the levels before it looks at a table. A level is a factor of 1.13 in scale.

As bits, most significant first: the number n of channels with an offset; then of each, by rising channel, how many
channels without one lie before it, |offset| - 1, and a bit that is 1 for a negative one; zero bits up to a whole 32-bit
word. Numbers are Elias gamma codes of the number plus one.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from lic_dist.codec.rans import BitstreamError

MOST = 7  # levels: a factor of 2.4
_WORD = 32
_PRICE = 7.0  # bits that an offset of one level costs, about; each level more costs another


def choose(bits_at: Callable[[int], NDArray[np.float64]]) -> NDArray[np.int8]:
    """Return the offsets [M] that save most: `bits_at` gives the bits of each channel [M] at one offset for all.

    They are all zero where what they save is less than what `pack` needs for them.
    """
    before = bits_at(0)
    least, offsets = before.copy(), np.zeros(len(before), np.int8)
    for sign in (1, -1):
        last = before
        for size in range(1, MOST + 1):
            bits = bits_at(sign * size)
            better = bits + _PRICE + size - 1 < least
            least[better], offsets[better] = bits[better] + _PRICE + size - 1, sign * size
            if not (bits < last).any():
                break
            last = bits
    chosen = np.where(offsets != 0, least - _PRICE - (np.abs(offsets) - 1), before)
    return offsets if chosen.sum() + 8 * len(pack(offsets)) < before.sum() else np.zeros_like(offsets)


def pack(offsets: NDArray[np.int8]) -> bytes:
    """Return offsets [M] of at most MOST levels as bytes, whole 32-bit words."""
    used = np.flatnonzero(offsets)
    text = _gamma(len(used))
    for gap, offset in zip(np.diff(used, prepend=-1) - 1, offsets[used].tolist(), strict=True):
        text += _gamma(int(gap)) + _gamma(abs(offset) - 1) + "01"[offset < 0]
    text += "0" * (-len(text) % _WORD)
    return int(text, 2).to_bytes(len(text) // 8, "big")


def unpack(data: bytes, channels: int) -> tuple[NDArray[np.int8], bytes]:
    """Return the offsets [channels] at the beginning of some bytes, and what follows them.

    Raises:
        BitstreamError: no offsets that `pack` writes.
    """
    reader = _Reader(data)
    offsets = np.zeros(channels, np.int8)
    place = -1
    for _ in range(reader.number(channels)):
        place += 1 + reader.number(channels)
        size = 1 + reader.number(MOST - 1)
        if place >= channels:
            raise _broken()
        offsets[place] = -size if reader.bit() else size
    return offsets, reader.rest()


def _gamma(number: int) -> str:
    """Return the Elias gamma code of a number from 0 on, plus one."""
    text = f"{number + 1:b}"
    return "0" * (len(text) - 1) + text


class _Reader:
    """Bits of a few bytes, from the first on; raises BitstreamError at their end."""

    def __init__(self, data: bytes) -> None:
        self._data, self._place = data, 0

    def bit(self) -> int:
        byte, bit = divmod(self._place, 8)
        if byte >= len(self._data):
            raise _broken()
        self._place += 1
        return self._data[byte] >> (7 - bit) & 1

    def number(self, most: int) -> int:
        zeros = 0
        while not self.bit():
            zeros += 1
            if zeros > most.bit_length():
                raise _broken()
        value = 1
        for _ in range(zeros):
            value = 2 * value + self.bit()
        if value - 1 > most:
            raise _broken()
        return value - 1

    def rest(self) -> bytes:
        """Return what follows after the zero bits up to a whole word."""
        while self._place % _WORD:
            if self.bit():
                raise _broken()
        return self._data[self._place // 8 :]


def _broken() -> BitstreamError:
    return BitstreamError("this bitstream contradicts itself: scale offsets that no encoder writes")
