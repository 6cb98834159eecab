"""An open store: numpy arrays, torch datasets, an xarray view."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lic_dist.cache.shard_reader import ShardReader

if TYPE_CHECKING:
    import xarray

    from lic_dist.cache.torch_data import CachedSamples, StreamedBatches


class LatentCache(ShardReader):
    """An open store: `cache = LatentCache.open(path)`. Picklable; samples are read on demand.

    Read whole shards (`shard`, `load`: fast) or one sample (`cache[i]`: milliseconds); `stream` and `dataset` serve
    torch, `to_xarray` serves analysis. Array names are those of layout.py. Samples that are faulty or in unwritten
    shards are not `usable`; their rows are zero. An object that is missing, cut or altered raises an error that names
    shard and array; it never reads as zeros.
    """

    def dataset(self, arrays: Sequence[str], held_out: bool = False) -> CachedSamples:
        """Return the usable samples of a part as a map-style torch dataset: see torch_data.py."""
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
        """Return an endless stream of shuffled batches of a part, from `step` on, as an iterable torch dataset: see
        order.py.

        `batch` is the global batch, of which a rank gets its part. The defaults of `streams` and `buffer` suit most
        uses.

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
        """Return the whole cache as a lazily read dataset: see xarray_view.py. UsageError where xarray is not
        installed.
        """
        from lic_dist.cache import xarray_view

        return xarray_view.dataset(self)
