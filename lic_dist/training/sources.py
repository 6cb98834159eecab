"""Sources: the kinds of photos that retraining is judged by, each by itself, so that no kind pays for another.

A held-out sample's source is the folder of its photo: the first folder in which the held-out photos' paths differ, such
as `studio` and `street`, or `valid/studio` and `valid/street`. Where all lie in one folder, sources are thirds of the
samples by the bits that the base model's y takes: `smooth`, `medium` and `detailed`; of few samples there is one
source, `all`. Of several stores each has sources of its own, with its name before them. All of it depends on the cache
alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

from lic_dist.cache.mixture import Mixture
from lic_dist.cache.reader import LatentCache
from lic_dist.data.folders import folder_names, folders_missing, with_others
from lic_dist.errors import LicError

MOST_SAMPLES, HELD_OUT_BATCH = 64, 8  # L is measured on the first held-out samples, in batches of this size,
LEAST_SAMPLES = 8  # and on so many of each folder, where there are that many; a third has no fewer
MOST_FOLDERS = 8  # that are sources of their own; those of fewest samples are one source
ALL, THIRDS = "all", ("smooth", "medium", "detailed")
Key = TypeVar("Key", str, tuple[str, str])
Batches: TypeAlias = tuple[list[NDArray[np.int64]], list[Key]]  # of rows, and the source of each


@dataclass(frozen=True)
class Sources:
    """The held-out samples that L is measured on, `samples` int64 [n], ascending, with the path of each one's photo and
    the name of its source, and the names of all sources in their order.
    """

    samples: NDArray[np.int64]
    photos: tuple[str, ...]
    of_sample: tuple[str, ...]
    names: tuple[str, ...]

    def batches(self) -> Batches[str]:
        """Return rows of samples in batches, each of one source; of a single source no names."""
        parts, names = batches_of(self.of_sample)
        return parts, names if len(self.names) > 1 else []

    def photo_batches(self) -> Batches[tuple[str, str]]:
        """Return rows of samples in batches, each of one photo of one source, and these two: (source, photo)."""
        return batches_of(list(zip(self.of_sample, self.photos, strict=True)))


def sources_of(cache: LatentCache, group: str) -> Sources:
    """Return the held-out samples of a cache that a job measures, and their sources; `group` is the base model's."""
    every = cache.indices(held_out=True)
    paths = _paths(cache, every)
    named, names = with_others(folder_names(paths), MOST_FOLDERS)
    rows = _chosen(named)
    if len(names) <= 1:
        names = THIRDS if len(rows) >= LEAST_SAMPLES * len(THIRDS) else (ALL,)
        bits = cache.load((f"quantized/{group}/bits",), every[rows])[f"quantized/{group}/bits"]
        order = np.argsort(np.argsort(bits, kind="stable"), kind="stable")
        chosen = [names[place * len(names) // len(rows)] for place in order]
    else:
        chosen = [named[row] for row in rows]
    return Sources(every[rows], tuple(paths[row] for row in rows), tuple(chosen), names)


def sources_of_all(stores: Mixture, group: str) -> Sources:
    """Return the sources of every store that holds samples out; of one store those of `sources_of`."""
    if len(stores.stores) == 1:
        return sources_of(stores.stores[0], group)
    samples: list[NDArray[np.int64]] = []
    photos: list[str] = []
    of_sample: list[str] = []
    names: list[str] = []
    for at, (one, store) in enumerate(zip(stores.stores, stores.names, strict=True)):
        if len(one.indices(held_out=True)):
            found = sources_of(one, group)
            named = {name: store if name == ALL else f"{store} {name}" for name in found.names}
            samples.append(stores.numbers(at, found.samples))
            photos += found.photos
            of_sample += [named[source] for source in found.of_sample]
            names += named.values()
    if not samples:
        raise LicError("no store has held-out samples", hint="see images.held_out")
    return Sources(np.concatenate(samples), tuple(photos), tuple(of_sample), tuple(names))


def trained_elsewhere(stores: Mixture) -> int:
    """Return how many photos train in one of several stores and are held out in another."""
    parts: list[set[str]] = [set(), set()]
    for one in stores.stores if len(stores.stores) > 1 else ():
        for held_out, digests in enumerate(parts):
            rows = one.samples["digest"][one.indices(bool(held_out))]
            digests.update(np.unique(rows).tolist())
    return len(parts[0] & parts[1])


def not_held_out(cache: LatentCache) -> list[str]:
    """Return the folders of a cache whose photos train and of which none is held out: what nobody measures."""
    training, held_out = (_paths(cache, cache.indices(part)) for part in (False, True))
    return folders_missing(training, held_out)


def _paths(cache: LatentCache, samples: NDArray[np.int64]) -> list[str]:
    """Return the paths of samples' photos; the samples ascend. LicError where a shard has lost them."""
    size = cache.header.shard
    shards, where = np.unique(samples // size, return_inverse=True)
    counts = cache.header.shards.counts(shards)
    firsts = np.cumsum(counts) - counts
    rows = cache.column("samples/source", shards.tolist())[firsts[where] + samples % size]
    paths = [row.tobytes().rstrip(b"\0").decode() for row in rows]
    if "" in paths:
        cache.load(("samples/source",), samples)  # raises for the one that is lost
    return paths


def _chosen(named: Sequence[str]) -> NDArray[np.int64]:
    """Return the rows to measure on: the first MOST_SAMPLES, and more of those that come first of rare sources."""
    rows, seen = [], Counter[str]()
    for row, name in enumerate(named):
        seen[name] += 1
        if row < MOST_SAMPLES or seen[name] <= LEAST_SAMPLES:
            rows.append(row)
    return np.array(rows, np.int64)


def batches_of(keys: Sequence[Key]) -> Batches[Key]:
    rows: dict[Key, list[int]] = {}
    for row, key in enumerate(keys):
        rows.setdefault(key, []).append(row)
    parts = {key: np.array_split(some, -(-len(some) // HELD_OUT_BATCH)) for key, some in rows.items()}
    return [part for some in parts.values() for part in some], [key for key, some in parts.items() for _ in some]
