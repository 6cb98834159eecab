"""Markers: a shard is done when its marker says so and its objects have the recorded sizes.

The order makes it safe to stop at any point: the old marker is removed, the objects are put whole, and the new marker
is put last. Whatever is killed in between leaves a shard without a marker, which the next job writes again.
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

    `objects` maps the key of each object in the store to {"bytes", "sha256"}. `samples` counts without
    padding, `faulty` those of them with a status other than 0, `faults` these by reason (of the base arrays). `bits`
    and `distortion` are sums over the good samples, and `base` is the digest of the latents that they were made from
    (of a group; see `latents_digest`). `seconds` is what the builder measured, by stage, and, alone here, may differ
    between equal stores.
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
    """_progress/<first 8 digits of the fingerprint>/<shard>.json"""
    return f"{FOLDER}/{fingerprint[:8]}/{shard}.json"


def read_marker(storage: Storage, fingerprint: str, shard: int) -> Marker | None:
    """The marker of a shard; None where none is there that parses and names this fingerprint and shard."""
    try:
        marker = _MARKER.validate_json(storage.get(marker_key(fingerprint, shard)), strict=True)
    except (FileNotFoundError, NotADirectoryError, ValidationError):
        return None
    return marker if (marker.fingerprint, marker.shard) == (fingerprint, shard) else None


def marked_shards(storage: Storage, fingerprint: str) -> list[int]:
    """The shards that have a marker of some kind, ascending."""
    names = storage.names(f"{FOLDER}/{fingerprint[:8]}")
    return sorted(int(name[:-5]) for name in names if re.fullmatch(r"[0-9]{1,12}\.json", name))


def latents_digest(marker: Marker) -> str:
    """sha256 over the digests of y, z and status in a shard's base marker: what a group's indices depend on."""
    used = ("latents/", "samples/status/")
    lines = [f"{key} {entry['sha256']}" for key, entry in sorted(marker.objects.items()) if key.startswith(used)]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def fault_counts(found: Iterable[Marker]) -> dict[str, int]:
    """Samples set aside by reason, over base markers."""
    counts: Counter[str] = Counter()
    for marker in found:
        counts.update(marker.faults)
    return dict(counts)


def is_whole(marker: Marker, keys: Collection[str], entry: Callable[[str], Entry | None]) -> bool:
    """Whether a marker names just these objects, and each of them has the recorded size."""
    if set(keys) != marker.objects.keys():
        return False
    found = ((entry(key), recorded.get("bytes")) for key, recorded in marker.objects.items())
    return all(there is not None and there.bytes == size for there, size in found)


def write_marker(storage: Storage, marker: Marker) -> None:
    """Publish a marker: whole, on disk, or not at all."""
    text = json.dumps(asdict(marker), sort_keys=True, indent=1)
    storage.put(marker_key(marker.fingerprint, marker.shard), text.encode())


def remove_marker(storage: Storage, fingerprint: str, shard: int) -> None:
    """Declare a shard not done."""
    storage.delete(marker_key(fingerprint, shard))


def size_and_digest(data: bytes) -> dict[str, Any]:
    """What a marker records of an object: {"bytes", "sha256"}."""
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def shard_lock(storage: Storage, fingerprint: str, shard: int) -> AbstractContextManager[None]:
    """Be the only writer of a shard: waits for another process that writes it.

    An engine gives each shard to one worker; this guards against two jobs on one store, and against a worker that was
    given up but still writes. On a place without locks the engine's rule stands alone, and two writers of one shard
    put the same bytes.
    """
    return storage.lock(f"{FOLDER}/{fingerprint[:8]}/{shard}.lock")
