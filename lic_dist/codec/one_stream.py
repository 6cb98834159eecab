"""z and y of a picture in one stream, for blocks, of which the states of two coders would be one part in a hundred.

rANS is last in, first out: y is coded before z, so that a decoder reads z, computes the scales, and goes on to y from
the same state. The state that the encoder begins with, where the decoder ends, is not 2^31 but 2^31 plus a checksum,
for no further bytes: the lower 31 bits of the CRC-32 of z, and of the levels and then the indices of each plane of y,
as they are coded from lanes, in 16 bits, the lowest byte first, but for levels of scales, which have 8. So a decoder
knows that it computed the encoder's scales and read the encoder's indices. The stream is short (rans.py).
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lic_dist.codec import rans, walk
from lic_dist.codec.blocks import Block
from lic_dist.codec.codec import FoundLatents, ImageCodec, channel_rows
from lic_dist.codec.kernels import LOWEST_STATE
from lic_dist.codec.offsets import unpack as unpack_offsets
from lic_dist.codec.rans import BitstreamError
from lic_dist.quantization.rates import CdfTables
from lic_dist.quantization.trellis import SCALAR, Trellis


class _Checksum:
    def __init__(self) -> None:
        self._crc = 0

    def add(self, values: NDArray[Any]) -> None:
        self._crc = zlib.crc32(np.ascontiguousarray(values).data, self._crc)

    @property
    def state(self) -> int:
        """The coder's state that says it."""
        return LOWEST_STATE | self._crc & LOWEST_STATE - 1


def encode_stream(
    z: NDArray[np.int16],
    planes: Sequence[walk.Plane],
    rows: Sequence[NDArray[np.int32]],
    z_tables: CdfTables,
    y_tables: CdfTables,
) -> bytes:
    """Code z int16 [Nz, positions] and the planes of y with their rows of the tables into one stream."""
    check = _Checksum()
    for values in (z, *(one for plane in planes for one in (plane.level, plane.k))):
        check.add(values)
    of_y = [(plane.k, row) for plane, row in zip(planes, rows, strict=True)]
    parts = [([(z, channel_rows(z.shape))], z_tables), (of_y, y_tables)]
    return rans.shortened(rans.encode_parts(parts, (check.state,)))


class OneStream:
    """Reads a stream of `encode_stream`: z, then as a `walk.Reader` the planes of y.

    Raises:
        BitstreamError: from here and from its methods: the stream is cut, or such as no encoder writes, or this machine
            computes other scales.
    """

    def __init__(self, stream: bytes, z_tables: CdfTables, y_tables: CdfTables, trellis: Trellis) -> None:
        self._decoder = rans.Decoder(rans.restored(stream))
        self._z_tables, self._y_tables, self._trellis = z_tables, y_tables, trellis
        self._check = _Checksum()

    def z(self, rows: NDArray[np.int32]) -> NDArray[np.int16]:
        """Return z int16 [Nz, positions] of such rows."""
        found = self._decoder.decode(rows, self._z_tables, SCALAR)
        self._check.add(found)
        return found

    def take(self, level: NDArray[Any], last: bool) -> NDArray[np.int16]:
        """See `walk.Reader`."""
        self._check.add(level)
        try:
            found = self._decoder.decode(level, self._y_tables, self._trellis)
        except BitstreamError:
            raise walk.other_scales() from None  # the block is whole: see there
        self._check.add(found)
        return found

    def close(self) -> None:
        """See `walk.Reader`."""
        try:
            self._decoder.close(self._check.state)
        except BitstreamError:
            raise walk.other_scales() from None


class OneStreamCodec(ImageCodec):
    """A codec of blocks."""

    def encode_block(self, image: NDArray[np.uint8]) -> tuple[FoundLatents, Block]:
        """Code a block, uint8 [h, w, 3] or [h, w]; return what was found as well. See `ImageCodec.encode`."""
        found, planes = self.search(image)
        rows = [self.quantizer.rows(plane.k, plane.level) for plane in planes]
        stream = encode_stream(found.z, planes, rows, self.record.z_tables, self.record.y_tables)
        height, width = image.shape[:2]
        return found, Block(height, width, found.offsets + stream, bool(found.offsets))

    @torch.no_grad()
    def decode_block(self, block: Block, grey: bool, integer: bool) -> NDArray[np.uint8]:
        """Decode a block: uint8 [h, w, 3], or [h, w] of a grey one. Raises BitstreamError: see `ImageCodec.decode`."""
        offsets, stream = None, block.stream
        if block.offsets:
            offsets, stream = unpack_offsets(stream, self._codec.channels)
        reader = OneStream(stream, self.record.z_tables, self.record.y_tables, self.quantizer.trellis)
        shape = (block.height, block.width) if grey else (block.height, block.width, 3)
        z = reader.z(self.z_rows(self.grid(block.height, block.width)))
        return self.picture(self.read(shape, z, reader, offsets, integer))
