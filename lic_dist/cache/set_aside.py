"""Photos that a store leaves out, by name and reason, from the scan's manifest and from the written shards."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from lic_dist.cache import layout, store
from lic_dist.cache.reader import LatentCache
from lic_dist.cache.storage import Storage
from lic_dist.data.photo import FAULTS
from lic_dist.data.photo_files import printable

if TYPE_CHECKING:
    from lic_dist.cache.markers import Marker
    from lic_dist.data.manifest import Manifest

MANIFEST = ".manifest.parquet"  # suffix of the manifest beside a store


def read_manifest(storage: Storage) -> Manifest | None:
    """Return the manifest of the last scan for a store; None where there was none.

    Raises:
        LicError: a damaged manifest, one of another version, or storage without a place for one.
    """
    from lic_dist.data.manifest import Manifest  # loads Arrow

    around, key = storage.sibling(MANIFEST)
    return Manifest.from_bytes(around.get(key)) if around.entry(key) is not None else None


def set_aside(
    storage: Storage,
    photos: Manifest | None,
    crop: int | None = None,
    finished: Mapping[int, Marker] | None = None,
) -> dict[str, str]:
    """Return {photo: reason}, sorted by name, from a manifest and from the samples of the written shards.

    `crop` is the side in pixels that photos must have; an existing store's own crop size replaces it. `finished` are
    its `finished_markers`, for a caller that has them.

    Raises:
        LicError: a shard that does not decode.
    """
    found: dict[str, str] = {}
    if layout.read_attributes(storage) is not None:
        cache = LatentCache(storage, header=layout.read_header(storage))
        crop = cache.header.photo_side
        if finished is None:
            finished = store.finished_markers(storage, cache.header)
        cache.take_as_written(finished)
        for shard, marker in finished.items():
            if marker.faulty:
                rows = cache.shard(shard, ("samples/source", "samples/status"))
                for row in np.flatnonzero(rows["samples/status"]).tolist():
                    name = rows["samples/source"][row].tobytes().rstrip(b"\0").decode("utf-8", "replace")
                    found[name] = FAULTS[rows["samples/status"][row]]
    if photos is not None:
        found |= photos.reasons(crop or 0)
    return dict(sorted(found.items()))


def photo_lines(found: Mapping[str, str], most: int | None = None) -> list[str]:
    """Return `name: reason` for each photo, up to `most` of them, and the number of those left."""
    named = [f"{printable(name)}: {reason}" for name, reason in list(found.items())[:most]]
    left = len(found) - len(named)
    return [*named, f"and {left} more: `lic-dist cache faults` names all"] if left else named
