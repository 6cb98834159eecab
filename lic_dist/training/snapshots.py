"""Which snapshots of its caches a job reads: the newest when it begins, and the same ones whenever it goes on."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lic_dist import config
from lic_dist.cache.layout import Header
from lic_dist.cache.mixture import Mixture
from lic_dist.cache.reader import LatentCache
from lic_dist.errors import UsageError
from lic_dist.models.names import SUFFIX
from lic_dist.training.distributed import Ranks

FILE = "snapshot.json"


def read_snapshots(caches: Sequence[LatentCache], section: config.Finetune, ranks: Ranks) -> Mixture:
    """Return the caches at the job's snapshots, which the first rank chooses, and writes down where they are not yet.

    Raises:
        LicError: no such snapshot, or stores that do not mix.
        UsageError: one snapshot is asked for of several stores, or a store is named twice.
    """
    asked = [one.snapshot for one in section.cache] or [section.snapshot]
    if section.cache and section.snapshot is not None:
        raise UsageError("finetune.snapshot is of one store", hint="finetune.cache: [{path: ..., snapshot: ...}, ...]")
    paths = [str(one.storage) for one in caches]
    if len(set(paths)) < len(paths):
        raise UsageError(
            f"finetune.cache names one store twice: {', '.join(paths)}", hint="give it once, and its weight"
        )
    numbers = None
    if ranks.first:
        began_with = _recorded(section.out)
        if not began_with and _has_begun(section.out):  # before there were snapshots
            asked = [0 if one is None else one for one in asked]
        digests = began_with if len(began_with) == len(caches) else [None] * len(caches)
        headers = [_chosen(*one) for one in zip(caches, asked, digests, strict=True)]
        numbers = [header.snapshot for header in headers]
        if not (section.out / FILE).exists():
            section.out.mkdir(parents=True, exist_ok=True)
            part = section.out / f"{FILE}.part"
            part.write_text(json.dumps(_document(paths, headers, section)) + "\n")
            part.replace(section.out / FILE)
    opened = []
    for cache, number in zip(caches, ranks.gather(numbers)[0], strict=True):
        opened.append(cache.at(number))
        if ranks.first and number:
            print(f"{cache.storage}: snapshot {number}, {opened[-1].header.digest[:12]}")
    return Mixture(opened, [one.weight for one in section.cache] or [1.0])


def _document(paths: Sequence[str], headers: Sequence[Header], section: config.Finetune) -> dict[str, Any]:
    plain = [{"snapshot": header.snapshot, "digest": header.digest} for header in headers]
    if not section.cache:
        return plain[0]
    rows = zip(paths, plain, section.cache, strict=True)
    return {"stores": [{"path": path, "weight": one.weight, **row} for path, row, one in rows]}


def _chosen(cache: LatentCache, asked: int | str | None, began_with: str | None) -> Header:
    """Return the header of the snapshot that is asked for, or that the job began with, or the newest."""
    if asked is not None:
        return cache.at(asked).header
    for number, one in enumerate(cache.header.chain):
        if one.digest == began_with:
            return cache.header.at(number)
    return cache.header  # of another store, which the job's states will say, or a new job


def _recorded(out: Path) -> list[Any]:
    """Return the digests of the snapshots that a job began with, one for each store."""
    try:
        found = json.loads((out / FILE).read_text())
    except (FileNotFoundError, ValueError):
        return []
    rows = found.get("stores", [found]) if isinstance(found, dict) else []
    return [row["digest"] for row in rows if isinstance(row, dict) and "digest" in row]


def _has_begun(out: Path) -> bool:
    return any((out / name).exists() for name in ("states", "round-1", f"checkpoint{SUFFIX}"))
