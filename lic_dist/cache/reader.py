"""An open store, as people use it: numpy arrays, datasets of torch, an xarray view."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lic_dist.cache.shard_reader import ShardReader

if TYPE_CHECKING:
    import xarray

    from lic_dist.cache.torch_data import CachedSamples, StreamedBatches


class LatentCache(ShardReader):
    """An open store: `cache = LatentCache.open(path)`. Picklable; samples are not read until asked for.

    Reading is by whole shards (`shard`, `load`: fast) or one sample (`cache[i]`: milliseconds); `stream` and `dataset`
    serve torch, `to_xarray` analysis. Array names are those of layout.py. Samples of unwritten shards and faulty ones
    are not `usable`; their rows are zero. What cannot be read (a missing, cut or altered object) is an error that
    names shard and array, never zeros.
    """

    def dataset(self, arrays: Sequence[str], held_out: bool = False) -> CachedSamples:
        """The usable samples of a part as a map-style dataset of torch: see torch_data.py."""
        from lic_dist.cache.torch_data import CachedSamples

        return CachedSamples(self, arrays, held_out)

    def stream(
        self,
        arrays: Sequence[str],
        batch: int,
        seed: int = 0,
        step: int = 0,
        rank: int = 0,
        world: int = 1,
        held_out: bool = False,
        streams: int | None = None,
        buffer: int | None = None,
    ) -> StreamedBatches:
        """Shuffled batches of a part from `step` on, without end, as an iterable dataset of torch: see order.py.

        `batch` is the global one; a rank gets its part of it. `streams` and `buffer` are best left alone.

        Raises:
            LicError: the part is empty, or no such array.
            UsageError: streams that do not divide the batch, or among the ranks.
        """
        from lic_dist.cache.order import Order
        from lic_dist.cache.stream import ShardStream
        from lic_dist.cache.torch_data import StreamedBatches

        order = Order(self.indices(held_out), self.header.shard, batch, seed, streams, buffer)
        return StreamedBatches(ShardStream(self, arrays, order, step, rank, world))

    def to_xarray(self) -> xarray.Dataset:
        """The whole cache as one lazily read dataset: see xarray_view.py. UsageError where xarray is not installed."""
        from lic_dist.cache import xarray_view

        return xarray_view.dataset(self)
