"""The order of streamed samples: which of them make up global batch `step`, by arithmetic alone.

    epoch    the shards that hold samples of the part, permuted by (seed, epoch)
    deal     the shards of all epochs, end to end, go one by one to V virtual streams in turn
    buffer   a stream takes its shards of an epoch up to `buffer` at a time, and permutes their samples together by
             (seed, epoch, stream, number of the buffer)
    batch    global batch `step` is the next batch / V samples of each stream, in the order of the streams

So a batch is a pure function of (part, seed, batch, V, buffer, step). Ranks and workers own streams and do not change
the batches.

Guaranteed: within an epoch of its stream a sample comes exactly once, before any sample of the stream's next epoch;
over all streams an epoch has every sample exactly once. The deal continues where the last epoch ended, so after any
number of epochs the streams differ by at most one shard. No stream waits for another: where shards hold unequal numbers
of samples (faults, or the shard in which the held-out part begins), a stream with smaller shards runs ahead by the
difference and begins its next epoch earlier.

Shuffling quality: the samples of a batch come from V shards (if V is at most the batch), each drawn from `buffer`
shards, out of a pool of V * buffer shards. The default V is the largest divisor of the batch up to 16, with buffers
that make the pool 16 shards: 1,024 samples at 64 a shard. A cache with fewer shards has fewer streams: the largest
divisor of the batch up to that number. Memory grows with the pool, see stream.py.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import count
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from lic_dist.errors import LicError, UsageError
from lic_dist.text import counted

MOST_STREAMS = 16
POOL = 16  # shards that the streams' buffers hold together by default


Place = tuple[int, int]  # of a row in a batch: the stream of its buffer, and the number of the sample there


@dataclass(frozen=True, eq=False)
class Buffer:
    """The samples that a stream serves next: int64, in order; the first is sample number `start` of the stream."""

    stream: int
    start: int
    samples: NDArray[np.int64]
    shards: tuple[int, ...]


class Order:
    """The order of a part of the cache: `part` int64 are its sample numbers, ascending; `length` samples a shard with
    padding.

    Attributes: streams (V), buffer (shards), share (samples of each stream in a batch), num_shards (with samples of the
    part), opened (buffers that a stream serves from at once).

    Where streams take shards `in_turn`, there may be more streams than shards: then some have none in an epoch.

    Raises:
        LicError: the part is empty.
        UsageError: V does not divide the batch, or exceeds the number of shards.
    """

    opened = 1

    def __init__(
        self,
        part: NDArray[np.int64],
        length: int,
        batch: int,
        seed: int = 0,
        streams: int | None = None,
        buffer: int | None = None,
        in_turn: bool = False,
    ) -> None:
        if not len(part):
            raise LicError("the cache has no usable samples of this part", hint="see images.held_out")
        self.part, self.batch, self.seed = part, batch, seed
        self.shards, starts = np.unique(part // length, return_index=True)
        self.starts = np.append(starts, len(part))
        self.counts = np.diff(self.starts)
        self.num_shards = len(self.shards)
        self.streams = default_streams(batch, len(self.shards)) if streams is None else streams
        if self.streams < 1 or batch % self.streams:
            raise UsageError(
                f"{self.streams} streams do not divide a batch of {batch}", hint="set streams to a divisor"
            )
        if self.streams > len(self.shards) and not in_turn:
            raise UsageError(
                f"{self.streams} streams, but only {counted(len(self.shards), 'shard')} with samples",
                hint="set fewer streams, or build the cache with a smaller cache.shard",
            )
        self.buffer = max(1, POOL // self.streams) if buffer is None else buffer
        self.share = batch // self.streams

    def streams_of_rank(self, rank: int, world: int) -> range:
        """Return the streams that one of `world` ranks owns. They are contiguous: the ranks' parts in order are the
        batch.

        Raises:
            UsageError: the streams do not divide among the ranks.
        """
        return streams_of_rank(self, rank, world)

    def places(self, owned: range, step: int = 0) -> Iterator[list[Place]]:
        """Yield the place of each row of some streams' part of a batch, from step to step without end."""
        for now in count(step):
            yield [(stream, number) for stream in owned for number in range(now * self.share, (now + 1) * self.share)]

    def buffers(self, stream: int, first: int = 0) -> Iterator[Buffer]:
        """Yield the buffers of a stream without end, from the one that holds its sample number `first`."""
        start = 0
        for epoch in count():
            dealt_from = (stream - epoch * len(self.shards)) % self.streams
            mine = permutation(self.seed, epoch, len(self.shards))[dealt_from :: self.streams]
            if not len(mine):
                continue
            total = int(self.counts[mine].sum())
            if start + total <= first:
                start += total
                continue
            for number, places in enumerate(np.array_split(mine, -(-len(mine) // self.buffer))):
                size = int(self.counts[places].sum())
                if start + size > first:
                    samples = np.concatenate([self.part[self.starts[one] : self.starts[one + 1]] for one in places])
                    generator = np.random.default_rng((self.seed, epoch, stream + 1, number))
                    shards = tuple(self.shards[places].tolist())
                    yield Buffer(stream, start, generator.permutation(samples), shards)
                start += size

    def schedule(self, owned: range, step: int = 0) -> Iterator[Buffer]:
        """Yield the buffers of some streams without end, in the order in which the batches from `step` on need them."""

        def needed(buffer: Buffer) -> tuple[int, int, int]:
            return max(step, buffer.start // self.share), buffer.stream, buffer.start

        return heapq.merge(*(self.buffers(stream, step * self.share) for stream in owned), key=needed)


class Streamed(Protocol):
    """What `streams_of_rank` asks of an order."""

    streams: int
    batch: int
    num_shards: int


def streams_of_rank(order: Streamed, rank: int, world: int) -> range:
    """Return the streams of an order that one of `world` ranks owns. Raises UsageError as `Order.streams_of_rank`."""
    if order.streams % world:
        hint = f"set streams to a multiple of {world} that divides the batch of {order.batch}"
        if order.num_shards < world:
            shards = counted(order.num_shards, "shard")
            hint = f"only {shards} with samples: use fewer ranks, or a smaller cache.shard"
        raise UsageError(f"{order.streams} streams do not divide among {world} ranks", hint=hint)
    size = order.streams // world
    return range(rank * size, (rank + 1) * size)


def default_streams(batch: int, shards: int) -> int:
    """Return the largest divisor of the batch up to 16 and to the number of shards.

    default_streams(16, 1000) => 16; default_streams(24, 1000) => 12; default_streams(16, 5) => 4
    """
    return max(divisor for divisor in range(1, min(MOST_STREAMS, shards) + 1) if batch % divisor == 0)


@lru_cache(maxsize=32)
def permutation(seed: int, epoch: int, size: int) -> NDArray[np.int64]:
    """Return the permutation of `size` things in an epoch; read-only, the latest are kept."""
    order = np.random.default_rng((seed, epoch)).permutation(size)
    order.setflags(write=False)
    return order
