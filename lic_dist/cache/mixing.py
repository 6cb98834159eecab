"""The order of samples of several stores by weight: arithmetic alone, as that of one store (order.py).

    sequence    sample `number` of a store takes its place at (2 number + 1) / weight; ties go to the earlier store
                (the method of Webster and Sainte-Lague): of any first n places a store has its share, to a sample or so
    in RAM      one sequence; each store's samples are permuted for each epoch of its own
    streamed    each of the V virtual streams has the sequence, begun at a place of its own, and takes each store's
                samples from that store's stream of the same number

So the stores' shares are exact whatever their sizes: a small store of a large weight comes round more often. Batches
are a function of (parts, weights, seed, batch, V, buffer, step), as those of one store are.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from lic_dist.cache.order import POOL, Buffer, Order, Place, default_streams, permutation, streams_of_rank
from lic_dist.errors import UsageError
from lic_dist.text import counted


class Shares:
    """The sequence of stores by their weights, from any place on; a weight counts as the decimal number it prints as.

    list(islice(Shares([3, 1]).walk(), 5)) => [(0, 0), (0, 1), (1, 0), (0, 2), (0, 3)]
    """

    def __init__(self, weights: Sequence[float]) -> None:
        exact = [Fraction(str(weight)) for weight in weights]
        whole = [int(one * math.lcm(*(other.denominator for other in exact))) for one in exact]
        self.period = sum(whole) // math.gcd(*whole)  # places after which the sequence repeats
        self.strides = [math.lcm(*whole) // one for one in whole]

    def place(self, store: int, number: int) -> int:
        """Return the place of a store's sample, both counted from 0."""
        key, total = (2 * number + 1) * self.strides[store], 0
        for other, stride in enumerate(self.strides):
            total += number if other == store else (key + stride - (other > store)) // (2 * stride)
        return total

    def count(self, store: int, places: int) -> int:
        """Return how many of the first `places` a store has."""
        low, high = 0, places
        while low < high:
            middle = (low + high) // 2
            low, high = (middle + 1, high) if self.place(store, middle) < places else (low, middle)
        return low

    def walk(self, first: int = 0) -> Iterator[tuple[int, int]]:
        """Yield (store, the number of its sample) of each place from `first` on, without end."""
        numbers = [self.count(store, first) for store in range(len(self.strides))]
        keys = [
            ((2 * number + 1) * stride, store)
            for store, (number, stride) in enumerate(zip(numbers, self.strides, strict=True))
        ]
        heapq.heapify(keys)
        while True:
            key, store = keys[0]
            yield store, numbers[store]
            numbers[store] += 1
            heapq.heapreplace(keys, (key + 2 * self.strides[store], store))


def seeds(seed: int, stores: int) -> list[int]:
    """Return the seed of each of several stores; of one store it is the job's."""
    if stores == 1:
        return [seed]
    return [int(np.random.SeedSequence((seed, store)).generate_state(1)[0]) for store in range(stores)]


def shuffled(counts: Sequence[int], shares: Shares, seed: int, first: int, end: int) -> NDArray[np.int64]:
    """Return which samples stand at places `first` to `end` (exclusive) where each store's are permuted as a whole for
    each epoch; samples count from 0 through all stores, of which each has so many.
    """
    offsets = list(itertools.accumulate(counts, initial=0))
    of_store = seeds(seed, len(counts))
    found = np.empty(end - first, np.int64)
    for row, (store, number) in enumerate(itertools.islice(shares.walk(first), end - first)):
        epoch, place = divmod(number, counts[store])
        found[row] = offsets[store] + permutation(of_store[store], epoch, counts[store])[place]
    return found


class MixedOrder:
    """The order of several parts, streamed: what `Order` is of one part. Their samples have numbers of their own.

    Raises:
        LicError: a part is empty.
        UsageError: V does not divide the batch, or exceeds the shards of the store that has most.
    """

    def __init__(
        self,
        parts: Sequence[NDArray[np.int64]],
        shares: Shares,
        length: int,
        batch: int,
        seed: int = 0,
        streams: int | None = None,
    ) -> None:
        most = max(len(np.unique(part // length)) for part in parts)
        self.streams = default_streams(batch, most) if streams is None else streams
        if self.streams > most:
            raise UsageError(
                f"{self.streams} streams, but at most {counted(most, 'shard')} of a store", hint="set fewer"
            )
        each = max(1, POOL // (self.streams * len(parts)))
        self.orders = [
            Order(part, length, batch, one, self.streams, each, in_turn=True)
            for part, one in zip(parts, seeds(seed, len(parts)), strict=True)
        ]
        self.part = np.concatenate(parts)
        self.shares, self.seed, self.batch, self.share = shares, seed, batch, batch // self.streams
        self.opened, self.buffer = len(parts), each * len(parts)
        starts = [stream * shares.period // self.streams for stream in range(self.streams)]
        self.starts = starts  # the place in the sequence at which each stream begins
        self.skipped = [[shares.count(store, start) for store in range(len(parts))] for start in starts]
        self.num_shards = most

    def streams_of_rank(self, rank: int, world: int) -> range:
        """Return the streams of a rank, as `Order.streams_of_rank` does."""
        return streams_of_rank(self, rank, world)

    def places(self, owned: range, step: int = 0) -> Iterator[list[Place]]:
        """Yield which sample of which stream of buffers each row of a batch is, as `Order.places` does."""
        walks = {stream: self.shares.walk(self.starts[stream] + step * self.share) for stream in owned}
        stores = len(self.orders)
        while True:
            yield [
                (stream * stores + store, number - self.skipped[stream][store])
                for stream in owned
                for store, number in itertools.islice(walks[stream], self.share)
            ]

    def schedule(self, owned: range, step: int = 0) -> Iterator[Buffer]:
        """Yield the buffers of some streams in the order in which they are needed, as `Order.schedule` does."""
        return (
            buffer
            for _, buffer in heapq.merge(
                *(self._needed(stream, store, step) for stream in owned for store in range(len(self.orders))),
                key=lambda one: one[0],
            )
        )

    def _needed(self, stream: int, store: int, step: int) -> Iterator[tuple[tuple[int, int, int], Buffer]]:
        """Yield a stream's buffers of one store, each with (step, stream, place) of its first sample."""
        start, skipped = self.starts[stream], self.skipped[stream][store]
        first = self.shares.count(store, start + step * self.share) - skipped
        for buffer in self.orders[store].buffers(stream, first):
            place = self.shares.place(store, skipped + max(first, buffer.start)) - start
            yield (
                (place // self.share, stream, place),
                replace(buffer, stream=stream * len(self.orders) + store),
            )
