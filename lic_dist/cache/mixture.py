"""Several stores of one kind read as one, each with a weight: what training needs of a `LatentCache`.

    mixture = Mixture([LatentCache.open("a.zarr"), LatentCache.open("b.zarr")], [3, 1])
    loader = DataLoader(mixture.stream(["pixels"], batch=16), batch_size=None)     # three of four samples from a.zarr

Shards are counted through all stores. A sample's number is that of its shard times `shard_length` plus its place there,
where `shard_length` is that of the store of the longest shards; in a mixture of one store it is the store's own number.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lic_dist.cache.mixing import MixedOrder, Shares
from lic_dist.cache.order import Order
from lic_dist.cache.plan import differences
from lic_dist.cache.reader import LatentCache
from lic_dist.cache.stream import ShardStream
from lic_dist.errors import LicError

if TYPE_CHECKING:
    import zarr

    from lic_dist.cache.torch_data import StreamedBatches


class Mixture:
    """Open stores as one; picklable. `weights` are the stores' shares of the samples that training draws.

    Raises:
        LicError: a store whose arrays have other shapes than the first's; it is named.
    """

    def __init__(self, stores: Sequence[LatentCache], weights: Sequence[float] = (1.0,)) -> None:
        self.stores, self.weights, self.shares = tuple(stores), tuple(weights), Shares(weights)
        first, *others = self.stores
        for one in others:
            lines = differences(vars(one.geometry), vars(first.geometry))
            if lines:
                raise LicError(
                    f"{one.storage} and {first.storage} do not mix: {'; '.join(lines)}", hint="see cache.path"
                )
        self.shard_length = max(one.shard_length for one in self.stores)
        self.firsts = list(itertools.accumulate((one.num_shards for one in self.stores[:-1]), initial=0))
        self.names = names_of([str(one.storage) for one in self.stores])

    @property
    def store_y(self) -> bool:
        """Whether every store keeps y."""
        return all(one.header.store_y for one in self.stores)

    def array(self, name: str) -> zarr.Array[Any]:
        """Return the first store's array, whose shape of a sample and dtype are those of all."""
        return self.stores[0].array(name)

    def numbers(self, store: int, samples: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the mixture's numbers of a store's samples."""
        shards, places = np.divmod(samples, self.stores[store].shard_length)
        found: NDArray[np.int64] = (self.firsts[store] + shards) * self.shard_length + places
        return found

    def parts(self, held_out: bool) -> list[NDArray[np.int64]]:
        """Return the numbers of the usable samples of the held-out or the training part, store by store, ascending."""
        return [self.numbers(at, one.indices(held_out)) for at, one in enumerate(self.stores)]

    def first(self, held_out: bool, most: int) -> NDArray[np.int64]:
        """Return the first samples of each store's part, together up to `most` by the weights."""
        return np.concatenate(
            [part[: self.shares.count(store, most)] for store, part in enumerate(self.parts(held_out))]
        )

    def shard(self, shard: int, arrays: Sequence[str]) -> dict[str, NDArray[Any]]:
        """Return arrays of one shard, as `LatentCache.shard` does."""
        store = np.searchsorted(self.firsts, shard, side="right") - 1
        return self.stores[store].shard(shard - self.firsts[store], arrays)

    def load(self, arrays: Sequence[str], numbers: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
        """Load samples in the order of their numbers, as `LatentCache.load` does."""
        parts = [(rows, one.load(arrays, samples)) for one, rows, samples in self._by_store(numbers)]
        found = {}
        for name in arrays:
            found[name] = np.empty((len(numbers), *parts[0][1][name].shape[1:]), parts[0][1][name].dtype)
            for rows, read in parts:
                found[name][rows] = read[name]
        return found

    def _by_store(
        self, numbers: NDArray[np.int64]
    ) -> Iterator[tuple[LatentCache, NDArray[np.int64], NDArray[np.int64]]]:
        """Yield each store that has some of the samples, their rows in `numbers`, and its own numbers of them."""
        shards, places = np.divmod(np.asarray(numbers, np.int64), self.shard_length)
        stores = np.searchsorted(self.firsts, shards, side="right") - 1
        for at in np.unique(stores).tolist():
            rows = np.flatnonzero(stores == at)
            yield self.stores[at], rows, (shards[rows] - self.firsts[at]) * self.stores[at].shard_length + places[rows]

    def order(
        self, batch: int, seed: int = 0, streams: int | None = None, held_out: bool = False
    ) -> Order | MixedOrder:
        """Return the order in which a part is streamed. Raises as these do."""
        parts = self.parts(held_out)
        if len(parts) == 1:
            return Order(parts[0], self.shard_length, batch, seed, streams)
        return MixedOrder(parts, self.shares, self.shard_length, batch, seed, streams)

    def stream(
        self,
        arrays: Sequence[str],
        batch: int,
        seed: int = 0,
        step: int = 0,
        rank: int = 0,
        world: int = 1,
        streams: int | None = None,
    ) -> StreamedBatches:
        """Return an endless stream of shuffled training batches, as `LatentCache.stream` does."""
        from lic_dist.cache.torch_data import StreamedBatches

        return StreamedBatches(ShardStream(self, arrays, self.order(batch, seed, streams), step, rank, world))


def names_of(paths: Sequence[str]) -> list[str]:
    """Return short names that tell stores apart: the last part of each path, or the whole paths where those are equal.

    names_of(["runs/a.zarr", "s3://b/c.zarr"]) => ["a", "c"]
    """
    short = [path.rstrip("/").rpartition("/")[2].removesuffix(".zarr") for path in paths]
    return short if len(set(short)) == len(short) else list(paths)
