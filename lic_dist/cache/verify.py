"""Verification: read every object of a store and compare it with its shard's marker."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from lic_dist.cache import layout, markers
from lic_dist.cache.layout import ArraySpec, Header
from lic_dist.cache.place import Place, place_of
from lic_dist.progress import Progress

What = Literal["missing", "zero", "torn", "altered"]


@dataclass(frozen=True)
class Finding:
    """One thing wrong with a store.

    `array` is an array's path, "_progress/<fingerprint8>" for the marker itself, or the key of what belongs to no
    shard (then `shard` is -1); `group` is the quantized group, "" for the base arrays.
    `what`:

        missing   no object, or no marker: the shard is not written
        zero      the object is there, but all zero bytes, or decodes to nothing but zeros
        torn      the object is cut or only partly written: it does not decode; or the marker does not parse
        altered   a whole object with other contents than were written
    """

    shard: int
    array: str
    what: What
    group: str = ""


def verify(path: Path | str | Place, options: Mapping[str, str] | None = None) -> list[Finding]:
    """Compare every object with the sha256 in its marker; empty when all shards are there and unharmed.

    Reads the whole store once, in parallel; findings are in order of group, shard and array. What belongs to no shard
    (an array's or group's `zarr.json`, a group's record) has shard -1.

    Raises:
        LicError: no store, or not one of ours.
    """
    place = place_of(path, options)
    header = layout.read_header(place)
    base = [*layout.sample_arrays(header.source_bytes), *layout.base_arrays(header.geometry, header.store_y)]
    parts: list[tuple[str, str, Sequence[ArraySpec]]] = [("", header.fingerprint, base)]
    findings: list[Finding] = []
    for group in layout.group_names(place):
        attributes = layout.read_attributes(place, f"quantized/{group}") or {}
        parts.append((group, str(attributes.get("fingerprint", "")), layout.group_arrays(group, header.geometry)))
        findings += _verify_record(place, group, attributes)
    for group, _, specs in parts:
        findings += [found for spec in specs for found in _verify_document(place, group, spec)]
    work = [(group, key, shard, specs) for group, key, specs in parts for shard in range(header.num_shards)]
    with (
        ThreadPoolExecutor(os.cpu_count() or 1) as pool,
        Progress("verifying", total=len(work), unit="shard") as bar,
    ):
        for found in pool.map(lambda item: _verify_shard(place, header, *item), work):
            findings += found
            bar.advance(1, findings=len(findings))
    return findings


def _verify_record(place: Place, group: str, attributes: Mapping[str, Any]) -> list[Finding]:
    key = f"quantized/{group}/record.json"
    recorded = attributes.get("record_json_sha256")
    try:
        digest = hashlib.sha256(place.get(key)).hexdigest()
    except FileNotFoundError:
        return [Finding(-1, key, "missing", group)]
    return [] if digest == recorded else [Finding(-1, key, "altered", group)]


def _verify_document(place: Place, group: str, spec: ArraySpec) -> list[Finding]:
    key = f"{spec.name}/zarr.json"
    document = place.get_json(key)
    if document is None:
        return [Finding(-1, key, "missing" if place.entry(key) is None else "torn", group)]
    found = (document.get("data_type"), document.get("shape", [None])[1:], document.get("node_type"))
    expected = (spec.dtype, list(spec.shape), "array")
    return [] if found == expected else [Finding(-1, key, "altered", group)]


def _verify_shard(
    place: Place, header: Header, group: str, key: str, shard: int, specs: Sequence[ArraySpec]
) -> list[Finding]:
    marker = markers.read_marker(place, key, shard)
    if marker is None:
        there = place.entry(markers.marker_key(key, shard)) is not None
        return [Finding(shard, f"{markers.FOLDER}/{key[:8]}", "torn" if there else "missing", group)]
    findings = []
    for spec in specs:
        name = layout.object_key(spec, shard)
        wrong = _compare(place, header, spec, shard, name, marker.objects.get(name, {}))
        if wrong is not None:
            findings.append(Finding(shard, spec.name, wrong, group))
    return findings


def _compare(
    place: Place, header: Header, spec: ArraySpec, shard: int, name: str, entry: dict[str, Any]
) -> What | None:
    try:
        data = place.get(name)
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
        values = np.asarray(layout.open_array(place, spec.name)[first : first + header.shard])
    except Exception:  # whatever a codec makes of broken bytes; which error it is depends on the codec
        return "torn" if _is_cut(data, entry) else "altered"
    return "altered" if values.any() else "zero"


def _is_cut(data: bytes, entry: dict[str, Any]) -> bool:
    """Another length than was written, or zeros at the end, where a shard's index and its checksum belong."""
    return len(data) != entry.get("bytes") or not any(data[-4:])
