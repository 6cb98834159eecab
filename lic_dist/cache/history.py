"""The history of a store that grows, as plain JSON: its snapshots, and how two of them differ."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from lic_dist.cache import growth, layout, store
from lic_dist.cache.layout import Header
from lic_dist.cache.reader import LatentCache
from lic_dist.cache.storage import Storage
from lic_dist.cache.storages import open_storage
from lic_dist.data.photo_files import printable
from lic_dist.errors import UsageError
from lic_dist.text import counted


def history(path: Path | str | Storage) -> dict[str, Any]:
    """Return the snapshots of a store, oldest first, the unfinished one too, with their names and readable groups.

    Raises:
        LicError: no store there, or another kind of Zarr group.
    """
    storage = open_storage(path).absolute()
    header = layout.read_header(storage)
    names, readable = growth.snapshot_names(storage), _readable(storage, header)
    rows = []
    for number, one in enumerate(header.chain):
        at = header.at(number)
        rows.append(
            {
                "snapshot": number,
                **asdict(one),
                "shards": at.num_shards - one.first_shard,
                "total": at.num_samples,
                "names": [name for name, of in names.items() if of == number],
                "groups": [group for group, last in readable.items() if number <= last],
            }
        )
    return {"path": str(storage), "fingerprint": header.fingerprint, "snapshots": rows}


def _readable(storage: Storage, header: Header) -> dict[str, int]:
    """Return the last snapshot at which each group is whole; -1 for none."""
    listing, found = storage.listing(), {}
    for group in layout.group_names(storage):
        done = store.finished_markers(storage, header, group, listing)
        missing = next((shard for shard in range(header.num_shards) if shard not in done), header.num_shards)
        whole = [number for number in range(len(header.chain)) if header.at(number).num_shards <= missing]
        found[group] = max(whole, default=-1)
    return found


def describe(report: Mapping[str, Any]) -> list[str]:
    """Return a history in lines for a terminal."""
    lines = [f"{report['path']}: fingerprint {report['fingerprint'][:12]}"]
    for row in report["snapshots"]:
        what = f"{counted(row['num_samples'], 'sample')} ({row['num_held_out']} held out)"
        masked = f", {row['num_masked']} masked" if row["num_masked"] else ""
        state = "" if row["complete"] else ", unfinished"
        names = "".join(f", '{name}'" for name in row["names"])
        groups = f"; groups: {', '.join(row['groups']) or 'none'}"
        lines.append(
            f"{row['snapshot']:>3}  {row['digest'][:12]}  {row['time'] or 'no time':<20}  +{what}{masked}, "
            f"{row['total']} in all{names}{state}{groups}"
        )
    return lines


def difference(path: Path | str | Storage, first: int | str, second: int | str) -> dict[str, Any]:
    """Return what the second snapshot has that the first has not: samples and paths of photos, masked samples with the
    paths of theirs, and groups that can be read at one of them alone.

    Raises:
        LicError: no such store or snapshot.
        UsageError: the second is the earlier one.
    """
    storage = open_storage(path).absolute()
    one, other = (LatentCache(storage, header=growth.header_at(storage, at)) for at in (first, second))
    if one.header.snapshot > other.header.snapshot:
        raise UsageError(f"snapshot {first} is later than {second}", hint="name the earlier one first")
    readable = _readable(storage, layout.read_header(storage))
    shards = range(one.num_shards, other.num_shards)
    added = other.column("samples/source", shards)
    masked = np.setdiff1d(other.masked, one.masked)
    hidden = other.load(["samples/source"], masked)["samples/source"]
    groups = {at: [name for name, last in readable.items() if at.header.snapshot <= last] for at in (one, other)}
    return {
        "path": str(storage),
        "snapshots": [one.header.snapshot, other.header.snapshot],
        "digests": [one.header.digest, other.header.digest],
        "samples": other.header.num_samples - one.header.num_samples,
        "held_out": other.header.num_held_out - one.header.num_held_out,
        "photos": _paths(added),
        "masked": masked.tolist(),
        "masked_photos": _paths(hidden),
        "groups_lost": sorted({*groups[one]} - {*groups[other]}),
    }


def _paths(rows: np.ndarray[Any, np.dtype[np.uint8]]) -> list[str]:
    texts = np.ascontiguousarray(rows).view(f"S{rows.shape[1]}").ravel() if len(rows) else np.empty(0, "S1")
    return [text.decode() for text in np.unique(texts).tolist()]


def describe_difference(report: Mapping[str, Any], most: int) -> list[str]:
    """Return a difference in lines for a terminal, with at most so many photos of each kind."""
    first, second = report["snapshots"]
    photos = report["photos"]
    lines = [
        f"{report['path']}: from snapshot {first} to {second}: {counted(report['samples'], 'sample')} more "
        f"({report['held_out']} held out) of {counted(len(photos), 'photo')}, {len(report['masked'])} masked"
    ]
    for mark, paths in (("+", photos), ("-", report["masked_photos"])):
        lines += [f"  {mark} {printable(path)}" for path in paths[:most]]
        lines += [f"  {mark} {len(paths) - most} more"] if len(paths) > most else []
    lines += [f"  group {name} has not followed" for name in report["groups_lost"]]
    return lines
