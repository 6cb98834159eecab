"""Formats 1 and 2: which arrays a store holds, their types and codecs, and where each shard's object lies.

    zarr.json                 group; attributes: format, num_samples, shard, geometry, identity ...
    pixels                    uint8   [N, 3, s, s]
    latents/y                 float16 [N, M, h, w]      (may be left out)
    latents/z                 int16   [N, Nz, hz, wz]   (left out where Nz is 0)
    quantized/<group>/k       int16   [N, M, h, w]      beside it record.json, the quantizer record
    quantized/<group>/bits, distortion   float32 [N]
    samples/source            uint8   [N, L]            UTF-8, filled up with zero bytes
    samples/digest            uint8   [N, 64]           sha256 of the photo, as ASCII hex digits
    samples/crop_y, crop_x    int32   [N];  flip, held_out  bool [N]
    samples/status            uint8   [N]               0 good, 255 unwritten, else see its attribute `names`
    _progress/<fingerprint8>/<shard>.json               the markers
    _chain/                                             of a store that has grown: manifests, masks, claims, names

N is `num_samples` rounded up to whole shards; the rows beyond are zero, with status 255. A store that has grown is of
format 2: its root lists the instalments (chain.py), each in whole shards. Text is stored as
rows of bytes because Zarr v3 has no string type in its core: uint8 opens everywhere. docs/cache-format.md has
the page for those who write a reader.

Every array is sharded (Zarr v3 `sharding_indexed`): one object holds one shard of S samples, in inner
chunks of up to eight samples, a compromise between whole shards (as fast as with chunks of 32) and a single a[i].
Codecs are the core's: Blosc with zstd over shuffled bits or bytes, then crc32c. Measured on 64 photographs with the
shipped model, against their entropy-coded size: k 1.34 (zstd alone 1.80), z 1.43 (2.00). Pixels take 0.73 of their
bytes (zstd alone 0.86) and read at 4,500 crops a second; lossless WebP would take 0.42, but reads at 600.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Annotated, Any, Literal

import numcodecs.blosc
import numpy as np
import zarr
from numpy.typing import NDArray
from pydantic import Field, TypeAdapter, ValidationError
from zarr.codecs import BloscCodec, Crc32cCodec
from zarr.core.buffer import default_buffer_prototype
from zarr.storage import MemoryStore

from lic_dist.cache.chain import MOST_SAMPLES, Instalment, Shards, is_chain
from lic_dist.cache.plan import Geometry, fingerprint
from lic_dist.cache.storage import Storage
from lic_dist.data.photo import least_side
from lic_dist.errors import LicError

numcodecs.blosc.use_threads = False  # with threads, blocks in a chunk are in the order of their completion

FORMAT, GROWN = 1, 2  # of a store as it is built, and of one that has grown
UNWRITTEN = 255  # status of a sample whose shard is not written, and of the padding
INNER_SAMPLES = 8  # most samples in an inner chunk,
SMALL_SHARD = 64 * 1024  # unless a shard has at most so many bytes
DIGEST_BYTES = 64
Pipeline = Literal["zarr", "zarrs"]


@dataclass(frozen=True)
class ArraySpec:
    """One array: its path in the store, numpy type, shape and dimension names of one sample, fill value, and Blosc's
    shuffle.

    Of an array that may become wider (`samples/source`, where paths of later photos are longer) `shape` is that of a
    block, and `block` the number of one of those side by side.
    """

    name: str
    dtype: str
    shape: tuple[int, ...] = ()
    dimensions: tuple[str, ...] = ()
    fill_value: int = 0
    shuffle: Literal["bitshuffle", "shuffle"] = "bitshuffle"
    block: int = 0

    @property
    def widens(self) -> bool:
        return self.name == "samples/source"

    @property
    def sample_bytes(self) -> int:
        """Bytes of one sample before compression."""
        return int(np.dtype(self.dtype).itemsize * np.prod(self.shape, dtype=np.int64))


@dataclass(frozen=True)
class Header:
    """The root attributes of a store, or of one of its snapshots."""

    shard: Annotated[int, Field(ge=1, le=MOST_SAMPLES)]
    batch: Annotated[int, Field(ge=1, le=MOST_SAMPLES)]
    geometry: Geometry
    store_y: bool
    source_bytes: Annotated[int, Field(ge=1, le=MOST_SAMPLES)]
    identity: dict[str, Any]
    fingerprint: str
    provenance: dict[str, Any]
    chain: Annotated[tuple[Instalment, ...], Field(min_length=1)]

    @cached_property
    def shards(self) -> Shards:
        return Shards(self.chain, self.shard)

    @property
    def squares(self) -> bool:
        """Whether its crops are neighbours in squares."""
        return bool(self.identity.get("images", {}).get("squares"))

    @property
    def photo_side(self) -> int:
        """The side in pixels that its photos have at least."""
        return least_side(self.geometry.crop, self.squares)

    @property
    def num_samples(self) -> int:
        return sum(one.num_samples for one in self.chain)

    @property
    def num_held_out(self) -> int:
        return sum(one.num_held_out for one in self.chain)

    @property
    def num_shards(self) -> int:
        return self.shards.num_shards

    @property
    def num_rows(self) -> int:
        """Rows up to the last sample; those that fill up an instalment's last shard are among them."""
        return self.shards.num_rows

    def count(self, shard: int) -> int:
        """Return the number of samples in a shard, without padding."""
        return self.shards.count(shard)

    @property
    def snapshot(self) -> int:
        """The number of the snapshot that this header is of."""
        return len(self.chain) - 1

    @property
    def digest(self) -> str:
        """The chain's digest; that of snapshot 0 is the fingerprint."""
        return self.chain[-1].digest

    @property
    def complete(self) -> Header:
        """The newest snapshot that is complete."""
        return self if self.chain[-1].complete else self.at(self.snapshot - 1)

    def at(self, snapshot: int) -> Header:
        """Return the header of a snapshot. Raises IndexError for none."""
        if not 0 <= snapshot <= self.snapshot:
            raise IndexError(f"snapshot {snapshot} of {self.snapshot + 1}")
        return replace(self, chain=self.chain[: snapshot + 1])

    def blocks(self, shard: int | None = None) -> int:
        """Return how many blocks of `source_bytes` the paths of a shard's samples take, or the longest of all."""
        of = self.chain if shard is None else (self.chain[self.shards.instalment(shard)],)
        return max(1, *(-(-one.source_bytes // self.source_bytes) for one in of))


def sample_arrays(source_bytes: int) -> tuple[ArraySpec, ...]:
    """Return the arrays of what the plan knows of each sample."""
    return (
        ArraySpec("samples/source", "uint8", (source_bytes,), ("byte",)),
        ArraySpec("samples/digest", "uint8", (DIGEST_BYTES,), ("digit",)),
        ArraySpec("samples/crop_y", "int32"),
        ArraySpec("samples/crop_x", "int32"),
        ArraySpec("samples/flip", "bool"),
        ArraySpec("samples/held_out", "bool"),
    )


def base_arrays(geometry: Geometry, store_y: bool) -> tuple[ArraySpec, ...]:
    """Return the arrays that building a shard fills: pixels, latents and the samples' status."""
    crop, m, h, nz, hz = (
        geometry.crop,
        geometry.y_channels,
        geometry.y_size,
        geometry.z_channels,
        geometry.z_size,
    )
    y = ArraySpec("latents/y", "float16", (m, h, h), ("channel", "row", "column"), shuffle="shuffle")
    z = ArraySpec("latents/z", "int16", (nz, hz, hz), ("channel", "row", "column"))
    return (
        ArraySpec("pixels", "uint8", (3, crop, crop), ("color", "row", "column")),
        *((y,) if store_y else ()),
        *((z,) if nz else ()),
        ArraySpec("samples/status", "uint8", fill_value=UNWRITTEN),
    )


def group_arrays(group: str, geometry: Geometry) -> tuple[ArraySpec, ...]:
    """Return the arrays that quantizing a shard fills."""
    shape = (geometry.y_channels, geometry.y_size, geometry.y_size)
    return (
        ArraySpec(f"quantized/{group}/k", "int16", shape, ("channel", "row", "column")),
        ArraySpec(f"quantized/{group}/bits", "float32"),
        ArraySpec(f"quantized/{group}/distortion", "float32"),
    )


def arrays_of(header: Header, group: str | None = None) -> tuple[ArraySpec, ...]:
    """Return all arrays of the base or of a group."""
    if group is not None:
        return group_arrays(group, header.geometry)
    return (*sample_arrays(header.source_bytes), *base_arrays(header.geometry, header.store_y))


def objects_of(header: Header, group: str | None, shard: int) -> list[ArraySpec]:
    """Return the array of each object that a shard has, of the base or of a group: one for each block of an array."""
    specs = arrays_of(header, group)
    return [
        replace(spec, block=block) if block else spec
        for spec in specs
        for block in range(header.blocks(shard) if spec.widens else 1)
    ]


def inner_chunk(shard: int, sample_bytes: int) -> int:
    """Return the samples in an inner chunk: all of a shard of small samples, else the largest divisor up to
    INNER_SAMPLES.

    inner_chunk(64, 98304) => 8; inner_chunk(64, 4) => 64
    """
    if shard * sample_bytes <= SMALL_SHARD:
        return shard
    return max(divisor for divisor in range(1, INNER_SAMPLES + 1) if shard % divisor == 0)


def group_of(name: str) -> str | None:
    """Return the group that an array belongs to; None of the base's.

    group_of("quantized/tcq8/k") => "tcq8"
    """
    return name.split("/")[1] if name.startswith("quantized/") else None


def object_key(spec: ArraySpec, shard: int) -> str:
    """Return the key of one shard of one array, or of one of its blocks."""
    if spec.block:
        return f"{spec.name}/c/{shard}/{spec.block}"
    return f"{spec.name}/{chunk_key(shard, 1 + len(spec.shape))}"


def chunk_key(shard: int, dimensions: int) -> str:
    """Return the key of a shard in an array of so many dimensions, samples included (Zarr v3: c/<shard>/0/0/0)."""
    return "/".join(["c", str(shard), *("0" for _ in range(dimensions - 1))])


def array_document(
    spec: ArraySpec, shards: int, shard: int, attributes: dict[str, Any] | None = None, blocks: int = 1
) -> bytes:
    """Return the `zarr.json` of an array of `shards` shards, and of `blocks` blocks where it widens."""
    return _array_document(spec, shards, shard, json.dumps(attributes or {}), blocks)


@lru_cache(maxsize=128)
def _array_document(spec: ArraySpec, shards: int, shard: int, attributes: str, blocks: int) -> bytes:
    store = MemoryStore()
    zarr.create_array(
        store,
        shape=(shards * shard, *((blocks * spec.shape[0],) if spec.widens else spec.shape)),
        dtype=spec.dtype,
        chunks=(inner_chunk(shard, spec.sample_bytes), *spec.shape),
        shards=(shard, *spec.shape),
        compressors=(BloscCodec(cname="zstd", clevel=5, shuffle=spec.shuffle), Crc32cCodec()),
        fill_value=bool(spec.fill_value) if spec.dtype == "bool" else spec.fill_value,
        dimension_names=("sample", *spec.dimensions),
        attributes=json.loads(attributes),
    )
    return store._store_dict["zarr.json"].to_bytes()


def group_document(attributes: dict[str, Any] | None = None) -> bytes:
    """Return the `zarr.json` of a group."""
    store = MemoryStore()
    zarr.create_group(store, attributes=attributes or {})
    return store._store_dict["zarr.json"].to_bytes()


def encode(document: bytes, shard: int, rows: NDArray[Any], block: int = 0) -> bytes:
    """Return one shard's object as Zarr writes it for the array of this `zarr.json`; `rows` are all of the shard's, of
    one block.

    Zarr drops all-zero chunks unless `write_empty_chunks` is set when an array is opened.
    """
    objects = {"zarr.json": default_buffer_prototype().buffer.from_bytes(document)}
    with zarr.config.set({"array.write_empty_chunks": True}):
        array = zarr.open_array(MemoryStore(objects), mode="r+")
        columns = (slice(block * rows.shape[1], (block + 1) * rows.shape[1]),) if rows.ndim == 2 else ()
        array[(slice(shard * len(rows), (shard + 1) * len(rows)), *columns)] = rows
    del objects["zarr.json"]
    (data,) = objects.values()
    return data.to_bytes()


def without_channels(header: Header) -> zarr.Array[Any]:
    """Return in memory the z of a store whose model has no side latent: int16 [N, 0, h, w]."""
    size = header.geometry.z_size
    shape = header.num_shards * header.shard, 0, size, size
    return zarr.create_array(MemoryStore(), shape=shape, chunks=(1, 1, size, size), dtype="int16")


def open_array(storage: Storage, name: str, pipeline: Pipeline = "zarr") -> zarr.Array[Any]:
    """Open one array for reading, with Zarr's own codecs or those of the package zarrs. Raises LicError where its
    `zarr.json` is lost, torn or altered.
    """
    paths = {
        "zarr": "zarr.core.codec_pipeline.BatchedCodecPipeline",
        "zarrs": "zarrs.ZarrsCodecPipeline",
    }
    opened = storage.zarr_store()
    with zarr.config.set({"codec_pipeline.path": paths[pipeline]}):
        try:
            return zarr.open_array(opened, path=name, mode="r")
        except (ValueError, LookupError, TypeError, AttributeError, FileNotFoundError) as error:
            what = f"{storage}/{name}/zarr.json is lost or altered"
            raise LicError(what, hint="build again: it is put back") from error


def read_attributes(storage: Storage, group: str = "") -> dict[str, Any] | None:
    """Return the attributes of a Zarr group; None where there is none that can be read."""
    document = storage.get_json(f"{group}/zarr.json" if group else "zarr.json")
    return document.get("attributes", {}) if isinstance(document, dict) else None


def read_header(storage: Storage) -> Header:
    """Return the header of a store.

    Raises:
        LicError: no store there, no cache of lic_dist, one of another format, or invalid attributes.
    """
    attributes = read_attributes(storage)
    if attributes is None:
        raise LicError(f"no cache at {storage}", hint="`lic-dist cache build` makes one")
    require_cache(storage, attributes)
    if attributes["format"] not in (FORMAT, GROWN):
        raise LicError(f"{storage} is of format {attributes['format']!r}, this version reads {FORMAT} and {GROWN}")
    try:
        fields = {name: attributes.get(name) for name in Header.__dataclass_fields__}
        if attributes["format"] == FORMAT:
            fields["chain"] = [_first_instalment(attributes)]
        header = _HEADER.validate_json(json.dumps(fields), strict=True)
    except ValidationError as error:
        fault = error.errors()[0]
        what = f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}"
        raise LicError(f"{storage}/zarr.json: {what}", hint="of another version? `cache build --rebuild`") from None
    if fingerprint(header.identity) != header.fingerprint:
        raise LicError(f"{storage}/zarr.json: its identity is not that of its fingerprint")
    if not is_chain(header.chain, header.shard, header.fingerprint):
        raise LicError(f"{storage}/zarr.json: its chain is not that of its digests")
    return header


def _first_instalment(attributes: dict[str, Any]) -> dict[str, Any]:
    """Return the instalment that a store of format 1 is."""
    identity, provenance = attributes.get("identity"), attributes.get("provenance")
    photos = identity.get("images") if isinstance(identity, dict) else None
    manifest = photos.get("manifest_sha256", "") if isinstance(photos, dict) else ""
    time = provenance.get("time", "") if isinstance(provenance, dict) else ""
    return {
        "first_shard": 0,
        **{name: attributes.get(name) for name in ("num_samples", "num_held_out", "source_bytes")},
        "manifest_sha256": manifest,
        **{"num_masked": 0, "mask_sha256": "", "digest": attributes["fingerprint"], "time": time, "complete": True},
    }


def require_cache(storage: Storage, attributes: dict[str, Any]) -> None:
    """Refuse a Zarr group that is no cache of lic_dist, complete or not. Raises LicError."""
    if "fingerprint" not in attributes or "format" not in attributes:
        raise LicError(f"{storage} is not a cache of lic_dist", hint="give cache.path a path of its own")


_HEADER = TypeAdapter(Header)


def read_group(storage: Storage, group: str) -> dict[str, Any] | None:
    """Return the attributes of a quantized group; None where there is none, or its identity is missing or wrong."""
    attributes = read_attributes(storage, f"quantized/{group}") or {}
    whole = isinstance(attributes.get("identity"), dict) and isinstance(attributes.get("fingerprint"), str)
    return attributes if whole and fingerprint(attributes["identity"]) == attributes["fingerprint"] else None


def group_names(storage: Storage) -> tuple[str, ...]:
    """Return the names of a store's quantized groups, sorted."""
    return tuple(name for name in storage.names("quantized") if read_group(storage, name) is not None)


def group_folders(storage: Storage) -> list[str]:
    """Return the names below `quantized/` that hold anything, including groups whose `zarr.json` is lost or torn."""
    return [name for name in storage.names("quantized") if storage.names(f"quantized/{name}")]
