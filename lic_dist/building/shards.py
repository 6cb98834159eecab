"""The work on one shard, as stages that an engine runs in one process or spread over a cluster:

    read and crop (CPU)      -> encode (GPU or CPU, the frozen g_a, h_a, h_s) -> search and write (CPU)
    read the stored pixels   -> encode                                        -> search and write
                                read the stored y and z, run h_s              -> search and write

Each stage is a factory, called once in a worker, that returns the function for one shard. The bytes written depend on
the plan alone: encoder batches are the plan's, and each worker computes on one thread.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from lic_dist.building.calibrate import z_bits
from lic_dist.building.latents import encode, quantizer_input
from lic_dist.cache import layout, store
from lic_dist.cache.layout import Header
from lic_dist.cache.reader import LatentCache
from lic_dist.cache.storage import Storage
from lic_dist.data import images
from lic_dist.data.photo import FAULTS, Crop
from lic_dist.errors import LicError
from lic_dist.models import checkpoint
from lic_dist.models.refine import Refinement
from lic_dist.quantization.quantize import Quantizer
from lic_dist.quantization.record import QuantizerRecord

T = TypeVar("T")


@dataclass(frozen=True)
class Shard:
    """A unit of work: a shard's number and its samples, without samples where its latents are stored."""

    number: int
    crops: tuple[Crop, ...]

    def __str__(self) -> str:
        return f"shard {self.number}"


@dataclass(frozen=True)
class ReadShard:
    """A shard that was read: pixels uint8 [n, 3, s, s], status uint8 [n], seconds by stage; `stored`: the base is
    written.
    """

    shard: Shard
    pixels: NDArray[np.uint8]
    status: NDArray[np.uint8]
    seconds: dict[str, float]
    stored: bool = False


@dataclass(frozen=True)
class EncodedShard:
    """A shard that was encoded, with what the search needs; without pixels where the base is written already."""

    shard: Shard
    pixels: NDArray[np.uint8] | None
    y: NDArray[np.float16]
    z: NDArray[np.int16]
    residual: NDArray[np.float32]
    level: NDArray[np.uint8]
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


@dataclass(frozen=True)
class Target:
    """The store to write to, by its storage and fingerprint, and the group with its record's JSON, if any."""

    storage: Storage
    fingerprint: str
    group: str | None = None
    record_json: str = ""

    def header(self) -> Header:
        """Return the store's header. Raises LicError where it has become another store's."""
        header = layout.read_header(self.storage)
        if header.fingerprint != self.fingerprint:
            raise LicError(f"{self.storage} has become another cache meanwhile", hint="was it rebuilt beside this job?")
        return header

    def skip_done(self, work: Callable[[Shard], T]) -> Callable[[Shard], T | None]:
        """Return `work` for shards, wrapped to return None for those that another job has written meanwhile."""
        header = self.header()

        def pending(shard: Shard) -> T | None:
            # a group's finished shard implies finished latents
            done = store.finished_marker(self.storage, header, shard.number, self.group) is not None
            return None if done else work(shard)

        return pending


def make_reader(target: Target, folder: str, size: int) -> Callable[[Shard], ReadShard | None]:
    """Make the first stage: decode the photos of a shard and cut its crops."""

    def work(shard: Shard) -> ReadShard:
        started = time.perf_counter()
        pixels, status = images.read_crops(Path(folder), shard.crops, size)
        return ReadShard(shard, pixels, status, {"read": time.perf_counter() - started})

    return target.skip_done(work)


def make_stored_reader(target: Target) -> Callable[[Shard], ReadShard | None]:
    """Make the first stage for a store that keeps pixels but not y: read the pixels from the store."""
    cache = LatentCache.open(target.storage)

    def work(shard: Shard) -> ReadShard:
        started = time.perf_counter()
        read = cache.shard(shard.number, ("pixels", "samples/status"))
        seconds = {"read": time.perf_counter() - started}
        return ReadShard(shard, read["pixels"], read["samples/status"], seconds, stored=True)

    return target.skip_done(work)


def make_encoder(
    source: str, architecture: str | None, lmbda: float | None, options: dict[str, Any], batch: int, refine: int
) -> Callable[[ReadShard], EncodedShard]:
    """Make the second stage: the frozen encoder, `refine` steps of y, and the hyper-decoder; float32 without TF32."""
    loaded = _load(source, architecture, lmbda, options)
    model, refinement = loaded.model, Refinement(refine, loaded.spec.lmbda)

    def work(read: ReadShard) -> EncodedShard:
        started = time.perf_counter()
        latents, overflow = encode(model, read.pixels, batch, refinement)
        status = read.status.copy()
        status[overflow & (status == 0)] = FAULTS.index("latents overflow")
        for array in (latents.y, latents.z):  # pixels are read-only on Ray; `write_shard` zeroes them
            array[status != 0] = 0
        inputs = quantizer_input(model, latents.y, latents.z, batch)
        seconds = {**read.seconds, "encode": time.perf_counter() - started}
        pixels = None if read.stored else read.pixels
        return EncodedShard(read.shard, pixels, latents.y, latents.z, inputs.residual, inputs.level, status, seconds)

    return work


def make_hyper_decoder(
    target: Target,
    source: str,
    architecture: str | None,
    lmbda: float | None,
    options: dict[str, Any],
    batch: int,
) -> Callable[[Shard], EncodedShard | None]:
    """Make the stage that replaces the first two where y is stored: read it and run the hyper-decoder."""
    model = _load(source, architecture, lmbda, options).model
    cache = LatentCache.open(target.storage)

    def work(shard: Shard) -> EncodedShard:
        started = time.perf_counter()
        read = cache.shard(shard.number, ("latents/y", "latents/z", "samples/status"))
        y, z = read["latents/y"], read["latents/z"]
        inputs = quantizer_input(model, y, z, batch)
        seconds = {"view": time.perf_counter() - started}
        return EncodedShard(shard, None, y, z, inputs.residual, inputs.level, read["samples/status"], seconds)

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


def _load(source: str, architecture: str | None, lmbda: float | None, options: dict[str, Any]) -> checkpoint.Checkpoint:
    torch.set_num_threads(1)
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    loaded = checkpoint.load(source, architecture, lmbda, options)
    loaded.model.to("cuda" if torch.cuda.is_available() else "cpu")
    return loaded


def make_searcher(target: Target) -> Callable[[EncodedShard], ShardReport]:
    """Make the last stage: search, then write every array of the shard, then its marker."""
    torch.set_num_threads(1)
    search = Quantizer(QuantizerRecord.from_json(target.record_json)) if target.group else None
    header = target.header()

    def work(coded: EncodedShard) -> ShardReport:
        started = time.perf_counter()
        faulty = coded.status != 0
        written: dict[str, NDArray[Any]] = {}
        bits = 0.0
        if search is not None:
            arrays = quantized_arrays(search, coded.y, coded.z, coded.residual, coded.level, faulty)
            written = {f"quantized/{target.group}/{name}": array for name, array in arrays.items()}
            bits = float(arrays["bits"].sum())
        if coded.pixels is not None:
            written |= {"pixels": coded.pixels, "latents/z": coded.z, "samples/status": coded.status}
            if header.store_y:
                written["latents/y"] = coded.y
        seconds = {**coded.seconds, "search": time.perf_counter() - started}
        number, crops = coded.shard.number, coded.shard.crops
        store.write_shard(target.storage, target.fingerprint, number, written, crops, seconds)
        named = tuple((crops[index].source, FAULTS[coded.status[index]]) for index in np.flatnonzero(faulty) if crops)
        pixels = int((~faulty).sum()) * header.geometry.crop**2
        return ShardReport(number, len(faulty), named, bits, pixels)

    return work


def quantized_arrays(
    quantizer: Quantizer,
    y: NDArray[np.float16],
    z: NDArray[np.int16],
    residual: NDArray[np.float32],
    level: NDArray[np.uint8],
    faulty: NDArray[np.bool_],
) -> dict[str, NDArray[Any]]:
    """Return k int16 [n, M, h, w], bits float32 [n] (y and z, by the integer tables) and distortion float32 [n].

    The distortion is the sum of S_c (r - level)^2: the predicted squared error of the picture's values in [0, 1],
    summed over pixels and colours.
    """
    count, channels = y.shape[:2]
    k = quantizer.quantize(residual, level)
    error = (residual.astype(np.float64) - quantizer.dequantize(k)) ** 2
    by_channel = error.reshape(count, channels, -1).sum(axis=2)
    distortion = by_channel @ quantizer.record.weights.astype(np.float64)
    bits = quantizer.bits(k, level).reshape(count, channels).sum(axis=1) + z_bits(quantizer.record, z)
    k = k.reshape(y.shape)
    k[faulty], bits[faulty], distortion[faulty] = 0, 0, 0
    return {"k": k, "bits": bits.astype(np.float32), "distortion": distortion.astype(np.float32)}
