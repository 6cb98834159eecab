"""Markers: a shard is done when its marker says so and its objects have the recorded sizes.

The order makes it safe to stop at any point: the old marker is removed, the objects are put whole, and the new marker
is put last. Whatever is killed in between leaves a shard without a marker, which the next job writes again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from typing import Any

from lic_dist.cache.place import Entry, Place

FOLDER = "_progress"
READERS = 16  # markers read at once


@dataclass(frozen=True)
class Marker:
    """What is known of a finished shard.

    `objects` maps the key of each object in the store to {"bytes", "sha256"}. `samples` counts without
    padding, `faulty` those of them with a status other than 0. `bits` and `distortion` are sums over the
    good samples, None for the base arrays. `seconds` is what the builder measured and, alone here, may
    differ between equal stores.
    """

    fingerprint: str
    shard: int
    samples: int
    faulty: int
    objects: dict[str, dict[str, Any]]
    bits: float | None = None
    distortion: float | None = None
    seconds: Any = 0.0


def marker_key(fingerprint: str, shard: int) -> str:
    """_progress/<first 8 digits of the fingerprint>/<shard>.json"""
    return f"{FOLDER}/{fingerprint[:8]}/{shard}.json"


def read_marker(place: Place, fingerprint: str, shard: int) -> Marker | None:
    """The marker of a shard; None where none is there that parses and names this fingerprint and shard."""
    content = place.get_json(marker_key(fingerprint, shard))
    try:
        marker = Marker(**content)
    except TypeError:
        return None
    named = (marker.fingerprint, marker.shard) == (fingerprint, shard)
    return marker if named and isinstance(marker.objects, dict) else None


def is_done(place: Place, fingerprint: str, shard: int) -> bool:
    """Whether the shard has a marker and every object that it names has the recorded size."""
    marker = read_marker(place, fingerprint, shard)
    return marker is not None and all(_fits(place.entry(key), entry) for key, entry in marker.objects.items())


def done(place: Place, fingerprint: str, shards: range, listing: Mapping[str, Entry]) -> dict[int, Marker]:
    """Those of the shards that are done, by number, ascending; `listing` is of their arrays at least."""
    names = place.names(f"{FOLDER}/{fingerprint[:8]}")
    numbers = sorted(int(name.removesuffix(".json")) for name in names if name.removesuffix(".json").isdecimal())
    with ThreadPoolExecutor(READERS) as pool:
        found = pool.map(lambda shard: read_marker(place, fingerprint, shard), (n for n in numbers if n in shards))
        return {
            marker.shard: marker
            for marker in found
            if marker and all(_fits(listing.get(key), entry) for key, entry in marker.objects.items())
        }


def _fits(found: Entry | None, recorded: dict[str, Any]) -> bool:
    return found is not None and found.bytes == recorded.get("bytes")


def write_marker(place: Place, marker: Marker) -> None:
    """Publish a marker: whole, on disk, or not at all."""
    text = json.dumps(asdict(marker), sort_keys=True, indent=1)
    place.put(marker_key(marker.fingerprint, marker.shard), text.encode())


def remove_marker(place: Place, fingerprint: str, shard: int) -> None:
    """Declare a shard not done."""
    place.delete(marker_key(fingerprint, shard))


def describe(data: bytes) -> dict[str, Any]:
    """What a marker records of an object: {"bytes", "sha256"}."""
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def owner(place: Place, fingerprint: str, shard: int) -> AbstractContextManager[None]:
    """Be the only writer of a shard: waits for another process that writes it.

    An engine gives each shard to one worker; this guards against two jobs on one store, and against a worker that was
    given up but still writes. On a place without locks the engine's rule stands alone, and two writers of one shard
    put the same bytes.
    """
    return place.lock(f"{FOLDER}/{fingerprint[:8]}/{shard}.lock")
