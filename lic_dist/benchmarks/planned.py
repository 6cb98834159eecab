"""Photos and shards that exist by plan alone: manifests of any length, and a store whose shards are links to one."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pyarrow as pa

from lic_dist.building.grown import changes_of
from lic_dist.cache import layout, markers, store
from lic_dist.cache.folder import Folder
from lic_dist.cache.layout import Header
from lic_dist.cache.plan import Geometry, Plan
from lic_dist.data.crops import Crops, plan_crops, require_held_out
from lic_dist.data.manifest import Manifest
from lic_dist.data.photo import Photo

CROP, SHARD, BATCH, HELD_OUT = 256, 64, 8, 0.05
GROUP = "tcq8"
SMALL = Geometry(16, 1, 1, 1, 1)  # of a store of which only the number of shards matters


def photos(count: int, first: int = 0) -> Iterator[Photo]:
    """Yield photos up to a number, a thousand to a folder."""
    for n in range(first, count):
        digest = hashlib.sha256(b"%d" % n).hexdigest()
        yield Photo(f"photos/{n // 1000:06d}/{n:09d}.jpg", digest, 640 + n % 999, 480 + n % 777, n, n)


def plan(manifest: Manifest, crop: int = CROP, geometry: Geometry | None = None) -> Plan:
    """Lay out a manifest's samples as `building.job.prepare` does, one crop a photo, with all that a store asks of a
    plan.
    """
    require_held_out(manifest, HELD_OUT)
    crops = plan_crops(manifest, crop, 1, 0, HELD_OUT)
    identity = {"manifest_sha256": manifest.digest}
    made = Plan(crops, geometry or Geometry(crop, 192, crop // 16, 128, crop // 64), SHARD, BATCH, identity)
    made.fingerprint, made.source_bytes, made.num_held_out  # noqa: B018  # computed once, ahead
    return made


def after_an_append(added_to: Manifest) -> Callable[[], Plan]:
    """Return what lays out an append of 1 % to these photos, as `building.job.prepare` does: the plan of the photos
    that are there, what has been added since, and its plan.
    """
    count = len(added_to)
    more = Manifest(pa.concat_tables([added_to.table, Manifest.of(photos(count + count // 100, count)).table]))
    first = plan(added_to)
    with tempfile.TemporaryDirectory(prefix="lic_dist-bench-") as folder:
        store.create(Path(folder) / "a.zarr", first)
        header = layout.read_header(Folder(Path(folder) / "a.zarr"))

    def rule(some: Manifest) -> Crops:
        return plan_crops(some, CROP, 1, 0, HELD_OUT)

    def work() -> Plan:
        known = (added_to, rule(Manifest(added_to.table)))
        changes = changes_of(Folder(Path("nowhere")), header, [known], Manifest(more.table))
        return replace(first, crops=known[1], later=(rule(changes.added),))

    return work


def build(path: Path, shards: int) -> Callable[[], None]:
    """Create a store with one group at a path; all shards have the objects of the first, and markers of their own.

    Return what writes the first once more.
    """
    planned = plan(Manifest.of(photos(shards * SHARD)), SMALL.crop, SMALL)
    store.create(path, planned)
    store.create_group(path, GROUP, '{"name": "tcq"}', {"record_sha256": "0" * 64})
    storage, header = Folder(path), layout.read_header(Folder(path))
    specs = (*layout.base_arrays(SMALL, True), *layout.group_arrays(GROUP, SMALL))
    arrays = {spec.name: np.ones((SHARD, *spec.shape), spec.dtype) for spec in specs}
    arrays["samples/status"][:] = 0

    def write() -> None:
        store.write_shard(path, header.fingerprint, 0, arrays, planned.crops_of(0), {"encode": 0.1})

    write()
    for group in (None, GROUP):
        _link_shards(storage, header, group)
    return write


def _link_shards(storage: Folder, header: Header, group: str | None) -> None:
    key = store.fingerprint_of(storage, header, group)
    first = markers.read_marker(storage, key, 0)
    assert first is not None
    names = [spec.name for spec in layout.arrays_of(header, group)]
    keys = {name: next(one for one in first.objects if one.startswith(f"{name}/c/0")) for name in names}
    for shard in range(1, header.num_shards):
        moved = {name: keys[name].replace(f"{name}/c/0", f"{name}/c/{shard}", 1) for name in names}
        for name in names:
            target = storage.root / moved[name]
            if "/" in moved[name].removeprefix(f"{name}/c/"):
                target.parent.mkdir(parents=True)
            os.link(storage.root / keys[name], target)
        marker = replace(first, shard=shard, objects={moved[name]: first.objects[keys[name]] for name in names})
        if group is not None:
            latents = markers.read_marker(storage, header.fingerprint, shard)
            assert latents is not None
            marker = replace(marker, base=markers.latents_digest(latents))
        text = json.dumps(asdict(marker), sort_keys=True, indent=1)
        (storage.root / markers.marker_key(key, shard)).write_text(text)
