"""Read small arrays shard by shard, without Zarr's machinery, which takes a millisecond a shard.

Opening a store for training asks for the status, the part and the photo of each sample. A shard of such an array is one
inner chunk, so its object is that chunk (Blosc, then its crc32c) and an index of one entry (offset, bytes, crc32c), as
layout.py writes it. Arrays that another program has stored with other codecs are left to Zarr.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import google_crc32c
import numcodecs.blosc
import numpy as np
from numpy.typing import NDArray

from lic_dist.cache import documents, layout, store
from lic_dist.cache.layout import ArraySpec, Header
from lic_dist.cache.parallel import read_each
from lic_dist.cache.storage import Storage

INDEX = struct.Struct("<QQI")  # offset and bytes of the chunk, crc32c of these two
CRC, DECODED = struct.Struct("<I"), slice(4, 8)  # bytes after decoding, in Blosc's header


def plain_spec(storage: Storage, header: Header, name: str) -> ArraySpec | None:
    """Return the array of this name if its shards are single chunks with the codecs of layout.py, else None."""
    spec = next((one for one in layout.arrays_of(header, layout.group_of(name)) if one.name == name), None)
    if spec is None or layout.inner_chunk(header.shard, spec.sample_bytes) < header.shard:
        return None
    found, expected = storage.get_json(f"{name}/zarr.json"), store.array_document(spec, header)
    same = documents.same_array(found, expected) and found["codecs"] == json.loads(expected)["codecs"]
    return spec if same else None


def read(storage: Storage, header: Header, spec: ArraySpec, shards: Sequence[int]) -> list[NDArray[Any]]:
    """Return the rows of shards, without padding: [samples in the shard, ...] each; paths as wide as the longest.

    Raises:
        FileNotFoundError: a shard without an object.
        ValueError: an object that is cut or altered.
    """

    def object_rows(spec: ArraySpec, shard: int) -> NDArray[Any]:
        return decode(spec, header.shard, storage.get(layout.object_key(spec, shard)))[: header.count(shard)]

    def rows(shard: int) -> NDArray[Any]:
        if (width := header.blocks()) == 1 or not spec.widens:
            return object_rows(spec, shard)
        blocks = [object_rows(replace(spec, block=block), shard) for block in range(header.blocks(shard))]
        wide = np.concatenate(blocks, axis=1)
        return np.pad(wide, ((0, 0), (0, width * spec.shape[0] - wide.shape[1])))

    return read_each(rows, shards)


def decode(spec: ArraySpec, length: int, data: bytes) -> NDArray[Any]:
    """Return the `length` rows of an object, padding included. ValueError where it is cut or altered."""
    if len(data) < INDEX.size:
        raise ValueError(f"an object of {len(data)} bytes")
    offset, size, check = INDEX.unpack(data[-INDEX.size :])
    chunk = data[offset : offset + size]
    if google_crc32c.value(data[-INDEX.size : -CRC.size]) != check or len(chunk) != size or size < CRC.size:
        raise ValueError("the index of its chunk is altered")
    packed = chunk[: -CRC.size]
    if google_crc32c.value(packed) != CRC.unpack(chunk[-CRC.size :])[0]:
        raise ValueError("stored and computed checksum do not match")
    if int.from_bytes(packed[DECODED], "little") != length * spec.sample_bytes:
        raise ValueError("a chunk of another size")
    rows = np.frombuffer(numcodecs.blosc.decompress(packed), np.dtype(spec.dtype).newbyteorder("<"))
    return rows.reshape(length, *spec.shape)
