"""Markers: a shard is finished when it has a marker and its objects have the sizes that the marker records.

The order of writing makes it safe to stop at any point: the old marker is removed, each object is put whole, and the
new marker is put last. A kill in between leaves a shard without a marker, which the next job writes again.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from typing import Any

from pydantic import TypeAdapter, ValidationError

from lic_dist.cache.storage import Entry, Storage

FOLDER = "_progress"


@dataclass(frozen=True)
class Marker:
    """What is known of a finished shard.

    `objects` maps the key of each object in the store to {"bytes", "sha256"}. `samples` counts without padding,
    `faulty` those with a status other than 0, and `faults` counts these by reason (base arrays only). `bits` and
    `distortion` are sums over the good samples, and `base` is the digest of the latents that they were made from
    (groups only; see `latents_digest`). `seconds` is the time by stage that the builder measured; it is the only field
    that may differ between equal stores.
    """

    fingerprint: str
    shard: int
    samples: int
    faulty: int
    objects: dict[str, dict[str, Any]]
    faults: dict[str, int] = field(default_factory=dict)
    bits: float | None = None
    distortion: float | None = None
    base: str = ""
    seconds: dict[str, float] = field(default_factory=dict)


_MARKER = TypeAdapter(Marker)


def marker_key(fingerprint: str, shard: int) -> str:
    """Return _progress/<first 8 digits of the fingerprint>/<shard>.json"""
    return f"{FOLDER}/{fingerprint[:8]}/{shard}.json"


def read_marker(storage: Storage, fingerprint: str, shard: int) -> Marker | None:
    """Return the marker of a shard; None where there is none that parses and names this fingerprint and shard."""
    try:
        marker = _MARKER.validate_json(storage.get(marker_key(fingerprint, shard)), strict=True)
    except (FileNotFoundError, NotADirectoryError, ValidationError):
        return None
    return marker if (marker.fingerprint, marker.shard) == (fingerprint, shard) else None


def marked_shards(storage: Storage, fingerprint: str) -> list[int]:
    """Return the shards that have a marker file, valid or not, ascending."""
    names = storage.names(f"{FOLDER}/{fingerprint[:8]}")
    return sorted(int(name[:-5]) for name in names if re.fullmatch(r"[0-9]{1,12}\.json", name))


def latents_digest(marker: Marker) -> str:
    """Return the sha256 over the digests of y, z and status in a base marker: what a group's indices depend on."""
    used = ("latents/", "samples/status/")
    lines = [f"{key} {entry['sha256']}" for key, entry in sorted(marker.objects.items()) if key.startswith(used)]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def fault_counts(found: Iterable[Marker]) -> dict[str, int]:
    """Return the number of samples set aside by reason, over base markers."""
    counts: Counter[str] = Counter()
    for marker in found:
        counts.update(marker.faults)
    return dict(counts)


def is_whole(marker: Marker, keys: Collection[str], entry: Callable[[str], Entry | None]) -> bool:
    """Return whether a marker names exactly these objects, and each has the recorded size."""
    if set(keys) != marker.objects.keys():
        return False
    found = ((entry(key), recorded.get("bytes")) for key, recorded in marker.objects.items())
    return all(there is not None and there.bytes == size for there, size in found)


def write_marker(storage: Storage, marker: Marker) -> None:
    """Put a marker, whole and durably."""
    text = json.dumps(asdict(marker), sort_keys=True, indent=1)
    storage.put(marker_key(marker.fingerprint, marker.shard), text.encode())


def remove_marker(storage: Storage, fingerprint: str, shard: int) -> None:
    """Remove a shard's marker, so that the shard is no longer finished."""
    storage.delete(marker_key(fingerprint, shard))


def size_and_digest(data: bytes) -> dict[str, Any]:
    """Return what a marker records of an object: {"bytes", "sha256"}."""
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def shard_lock(storage: Storage, fingerprint: str, shard: int) -> AbstractContextManager[None]:
    """Hold the lock of a shard as its only writer; waits for another process that writes it.

    An engine gives each shard to one worker. The lock guards against two jobs on one store, and against a worker that
    was given up but still writes. Storage without locks relies on the engine alone; two writers of one shard put the
    same bytes.
    """
    return storage.lock(f"{FOLDER}/{fingerprint[:8]}/{shard}.lock")
