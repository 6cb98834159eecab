"""Training samples of a cache in exact batches: decoded once to RAM if they fit, otherwise streamed by whole shards.

    training = training_data(cache, {"tcq8": quantizer}, with_y=False, section)
    with closing(training.batches(first, ranks)) as batches: ...

Either way batch `step` depends on the samples, the seed and the step alone, and each rank takes its part of it.
Resuming at a step and changing the number of ranks keep the order. In RAM the order is a permutation of all samples for
each epoch; streamed, it is that of cache/order.py; of several stores, both are as in cache/mixing.py. The number of
bytes alone decides between the two, never a machine's memory, and the decision is part of the job's identity with all
that the order depends on.
"""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader

from lic_dist import config
from lic_dist.cache.mixing import MixedOrder, Shares, shuffled
from lic_dist.cache.mixture import Mixture
from lic_dist.cache.order import Order
from lic_dist.cache.stream import Shards, ShardStream
from lic_dist.cache.torch_data import StreamedBatches, merge_workers
from lic_dist.errors import LicError
from lic_dist.models.protocol import Elements
from lic_dist.progress import Progress
from lic_dist.quantization.quantize import Quantizer
from lic_dist.training import shared_memory
from lic_dist.training.distributed import Ranks

IN_MEMORY = 4 << 30  # bytes of decoded samples, all arrays together, that a rank keeps in RAM
AHEAD = 2  # batches made ahead of the training step
Layout = tuple[Elements, ...]  # of `CodecModel.layout`
ONE_STAGE: Layout = (Elements(),)
T = TypeVar("T")


@dataclass(frozen=True)
class Batch:
    """Samples of a cache, first axis b; `y` and `noise` are empty where a job does not need them.

    sample int64 [b], their numbers; pixels uint8 [b, 3, s, s]; z int16 [b, Nz, hz, wz]; and, [b, M, h, w] each, y
    float16, noise float32 in -0.5..0.5, k int16, level float32 (y_hat - means), and quantizer uint8, the active
    quantizer (0 or 1) of each index.
    """

    sample: Tensor
    pixels: Tensor
    y: Tensor
    noise: Tensor
    z: Tensor
    k: Tensor
    level: Tensor
    quantizer: Tensor

    def split(self, parts: int) -> list[Batch]:
        """Split the batch into parts of equal size."""
        columns = {name: value.tensor_split(parts) for name, value in vars(self).items()}
        return [Batch(**{name: column[part] for name, column in columns.items()}) for part in range(parts)]

    def to(self, device: torch.device) -> Batch:
        """Return the batch on a device."""
        return Batch(**{name: value.to(device, non_blocking=True) for name, value in vars(self).items()})


class TrainingData(Protocol):
    """The data that a job trains on."""

    @property
    def identity(self) -> dict[str, Any]:
        """What the order of the batches depends on in addition to the cache, the seed and the batch."""

    def batches(self, first: int, ranks: Ranks) -> Generator[Batch, None, None]:
        """Yield this rank's part of each global batch from `first` on, without end, prefetched in a thread. Close it
        after use.
        """


def turn(seed: int, step: int, count: int) -> int:
    """Return whose turn it is at a step, of several groups that are trained on together: each is as likely."""
    return int(np.random.default_rng((seed, step)).integers(count)) if count > 1 else 0


def training_data(
    cache: Mixture,
    groups: Mapping[str, Quantizer],
    with_y: bool,
    section: config.Finetune,
    layout: Layout = ONE_STAGE,
) -> TrainingData:
    """Return the training part: in RAM where its arrays take up to IN_MEMORY bytes, else (or where asked for) streamed.

    A batch has the indices of one of the groups, by `turn`. `layout` is the model's, for the cache's size of y.

    Raises:
        LicError: a store has no training samples.
        UsageError: `finetune.streams` does not divide the batch, or exceeds the number of shards.
    """
    names, parts = array_names(groups, with_y), cache.parts(held_out=False)
    counts = tuple(map(len, parts))
    if 0 in counts:
        store = cache.stores[counts.index(0)].storage
        raise LicError(f"{store} has no usable samples to train on", hint="see images.held_out")
    sample = sum(np.dtype(array.dtype).itemsize * int(np.prod(array.shape[1:])) for array in map(cache.array, names))
    if section.streams == "auto" and sum(counts) * sample <= IN_MEMORY:
        samples = Samples(cache, groups, np.concatenate(parts), with_y, layout)
        return ShuffledData(samples, section.seed, section.batch, counts, cache.shares)
    streams = None if section.streams == "auto" else section.streams
    order = cache.order(section.batch, section.seed, streams)
    return StreamedData(cache, groups, with_y, order, section.workers, layout)


def array_names(groups: Iterable[str], with_y: bool) -> tuple[str, ...]:
    """Return the names of the arrays that batches are made of."""
    indices = (f"quantized/{group}/k" for group in groups)
    return ("pixels", "latents/z", *indices, *(("latents/y",) if with_y else ()))


def _of_turn(groups: Mapping[str, Quantizer], turn: int, with_y: bool) -> tuple[Quantizer, tuple[str, ...]]:
    """Return the quantizer whose turn it is, and the names of the arrays that its batches are made of."""
    group, quantizer = list(groups.items())[turn]
    return quantizer, array_names((group,), with_y)


class Samples:
    """Samples of a cache decoded to RAM, with access to any batch of them; `part` are their numbers, ascending."""

    def __init__(
        self,
        cache: Shards,
        groups: Mapping[str, Quantizer],
        part: NDArray[np.int64],
        with_y: bool,
        layout: Layout = ONE_STAGE,
    ) -> None:
        if not len(part):
            raise LicError("the cache has no usable samples of this part", hint="see images.held_out")
        self.groups, self.with_y, self.part, self.layout = groups, with_y, part, layout
        self.names = array_names(groups, with_y)
        arrays = {name: cache.array(name) for name in self.names}
        self.arrays = {name: np.empty((len(part), *array.shape[1:]), array.dtype) for name, array in arrays.items()}
        self._fill(cache, part)

    def __len__(self) -> int:
        return len(self.arrays["pixels"])

    def _fill(self, cache: Shards, part: NDArray[np.int64]) -> None:
        length = cache.shard_length
        shards, firsts = np.unique(part // length, return_index=True)  # `part` ascends: a shard's samples lie together
        with Progress("reading the cache", len(shards), "shard") as bar:
            for shard, first, end in zip(shards.tolist(), firsts, [*firsts[1:], len(part)], strict=True):
                read = cache.shard(shard, self.names)
                for name in self.names:
                    self.arrays[name][first:end] = read[name][part[first:end] - shard * length]
                bar.advance()

    def batch(self, numbers: NDArray[np.int64], key: tuple[int, int] = (0, 0), turn: int = 0) -> Batch:
        """Return the samples of these numbers, counted within the part, with the noise of a key and the indices of the
        group whose turn it is.
        """
        quantizer, names = _of_turn(self.groups, turn, self.with_y)
        rows = {name: self.arrays[name][numbers] for name in names}
        return make_batch(quantizer, names, {"sample": self.part[numbers], **rows}, key, self.layout)


@dataclass(frozen=True)
class ShuffledData:
    """Samples in RAM, those of each store permuted as a whole for each epoch: see `TrainingData`.

    `counts` are the samples of each store, `shares` the stores' parts of a batch; by default there is one store.
    """

    samples: Samples
    seed: int
    batch: int
    counts: tuple[int, ...] = ()
    shares: Shares = field(default_factory=lambda: Shares([1]))

    @property
    def identity(self) -> dict[str, Any]:
        return {"samples": len(self.samples)}

    def batches(self, first: int, ranks: Ranks) -> Generator[Batch, None, None]:
        samples, share, seed = self.samples, ranks.share(self.batch), self.seed
        return prefetch(
            samples.batch(self.numbers(step)[share], (seed, step), turn(seed, step, len(samples.groups)))
            for step in itertools.count(first)
        )

    def numbers(self, step: int) -> NDArray[np.int64]:
        """Return the samples of global batch `step`."""
        counts = self.counts or (len(self.samples),)
        return shuffled(counts, self.shares, self.seed, step * self.batch, (step + 1) * self.batch)


@dataclass(frozen=True)
class StreamedData:
    """Samples read by whole shards through shuffle buffers (cache/stream.py): see `TrainingData`.

    `workers` processes read a rank's streams; with 0 workers threads do.
    """

    cache: Shards
    groups: Mapping[str, Quantizer]
    with_y: bool
    order: Order | MixedOrder
    workers: int
    layout: Layout = ONE_STAGE

    @property
    def identity(self) -> dict[str, Any]:
        return {"samples": len(self.order.part), "streams": self.order.streams, "buffer": self.order.buffer}

    def batches(self, first: int, ranks: Ranks) -> Generator[Batch, None, None]:
        """Yield batches as `TrainingData` says. UsageError where the streams do not divide among ranks and workers."""
        names = array_names(self.groups, self.with_y)
        stream = ShardStream(self.cache, names, self.order, first, ranks.rank, ranks.world)
        stream.for_worker(0, max(1, self.workers))  # raises here what a worker would raise
        sample = sum(math.prod(a.shape[1:]) * a.dtype.itemsize for a in map(self.cache.array, names))
        shared_memory.require(sample * self.order.batch // ranks.world, self.workers)
        how: Any = {"num_workers": self.workers, "multiprocessing_context": "forkserver" if self.workers else None}
        loader = merge_workers(DataLoader(StreamedBatches(stream), batch_size=None, **how))
        read = ({name: rows.numpy() for name, rows in batch.items()} for batch in loader)
        return prefetch(self._batch(rows, step) for step, rows in enumerate(read, start=first))

    def _batch(self, rows: Mapping[str, NDArray[Any]], step: int) -> Batch:
        seed = self.order.seed
        quantizer, names = _of_turn(self.groups, turn(seed, step, len(self.groups)), self.with_y)
        return make_batch(quantizer, names, rows, (seed, step), self.layout)


def make_batch(
    quantizer: Quantizer,
    names: tuple[str, ...],
    rows: Mapping[str, NDArray[Any]],
    key: tuple[int, int],
    layout: Layout = ONE_STAGE,
) -> Batch:
    """Make a batch from the arrays' rows, named as by `array_names`, and "sample"; most of it releases the GIL.

    Levels and active quantizers follow from walking the state machine, from state 0 on in each lane of each stage of
    `layout`. Where there is y, noise is drawn for each sample by (seed, step, number of the sample), so that it is
    independent of the rank, the split of the batch and the device.
    """
    pixels, z, k, *rest = (rows[name] for name in names)
    indices = torch.from_numpy(k)
    level, active = torch.empty(k.shape), torch.empty(k.shape, dtype=torch.uint8)
    for elements in layout:
        part = elements.take(indices)
        lanes = elements.lanes(part)
        elements.put(level, elements.from_lanes(quantizer.unspread(lanes), part))
        elements.put(active, elements.from_lanes(quantizer.active(lanes), part))
    y = rest[0] if rest else np.empty(0, np.float16)
    noise = np.empty(y.shape, np.float32)
    for one, sample in zip(noise, rows["sample"] if rest else (), strict=True):
        np.random.default_rng((*key, int(sample))).random(out=one, dtype=np.float32)
    noise -= 0.5
    stored = map(torch.from_numpy, (rows["sample"], pixels, y, noise, z))
    return Batch(*(*stored, indices, level, active))


def prefetch(items: Iterator[T]) -> Generator[T, None, None]:
    """Yield the items of a generator, made in a thread up to AHEAD before they are asked for; its errors are raised
    here.

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
