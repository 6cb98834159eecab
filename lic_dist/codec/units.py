"""The container of a progressive file: format 3, of which any prefix that holds its head decodes (docs/progressive.md).

All integers are unsigned and little-endian; a varint has 7 bits a byte, the lowest first, and 128 in all bytes but the
last.

    offset  bytes
         0      3  "LIC"
         3      1  format: 3
         4      1  flags: 1 a grey image, 2 the entropy model was computed in integers; no other
         5      2  height of the image in pixels, 1..65535
         7      2  width of the image in pixels, 1..65535
         9      4  the model: first bytes of the digest of its tensors
        13      4  the quantizer: first bytes of the digest of bit planes, gains of channels and tables of z
        17      4  CRC-32 of the scale levels: does this decoder compute the encoder's scales?
        21      2  how many units there are
        23         of each unit three numbers: by how many slopes it lies below the one before, at least 1, as a varint;
                   its 32-bit words, a varint; CRC-16 (CCITT, from 0) of its bytes, 2 bytes
                   length a of the z stream in 32-bit words, a varint
               a   z stream
               4   CRC-32 of every byte before: here the head ends
                   the units, one after the other

The first unit's slope is so much below the largest one of the picture's elements, plus 1. A file that ends within a
unit, or before one, was cut, which is no error; in whole units a CRC-16 sees every error of up to 16 bits in a row, and
any other but for one in 2^16, and the coder's end state most of those.
"""

from __future__ import annotations

import binascii
import struct
import zlib
from dataclasses import dataclass

from lic_dist.codec.heads import (
    GREY,
    HEAD,
    INTEGER,
    Head,
    check_sides,
    contradictory,
    cut_head,
    has_format,
    read_varint,
    varint,
)
from lic_dist.codec.rans import BitstreamError

FORMAT = 3
MOST_UNITS = 1 << 8
MOST_FALL = 1 << 14  # slopes, of all units together: those of any model span fewer
_REST = struct.Struct("<IH")
_CHECK = struct.Struct("<I")
_UNIT_CHECK = struct.Struct("<H")


@dataclass(frozen=True)
class Unit:
    """A unit of a file: by how many slopes it lies below the one before, and its stream."""

    fall: int
    stream: bytes


@dataclass(frozen=True)
class Progressive:
    """A coded image, or what a cut left of it: sizes in pixels, identities of 4 bytes, the CRC-32 of the scale levels,
    the z stream, and the units that are whole. `ends` are the sizes in bytes of the prefixes of the file that hold the
    head alone, one unit, two units and so on, cut or not.

    Raises:
        LicError: a picture larger than the format holds.
    """

    height: int
    width: int
    model: bytes
    record: bytes
    levels: int
    z: bytes
    units: tuple[Unit, ...]
    grey: bool = False
    integer: bool = False
    ends: tuple[int, ...] = ()

    def pack(self) -> bytes:
        """Return the file's bytes."""
        check_sides(self.height, self.width)
        flags = GREY * self.grey | INTEGER * self.integer
        first = Head(FORMAT, flags, self.height, self.width, self.model, self.record)
        head = bytearray(first.pack() + _REST.pack(self.levels, len(self.units)))
        for unit in self.units:
            head += varint(unit.fall) + varint(len(unit.stream) // 4)
            head += _UNIT_CHECK.pack(binascii.crc_hqx(unit.stream, 0))
        head += varint(len(self.z) // 4) + self.z
        head += _CHECK.pack(zlib.crc32(head))
        return bytes(head) + b"".join(unit.stream for unit in self.units)

    @classmethod
    def unpack(cls, data: bytes) -> Progressive:
        """Return the container of a file's bytes, or of a prefix of them.

        Raises:
            BitstreamError: not this format, altered or extended, or cut before the end of its head.
        """
        if not is_progressive(data):
            raise BitstreamError("this is not a progressive bitstream", hint="was it made by `encode --progressive`?")
        place: int = HEAD + _REST.size
        if len(data) < place:
            raise cut_head()
        head, (levels, count) = Head.unpack(data), _REST.unpack_from(data, HEAD)
        falls, sizes, checks = [], [], []
        if count > MOST_UNITS:
            raise contradictory()
        for _ in range(count):
            fall, place = read_varint(data, place)
            words, place = read_varint(data, place)
            if place + _UNIT_CHECK.size > len(data):
                raise cut_head()
            falls.append(fall)
            sizes.append(4 * words)
            checks.append(_UNIT_CHECK.unpack_from(data, place)[0])
            place += _UNIT_CHECK.size
        z_words, place = read_varint(data, place)
        end = place + 4 * z_words + _CHECK.size
        if end > len(data):
            raise cut_head()
        if zlib.crc32(memoryview(data)[: end - _CHECK.size]) != _CHECK.unpack_from(data, end - _CHECK.size)[0]:
            raise BitstreamError("the head of this progressive bitstream is altered: its checksum does not fit")
        head.check(GREY | INTEGER)
        if min(falls, default=1) < 1 or sum(falls) > MOST_FALL:
            raise contradictory()
        z, ends = bytes(data[place : end - _CHECK.size]), [end]
        units: list[Unit] = []
        for fall, size, check in zip(falls, sizes, checks, strict=True):
            stream = bytes(data[ends[-1] : ends[-1] + size])
            ends.append(ends[-1] + size)
            if len(stream) == size and len(units) == len(ends) - 2:
                if binascii.crc_hqx(stream, 0) != check:
                    raise BitstreamError(f"unit {len(units) + 1} of this progressive bitstream is altered")
                units.append(Unit(fall, stream))
        if len(data) > ends[-1]:
            raise BitstreamError("this progressive bitstream has bytes left over")
        told = bool(head.flags & GREY), bool(head.flags & INTEGER)
        return cls(*head[2:], levels, z, tuple(units), *told, tuple(ends))


def is_progressive(data: bytes) -> bool:
    """Return whether a file's first bytes are those of a progressive one."""
    return has_format(data, FORMAT)
