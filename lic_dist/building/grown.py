"""What has become of a store's photos, and the plan of a store that grows by them.

A photo is its content: one under another name, or a copy, is the one that the store has. So photos are compared by
digest, those of the folder with those of every instalment, whose manifests the store keeps. Of a store that has never
grown they are read off its samples. Photos that vanished stay in the store; on request they are masked.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from lic_dist.cache import chain, store
from lic_dist.cache.growth import Photos
from lic_dist.cache.layout import DIGEST_BYTES, Header
from lic_dist.cache.reader import LatentCache
from lic_dist.cache.storage import Storage
from lic_dist.data.crops import Crops
from lic_dist.data.manifest import SCHEMA, Manifest
from lic_dist.data.photo_files import printable
from lic_dist.errors import LicError

NAMED = 10  # photos that vanished or changed, which a line names

PlanOf = Callable[[Manifest], Crops]  # the samples of photos by a store's rule
Known = tuple[Manifest, Crops]  # the photos of an instalment, and their samples


@dataclass(frozen=True)
class Changes:
    """How a folder differs from what a store has: usable photos that are `added`, as large as a crop; paths of those
    that vanished, or whose content is another now (which is `added` then); how many lie elsewhere; and the numbers of
    the samples of those gone, without the ones that are masked already.
    """

    added: Manifest
    vanished: tuple[str, ...]
    changed: tuple[str, ...]
    moved: int
    gone: NDArray[np.int64]

    def __bool__(self) -> bool:
        """Whether there is something to append or to mask."""
        return len(self.added) + len(self.gone) > 0

    def __str__(self) -> str:
        counts = (len(self.added), len(self.vanished), len(self.changed))
        said = [f"{count} {what}" for count, what in zip(counts, ("added", "vanished", "changed"), strict=True)]
        return ", ".join(said + ([f"{self.moved} moved"] if self.moved else []))

    def lines(self) -> list[str]:
        """Return the photos that are gone in lines."""
        found = []
        for what, paths in (("vanished", self.vanished), ("changed", self.changed)):
            found += [f"{what}: {printable(path)}" for path in paths[:NAMED]]
            found += [f"{what}: {len(paths) - NAMED} more"] if len(paths) > NAMED else []
        return found


def known_photos(
    storage: Storage, header: Header, before: Manifest | None, photos: Manifest, plan_of: PlanOf
) -> list[Known]:
    """Return the photos and samples of every instalment; `before` is the last scan's manifest, `photos` that of now.

    Raises:
        LicError: one is lost or altered; or a store that has never grown is not wholly built, or its samples do not
            follow from its photos.
    """
    first = header.chain[0].manifest_sha256
    if len(header.chain) == 1 and storage.entry(chain.manifest_key(first)) is None:
        if store.pending(storage, header=header, since=header.num_shards):
            hint = "build it of the photos it was begun with first"
            raise LicError(f"{storage} is of other photos and not wholly built", hint=hint)
        if before is None or before.digest != first:
            return [_read_off(storage, header, photos, plan_of)]
        planned = plan_of(before)
        return [(_sized(planned.paths, planned.digests, photos, header), planned)]
    found = [_stored(storage, one.manifest_sha256) if one.num_samples else Manifest.of([]) for one in header.chain]
    known = [(manifest, plan_of(manifest)) for manifest in found]
    if [len(crops) for _, crops in known] != [one.num_samples for one in header.chain]:
        raise LicError(f"the samples of {storage} do not follow from its photos", hint="`lic-dist cache verify`")
    return known


def _stored(storage: Storage, digest: str) -> Manifest:
    key = chain.manifest_key(digest)
    try:
        found = Manifest.from_bytes(storage.get(key))
    except (FileNotFoundError, LicError):
        found = Manifest.of([])
    if found.digest != digest:
        raise LicError(f"{storage}/{key} is lost or altered", hint="put it back; what is written can be read as it is")
    return found


def _read_off(storage: Storage, header: Header, photos: Manifest, plan_of: PlanOf) -> Known:
    """Return the photos of a store by its samples, and these."""
    cache, shards = LatentCache(storage, header=header), range(header.num_shards)
    rows = cache.column("samples/digest", shards).view(f"S{DIGEST_BYTES}").ravel()
    firsts = np.sort(np.unique(rows, return_index=True)[1])
    source = np.ascontiguousarray(cache.column("samples/source", shards)[firsts])
    digests = pa.array(rows[firsts].tolist(), pa.binary()).cast(pa.string()).cast(pa.large_string())
    paths = pa.array(source.view(f"S{source.shape[1]}").ravel().tolist(), pa.binary()).cast(pa.large_string())
    found = _sized(paths, digests, photos, header)
    planned = plan_of(found)
    if planned.digests.take(pa.array(planned.photo)).to_pylist() != [one.decode() for one in rows.tolist()]:
        raise LicError(f"the samples of {storage} do not follow from its photos", hint="`lic-dist cache verify`")
    return found, planned


def _sized(paths: pa.Array, digests: pa.Array, photos: Manifest, header: Header) -> Manifest:
    """Return the manifest of photos by path; their sizes are those of `photos`, or a crop's of those gone."""
    usable = Manifest(photos.table.filter(photos.usable))
    at = pc.index_in(digests, value_set=usable.table["digest"].combine_chunks()).fill_null(-1)
    place = np.asarray(at.to_numpy(zero_copy_only=False), np.int64)

    def numbers(name: str, absent: int) -> NDArray[Any]:
        column = np.append(usable.column(name), np.array([absent], usable.column(name).dtype))
        return column[place]

    crop = header.geometry.crop
    sizes = {"width": crop, "height": crop, "bytes": 0, "mtime_ns": 0}
    table = pa.table(
        {
            "path": paths,
            "digest": digests,
            **{name: numbers(name, absent) for name, absent in sizes.items()},
            "fault": pa.array([""] * len(paths), pa.large_string()),
        },
        schema=SCHEMA,
    )
    return Manifest(table.take(pc.sort_indices(table["path"])))


def changes_of(storage: Storage, header: Header, known_parts: Sequence[Known], photos: Manifest) -> Changes:
    """Compare the photos of a folder with those of a store's instalments."""
    masked = np.concatenate([chain.masked_by(storage, one) for one in header.chain])
    usable = photos.usable
    there = photos.table["digest"].filter(pa.array(usable)).combine_chunks()
    names = photos.table["path"].combine_chunks()
    known, paths, gone, moved = [], [], [], 0
    for one, (_, crops) in zip(header.chain, known_parts, strict=True):
        rows = one.first_shard * header.shard + np.arange(len(crops))
        live = np.ones(len(crops.digests), np.bool_)
        if (hidden := np.isin(rows, masked)).any():
            live[crops.photo[hidden]] = False
        lost = live & ~_is_in(crops.digests, there)
        known.append(crops.digests.filter(pa.array(live)))
        paths.append(crops.paths.filter(pa.array(lost)))
        gone.append(rows[lost[crops.photo]] if lost.any() else rows[:0])
        moved += int((live & ~lost & ~_is_in(crops.paths, names)).sum())
    large = usable & (np.minimum(photos.column("width"), photos.column("height")) >= header.geometry.crop)
    new = large & ~_is_in(photos.table["digest"].combine_chunks(), pa.concat_arrays(known))
    lost_paths = pa.concat_arrays(paths)
    changed = _is_in(lost_paths, names)
    vanished = lost_paths.filter(pa.array(~changed)).to_pylist()
    added = Manifest(photos.table.filter(pa.array(new)))
    return Changes(
        added, tuple(vanished), tuple(lost_paths.filter(pa.array(changed)).to_pylist()), moved, np.concatenate(gone)
    )


def _is_in(values: pa.Array, among: pa.Array) -> NDArray[np.bool_]:
    found: NDArray[np.bool_] = pc.is_in(values, value_set=among).to_numpy(zero_copy_only=False)
    return found


def photos_of(manifest: Manifest, crops: Crops) -> Photos:
    """Return photos and their samples as an instalment takes them."""
    if not len(crops):
        return Photos(b"", Manifest.of([]).digest, 0, 0, 0)
    return Photos(manifest.to_bytes(), manifest.digest, len(crops), crops.num_held_out, crops.longest_source)
