"""Write a store: create it, add groups, write one shard, list what is left to do.

    create -> (create_group) -> write_shard for every shard that `pending` lists -> LatentCache

The first planner that puts the root's `zarr.json` decides what the store is. All other documents follow from that one,
so another planner, or the same one after a kill, completes the same store or is refused. From then on only whole shards
are written, each by one owner: encoded in memory, hashed, put whole, and its marker last.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lic_dist.cache import documents, layout, markers
from lic_dist.cache.layout import ArraySpec, Header
from lic_dist.cache.parallel import read_each
from lic_dist.cache.plan import Plan, differences, fingerprint
from lic_dist.cache.storage import Entry, Storage
from lic_dist.cache.storages import open_storage
from lic_dist.data.photo import FAULTS, Crop
from lic_dist.errors import LicError

FEW = 20  # part of the shards up to which their objects are looked up one by one, and the store is not listed
GROUP_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,99}")


def create(
    path: Path | str | Storage, plan: Plan, store_y: bool = True, provenance: Mapping[str, Any] | None = None
) -> None:
    """Create the store of a plan with empty arrays; complete it where it exists already.

    `provenance` (versions, host, argv ...) is stored as given and never compared.

    Raises:
        LicError: something else lies at `path`, or a store of another identity or plan; each differing field is named.
    """
    storage = open_storage(path)
    if layout.read_attributes(storage) is None:
        require_usable(storage, plan.fingerprint)
        storage.make()
        attributes = {"format": layout.FORMAT, **_plan_attributes(plan, store_y), "provenance": dict(provenance or {})}
        document = layout.group_document({**attributes, "fingerprint": plan.fingerprint})
        if not storage.put_new("zarr.json", document) and layout.read_attributes(storage) is None:
            storage.put("zarr.json", document)  # replaces one that does not parse
    header = layout.read_header(storage)
    _require_same(f"{storage} holds another cache", header.identity, plan.identity)
    expected = _plan_attributes(plan, store_y)
    found = {name: value for name, value in {**asdict(header), **asdict(header.chain[0])}.items() if name in expected}
    _require_same(f"{storage} follows another plan", found, expected)
    for name in ("latents", "quantized", "samples"):
        if storage.get_json(f"{name}/zarr.json") is None:
            storage.put(f"{name}/zarr.json", layout.group_document())
    put_documents(storage, layout.arrays_of(header), header)


def require_usable(storage: Storage, fingerprint: str = "") -> None:
    """Refuse storage that holds something else than a cache. What a killed or concurrent planner has left is accepted.

    A store that has lost its root is recognised by markers that name the plan's `fingerprint`.

    Raises:
        LicError: a file, or a folder that is not empty; one of its entries is named.
    """
    storage.require_folder()
    ours = (markers.FOLDER, "zarr.json.lock", ".zarr.json.")  # also left by a running or killed planner
    strange = [name for name in storage.names() if not name.startswith(ours)]
    if not strange or layout.read_attributes(storage) is not None:  # another planner has just created the store
        return
    if not fingerprint and markers.FOLDER in storage.names():  # the plan's fingerprint will tell whose store it is
        return
    known = markers.marked_shards(storage, fingerprint)
    if known and markers.read_marker(storage, fingerprint, known[0]) is not None:
        return
    raise LicError(f"{storage} is no cache and not empty: it holds {strange[0]}", hint="give another cache.path")


def create_group(
    path: Path | str | Storage,
    name: str,
    record_json: str,
    identity: Mapping[str, Any],
    provenance: Mapping[str, Any] | None = None,
) -> None:
    """Add the group `quantized/<name>` with its quantizer record; complete it where it exists already.

    `identity` names what the group's numbers depend on beyond the store's own identity (the record's digest, the sha256
    of the entropy-side tensors). The record's text is put first, as `record.json`, and the group's `zarr.json` last.

    Raises:
        LicError: a bad name, or a group of another identity or record under this name; each differing field is named,
            unless it has lost its `zarr.json`.
    """
    storage = open_storage(path)
    header = layout.read_header(storage)
    if not GROUP_NAME.fullmatch(name) or name.endswith(".json"):
        raise LicError(f"'{name}' cannot name a group", hint="letters, digits, and . _ @ - after the first; up to 100")
    digest = markers.size_and_digest(record_json.encode())["sha256"]
    whole = {"group": name, "cache": header.fingerprint, **identity}
    node = f"quantized/{name}"
    if name in layout.group_names(storage):
        _require_same(f"group '{name}' of {storage} is another one", group_attributes(storage, name)["identity"], whole)
    elif storage.names(f"{node}/k/c") and not markers.marked_shards(storage, fingerprint(whole)):
        raise LicError(
            f"group '{name}' of {storage} has lost its zarr.json, and its shards are of another model or record",
            hint="`lic-dist cache verify CONFIG --repair` with the model that it was made by",
        )
    if not storage.put_new(f"{node}/record.json", record_json.encode()):
        stored = {"record": markers.size_and_digest(storage.get(f"{node}/record.json"))["sha256"]}
        _require_same(f"group '{name}' of {storage} has another record.json", stored, {"record": digest})
    put_documents(storage, layout.arrays_of(header, name), header)
    made = {
        "identity": whole,
        "fingerprint": fingerprint(whole),
        "record_json_sha256": digest,
        "provenance": dict(provenance or {}),
    }
    if not storage.put_new(f"{node}/zarr.json", layout.group_document(made)) and name not in layout.group_names(
        storage
    ):
        storage.put(f"{node}/zarr.json", layout.group_document(made))  # replaces one that does not parse
    _require_same(f"group '{name}' of {storage} is another one", group_attributes(storage, name)["identity"], whole)


def write_shard(
    path: Path | str | Storage,
    key: str,
    shard: int,
    arrays: Mapping[str, NDArray[Any]],
    crops: Sequence[Crop] = (),
    seconds: Mapping[str, float] = MappingProxyType({}),
) -> None:
    """Write one whole shard and then its marker: the base arrays, the arrays of groups, or both at once.

    `key` is the fingerprint of the store that the caller expects. `arrays` maps names as in layout.py ("pixels",
    "latents/y", "latents/z", "samples/status"; "quantized/<group>/k", "bits", "distortion") to arrays of the shard's
    samples, without padding and of the exact type. All arrays of the base, or of a group, must be given, or none of
    them; a z without channels is not needed. `crops` are the samples of the base. Samples whose status is not 0 are
    written as zeros.

    Raises:
        ValueError: an array that is missing, unknown, not finite, or of another shape or type; a wrong number of crops.
        LicError: another store, a group's shard whose base shard is not written, or storage that cannot be written.
    """
    storage = open_storage(path)
    header = layout.read_header(storage)
    _require_same(f"{storage} holds another cache", {"fingerprint": header.fingerprint}, {"fingerprint": key})
    base = layout.base_arrays(header.geometry, header.store_y)
    grouped = {name.split("/")[1] for name in arrays if name.startswith("quantized/") and name.count("/") == 2}
    groups = {name: layout.group_arrays(name, header.geometry) for name in sorted(grouped)}
    with_base = any(spec.name in arrays for spec in base)
    expected = [*(base if with_base else ()), *(spec for specs in groups.values() for spec in specs)]
    if not header.geometry.z_channels:
        arrays = {name: array for name, array in arrays.items() if name != "latents/z"}
    _check_arrays(arrays, expected, header.count(shard))

    if with_base:
        if len(crops) != header.count(shard):
            raise ValueError(f"{len(crops)} crops for the {header.count(shard)} samples of shard {shard}")
        status = arrays["samples/status"]
        rows = {**sample_rows(crops, header.blocks(shard) * header.source_bytes), **arrays}
        marker = _write(storage, header, shard, None, rows, status, seconds)
    else:
        found = finished_marker(storage, header, shard)
        if found is None:
            raise LicError(f"shard {shard} of {storage} holds no latents yet", hint="`lic-dist cache build` first")
        marker = found
        first = shard * header.shard
        status = np.asarray(layout.open_array(storage, "samples/status")[first : first + header.count(shard)])
    for name in groups:
        _write(storage, header, shard, name, arrays, status, seconds, markers.latents_digest(marker))


def pending(
    path: Path | str | Storage, group: str | None = None, header: Header | None = None, since: int = 0
) -> list[int]:
    """Return the unfinished shards, of the base or of a group (see `finished_markers`), up to a snapshot's `header`.

    Shards before `since` are taken as finished where all of them have a marker.

    Raises:
        LicError: no store, or no such group.
    """
    storage = open_storage(path)
    header = header or layout.read_header(storage)
    if since and not set(markers.marked_shards(storage, fingerprint_of(storage, header, group))) >= set(range(since)):
        since = 0
    stored = finished_markers(storage, header, group, since=since)
    return [shard for shard in range(since, header.num_shards) if shard not in stored]


def finished_marker(storage: Storage, header: Header, shard: int, group: str | None = None) -> markers.Marker | None:
    """Return the marker of one shard, of the base or of a group, if it is finished: see `finished_markers`."""
    found = _finished_marker(storage, header, shard, group, fingerprint_of(storage, header, group), storage.entry)
    if found is None or group is None:
        return found
    base = _finished_marker(storage, header, shard, None, header.fingerprint, storage.entry)
    return found if base is not None and markers.latents_digest(base) == found.base else None


def finished_markers(
    storage: Storage,
    header: Header,
    group: str | None = None,
    listing: Mapping[str, Entry] | None = None,
    since: int = 0,
) -> dict[int, markers.Marker]:
    """Return the markers of the finished shards from `since` on, of the base arrays or of a group, by shard number.

    A shard is finished if its marker names exactly its objects, each of the recorded size. A group's shard also needs
    finished latents that are the ones its indices were made from. `listing` is of the whole storage, for a caller that
    has it.
    """
    if listing is None and FEW * (header.num_shards - since) > header.num_shards:
        listing = storage.listing()
    entry = storage.entry if listing is None else listing.get
    found = _finished_markers(storage, header, group, entry, since)
    if group is None:
        return found
    base = _finished_markers(storage, header, None, entry, since)
    return {n: one for n, one in found.items() if n in base and markers.latents_digest(base[n]) == one.base}


def _finished_markers(
    storage: Storage, header: Header, group: str | None, entry: Callable[[str], Entry | None], since: int
) -> dict[int, markers.Marker]:
    key = fingerprint_of(storage, header, group)
    numbers = [number for number in markers.marked_shards(storage, key) if since <= number < header.num_shards]
    found = read_each(lambda shard: _finished_marker(storage, header, shard, group, key, entry), numbers)
    return {marker.shard: marker for marker in found if marker is not None}


def _finished_marker(
    storage: Storage, header: Header, shard: int, group: str | None, key: str, entry: Callable[[str], Entry | None]
) -> markers.Marker | None:
    marker = markers.read_marker(storage, key, shard)
    if marker is None or marker.samples != header.count(shard):
        return None
    keys = [layout.object_key(spec, shard) for spec in layout.objects_of(header, group, shard)]
    return marker if markers.is_whole(marker, keys, entry) else None


def fingerprint_of(storage: Storage, header: Header, group: str | None) -> str:
    """Return the fingerprint of the store or of a group, which its markers name. LicError for no such group."""
    return header.fingerprint if group is None else str(group_attributes(storage, group)["fingerprint"])


def invalidate_shard(path: Path | str | Storage, shard: int, group: str | None = None) -> None:
    """Remove a shard's marker, so that the next job writes the shard again (after `verify` found damage, say)."""
    storage = open_storage(path)
    header = layout.read_header(storage)
    markers.remove_marker(storage, fingerprint_of(storage, header, group), shard)


def sample_rows(crops: Sequence[Crop], source_bytes: int) -> dict[str, NDArray[Any]]:
    """Return the rows of `samples/*` that the plan knows, one for each crop."""

    def text(values: list[str], width: int) -> NDArray[np.uint8]:
        encoded = np.array([value.encode() for value in values], dtype=f"S{width}")
        return encoded.view(np.uint8).reshape(len(values), width)

    return {
        "samples/source": text([crop.source for crop in crops], source_bytes),
        "samples/digest": text([crop.digest for crop in crops], layout.DIGEST_BYTES),
        "samples/crop_y": np.array([crop.crop_y for crop in crops], np.int32),
        "samples/crop_x": np.array([crop.crop_x for crop in crops], np.int32),
        "samples/flip": np.array([crop.flip for crop in crops], np.bool_),
        "samples/held_out": np.array([crop.held_out for crop in crops], np.bool_),
    }


def _plan_attributes(plan: Plan, store_y: bool) -> dict[str, Any]:
    return {
        "num_samples": plan.num_samples,
        "num_held_out": plan.num_held_out,
        "shard": plan.shard,
        "batch": plan.batch,
        "geometry": asdict(plan.geometry),
        "store_y": store_y,
        "source_bytes": plan.source_bytes,
        "identity": plan.identity,
    }


def put_documents(storage: Storage, specs: Sequence[ArraySpec], header: Header) -> None:
    """Put every array's `zarr.json` that is missing, does not parse, or describes another array or fewer shards."""
    for spec in specs:
        key = f"{spec.name}/zarr.json"
        document = array_document(spec, header)
        found = storage.get_json(key)
        if not documents.same_array(found, document):
            storage.put(key, documents.grown_array(found, document))


def array_document(spec: ArraySpec, header: Header) -> bytes:
    """Return the `zarr.json` that an array of the store must have."""
    names = {"names": FAULTS, "unwritten": layout.UNWRITTEN} if spec.name == "samples/status" else {}
    return layout.array_document(spec, header.num_shards, header.shard, names, header.blocks())


@lru_cache(maxsize=64)
def _stored_document(storage: Storage, array: str, key: str) -> bytes:
    """Return an array's stored `zarr.json`, by which its shards are encoded; `key` keys the lru_cache."""
    try:
        return storage.get(f"{array}/zarr.json")
    except FileNotFoundError:
        raise LicError(f"{storage} has lost {array}/zarr.json", hint="build again: it is put back") from None


def _require_same(refusal: str, found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    if lines := differences(found, expected):
        raise LicError(f"{refusal}: {'; '.join(lines)}", hint="give this one another path or name, or remove it")


def group_attributes(storage: Storage, name: str) -> dict[str, Any]:
    """Return {"identity", "fingerprint", "provenance" ...} of a group. Raises LicError for no such group."""
    attributes = layout.read_group(storage, name)
    if attributes is None:
        known = ", ".join(layout.group_names(storage)) or "none"
        raise LicError(f"no group '{name}' in {storage}", hint=f"it has: {known}")
    return attributes


def _check_arrays(arrays: Mapping[str, NDArray[Any]], expected: Sequence[ArraySpec], count: int) -> None:
    names = {spec.name for spec in expected}
    if not expected or names != arrays.keys():
        missing, unknown = sorted(names - arrays.keys()), sorted(arrays.keys() - names)
        raise ValueError(f"a shard is written whole: missing {missing}, unknown {unknown}")
    for spec in expected:
        array = arrays[spec.name]
        if array.shape != (count, *spec.shape) or array.dtype != np.dtype(spec.dtype):
            wanted = f"{spec.dtype} {(count, *spec.shape)}"
            raise ValueError(f"{spec.name}: {array.dtype} {array.shape}, should be {wanted}")
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise ValueError(f"{spec.name}: values that are not finite")


def _write(
    storage: Storage,
    header: Header,
    shard: int,
    group: str | None,
    arrays: Mapping[str, NDArray[Any]],
    status: NDArray[np.uint8],
    seconds: Mapping[str, float],
    base: str = "",
) -> markers.Marker:
    """Write the arrays of the base or of a group. A finished shard of the same bytes is left untouched."""
    faulty, key = status != 0, fingerprint_of(storage, header, group)
    specs = layout.objects_of(header, group, shard)
    objects: dict[str, bytes] = {}
    for spec in specs:
        values = arrays[spec.name]
        if spec.widens:
            values = values[:, spec.block * spec.shape[0] : (spec.block + 1) * spec.shape[0]]
        if faulty.any() and not spec.name.startswith("samples/"):
            values = values.copy()
            values[faulty] = 0
        document = _stored_document(storage, spec.name, f"{header.fingerprint} {header.num_shards}")
        rows = _padded(values, spec, header.shard)
        objects[layout.object_key(spec, shard)] = layout.encode(document, shard, rows, spec.block)
    codes, counts = np.unique(status[faulty], return_counts=True)
    marker = markers.Marker(
        fingerprint=key,
        shard=shard,
        samples=len(status),
        faulty=int(faulty.sum()),
        objects={name: markers.size_and_digest(data) for name, data in objects.items()},
        faults={} if group else {FAULTS[code]: int(count) for code, count in zip(codes, counts, strict=True)},
        bits=_sum_over_good(specs, arrays, "bits", ~faulty),
        distortion=_sum_over_good(specs, arrays, "distortion", ~faulty),
        base=base,
        seconds={name: float(value) for name, value in seconds.items()},
    )
    with markers.shard_lock(storage, key, shard):
        stored = _finished_marker(storage, header, shard, group, key, storage.entry)
        if stored is not None and (stored.objects, stored.base) == (marker.objects, base):
            return stored
        markers.remove_marker(storage, key, shard)
        storage.put_all(objects)
        markers.write_marker(storage, marker)
    return marker


def _sum_over_good(
    specs: Sequence[ArraySpec], arrays: Mapping[str, NDArray[Any]], what: str, good: NDArray[np.bool_]
) -> float | None:
    for spec in specs:
        if spec.name.endswith(f"/{what}"):
            return float(arrays[spec.name][good].astype(np.float64).sum())
    return None


def _padded(values: NDArray[Any], spec: ArraySpec, length: int) -> NDArray[Any]:
    if len(values) == length:
        return values
    padded = np.full((length, *spec.shape), spec.fill_value, spec.dtype)
    padded[: len(values)] = values
    return padded
