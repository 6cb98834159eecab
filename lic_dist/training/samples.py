"""Training samples of a cache in exact batches: decoded once to RAM where they fit, streamed by whole shards elsewhere.

    training = training_samples(cache, "tcq8", quantizer, with_y=False, batch=16)
    with closing(training.batches(seed, batch, first, here)) as batches: ...

Either way batch `step` is a pure function of the samples, the seed and the step, of which every rank takes its part;
resuming at a step and changing the number of ranks keep the order. In RAM it is a permutation of all samples for each
epoch; streamed, that of cache/order.py. Which of the two serves is decided by bytes alone, never by a machine's memory,
and is part of the job's identity with all that its order depends on.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader

from lic_dist.cache.order import Order
from lic_dist.cache.reader import LatentCache
from lic_dist.cache.torch_data import joined
from lic_dist.errors import LicError
from lic_dist.progress import Progress
from lic_dist.quantization.quantize import Quantizer
from lic_dist.training.distributed import Ranks

IN_MEMORY = 4 << 30  # bytes of decoded samples, all arrays together, that a rank keeps in RAM
AHEAD = 2  # batches made ahead of the training step
T = TypeVar("T")


@dataclass(frozen=True)
class Batch:
    """pixels uint8 [b, 3, s, s], y float16 [b, M, h, w], z int16, level float32 (y_hat - means), row uint8, k int16.

    `quantizer` is the active quantizer of each index (0 or 1), all [b, M, h, w].
    """

    pixels: Tensor
    y: Tensor
    z: Tensor
    k: Tensor
    level: Tensor
    quantizer: Tensor


class Training(Protocol):
    """What a job trains on."""

    @property
    def identity(self) -> dict[str, Any]:
        """What the order of the batches depends on beside the cache, the seed and the batch."""

    def batches(self, seed: int, batch: int, first: int, here: Ranks) -> Generator[Batch, None, None]:
        """This rank's part of each global batch from `first` on, without end; made ahead in a thread. Close it."""


def training_samples(
    cache: LatentCache, group: str, quantizer: Quantizer, with_y: bool, batch: int, streams: int | None, workers: int
) -> Training:
    """The training part: in RAM where its arrays take up to IN_MEMORY bytes, else streamed.

    A number of `streams` asks for the stream whatever the size. It is read by `workers` processes of each rank, or by
    threads where that is 0.

    Raises:
        LicError: the cache has no training samples.
        UsageError: so many streams cannot be.
    """
    names = array_names(group, with_y)
    sample = sum(np.dtype(array.dtype).itemsize * int(np.prod(array.shape[1:])) for array in map(cache.array, names))
    if streams is None and len(cache.indices(held_out=False)) * sample <= IN_MEMORY:
        return Samples(cache, group, quantizer, held_out=False, with_y=with_y)
    return Streamed(cache, group, quantizer, with_y, batch, streams, workers)


def array_names(group: str, with_y: bool) -> tuple[str, ...]:
    """The arrays that a batch is made of."""
    return ("pixels", "latents/z", f"quantized/{group}/k", *(("latents/y",) if with_y else ()))


class Samples:
    """Decoded samples of one part of a cache (training or held out, its first `most`), with access to any batch."""

    def __init__(
        self,
        cache: LatentCache,
        group: str,
        quantizer: Quantizer,
        held_out: bool,
        with_y: bool,
        most: int | None = None,
    ) -> None:
        part = cache.indices(held_out)[:most]
        if not len(part):
            raise LicError(
                f"the cache has no {'held-out' if held_out else 'training'} samples", hint="see images.held_out"
            )
        self.quantizer, self.names = quantizer, array_names(group, with_y)
        arrays = {name: cache.array(name) for name in self.names}
        self.arrays = {name: np.empty((len(part), *array.shape[1:]), array.dtype) for name, array in arrays.items()}
        self._fill(cache, part)

    def __len__(self) -> int:
        return len(self.arrays["pixels"])

    def _fill(self, cache: LatentCache, part: NDArray[np.int64]) -> None:
        length = cache.header.shard
        shards = np.unique(part // length)
        with Progress("reading the cache", len(shards), "shard") as bar:
            for shard in shards:
                inside = np.flatnonzero(part // length == shard)
                read = cache.shard(int(shard), self.names)
                for name in self.names:
                    self.arrays[name][inside] = read[name][part[inside] - shard * length]
                bar.advance()

    @property
    def identity(self) -> dict[str, Any]:
        return {"samples": len(self)}

    def order(self, seed: int, epoch: int) -> NDArray[np.int64]:
        """The permutation of an epoch."""
        return np.random.default_rng((seed, epoch)).permutation(len(self))

    def numbers(self, seed: int, step: int, batch: int, share: slice) -> NDArray[np.int64]:
        """This rank's sample numbers of global batch `step`."""
        wanted = np.arange(step * batch, (step + 1) * batch)[share]
        epochs = wanted // len(self)
        orders = {epoch: self.order(seed, int(epoch)) for epoch in np.unique(epochs)}
        return np.array([orders[epoch][index % len(self)] for epoch, index in zip(epochs, wanted, strict=True)])

    def batch(self, numbers: NDArray[np.int64]) -> Batch:
        """The samples of these numbers."""
        return walked(self.quantizer, *(self.arrays[name][numbers] for name in self.names))

    def batches(self, seed: int, batch: int, first: int, here: Ranks) -> Generator[Batch, None, None]:
        """See `Training`."""
        share = here.share(batch)

        def made() -> Iterator[Batch]:
            step = first
            while True:
                yield self.batch(self.numbers(seed, step, batch, share))
                step += 1

        return made_ahead(made())


class Streamed:
    """The training part of a cache, read by whole shards through shuffle buffers: see cache/stream.py."""

    def __init__(
        self,
        cache: LatentCache,
        group: str,
        quantizer: Quantizer,
        with_y: bool,
        batch: int,
        streams: int | None = None,
        workers: int = 0,
    ) -> None:
        self.cache, self.quantizer, self.names, self.workers = cache, quantizer, array_names(group, with_y), workers
        self.order = Order(cache.indices(held_out=False), cache.header.shard, batch, streams=streams)

    @property
    def identity(self) -> dict[str, Any]:
        return {"samples": len(self.order.part), "streams": self.order.streams, "buffer": self.order.buffer}

    def batches(self, seed: int, batch: int, first: int, here: Ranks) -> Generator[Batch, None, None]:
        """See `Training`. UsageError where the streams do not divide among the ranks, or are fewer than the workers."""
        stream = self.cache.stream(
            self.names, batch, seed, first, here.rank, here.world, streams=self.order.streams, buffer=self.order.buffer
        )
        stream.stream.among(0, max(1, self.workers))  # refuses here what a worker would
        how: Any = {"num_workers": self.workers, "multiprocessing_context": "forkserver" if self.workers else None}
        # a generator of its own: the loader draws a seed in this thread, which must not move the training's noise
        rows = joined(DataLoader(stream, batch_size=None, generator=torch.Generator(), **how))
        return made_ahead(walked(self.quantizer, *(one[name].numpy() for name in self.names)) for one in rows)


def walked(
    quantizer: Quantizer,
    pixels: NDArray[np.uint8],
    z: NDArray[np.int16],
    k: NDArray[np.int16],
    y: NDArray[np.float16] | None = None,
) -> Batch:
    """A batch of the arrays' rows; levels and active quantizers by walking the state machine, without the GIL."""
    lanes = np.ascontiguousarray(k.reshape(k.shape[0] * k.shape[1], -1))
    level, active = quantizer.dequantize(lanes).reshape(k.shape), quantizer.active(lanes).reshape(k.shape)
    kept = np.empty(0, np.float16) if y is None else y
    return Batch(*(torch.from_numpy(array) for array in (pixels, kept, z, k, level, active)))


def made_ahead(items: Iterator[T]) -> Generator[T, None, None]:
    """The items of a generator, made up to AHEAD before they are asked for, in a thread; what it raises is raised here.

    Closing it ends the thread and closes the generator.
    """
    pool = ThreadPoolExecutor(1, "lic_dist-batches")
    end: Any = object()
    try:
        waiting = deque(pool.submit(next, items, end) for _ in range(AHEAD))
        while (item := waiting.popleft().result()) is not end:
            waiting.append(pool.submit(next, items, end))
            yield item
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        items.close()  # type: ignore[attr-defined]
