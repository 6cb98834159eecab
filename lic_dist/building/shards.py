"""The work on one shard, as three stages that an engine runs in one process or spread over a cluster:

    read and crop (CPU) -> encode (GPU or CPU, the frozen g_a, h_a, h_s) -> search and write (CPU)

Each stage is a factory, called once in a worker, that returns the function for one shard. The bytes written depend on
the plan alone: encoder batches are the plan's, each worker computes on one thread.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from lic_dist import images
from lic_dist.building.calibrate import z_bits
from lic_dist.building.latents import Latents, encode, view
from lic_dist.cache import store
from lic_dist.cache.plan import Plan
from lic_dist.cache.reader import LatentCache
from lic_dist.images import FAULTS, Crop
from lic_dist.models import checkpoint
from lic_dist.quantization.quantize import Quantizer
from lic_dist.quantization.record import QuantizerRecord


@dataclass(frozen=True)
class Shard:
    """A unit of work: a shard's number and its samples."""

    number: int
    crops: tuple[Crop, ...]


@dataclass(frozen=True)
class Pixels:
    """A shard that was read: uint8 [n, 3, s, s], status uint8 [n]; seconds so far."""

    shard: Shard
    pixels: NDArray[np.uint8]
    status: NDArray[np.uint8]
    seconds: float


@dataclass(frozen=True)
class Coded:
    """A shard that was encoded, and what the search needs of its view; `stored`: its latents are in the store."""

    shard: Shard
    latents: Latents
    residual: NDArray[np.float32]
    level: NDArray[np.uint8]
    status: NDArray[np.uint8]
    seconds: float
    stored: bool = False


@dataclass(frozen=True)
class ShardReport:
    """What was written: samples, how many of them are faulty and why, estimated bits, pixels, seconds of work."""

    number: int
    samples: int
    faults: dict[str, int]
    bits: float
    pixels: int
    seconds: float


def make_reader(folder: str, size: int) -> Callable[[Shard], Pixels]:
    """The first stage: decode the photos of a shard and cut its crops."""

    def work(shard: Shard) -> Pixels:
        started = time.perf_counter()
        pixels, status = images.read_crops(Path(folder), shard.crops, size)
        return Pixels(shard, pixels, status, time.perf_counter() - started)

    return work


def make_encoder(source: str, architecture: str | None, lmbda: float | None, batch: int) -> Callable[[Pixels], Coded]:
    """The second stage: the frozen encoder and hyper-decoder, float32 without TF32."""
    model = _load(source, architecture, lmbda)

    def work(read: Pixels) -> Coded:
        started = time.perf_counter()
        latents, overflow = encode(model, read.pixels, batch)
        status = read.status.copy()
        status[overflow & (status == 0)] = FAULTS.index("latents overflow")
        for array in (latents.y, latents.z):  # the pixels are read-only on Ray; `write_shard` zeroes those
            array[status != 0] = 0
        seen = view(model, latents.y, latents.z, batch)
        seconds = read.seconds + time.perf_counter() - started
        return Coded(read.shard, latents, seen.residual, seen.level, status, seconds)

    return work


def make_viewer(
    path: str, source: str, architecture: str | None, lmbda: float | None, batch: int
) -> Callable[[Shard], Coded]:
    """Instead of the first two stages, for a shard whose latents are stored: read them and run the hyper-decoder."""
    model = _load(source, architecture, lmbda)
    cache = LatentCache.open(path)

    def work(shard: Shard) -> Coded:
        started = time.perf_counter()
        read = cache.shard(shard.number, ("pixels", "latents/y", "latents/z", "samples/status"))
        latents = Latents(read["pixels"], read["latents/y"], read["latents/z"])
        seen = view(model, latents.y, latents.z, batch)
        seconds = time.perf_counter() - started
        return Coded(shard, latents, seen.residual, seen.level, read["samples/status"], seconds, stored=True)

    return work


def _load(source: str, architecture: str | None, lmbda: float | None) -> nn.Module:
    torch.set_num_threads(1)
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    model = checkpoint.load(source, architecture, lmbda).model
    return model.to("cuda" if torch.cuda.is_available() else "cpu")


def make_searcher(path: str, plan: Plan, group: str, record_json: str) -> Callable[[Coded], ShardReport]:
    """The third stage: the search, then the whole shard of every array, then its marker."""
    torch.set_num_threads(1)
    quantizer = Quantizer(QuantizerRecord.from_json(record_json))
    store_y = bool(plan.identity["store_y"])

    def work(coded: Coded) -> ShardReport:
        started = time.perf_counter()
        latents, faulty = coded.latents, coded.status != 0
        arrays = quantized_arrays(quantizer, latents, coded.residual, coded.level, faulty)
        seconds = coded.seconds + time.perf_counter() - started
        written: dict[str, NDArray[Any]] = {f"quantized/{group}/{name}": array for name, array in arrays.items()}
        if not coded.stored:
            written |= {"pixels": latents.pixels, "latents/z": latents.z, "samples/status": coded.status}
            if store_y:
                written["latents/y"] = latents.y
        store.write_shard(path, plan, coded.shard.number, written, seconds=seconds)
        names, counts = np.unique(coded.status[faulty], return_counts=True)
        faults = {FAULTS[name]: int(number) for name, number in zip(names, counts, strict=True)}
        pixels = int((~faulty).sum()) * latents.pixels.shape[2] * latents.pixels.shape[3]
        return ShardReport(coded.shard.number, len(faulty), faults, float(arrays["bits"].sum()), pixels, seconds)

    return work


def quantized_arrays(
    quantizer: Quantizer,
    latents: Latents,
    residual: NDArray[np.float32],
    level: NDArray[np.uint8],
    faulty: NDArray[np.bool_],
) -> dict[str, NDArray[Any]]:
    """k int16 [n, M, h, w], bits float32 [n] (y and z, by the integer tables), distortion float32 [n].

    The distortion is the search's own: sum of S_c (r - level)^2, the predicted squared error of the picture's
    values in [0, 1], summed over pixels and colours.
    """
    count, channels = latents.y.shape[:2]
    k = quantizer.quantize(residual, level)
    error = (residual.astype(np.float64) - quantizer.dequantize(k)) ** 2
    by_channel = error.reshape(count, channels, -1).sum(axis=2)
    distortion = by_channel @ quantizer.record.weights.astype(np.float64)
    bits = quantizer.bits(k, level).reshape(count, channels).sum(axis=1) + z_bits(quantizer.record, latents.z)
    k = k.reshape(latents.y.shape)
    k[faulty], bits[faulty], distortion[faulty] = 0, 0, 0
    return {"k": k, "bits": bits.astype(np.float32), "distortion": distortion.astype(np.float32)}
