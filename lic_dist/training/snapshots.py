"""Which snapshot of a cache a job reads: the newest when it begins, and the same one whenever it goes on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lic_dist import config
from lic_dist.cache import growth, layout
from lic_dist.cache.layout import Header
from lic_dist.cache.reader import LatentCache
from lic_dist.models.names import SUFFIX
from lic_dist.training.distributed import Ranks

FILE = "snapshot.json"


def read_snapshot(cache: LatentCache, section: config.Finetune, ranks: Ranks) -> LatentCache:
    """Return the cache at the job's snapshot, which the first rank chooses, and writes down where it is not yet.

    Raises:
        LicError: no such snapshot.
    """
    number = None
    if ranks.first:
        header = _chosen(cache, section)
        number = header.snapshot
        if not (section.out / FILE).exists():
            section.out.mkdir(parents=True, exist_ok=True)
            part = section.out / f"{FILE}.part"
            part.write_text(json.dumps({"snapshot": number, "digest": header.digest}) + "\n")
            part.replace(section.out / FILE)
    header = layout.read_header(cache.storage).at(ranks.gather(number)[0])
    if ranks.first and header.snapshot:
        print(f"{cache.storage}: snapshot {header.snapshot}, {header.digest[:12]}")
    return LatentCache(cache.storage, cache.pipeline, header)


def _chosen(cache: LatentCache, section: config.Finetune) -> Header:
    """Return the header of the snapshot that is asked for, or that the job began with, or the newest."""
    if section.snapshot is not None:
        return growth.header_at(cache.storage, section.snapshot)
    newest = cache.header
    began_with = _recorded(section.out).get("digest")
    if began_with is None and _has_begun(section.out):  # before there were snapshots
        return newest.at(0)
    for number, one in enumerate(newest.chain):
        if one.digest == began_with:
            return newest.at(number)
    return newest  # of another store, which the job's states will say, or a new job


def _recorded(out: Path) -> dict[str, Any]:
    try:
        found = json.loads((out / FILE).read_text())
    except (FileNotFoundError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _has_begun(out: Path) -> bool:
    return any((out / name).exists() for name in ("states", "round-1", f"checkpoint{SUFFIX}"))
