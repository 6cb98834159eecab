"""Export a snapshot to an Icechunk repository: its arrays as they are, in one commit at the end.

    main       a commit for each exported snapshot; its metadata say which
    tags       snapshot-<number>, and the names of the snapshot
    arrays     under the store's own names, as long as the snapshot; shards' objects are copied byte by byte
    status     254 where the snapshot masks a sample, since there is nobody who applies the mask
    record     in the attributes of its group, for Icechunk keeps arrays and attributes alone

Objects are copied, not referred to: a repository that refers to the store's files breaks when these are moved or
removed, and whoever opens it must be told where they may lie. A later snapshot of the same store into the same
repository writes just what is new. A killed export has committed nothing, and is given again.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from zarr.core.buffer import default_buffer_prototype

from lic_dist.cache import growth, layout, store
from lic_dist.cache.layout import ArraySpec, Header
from lic_dist.cache.reader import LatentCache
from lic_dist.cache.repository import BRANCH, NUMBERED, open_repository
from lic_dist.cache.shard_reader import MASKED
from lic_dist.cache.storage import Storage
from lic_dist.errors import LicError
from lic_dist.progress import Progress
from lic_dist.text import counted

if TYPE_CHECKING:
    import icechunk

AT_ONCE = 8  # objects that are copied side by side


@dataclass(frozen=True)
class Exported:
    """What an export did: the snapshot, its commit, the groups that are in it, objects written and in all."""

    snapshot: int
    commit: str
    groups: tuple[str, ...]
    written: int
    objects: int


def export(storage: Storage, path: Path | str, snapshot: int | str | None = None) -> Exported:
    """Export a snapshot, by default the newest, to a repository, which is made where there is none: in a folder, or at
    s3://bucket/prefix, where AWS's variables say how (AWS_ENDPOINT_URL too).

    Groups that are not whole at the snapshot are left out.

    Raises:
        UsageError: icechunk is not installed.
        LicError: no such snapshot, or not all of its latents are written; a folder of something else, a repository of
            another store, or of a later snapshot; somebody else has committed meanwhile.
    """
    cache = LatentCache(storage, header=growth.header_at(storage, snapshot))
    header = cache.header
    if missing := header.num_shards - len(cache.written()):
        raise LicError(
            f"{counted(missing, 'shard')} of {storage} are not written at snapshot {header.snapshot}",
            hint="`lic-dist cache build` goes on where it stopped",
        )
    groups = tuple(group for group in cache.groups if len(cache.written(group)) == header.num_shards)
    repository = open_repository(str(path), create=True)
    session = repository.writable_session(BRANCH)
    _require_earlier(session.store, header, path)
    written, objects = asyncio.run(_copy(cache, groups, session.store))
    at = repository.lookup_branch(BRANCH)
    if session.has_uncommitted_changes:
        import icechunk

        named = {"store": str(storage), "snapshot": header.snapshot, "digest": header.digest}
        try:
            at = session.commit(f"snapshot {header.snapshot} of {storage}", metadata=named)
        except icechunk.ConflictError as error:
            raise LicError(f"another job has committed to {path}", hint="give the command again") from error
    names = [name for name, number in growth.snapshot_names(storage).items() if number == header.snapshot]
    for tag in {f"{NUMBERED}{header.snapshot}", *names} - repository.list_tags():
        repository.create_tag(tag, snapshot_id=at)
    return Exported(header.snapshot, at, groups, written, objects)


def _require_earlier(target: icechunk.IcechunkStore, header: Header, path: Path | str) -> None:
    """Refuse a repository of another store, or of a later snapshot."""
    document = asyncio.run(_get(target, "zarr.json"))
    known = json.loads(document).get("attributes", {}) if document else {}
    chain = [one.digest for one in header.chain]
    digests = [one.get("digest") for one in known.get("chain", ())]
    if digests and (known.get("fingerprint") != header.fingerprint or digests != chain[: len(digests)]):
        raise LicError(
            f"{path} holds another store, or a later snapshot (snapshot {len(digests) - 1}, {digests[-1][:12]})",
            hint="give a path of its own; earlier snapshots are there as its tags",
        )


def _documents(cache: LatentCache, groups: tuple[str, ...]) -> Iterator[tuple[str, bytes]]:
    """Yield the key and text of each `zarr.json`, as of the snapshot."""
    header = cache.header
    attributes = {**asdict(header), "format": layout.GROWN}
    yield "zarr.json", layout.group_document(attributes)
    for name in ("latents", "quantized", "samples"):
        yield f"{name}/zarr.json", layout.group_document()
    for group in groups:
        record = json.loads(cache.record_json(group))
        yield f"quantized/{group}/zarr.json", layout.group_document({**cache.group_attributes(group), "record": record})
    for of in (None, *groups):
        for spec in layout.arrays_of(header, of):
            yield f"{spec.name}/zarr.json", store.array_document(spec, header)


async def _copy(cache: LatentCache, groups: tuple[str, ...], target: icechunk.IcechunkStore) -> tuple[int, int]:
    """Copy what differs; return the number of objects written, and of all."""
    for key, document in _documents(cache, groups):
        there = await _get(target, key)
        if there is None or json.loads(there) != json.loads(document):
            await target.set(key, default_buffer_prototype().buffer.from_bytes(document))
    masked, written = _masked_rows(cache), 0
    total = sum(1 for _ in _objects(cache.header, groups))
    left = _objects(cache.header, groups)
    with Progress("exporting", total, "object") as bar:

        async def work() -> None:
            nonlocal written
            for spec, shard in left:
                key = layout.object_key(spec, shard)
                data = await asyncio.to_thread(_object, cache, spec, shard, masked)
                if await _get(target, key) != data:
                    await target.set(key, default_buffer_prototype().buffer.from_bytes(data))
                    written += 1
                bar.advance()

        await asyncio.gather(*(work() for _ in range(AT_ONCE)))
    return written, total


def _objects(header: Header, groups: tuple[str, ...]) -> Iterator[tuple[ArraySpec, int]]:
    """Yield every object of the base and the groups: its array, or block of one, and shard."""
    for shard in range(header.num_shards):
        for of in (None, *groups):
            yield from ((spec, shard) for spec in layout.objects_of(header, of, shard))


async def _get(target: icechunk.IcechunkStore, key: str) -> bytes | None:
    found = await target.get(key, default_buffer_prototype())
    return None if found is None else found.to_bytes()


def _masked_rows(cache: LatentCache) -> Mapping[int, np.ndarray[Any, np.dtype[np.int64]]]:
    """Return the places of masked samples in their shards, by shard."""
    shards, places = np.divmod(cache.masked, cache.header.shard)
    return {int(shard): places[shards == shard] for shard in np.unique(shards)}


def _object(
    cache: LatentCache, spec: ArraySpec, shard: int, masked: Mapping[int, np.ndarray[Any, np.dtype[np.int64]]]
) -> bytes:
    """Return the bytes of one object as the snapshot shows it."""
    header = cache.header
    if spec.name != "samples/status" or shard not in masked:
        return cache.storage.get(layout.object_key(spec, shard))
    rows = np.full(header.shard, spec.fill_value, spec.dtype)
    rows[: header.count(shard)] = cache.shard(shard, [spec.name])[spec.name]
    rows[masked[shard]] = MASKED
    return layout.encode(store.array_document(spec, header), shard, rows)
