"""A cache as torch datasets: any sample by number, or the exact stream, in this process or in loader workers.

loader = DataLoader(cache.dataset(["pixels"]), batch_size=16, shuffle=True)
loader = DataLoader(cache.stream(["pixels"], batch=16), batch_size=None, num_workers=2,
                    multiprocessing_context="forkserver")
for batch in merge_workers(loader): batch["pixels"]        # uint8 [16, 3, s, s]
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from lic_dist.cache.stream import ShardStream

if TYPE_CHECKING:
    from lic_dist.cache.shard_reader import ShardReader


class CachedSamples(Dataset[dict[str, Tensor]]):
    """The usable samples of a part, by number: {array name: tensor, "sample": its number in the cache}.

    Samples are read in blocks as long as the arrays' inner chunks (usually 8 samples), of which the latest `keep` stay
    decoded: random access decodes at most 8 times what it needs, sequential access nothing twice. For shuffled training
    the stream reads far less. `reads` counts the blocks decoded.

    Raises:
        LicError: no such array; on access, a shard that is not written or cannot be read.
        IndexError: no such sample.
    """

    def __init__(self, cache: ShardReader, arrays: Sequence[str], held_out: bool = False, keep: int = 64) -> None:
        self.cache, self.arrays, self.keep = cache, tuple(arrays), keep
        self.part = cache.indices(held_out)
        self.block = min(cache.array(name).chunks[0] for name in arrays)
        self.blocks: OrderedDict[int, dict[str, NDArray[Any]]] = OrderedDict()
        self.reads = 0

    def __len__(self) -> int:
        return len(self.part)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Tensor]]:
        """Return many samples in the given order; each block is read once."""
        samples = [int(self.part[index]) for index in indices]
        found: dict[int, dict[str, Tensor]] = {}
        for sample in sorted(set(samples)):
            block = self._block(sample // self.block)
            rows = {name: torch.from_numpy(np.array(block[name][sample % self.block])) for name in self.arrays}
            found[sample] = {**rows, "sample": torch.tensor(sample)}
        return [found[sample] for sample in samples]

    def _block(self, number: int) -> dict[str, NDArray[Any]]:
        if number not in self.blocks:
            first = number * self.block
            self.blocks[number] = self.cache.rows(first, min(first + self.block, len(self.cache)), self.arrays)
            self.reads += 1
            if len(self.blocks) > self.keep:
                self.blocks.popitem(last=False)
        self.blocks.move_to_end(number)
        return self.blocks[number]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "blocks": OrderedDict()}


class StreamedBatches(IterableDataset[dict[str, Tensor]]):
    """The batches of a `ShardStream` as tensors. A loader worker yields its part of each; see `merge_workers`."""

    def __init__(self, stream: ShardStream) -> None:
        self.stream = stream

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        worker = get_worker_info()
        stream = self.stream if worker is None else self.stream.for_worker(worker.id, worker.num_workers)
        for batch in stream:
            yield {name: torch.from_numpy(rows) for name, rows in batch.items()}


def merge_workers(loader: DataLoader[dict[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
    """Yield the batches of a `DataLoader(cache.stream(...), batch_size=None)`, each merged from its workers' parts."""
    parts, workers = iter(loader), max(1, loader.num_workers)
    while group := list(islice(parts, workers)):
        yield {name: torch.cat([part[name] for part in group]) for name in group[0]} if workers > 1 else group[0]
