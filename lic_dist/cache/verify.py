"""Verification: read every object of a store and compare it with its shard's marker."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from lic_dist.cache import layout, markers
from lic_dist.cache.layout import ArraySpec, Header
from lic_dist.progress import Progress

What = Literal["missing", "zero", "torn", "altered"]


@dataclass(frozen=True)
class Finding:
    """One thing wrong with a store.

    `array` is an array's path, or "_progress/<fingerprint8>" for the marker itself; `group` is the
    quantized group, "" for the base arrays (what `store.forget` needs to have the shard written again).
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


def verify(path: Path | str) -> list[Finding]:
    """Compare every object with the sha256 in its marker; empty when all shards are there and unharmed.

    Reads the whole store once, in parallel; findings are in order of group, shard and array.

    Raises:
        LicError: no store, or not one of ours.
    """
    path = Path(path)
    header = layout.read_header(path)
    base = [*layout.sample_arrays(header.source_bytes), *layout.base_arrays(header.geometry, header.store_y)]
    parts: list[tuple[str, str, Sequence[ArraySpec]]] = [("", header.fingerprint, base)]
    for group in layout.group_names(path):
        attributes = layout.read_attributes(path / "quantized" / group) or {}
        parts.append((group, str(attributes.get("fingerprint", "")), layout.group_arrays(group, header.geometry)))
    work = [(group, key, shard, specs) for group, key, specs in parts for shard in range(header.num_shards)]
    findings: list[Finding] = []
    with (
        ThreadPoolExecutor(os.cpu_count() or 1) as pool,
        Progress("verifying", total=len(work), unit="shard") as bar,
    ):
        for found in pool.map(lambda item: _verify_shard(path, header, *item), work):
            findings += found
            bar.advance(1, findings=len(findings))
    return findings


def _verify_shard(
    path: Path, header: Header, group: str, key: str, shard: int, specs: Sequence[ArraySpec]
) -> list[Finding]:
    marker = markers.read_marker(path, key, shard)
    if marker is None:
        what: What = "torn" if markers.marker_path(path, key, shard).exists() else "missing"
        return [Finding(shard, f"{markers.FOLDER}/{key[:8]}", what, group)]
    findings = []
    for spec in specs:
        file = layout.object_path(path, spec, shard)
        entry = marker.objects.get(file.relative_to(path).as_posix(), {})
        wrong = _compare(path, header, spec, shard, file, entry)
        if wrong is not None:
            findings.append(Finding(shard, spec.name, wrong, group))
    return findings


def _compare(path: Path, header: Header, spec: ArraySpec, shard: int, file: Path, entry: dict[str, Any]) -> What | None:
    try:
        data = file.read_bytes()
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
        values = np.asarray(layout.open_array(path, spec.name)[first : first + header.shard])
    except Exception:  # whatever a codec makes of broken bytes; which error it is depends on the codec
        return "torn" if _is_cut(data, entry) else "altered"
    return "altered" if values.any() else "zero"


def _is_cut(data: bytes, entry: dict[str, Any]) -> bool:
    """Another length than was written, or zeros at the end, where a shard's index and its checksum belong."""
    return len(data) != entry.get("bytes") or not any(data[-4:])
