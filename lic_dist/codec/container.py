"""The file around the two entropy-coded streams of an image: format 2 (docs/bitstream.md).

All integers are unsigned and little-endian. 29 bytes are not streams.

    offset  bytes
         0      3  "LIC"
         3      1  format: 2
         4      1  flags: 1 a grey image, 2 the entropy model was computed in integers, 4 scale offsets,
                   8 an interleaved y stream; no other
         5      2  height of the image in pixels, 1..65535
         7      2  width of the image in pixels, 1..65535
         9      4  the model: first bytes of the digest of its tensors
        13      4  the quantizer: first bytes of the digest of what its record says to a decoder
        17      4  CRC-32 of the scale-index planes: does this decoder compute the encoder's scales?
        21      4  length a of the z stream in bytes, a multiple of 4
        25      a  z stream
    25 + a      b  scale offsets, if the flag says so, and y stream, up to the last four bytes; a multiple of 4
       end      4  CRC-32 of every byte before

A CRC-32 sees every error of up to 32 bits in a row, and any other but for one in 2^32. Height times width is at
most 2^28, so that no header makes a decoder take more memory than the largest picture needs.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass

from lic_dist.codec.heads import GREY, HEAD, INTEGER, MAGIC, Head, check_sides, contradictory
from lic_dist.codec.rans import BitstreamError

FORMAT = 2
_OFFSETS, _INTERLEAVED = 4, 8
_SIZES = struct.Struct("<II")
_CHECK = struct.Struct("<I")
OVERHEAD = HEAD + _SIZES.size + _CHECK.size  # bytes


@dataclass(frozen=True)
class Container:
    """One coded image: sizes in pixels, identities of 4 bytes, the CRC-32 of the level planes, two streams, and flags.
    With `offsets` y begins with those of the scales; `interleaved` is the layout of its stream.

    Raises:
        LicError: a picture larger than the format holds.
    """

    height: int
    width: int
    model: bytes
    record: bytes
    planes: int
    z: bytes
    y: bytes
    grey: bool = False
    integer: bool = False
    offsets: bool = False
    interleaved: bool = False

    def __post_init__(self) -> None:
        check_sides(self.height, self.width)
        if len(self.model) != 4 or len(self.record) != 4:
            raise ValueError("identities have 4 bytes")
        if len(self.z) % 4 or len(self.y) % 4:
            raise ValueError("streams are whole 32-bit words")

    def pack(self) -> bytes:
        """Return the file's bytes."""
        flags = GREY * self.grey | INTEGER * self.integer | _OFFSETS * self.offsets | _INTERLEAVED * self.interleaved
        head = Head(FORMAT, flags, self.height, self.width, self.model, self.record)
        content = head.pack() + _SIZES.pack(self.planes, len(self.z)) + self.z + self.y
        return content + _CHECK.pack(zlib.crc32(content))

    @classmethod
    def unpack(cls, data: bytes) -> Container:
        """Return the container of a file's bytes.

        Raises:
            BitstreamError: not this format, cut, altered or extended.
        """
        if data[:3] != MAGIC:
            raise BitstreamError("this is not a bitstream of this program", hint="does it start with LIC?")
        if len(data) < OVERHEAD:
            raise BitstreamError(f"this bitstream is cut: {len(data)} bytes are less than a header")
        if data[3] != FORMAT:
            raise BitstreamError(f"this bitstream has format {data[3]}; this program reads format {FORMAT}")
        (check,) = _CHECK.unpack(data[-_CHECK.size :])
        if zlib.crc32(memoryview(data)[: -_CHECK.size]) != check:
            raise BitstreamError("this bitstream is cut or altered: its checksum does not fit")
        head, (planes, z_size) = Head.unpack(data), _SIZES.unpack_from(data, HEAD)
        head.check(GREY | INTEGER | _OFFSETS | _INTERLEAVED)
        streams = memoryview(data)[HEAD + _SIZES.size : -_CHECK.size]
        if z_size > len(streams) or z_size % 4 or len(streams) % 4:
            raise contradictory()
        told = (bool(head.flags & one) for one in (GREY, INTEGER, _OFFSETS, _INTERLEAVED))
        return cls(*head[2:], planes, bytes(streams[:z_size]), bytes(streams[z_size:]), *told)
