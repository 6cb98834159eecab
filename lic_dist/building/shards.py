"""The work on one shard, as stages that an engine runs in one process or spread over a cluster:

    read and crop (CPU)      -> encode (GPU or CPU, the frozen g_a, h_a, h_s) -> search and write (CPU)
    read the stored pixels   -> encode                                        -> search and write
                                read the stored y and z, run h_s              -> search and write

Refinement (codec/refine.py), which runs g_s, belongs to the stage that runs h_s; the search then begins where it ended.

Where means depend on y_hat, or y_hat is corrected, one stage walks the model's with the search, where the encoder is:

    read and crop (CPU)      -> code: encode, walk, write (GPU or CPU)
    read the stored pixels   -> code
                                code: read the stored y and z, walk, write

Each stage is a factory, called once in a worker, that returns the function for one shard. The bytes written depend on
the plan alone: encoder batches are the plan's, and each worker computes on one thread.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from lic_dist.building.calibrate import z_bits
from lic_dist.building.latents import Latents, WalkedInput, encode, quantize_lanes, quantizer_input, refined
from lic_dist.building.reading import ReadShard, Shard, Target
from lic_dist.cache import store
from lic_dist.cache.reader import LatentCache
from lic_dist.data.photo import FAULTS
from lic_dist.models.checkpoint import Checkpoint, ModelSource
from lic_dist.quantization.quantize import Quantizer
from lic_dist.quantization.record import QuantizerRecord

STORED = ("latents/y", "latents/z", "samples/status")  # to quantize a stored shard again; to refine, pixels too


@dataclass(frozen=True)
class EncodedShard:
    """A shard that was encoded, with what the search needs; without pixels where the base is written already."""

    shard: Shard
    pixels: NDArray[np.uint8] | None
    y: NDArray[np.float16]
    z: NDArray[np.int16]
    residual: NDArray[np.float32]
    level: NDArray[np.integer[Any]]
    status: NDArray[np.uint8]
    seconds: dict[str, float]


@dataclass(frozen=True)
class ShardReport:
    """What was written: samples, (source, reason) of the faulty ones, estimated bits, pixels of the good ones."""

    number: int
    samples: int
    faulty: tuple[tuple[str, str], ...]
    bits: float
    pixels: int


def quantizer_of(target: Target) -> Quantizer | None:
    """Return the quantizer of a target's group, if any."""
    return Quantizer(QuantizerRecord.from_json(target.record_json)) if target.group else None


def make_encoder(target: Target, source: ModelSource, batch: int, z_steps: int) -> Callable[[ReadShard], EncodedShard]:
    """Make the second stage: the frozen encoder, refinement where the group's record asks for it, and the
    hyper-decoder; float32 without TF32.
    """
    model, quantizer = _load(source).model, quantizer_of(target)

    def work(read: ReadShard) -> EncodedShard:
        started = time.perf_counter()
        latents, status = _encoded(model, read, batch, z_steps)
        aim = latents.y if quantizer is None else refined(model, read.pixels, latents.y, latents.z, quantizer, batch)
        inputs = quantizer_input(model, aim, latents.z, batch)
        seconds = {**read.seconds, "encode": time.perf_counter() - started}
        pixels = None if read.stored else read.pixels
        return EncodedShard(read.shard, pixels, latents.y, latents.z, inputs.residual, inputs.level, status, seconds)

    return work


def _encoded(model: nn.Module, read: ReadShard, batch: int, z_steps: int) -> tuple[Latents, NDArray[np.uint8]]:
    """Return the latents of a shard, zeros of faulty samples, and the status of each sample."""
    latents, overflow = encode(model, read.pixels, batch, z_steps)
    status = read.status.copy()
    status[overflow & (status == 0)] = FAULTS.index("latents overflow")
    for array in (latents.y, latents.z):  # pixels are read-only on Ray; `write_shard` zeroes them
        array[status != 0] = 0
    return latents, status


def make_hyper_decoder(target: Target, source: ModelSource, batch: int) -> Callable[[Shard], EncodedShard | None]:
    """Make the stage that replaces the first two where y is stored: read it, refine where the group's record asks for
    it, and run the hyper-decoder.
    """
    model, stored = _load(source).model, _stored(target)

    def work(shard: Shard) -> EncodedShard:
        started = time.perf_counter()
        y, z, status, aim = stored(shard, model, batch)
        inputs = quantizer_input(model, aim, z, batch)
        seconds = {"view": time.perf_counter() - started}
        return EncodedShard(shard, None, y, z, inputs.residual, inputs.level, status, seconds)

    return target.skip_done(work)


def _stored(target: Target) -> Callable[[Shard, nn.Module, int], tuple[Any, Any, Any, Any]]:
    """Return what reads a shard: y, z, status, and what the group's search should aim at, for which pixels are read
    where its record asks for refinement.
    """
    cache, quantizer = LatentCache(target.storage, header=target.header()), quantizer_of(target)
    pixels = ("pixels",) if quantizer is not None and quantizer.record.refine else ()

    def read(shard: Shard, model: nn.Module, batch: int) -> tuple[Any, Any, Any, Any]:
        found = cache.shard(shard.number, (*STORED, *pixels))
        y, z, status = (found[name] for name in STORED)
        if quantizer is None or not pixels:
            return y, z, status, y
        return y, z, status, refined(model, found["pixels"], y, z, quantizer, batch)

    return read


def make_coder(target: Target, source: ModelSource, batch: int, z_steps: int) -> Callable[[ReadShard], ShardReport]:
    """Make the last stage of a model whose means depend on y_hat: the encoder, refinement where the group's record asks
    for it, the walk, then write as `make_searcher` does. Without a group nothing is walked.
    """
    model, write = _load(source).model, _Writer(target)

    def work(read: ReadShard) -> ShardReport:
        started = time.perf_counter()
        latents, status = _encoded(model, read, batch, z_steps)
        aim = latents.y
        if write.quantizer is not None:
            aim = refined(model, read.pixels, latents.y, latents.z, write.quantizer, batch)
        arrays = _walked_arrays(write.quantizer, model, aim, latents.z, batch, status != 0)
        seconds = {**read.seconds, "code": time.perf_counter() - started}
        pixels = None if read.stored else read.pixels
        return write(read.shard, pixels, latents.y, latents.z, status, arrays, seconds)

    return work


def make_stored_coder(target: Target, source: ModelSource, batch: int) -> Callable[[Shard], ShardReport | None]:
    """Make the only stage of such a model where y is stored: read it, refine where the group's record asks for it, walk
    and write.
    """
    model, write, stored = _load(source).model, _Writer(target), _stored(target)

    def work(shard: Shard) -> ShardReport:
        started = time.perf_counter()
        y, z, status, aim = stored(shard, model, batch)
        arrays = _walked_arrays(write.quantizer, model, aim, z, batch, status != 0)
        return write(shard, None, y, z, status, arrays, {"code": time.perf_counter() - started})

    return target.skip_done(work)


@contextmanager
def restore_torch_settings() -> Iterator[None]:
    """Restore torch's thread count and TF32 settings after the block; workers in this process change them."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    threads, allowed = torch.get_num_threads(), (matmul.allow_tf32, cudnn.allow_tf32)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        matmul.allow_tf32, cudnn.allow_tf32 = allowed


def _load(source: ModelSource) -> Checkpoint:
    torch.set_num_threads(1)
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    loaded = source.load()
    loaded.model.to("cuda" if torch.cuda.is_available() else "cpu")
    return loaded


def make_searcher(target: Target) -> Callable[[EncodedShard], ShardReport]:
    """Make the last stage: search, then write every array of the shard, then its marker."""
    torch.set_num_threads(1)
    write = _Writer(target)

    def work(coded: EncodedShard) -> ShardReport:
        started = time.perf_counter()
        arrays = {}
        if write.quantizer is not None:
            faulty = coded.status != 0
            arrays = quantized_arrays(write.quantizer, coded.y, coded.z, coded.residual, coded.level, faulty)
        seconds = {**coded.seconds, "search": time.perf_counter() - started}
        return write(coded.shard, coded.pixels, coded.y, coded.z, coded.status, arrays, seconds)

    return work


class _Writer:
    """Writes shards of a target, which `quantizer` quantizes, if any: every array, then the marker."""

    def __init__(self, target: Target) -> None:
        self.target, self.header = target, target.header()
        self.quantizer = quantizer_of(target)

    def __call__(
        self,
        shard: Shard,
        pixels: NDArray[np.uint8] | None,
        y: NDArray[np.float16],
        z: NDArray[np.int16],
        status: NDArray[np.uint8],
        arrays: dict[str, NDArray[Any]],
        seconds: dict[str, float],
    ) -> ShardReport:
        """Write the `arrays` of the group, if any, and the latents unless they are there, which no pixels say."""
        written = {f"quantized/{self.target.group}/{name}": array for name, array in arrays.items()}
        if pixels is not None:
            written |= {"pixels": pixels, "latents/z": z, "samples/status": status}
            if self.header.store_y:
                written["latents/y"] = y
        crops, faulty = shard.crops, status != 0
        store.write_shard(self.target.storage, self.target.fingerprint, shard.number, written, crops, seconds)
        named = tuple((crops[index].source, FAULTS[status[index]]) for index in np.flatnonzero(faulty) if crops)
        bits = float(arrays["bits"].sum()) if arrays else 0.0
        return ShardReport(shard.number, len(faulty), named, bits, int((~faulty).sum()) * self.header.geometry.crop**2)


def quantized_arrays(
    quantizer: Quantizer,
    y: NDArray[np.float16],
    z: NDArray[np.int16],
    residual: NDArray[np.float32],
    level: NDArray[np.integer[Any]],
    faulty: NDArray[np.bool_],
) -> dict[str, NDArray[Any]]:
    """Return k int16 [n, M, h, w], bits float32 [n] (y and z, by the integer tables) and distortion float32 [n].

    The distortion is the sum of S_c (r - level)^2, r about what the search aimed at: the predicted squared error of the
    picture's values in [0, 1], summed over pixels and colours.
    """
    k, _, bits, error = quantize_lanes(quantizer, residual, level, y.shape[1])
    return group_arrays(quantizer.record, k.reshape(y.shape), z, bits, error, faulty)


def group_arrays(
    record: QuantizerRecord,
    k: NDArray[np.int16],
    z: NDArray[np.int16],
    bits_of_y: NDArray[np.float64],
    error: NDArray[np.float64],
    faulty: NDArray[np.bool_],
) -> dict[str, NDArray[Any]]:
    """Return the arrays of a group, of bits and squared errors by channel, [n, M]; zeros for faulty samples."""
    distortion = error @ record.weights.astype(np.float64)
    bits = bits_of_y.sum(axis=1) + z_bits(record, z)
    k[faulty], bits[faulty], distortion[faulty] = 0, 0, 0
    return {"k": k, "bits": bits.astype(np.float32), "distortion": distortion.astype(np.float32)}


def _walked_arrays(
    quantizer: Quantizer | None,
    model: nn.Module,
    y: NDArray[np.float16],
    z: NDArray[np.int16],
    batch: int,
    faulty: NDArray[np.bool_],
) -> dict[str, NDArray[Any]]:
    """Return the arrays of the group by a walk, in batches of a fixed size; none without a quantizer."""
    if quantizer is None:
        return {}
    found = WalkedInput(model, y, z, batch).quantize(quantizer)
    return group_arrays(quantizer.record, found.k, z, found.bits, found.error, faulty)
