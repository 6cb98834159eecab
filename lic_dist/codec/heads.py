"""What the heads of all formats begin with, and the numbers of variable length in them.

    offset  bytes
         0      3  "LIC"
         3      1  format
         4      1  flags: 1 a grey image, 2 the entropy model was computed in integers, others by format
         5      2  height of the image in pixels, 1..65535
         7      2  width of the image in pixels, 1..65535
         9      4  the model
        13      4  the quantizer

A varint has 7 bits a byte, the lowest first, and 128 in all bytes but the last.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

from lic_dist.codec.rans import BitstreamError
from lic_dist.errors import LicError

MAGIC = b"LIC"
GREY, INTEGER = 1, 2
LARGEST_SIDE = 65535
LARGEST_AREA = 1 << 28  # pixels
_HEAD = struct.Struct("<3sBBHH4s4s")
HEAD = _HEAD.size  # bytes
VARINT_BYTES = 5


class Head(NamedTuple):
    """The fields of the module's text, without the first."""

    format: int
    flags: int
    height: int
    width: int
    model: bytes
    record: bytes

    def pack(self) -> bytes:
        """Return its bytes."""
        return _HEAD.pack(MAGIC, *self)

    @classmethod
    def unpack(cls, data: bytes) -> Head:
        """Return the head at the beginning of HEAD bytes or more, whatever it says."""
        return cls(*_HEAD.unpack_from(data)[1:])

    def check(self, flags: int) -> None:
        """Refuse flags other than these, and sizes that no encoder writes. Raises BitstreamError."""
        if self.flags & ~flags:
            raise BitstreamError("this bitstream states flags that this program does not know")
        if not 1 <= self.height * self.width <= LARGEST_AREA:
            raise contradictory()


def check_sides(height: int, width: int) -> None:
    """Raise LicError for a picture larger than the formats hold, ValueError for one without pixels."""
    if max(height, width) > LARGEST_SIDE or height * width > LARGEST_AREA:
        raise LicError(
            f"a picture of {width}x{height} is too large for this format",
            hint=f"sides up to {LARGEST_SIDE} pixels, up to {LARGEST_AREA >> 20} million of them in all",
        )
    if min(height, width) < 1:
        raise ValueError("sides are 1 or more")


def has_format(data: bytes, number: int) -> bool:
    """Return whether a file's first four bytes are those of a format."""
    return data[:4] == MAGIC + bytes([number])


def varint(number: int) -> bytes:
    """Return a number as a varint."""
    found = bytearray()
    while number > 127:
        found.append(number & 127 | 128)
        number >>= 7
    return bytes([*found, number])


def read_varint(data: bytes, place: int) -> tuple[int, int]:
    """Return the varint at a place, and where it ends. Raises BitstreamError where data or sense ends before it."""
    number = 0
    for count in range(VARINT_BYTES):
        if place + count >= len(data):
            raise cut_head()
        byte = data[place + count]
        number |= (byte & 127) << 7 * count
        if byte < 128:
            return number, place + count + 1
    raise contradictory()


def cut_head() -> BitstreamError:
    """Return the error that a file ends within its head."""
    return BitstreamError("this bitstream is cut in its head", hint="give more bytes of it, or the whole")


def contradictory() -> BitstreamError:
    """Return the error of sizes that do not go together."""
    return BitstreamError("this bitstream contradicts itself: sizes that no encoder writes")
