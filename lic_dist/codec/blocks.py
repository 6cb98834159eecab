"""The container of a file in blocks: format 4, of which a region is read without the rest (docs/blocks.md).

A block is a picture for itself: no context, trellis or state of a coder reaches from one into another. Blocks lie in
rows and columns, `side` pixels apart; the last row and column take what is left, half a side at least where there is
more than one. All integers are unsigned and little-endian; a varint has 7 bits a byte, the lowest first, and 128 in all
bytes but the last.

    offset  bytes
         0      3  "LIC"
         3      1  format: 4
         4      1  flags: 1 a grey image, 2 the entropy model was computed in integers, 4 the edges of blocks are to be
                   mended; no other
         5      2  height of the image in pixels, 1..65535
         7      2  width of the image in pixels, 1..65535
         9      4  the model: first bytes of the digest of its tensors
        13      4  the quantizer: first bytes of the digest of what its record says to a decoder
        17      2  side of a block in pixels, a multiple of 64
        19      4  the boundary network: first bytes of the digest of its tensors, if the flag says so
                   of each block, in raster order, a varint: twice its bytes, and 1 more for scale offsets
                4  CRC-32 of every byte before: here the head ends
                   the blocks, one after the other

    of a block:    scale offsets, if its varint says so
                   z and y in one stream, short (one_stream.py, rans.py)
                2  CRC-16 (polynomial 0x1021, from 0xffff on, not reflected) of every byte of the block before
"""

from __future__ import annotations

import struct
import zlib
from binascii import crc_hqx
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

from lic_dist.codec.heads import (
    GREY,
    HEAD,
    INTEGER,
    VARINT_BYTES,
    Head,
    check_sides,
    contradictory,
    cut_head,
    has_format,
    read_varint,
    varint,
)
from lic_dist.codec.rans import BitstreamError

FORMAT = 4
UNIT = 64  # pixels; sides are multiples
_MENDED = 4
_OFFSETS, _BYTES = 1, 2
_SIDE = struct.Struct("<H")
_CHECK = struct.Struct("<I")
_OF_BLOCK = struct.Struct("<H")
_IDENTITY = 4  # bytes

Read = Callable[[int, int], bytes]  # from a byte of a file on, so many of them, or those that there are


@dataclass(frozen=True)
class Layout:
    """The blocks of a picture, by number in raster order; sizes in pixels."""

    height: int
    width: int
    side: int

    @cached_property
    def rows(self) -> list[int]:
        """The rows between which blocks lie, the first and the last among them."""
        return _edges(self.height, self.side)

    @cached_property
    def columns(self) -> list[int]:
        """The columns, as `rows`."""
        return _edges(self.width, self.side)

    @property
    def count(self) -> int:
        """How many blocks there are."""
        return (len(self.rows) - 1) * (len(self.columns) - 1)

    def place(self, number: int) -> tuple[slice, slice]:
        """Return the rows and columns of a block."""
        row, column = divmod(number, len(self.columns) - 1)
        return slice(self.rows[row], self.rows[row + 1]), slice(self.columns[column], self.columns[column + 1])

    def meeting(self, rows: slice, columns: slice) -> list[int]:
        """Return the numbers of the blocks that have pixels in these rows and columns, ascending."""
        down, across = (
            [at for at in range(len(edges) - 1) if edges[at] < part.stop and edges[at + 1] > part.start]
            for edges, part in ((self.rows, rows), (self.columns, columns))
        )
        return [row * (len(self.columns) - 1) + column for row in down for column in across]


def _edges(length: int, side: int) -> list[int]:
    count = max(1, (length + side // 2) // side)
    return [*range(0, count * side, side), length]


@dataclass(frozen=True)
class Block:
    """A picture for itself: height and width in pixels, its stream, and whether that lies behind scale offsets."""

    height: int
    width: int
    stream: bytes
    offsets: bool = False

    def pack(self) -> bytes:
        """Return its bytes in a file."""
        return self.stream + _OF_BLOCK.pack(_checksum(self.stream))


def _checksum(data: bytes) -> int:
    return crc_hqx(data, 0xFFFF)


@dataclass(frozen=True)
class Blocks:
    """The head of a file: sizes in pixels, identities of 4 bytes, the bytes of each block, and the numbers of those
    with scale offsets; `boundary` is that of the network that mends edges, none without one.

    Raises:
        LicError: a picture larger than the format holds.
    """

    height: int
    width: int
    model: bytes
    record: bytes
    side: int
    sizes: tuple[int, ...]
    grey: bool = False
    integer: bool = False
    boundary: bytes = b""
    offsets: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        check_sides(self.height, self.width)

    @cached_property
    def layout(self) -> Layout:
        """Where its blocks lie."""
        return Layout(self.height, self.width, self.side)

    @property
    def shape(self) -> tuple[int, ...]:
        """The picture's shape."""
        return (self.height, self.width) if self.grey else (self.height, self.width, 3)

    @property
    def once(self) -> int:
        """Bytes of the head but those of the sizes of blocks: what a file has once."""
        return HEAD + _SIDE.size + len(self.boundary) + _CHECK.size

    @cached_property
    def begins(self) -> list[int]:
        """Where each block begins in the file, and where the last one ends."""
        return list(accumulate(self.sizes, initial=len(self.pack())))

    def pack(self) -> bytes:
        """Return the bytes of the head."""
        flags = GREY * self.grey | INTEGER * self.integer | _MENDED * bool(self.boundary)
        first = Head(FORMAT, flags, self.height, self.width, self.model, self.record)
        told = (size * _BYTES + _OFFSETS * (number in self.offsets) for number, size in enumerate(self.sizes))
        head = first.pack() + _SIDE.pack(self.side) + self.boundary + b"".join(map(varint, told))
        return head + _CHECK.pack(zlib.crc32(head))

    @classmethod
    def read(cls, read: Read) -> Blocks:
        """Return the head of a file. Raises BitstreamError: not this format, altered, or cut before its head ends."""
        begin = HEAD + _SIDE.size
        data = read(0, begin)
        if not has_format(data, FORMAT):
            raise BitstreamError("this is not a bitstream in blocks", hint="was it made by `encode --blocks`?")
        if len(data) < begin:
            raise cut_head()
        head, (side,) = Head.unpack(data), _SIDE.unpack_from(data, HEAD)
        head.check(GREY | INTEGER | _MENDED)
        if not side or side % UNIT:
            raise contradictory()
        count = Layout(head.height, head.width, side).count
        data = read(0, begin + _IDENTITY + VARINT_BYTES * count + _CHECK.size)
        place = begin + _IDENTITY * bool(head.flags & _MENDED)
        boundary, told = bytes(data[begin:place]), []
        for _ in range(count):
            one, place = read_varint(data, place)
            told.append(one)
        if place + _CHECK.size > len(data):
            raise cut_head()
        if zlib.crc32(memoryview(data)[:place]) != _CHECK.unpack_from(data, place)[0]:
            raise BitstreamError("the head of this bitstream in blocks is altered: its checksum does not fit")
        flags = bool(head.flags & GREY), bool(head.flags & INTEGER)
        offsets = frozenset(number for number, one in enumerate(told) if one & _OFFSETS)
        found = cls(*head[2:], side, tuple(one // _BYTES for one in told), *flags, boundary, offsets)
        if len(found.pack()) != place + _CHECK.size:  # varints that no encoder writes
            raise contradictory()
        return found

    def block(self, read: Read, number: int) -> Block:
        """Return a block. Raises BitstreamError: it is cut or altered."""
        size, check = self.sizes[number], _OF_BLOCK.size
        data = read(self.begins[number], size)
        where = f"block {number + 1} of this bitstream"
        if len(data) < size:
            raise BitstreamError(f"{where} is cut", hint="a region that does not meet it decodes: --region")
        stream = bytes(data[:-check])
        if size < check or _checksum(stream) != _OF_BLOCK.unpack(data[-check:])[0]:
            raise BitstreamError(f"{where} is altered: its checksum does not fit")
        rows, columns = self.layout.place(number)
        return Block(rows.stop - rows.start, columns.stop - columns.start, stream, number in self.offsets)


def is_in_blocks(data: bytes) -> bool:
    """Return whether a file's first bytes are those of one in blocks."""
    return has_format(data, FORMAT)
