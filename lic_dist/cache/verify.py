"""Verify a store: read every object and compare it with its shard's marker."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np

from lic_dist.cache import chain, documents, layout, markers, store
from lic_dist.cache.layout import ArraySpec, Header
from lic_dist.cache.storage import Storage
from lic_dist.cache.storages import open_storage
from lic_dist.errors import LicError
from lic_dist.progress import Progress

AHEAD = 4096  # shards handed to the readers at once
What = Literal["missing", "zero", "torn", "altered"]


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong with a store.

    `array` is an array's path, "_progress/<fingerprint8>" for the marker itself, or the key of a document that belongs
    to no shard (then `shard` is -1). `group` is the quantized group, "" for the base arrays. `what` is one of:

        missing   no object, or no marker: the shard is not written
        zero      the object exists, but is all zero bytes, or decodes to nothing but zeros
        torn      the object is cut or only partly written: it does not decode; or the marker does not parse
        altered   a whole object whose content is not what was written
    """

    shard: int
    array: str
    what: What
    group: str = ""


def verify(path: Path | str | Storage, options: Mapping[str, str] | None = None) -> list[Finding]:
    """Compare every object with the sha256 in its marker; return an empty list if all shards are written and intact.

    The whole store is read once, in parallel. Findings are in order of group, shard and array. Documents that belong to
    no shard (an array's or group's `zarr.json`, a group's record, manifests and masks of instalments) have shard -1.

    Raises:
        LicError: no store, or another kind of Zarr group.
    """
    storage = open_storage(path, options)
    header = layout.read_header(storage)
    findings = [found for group in layout.group_folders(storage) for found in _verify_group(storage, group)]
    known: list[str | None] = [None, *layout.group_names(storage)]
    findings += [found for group in known for found in _verify_documents(storage, header, group)]
    findings += _verify_chain(storage, header)
    total = len(known) * header.num_shards
    with (
        ThreadPoolExecutor(os.cpu_count() or 1) as pool,
        Progress("verifying", total=total, unit="shard") as bar,
    ):
        work = ((group, shard) for group in known for shard in range(header.num_shards))
        while part := list(islice(work, AHEAD)):
            for found in pool.map(lambda item: verify_shard(storage, header, *item), part):
                findings += found
                bar.advance(1, findings=len(findings))
    return findings


def _verify_group(storage: Storage, group: str) -> list[Finding]:
    """Return the findings on a group's `zarr.json` and its record."""
    node = f"quantized/{group}"
    attributes = layout.read_group(storage, group)
    if attributes is None:
        return [Finding(-1, f"{node}/zarr.json", _document_fault(storage, f"{node}/zarr.json"), group)]
    try:
        digest = hashlib.sha256(storage.get(f"{node}/record.json")).hexdigest()
    except FileNotFoundError:
        return [Finding(-1, f"{node}/record.json", "missing", group)]
    if digest == attributes.get("record_json_sha256"):
        return []
    return [Finding(-1, f"{node}/record.json", "altered", group)]


def _verify_documents(storage: Storage, header: Header, group: str | None) -> list[Finding]:
    """Return the findings on the `zarr.json` of every array and, for the base, of the groups that hold them."""
    findings = []
    header = _grown_to(storage, header, group)
    for spec in layout.arrays_of(header, group):
        key = f"{spec.name}/zarr.json"
        if not documents.same_array(storage.get_json(key), store.array_document(spec, header)):
            findings.append(Finding(-1, key, _document_fault(storage, key), group or ""))
    if group is None:
        for name in ("latents", "quantized", "samples"):
            if layout.read_attributes(storage, name) is None:
                findings.append(Finding(-1, f"{name}/zarr.json", _document_fault(storage, f"{name}/zarr.json")))
    return findings


def _grown_to(storage: Storage, header: Header, group: str | None) -> Header:
    """Return the header of the snapshot that the arrays of the base, or of a group, must hold: the last with shards."""
    marked = markers.marked_shards(storage, store.fingerprint_of(storage, header, group))
    last = max((shard for shard in marked if shard < header.num_shards), default=0)
    written = header.shards.instalment(last)
    return header.at(written if group else max(written, header.complete.snapshot))


def _verify_chain(storage: Storage, header: Header) -> list[Finding]:
    """Return the findings on the manifests and masks of a store that has grown."""
    findings = []
    for one in header.chain if len(header.chain) > 1 else ():
        key = chain.manifest_key(one.manifest_sha256)
        if one.num_samples and not _is_manifest(storage, key, one.manifest_sha256):
            findings.append(Finding(-1, key, "missing" if storage.entry(key) is None else "altered"))
        try:
            chain.masked_by(storage, one)
        except LicError:
            key = chain.mask_key(one.mask_sha256)
            findings.append(Finding(-1, key, "missing" if storage.entry(key) is None else "altered"))
    return findings


def _is_manifest(storage: Storage, key: str, digest: str) -> bool:
    from lic_dist.data.manifest import Manifest  # loads Arrow

    try:
        return Manifest.from_bytes(storage.get(key)).digest == digest
    except (FileNotFoundError, LicError):
        return False


def _document_fault(storage: Storage, key: str) -> What:
    if storage.entry(key) is None:
        return "missing"
    return "torn" if storage.get_json(key) is None else "altered"


def verify_shard(storage: Storage, header: Header, group: str | None, shard: int) -> list[Finding]:
    """Return the findings on one shard, of the base or of a group."""
    key = store.fingerprint_of(storage, header, group)
    where = f"{markers.FOLDER}/{key[:8]}"
    marker = markers.read_marker(storage, key, shard)
    if marker is None:
        there = storage.entry(markers.marker_key(key, shard)) is not None
        return [Finding(shard, where, "torn" if there else "missing", group or "")]
    findings = []
    if group is not None:
        base = markers.read_marker(storage, header.fingerprint, shard)
        if base is not None and markers.latents_digest(base) != marker.base:  # made from other latents
            findings.append(Finding(shard, where, "altered", group))
    for spec in layout.objects_of(header, group, shard):
        name = layout.object_key(spec, shard)
        wrong = _compare(storage, header, spec, shard, name, marker.objects.get(name, {}))
        if wrong is not None:
            findings.append(Finding(shard, spec.name, wrong, group or ""))
    return findings


def _compare(
    storage: Storage, header: Header, spec: ArraySpec, shard: int, name: str, entry: dict[str, Any]
) -> What | None:
    try:
        data = storage.get(name)
    except FileNotFoundError:
        return "missing"
    if hashlib.sha256(data).hexdigest() == entry.get("sha256"):
        return None
    if not data:  # Zarr would read it as zeros
        return "torn"
    if not any(data):
        return "zero"
    try:
        first = shard * header.shard
        values = np.asarray(layout.open_array(storage, spec.name)[first : first + header.shard])
    except Exception:  # the error for broken bytes depends on the codec
        return "torn" if _is_truncated(data, entry) else "altered"
    return "altered" if values.any() else "zero"


def _is_truncated(data: bytes, entry: dict[str, Any]) -> bool:
    """Return whether the length differs from the recorded one, or zeros end the object, where index and checksum
    belong.
    """
    return len(data) != entry.get("bytes") or not any(data[-4:])
