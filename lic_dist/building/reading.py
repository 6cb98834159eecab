"""The first stage of the work on one shard, which reads its pixels, and what a unit of that work is.

Nothing here needs a model: a worker that reads imports no torch, which takes two seconds and 240 MB.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from lic_dist.cache import layout, store
from lic_dist.cache.layout import Header
from lic_dist.cache.reader import LatentCache
from lic_dist.cache.storage import Storage
from lic_dist.data import images
from lic_dist.data.photo import Crop
from lic_dist.data.source import PhotoSource
from lic_dist.errors import LicError

T = TypeVar("T")


@dataclass(frozen=True)
class Shard:
    """A unit of work: a shard's number and its samples, without samples where its latents are stored."""

    number: int
    crops: tuple[Crop, ...]

    def __str__(self) -> str:
        return f"shard {self.number}"


@dataclass(frozen=True)
class ReadShard:
    """A shard that was read: pixels uint8 [n, 3, s, s], status uint8 [n], seconds by stage; `stored`: the base is
    written.
    """

    shard: Shard
    pixels: NDArray[np.uint8]
    status: NDArray[np.uint8]
    seconds: dict[str, float]
    stored: bool = False


@dataclass(frozen=True)
class Target:
    """The store to write to, by its storage and fingerprint, and the group with its record's JSON, if any."""

    storage: Storage
    fingerprint: str
    group: str | None = None
    record_json: str = ""

    def header(self) -> Header:
        """Return the store's header. Raises LicError where it has become another store's."""
        header = layout.read_header(self.storage)
        if header.fingerprint != self.fingerprint:
            raise LicError(f"{self.storage} has become another cache meanwhile", hint="was it rebuilt beside this job?")
        return header

    def skip_done(self, work: Callable[[Shard], T]) -> Callable[[Shard], T | None]:
        """Return `work` for shards, wrapped to return None for those that another job has written meanwhile."""
        header = self.header()

        def pending(shard: Shard) -> T | None:
            # a group's finished shard implies finished latents
            done = store.finished_marker(self.storage, header, shard.number, self.group) is not None
            return None if done else work(shard)

        return pending


def make_reader(target: Target, source: PhotoSource, size: int) -> Callable[[Shard], ReadShard | None]:
    """Make the first stage: decode the photos of a shard and cut its crops."""

    def work(shard: Shard) -> ReadShard:
        started = time.perf_counter()
        pixels, status = images.read_crops(source, shard.crops, size)
        return ReadShard(shard, pixels, status, {"read": time.perf_counter() - started})

    return target.skip_done(work)


def make_stored_reader(target: Target) -> Callable[[Shard], ReadShard | None]:
    """Make the first stage for a store that keeps pixels but not y: read the pixels from the store."""
    cache = LatentCache(target.storage, header=target.header())

    def work(shard: Shard) -> ReadShard:
        started = time.perf_counter()
        read = cache.shard(shard.number, ("pixels", "samples/status"))
        seconds = {"read": time.perf_counter() - started}
        return ReadShard(shard, read["pixels"], read["samples/status"], seconds, stored=True)

    return target.skip_done(work)
