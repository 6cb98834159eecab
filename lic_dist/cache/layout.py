"""Format 1: which arrays a store holds, their types and chunks, and where each shard's object lies.

    zarr.json                 group; attributes: format, num_samples, shard, geometry, identity ...
    pixels                    uint8   [N, 3, s, s]
    latents/y                 float16 [N, M, h, w]      (may be left out)
    latents/z                 int16   [N, Nz, hz, wz]
    quantized/<group>/k       int16   [N, M, h, w]      beside it record.json, the quantizer record
    quantized/<group>/bits, distortion   float32 [N]
    samples/source            uint8   [N, L]            UTF-8, filled up with zero bytes
    samples/digest            uint8   [N, 64]           sha256 of the photo, as ASCII hex digits
    samples/crop_y, crop_x    int32   [N];  flip, held_out  bool [N]
    samples/status            uint8   [N]               0 good, 255 unwritten, else see its attribute `names`
    _progress/<fingerprint8>/<shard>.json               the markers

N is `num_samples` rounded up to whole shards; the rows beyond are zero, with status 255. Text is stored as
rows of bytes because Zarr v3 has no string type in its core: uint8 opens everywhere.

Every array is sharded (Zarr v3 `sharding_indexed`): one object holds one shard of S samples, in inner
chunks of up to eight samples, zstd level 1 with its checksum. Eight is a compromise, measured on one core
of a 2-core machine (192x16x16 int16): whole shards read at 4,850 samples/s against 1,770 with chunks of one
and 5,600 of 32, while a single a[i] still takes 2 ms, not 13 ms.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import zarr
from zarr.codecs import ZstdCodec

from lic_dist.cache.plan import Geometry, num_shards
from lic_dist.errors import LicError

FORMAT = 1
UNWRITTEN = 255  # status of a sample whose shard is not written, and of the padding
INNER = 8  # samples an inner chunk holds at most,
SMALL = 64 * 1024  # unless a shard of the array has no more bytes than this
DIGEST_BYTES = 64


@dataclass(frozen=True)
class ArraySpec:
    """One array: its path in the store, numpy type, the shape of one sample, and the names of that shape."""

    name: str
    dtype: str
    shape: tuple[int, ...] = ()
    dimensions: tuple[str, ...] = ()
    fill_value: int = 0

    @property
    def sample_bytes(self) -> int:
        """Bytes of one sample before compression."""
        return int(np.dtype(self.dtype).itemsize * np.prod(self.shape, dtype=np.int64))


@dataclass(frozen=True)
class Header:
    """The root attributes of a store."""

    num_samples: int
    shard: int
    batch: int
    geometry: Geometry
    store_y: bool
    source_bytes: int
    identity: dict[str, Any]
    fingerprint: str
    provenance: dict[str, Any]

    @property
    def num_shards(self) -> int:
        return num_shards(self.num_samples, self.shard)

    def count(self, shard: int) -> int:
        """Samples in a shard, padding not counted."""
        return min(self.shard, self.num_samples - shard * self.shard)


def sample_arrays(source_bytes: int) -> tuple[ArraySpec, ...]:
    """What the plan knows of each sample."""
    return (
        ArraySpec("samples/source", "uint8", (source_bytes,), ("byte",)),
        ArraySpec("samples/digest", "uint8", (DIGEST_BYTES,), ("digit",)),
        ArraySpec("samples/crop_y", "int32"),
        ArraySpec("samples/crop_x", "int32"),
        ArraySpec("samples/flip", "bool"),
        ArraySpec("samples/held_out", "bool"),
    )


def base_arrays(geometry: Geometry, store_y: bool) -> tuple[ArraySpec, ...]:
    """What building a shard makes: pixels, latents and the samples' status."""
    crop, m, h, nz, hz = (
        geometry.crop,
        geometry.y_channels,
        geometry.y_size,
        geometry.z_channels,
        geometry.z_size,
    )
    y = ArraySpec("latents/y", "float16", (m, h, h), ("channel", "row", "column"))
    return (
        ArraySpec("pixels", "uint8", (3, crop, crop), ("color", "row", "column")),
        *((y,) if store_y else ()),
        ArraySpec("latents/z", "int16", (nz, hz, hz), ("channel", "row", "column")),
        ArraySpec("samples/status", "uint8", fill_value=UNWRITTEN),
    )


def group_arrays(group: str, geometry: Geometry) -> tuple[ArraySpec, ...]:
    """What quantizing a shard makes."""
    shape = (geometry.y_channels, geometry.y_size, geometry.y_size)
    return (
        ArraySpec(f"quantized/{group}/k", "int16", shape, ("channel", "row", "column")),
        ArraySpec(f"quantized/{group}/bits", "float32"),
        ArraySpec(f"quantized/{group}/distortion", "float32"),
    )


def raw_bytes(num_samples: int, geometry: Geometry, store_y: bool, groups: tuple[str, ...] = ()) -> dict[str, int]:
    """Bytes of each large array before compression: an upper bound for its size on disk.

    zstd leaves about a fifth of int16 latents, most of float16 ones and three quarters or more of
    photographs.
    """
    arrays = [
        *base_arrays(geometry, store_y),
        *(spec for group in groups for spec in group_arrays(group, geometry)),
    ]
    return {spec.name: num_samples * spec.sample_bytes for spec in arrays}


def inner_chunk(shard: int, sample_bytes: int) -> int:
    """Samples in an inner chunk: a whole shard of small samples, else the largest divisor of it up to INNER.

    inner_chunk(64, 98304) => 8; inner_chunk(64, 4) => 64
    """
    if shard * sample_bytes <= SMALL:
        return shard
    return max(divisor for divisor in range(1, INNER + 1) if shard % divisor == 0)


def object_path(store: Path, spec: ArraySpec, shard: int) -> Path:
    """The file of one shard of one array (Zarr v3 default chunk keys: c/<shard>/0/0/0)."""
    return store.joinpath(*spec.name.split("/"), "c", str(shard), *("0" for _ in spec.shape))


def create_array(
    store: Path, spec: ArraySpec, shards: int, shard: int, attributes: dict[str, Any] | None = None
) -> None:
    """Write the metadata of one array of `shards` shards; no data."""
    zarr.create_array(
        str(store),
        name=spec.name,
        shape=(shards * shard, *spec.shape),
        dtype=spec.dtype,
        chunks=(inner_chunk(shard, spec.sample_bytes), *spec.shape),
        shards=(shard, *spec.shape),
        compressors=ZstdCodec(level=1, checksum=True),
        fill_value=bool(spec.fill_value) if spec.dtype == "bool" else spec.fill_value,
        dimension_names=("sample", *spec.dimensions),
        attributes=attributes or {},
        config={"write_empty_chunks": True},
    )


def open_array(store: Path, name: str, mode: Literal["r", "r+"] = "r") -> zarr.Array:
    """Open one array; the only place that does. Without `write_empty_chunks` Zarr drops all-zero shards.

    The setting goes by Zarr's configuration: `zarr.open_array(config=...)` is ignored for an array that
    exists.
    """
    if mode == "r":
        return zarr.open_array(str(store), path=name, mode=mode)
    with zarr.config.set({"array.write_empty_chunks": True}):
        return zarr.open_array(str(store), path=name, mode=mode)


def read_attributes(node: Path) -> dict[str, Any] | None:
    """The attributes of a Zarr group, or None where there is none that can be read."""
    try:
        document = json.loads((node / "zarr.json").read_text())
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    return document.get("attributes", {}) if isinstance(document, dict) else None


def read_header(store: Path) -> Header:
    """The header of a store.

    Raises:
        LicError: no store there, not one of ours, or of another format.
    """
    attributes = read_attributes(store)
    if attributes is None:
        raise LicError(f"no cache at {store}", hint="`lic-dist cache build` makes one")
    if "fingerprint" not in attributes or "format" not in attributes:
        raise LicError(f"{store} is not a cache of lic_dist", hint="give cache.path a path of its own")
    if attributes["format"] != FORMAT:
        raise LicError(f"{store} is of format {attributes['format']}, this version reads format {FORMAT}")
    fields = {name: attributes[name] for name in Header.__dataclass_fields__}
    return Header(**{**fields, "geometry": Geometry(**fields["geometry"])})


def group_names(store: Path) -> tuple[str, ...]:
    """The quantized groups of a store, sorted."""
    return tuple(sorted(node.parent.name for node in (store / "quantized").glob("*/zarr.json")))
