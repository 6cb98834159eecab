"""Batches in exact, shuffled order from a cache, read by whole shards. `cache.stream(...)` wraps this for torch.

order.py defines what a batch and an epoch hold; this module reads the shards. While a stream serves one buffer, threads
decode the next one, in the order in which the buffers will be needed. So a training step waits only if reading a whole
buffer takes longer than training over it. Each shard is decoded once an epoch, by the rank and worker that owns its
stream. Resuming at a step decodes only the buffers that the step begins in.

Memory: two buffers a stream, the served and the next one, of whole decoded shards:

    2 * (V / ranks / workers) * buffer * shard * (bytes of a sample in the arrays read)

With the defaults (V * buffer = 16) and shards of 64 crops of 256x256 with M = 192, in MB: pixels, z and k 610 on one
rank, with y 820; on four ranks, or with four workers, a quarter of that each. Up to 180 more were measured for the
shards that are being decoded.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from lic_dist.cache.order import Buffer, Order
from lic_dist.errors import UsageError

if TYPE_CHECKING:
    import zarr

    from lic_dist.cache.mixing import MixedOrder

READERS = 2  # threads that read shards ahead
Rows = dict[str, NDArray[Any]]


class Shards(Protocol):
    """What a stream reads from: a `LatentCache`, or a `Mixture` of several."""

    @property
    def shard_length(self) -> int: ...

    def array(self, name: str) -> zarr.Array[Any]: ...

    def shard(self, shard: int, arrays: Sequence[str]) -> Rows: ...


@dataclass
class _OpenBuffer:
    """A buffer with its decoded shards, and the number of its samples that are served."""

    buffer: Buffer
    shards: dict[int, Rows]
    position: int


class ShardStream:
    """The batches of an order from `step` on, without end, in numpy; picklable.

        order = Order(cache.indices(held_out=False), cache.header.shard, batch=16)
        for batch in ShardStream(cache, ["pixels", "latents/z"], order): batch["pixels"]

    A batch maps each array's name to the rows of this rank's samples, [batch / world, ...], and "sample" to their
    numbers, int64. Every iteration begins at `step` again. `reads` counts the shards decoded for what the latest
    iteration has served, without those read ahead.

    Raises:
        LicError: no such array; while iterating, a shard that cannot be read (it is named).
        UsageError: streams that do not divide among the ranks.
    """

    def __init__(
        self,
        cache: Shards,
        arrays: Sequence[str],
        order: Order | MixedOrder,
        step: int = 0,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.cache, self.arrays, self.order, self.step = cache, tuple(arrays), order, step
        self.owned = self.order.streams_of_rank(rank, world)
        self.kinds = {name: (cache.array(name).shape[1:], cache.array(name).dtype) for name in arrays}
        self.reads = 0

    @property
    def memory(self) -> int:
        """Bytes that an iteration holds at most, by the formula above."""
        sample = sum(int(np.prod(shape, dtype=np.int64)) * dtype.itemsize for shape, dtype in self.kinds.values())
        return 2 * len(self.owned) * self.order.buffer * self.cache.shard_length * sample

    def for_worker(self, worker: int, workers: int) -> ShardStream:
        """Return the part of this stream that one loader worker reads; the workers' batches in order make up this
        stream's.

        Raises:
            UsageError: more workers than streams.
        """
        if workers > len(self.owned):
            raise UsageError(f"{workers} workers for {len(self.owned)} streams of a rank", hint="set fewer workers")
        part = copy.copy(self)
        first, end = (len(self.owned) * number // workers for number in (worker, worker + 1))
        part.owned = self.owned[first:end]
        return part

    def __iter__(self) -> Iterator[Rows]:
        self.reads = 0
        owned = self.owned
        schedule = self.order.schedule(owned, self.step)
        pool = ThreadPoolExecutor(READERS, "lic_dist-stream")
        ahead: deque[tuple[Buffer, list[Future[Rows]]]] = deque()
        served: dict[int, _OpenBuffer] = {}

        def read_ahead() -> None:
            buffer = next(schedule)
            ahead.append((buffer, [pool.submit(self.cache.shard, shard, self.arrays) for shard in buffer.shards]))

        def next_sample(stream: int, number: int) -> tuple[int, Rows]:
            if stream not in served or served[stream].position == len(served[stream].buffer.samples):
                served.pop(stream, None)  # frees its shards before waiting for the next
                buffer, reading = ahead.popleft()
                read_ahead()
                decoded = [future.result() for future in reading]
                self.reads += len(decoded)
                shards = dict(zip(buffer.shards, decoded, strict=True))
                served[stream] = _OpenBuffer(buffer, shards, number - buffer.start)
            now = served[stream]
            now.position += 1
            sample = int(now.buffer.samples[now.position - 1])
            return sample, now.shards[sample // self.cache.shard_length]

        try:
            for _ in range(len(owned) * self.order.opened):
                read_ahead()
            for places in self.order.places(owned, self.step):
                batch = self._empty(len(places))
                for row, place in enumerate(places):
                    sample, shard = next_sample(*place)
                    batch["sample"][row] = sample
                    for name in self.arrays:
                        batch[name][row] = shard[name][sample % self.cache.shard_length]
                yield batch
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _empty(self, size: int) -> Rows:
        batch: Rows = {name: np.empty((size, *shape), dtype) for name, (shape, dtype) in self.kinds.items()}
        return {"sample": np.empty(size, np.int64), **batch}
