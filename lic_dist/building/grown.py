"""What has become of a store's photos, and the plan of a store that grows by them.

A photo is its content: one under another name, or a copy, is the one that the store has. So photos are compared by
digest, those of the folder with those of every instalment, whose manifests the store keeps. Of a store that has never
grown they are read off its samples. Photos that vanished stay in the store; on request they are masked.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

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
WIDE = 2**31 - 1  # pixels a side, the most
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
        table = before.table.select(SCHEMA.names)
        return [(Manifest(table.filter(pc.is_in(table["path"], value_set=planned.paths))), planned)]
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
    corners = np.stack([cache.column(f"samples/crop_{axis}", shards) for axis in "yx"])
    firsts = np.unique(rows, return_index=True)[1]
    source = np.ascontiguousarray(cache.column("samples/source", shards)[firsts])
    digests = pa.array(rows[firsts].tolist(), pa.binary()).cast(pa.string()).cast(pa.large_string())
    paths = pa.array(source.view(f"S{source.shape[1]}").ravel().tolist(), pa.binary()).cast(pa.large_string())
    order = pc.sort_indices(paths)
    paths, digests = paths.take(order), digests.take(order)

    def follows(planned: Crops) -> bool:
        return planned.digests.take(pa.array(planned.photo)).to_pylist() == [one.decode() for one in rows.tolist()]

    sizes = _sizes(digests, photos)
    wide = plan_of(_manifest(paths, digests, np.full_like(sizes, WIDE)))
    if follows(wide):
        sizes = np.where(sizes > 0, sizes, _least_sizes(wide, corners, header.geometry.crop))
        found = _manifest(paths, digests, sizes)
        planned = plan_of(found)
        if follows(planned) and np.array_equal(np.stack([planned.drawn.crop_y, planned.drawn.crop_x]), corners):
            return found, planned
    raise LicError(f"the samples of {storage} do not follow from its photos", hint="`lic-dist cache verify`")


def _sizes(digests: pa.Array, photos: Manifest) -> NDArray[np.int32]:
    """Return height and width of photos by digest, int32 [2, photos]; 0 for one that is not among `photos`."""
    usable = Manifest(photos.table.filter(photos.usable))
    at = pc.index_in(digests, value_set=usable.table["digest"].combine_chunks()).fill_null(-1)
    place = np.asarray(at.to_numpy(zero_copy_only=False), np.int64)
    return np.stack([np.append(usable.column(side), np.int32(0))[place] for side in ("height", "width")])


def _least_sizes(wide: Crops, corners: NDArray[np.int32], crop: int) -> NDArray[np.int32]:
    """Return the least height and width by which the samples of each photo lie where they do, int32 [2, photos].

    `corners` are y and x of every sample, int32 [2, n], and `wide` what they were if all photos were WIDE: a sample
    lies at the same part of the way in both (`data.crops`).
    """
    parts = (np.stack([wide.drawn.crop_y, wide.drawn.crop_x]) + 0.5) / (WIDE - crop + 1)
    ways = np.ones((2, len(wide.paths)))
    for way, least in zip(ways, np.ceil(corners / parts), strict=True):
        np.maximum.at(way, wide.photo, least)
    return (ways + crop - 1).astype(np.int32)


def _manifest(paths: pa.Array, digests: pa.Array, sizes: NDArray[np.int32]) -> Manifest:
    """Return the manifest of photos of height and width `sizes`, of which nothing else is known."""
    none, zeros = pa.array([""] * len(paths), pa.large_string()), np.zeros(len(paths), np.int64)
    columns = {"path": paths, "digest": digests, "height": sizes[0], "width": sizes[1]}
    return Manifest(pa.table({**columns, "bytes": zeros, "mtime_ns": zeros, "fault": none}, schema=SCHEMA))


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
    large = usable & (np.minimum(photos.column("width"), photos.column("height")) >= header.photo_side)
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
