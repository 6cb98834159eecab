"""Samples of a cache for finetuning: decoded once to RAM, or to a memory map where RAM is too small; exact batches.

Batch `step` of a job is a pure function of (seed, step): a permutation of the samples for each epoch, cut into global
batches, of which every rank takes its share. Resuming at a step and changing the number of ranks keep the order.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lic_dist.cache.reader import LatentCache
from lic_dist.errors import LicError
from lic_dist.progress import Progress
from lic_dist.quantization.quantize import Quantizer

IN_MEMORY = 4 << 30  # bytes of decoded samples that a rank keeps in RAM


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


class Samples:
    """Decoded samples of one part of a cache (training or held out), with random access to batches."""

    def __init__(self, cache: LatentCache, group: str, quantizer: Quantizer, held_out: bool, with_y: bool) -> None:
        part = cache.indices(held_out)
        if not len(part):
            raise LicError(
                f"the cache has no {'held-out' if held_out else 'training'} samples", hint="see images.held_out"
            )
        self.quantizer = quantizer
        self.names = {"pixels": "pixels", "z": "latents/z", "k": f"quantized/{group}/k"}
        if with_y:
            self.names["y"] = "latents/y"
        self.arrays = {name: self._allocate(cache, path, len(part)) for name, path in self.names.items()}
        self._fill(cache, part)

    def __len__(self) -> int:
        return len(self.arrays["k"])

    def _allocate(self, cache: LatentCache, path: str, count: int) -> NDArray[np.generic]:
        array = cache.array(path)
        whole, dtype = (count, *array.shape[1:]), array.dtype
        if int(np.prod(whole)) * dtype.itemsize <= IN_MEMORY // len(self.names):
            return np.empty(whole, dtype)
        with tempfile.NamedTemporaryFile(prefix="lic_dist-samples-") as file:  # unlinked at once, freed with the map
            return np.memmap(Path(file.name), dtype=dtype, mode="w+", shape=whole)

    def _fill(self, cache: LatentCache, part: NDArray[np.int64]) -> None:
        length = cache.header.shard
        shards = np.unique(part // length)
        with Progress("reading the cache", len(shards), "shard") as bar:
            for shard in shards:
                inside = np.flatnonzero(part // length == shard)
                read = cache.shard(int(shard), tuple(self.names.values()))
                for name, path in self.names.items():
                    self.arrays[name][inside] = read[path][part[inside] - shard * length]
                bar.advance()

    def largest_index(self) -> int:
        """The largest |k|, without a copy of the memory map."""
        k = self.arrays["k"]
        return int(max(int(k.max()), -int(k.min())))

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
        """The samples of these numbers; levels and active quantizers come from walking the state machine."""
        taken = {name: array[numbers] for name, array in self.arrays.items()}
        k = taken["k"]
        lanes = np.ascontiguousarray(k.reshape(k.shape[0] * k.shape[1], -1))
        level = self.quantizer.dequantize(lanes).reshape(k.shape)
        active = self.quantizer.active(lanes).reshape(k.shape)
        tensors = {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in taken.items()}
        y = tensors.get("y", torch.empty(0, dtype=torch.float16))
        return Batch(
            tensors["pixels"], y, tensors["z"], tensors["k"], torch.from_numpy(level), torch.from_numpy(active)
        )
