"""The work on one shard, as three stages that an engine runs in one process or spread over a cluster:

    read and crop (CPU) -> encode (GPU or CPU, the frozen g_a, h_a, h_s) -> search and write (CPU)
                             view (the stored y, z; h_s)                -> search and write (CPU)

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
from lic_dist.cache import layout, store
from lic_dist.cache.place import Place
from lic_dist.cache.reader import LatentCache
from lic_dist.images import FAULTS, Crop
from lic_dist.models import checkpoint
from lic_dist.quantization.quantize import Quantizer
from lic_dist.quantization.record import QuantizerRecord


@dataclass(frozen=True)
class Shard:
    """A unit of work: a shard's number and its samples; none where its latents are stored."""

    number: int
    crops: tuple[Crop, ...]

    def __str__(self) -> str:
        return f"shard {self.number}"


@dataclass(frozen=True)
class Pixels:
    """A shard that was read: uint8 [n, 3, s, s], status uint8 [n]; seconds by stage."""

    shard: Shard
    pixels: NDArray[np.uint8]
    status: NDArray[np.uint8]
    seconds: dict[str, float]


@dataclass(frozen=True)
class Coded:
    """A shard that was encoded, and what the search needs of its view; `stored`: its latents are in the store."""

    shard: Shard
    latents: Latents
    residual: NDArray[np.float32]
    level: NDArray[np.uint8]
    status: NDArray[np.uint8]
    seconds: dict[str, float]
    stored: bool = False


@dataclass(frozen=True)
class ShardReport:
    """What was written: samples, (source, reason) of the faulty ones, estimated bits, pixels of the good ones."""

    number: int
    samples: int
    faulty: tuple[tuple[str, str], ...]
    bits: float
    pixels: int


def make_reader(folder: str, size: int) -> Callable[[Shard], Pixels]:
    """The first stage: decode the photos of a shard and cut its crops."""

    def work(shard: Shard) -> Pixels:
        started = time.perf_counter()
        pixels, status = images.read_crops(Path(folder), shard.crops, size)
        return Pixels(shard, pixels, status, {"read": time.perf_counter() - started})

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
        seconds = {**read.seconds, "encode": time.perf_counter() - started}
        return Coded(read.shard, latents, seen.residual, seen.level, status, seconds)

    return work


def make_viewer(
    place: Place, source: str, architecture: str | None, lmbda: float | None, batch: int
) -> Callable[[Shard], Coded]:
    """Instead of the first two stages, for a shard whose latents are stored: read them and run the hyper-decoder."""
    model = _load(source, architecture, lmbda)
    cache = LatentCache.open(place)

    def work(shard: Shard) -> Coded:
        started = time.perf_counter()
        read = cache.shard(shard.number, ("pixels", "latents/y", "latents/z", "samples/status"))
        latents = Latents(read["pixels"], read["latents/y"], read["latents/z"])
        seen = view(model, latents.y, latents.z, batch)
        seconds = {"view": time.perf_counter() - started}
        return Coded(shard, latents, seen.residual, seen.level, read["samples/status"], seconds, stored=True)

    return work


def _load(source: str, architecture: str | None, lmbda: float | None) -> nn.Module:
    torch.set_num_threads(1)
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    model = checkpoint.load(source, architecture, lmbda).model
    return model.to("cuda" if torch.cuda.is_available() else "cpu")


def make_searcher(place: Place, fingerprint: str, quantizer: tuple[str, str] | None) -> Callable[[Coded], ShardReport]:
    """The third stage: the search, then the whole shard of every array, then its marker.

    `fingerprint` is the store's; `quantizer` the group's name and its record's JSON, None to write the latents alone.
    """
    torch.set_num_threads(1)
    group = quantizer[0] if quantizer else ""
    search = Quantizer(QuantizerRecord.from_json(quantizer[1])) if quantizer else None
    store_y = layout.read_header(place).store_y

    def work(coded: Coded) -> ShardReport:
        started = time.perf_counter()
        latents, faulty = coded.latents, coded.status != 0
        written: dict[str, NDArray[Any]] = {}
        bits = 0.0
        if search is not None:
            arrays = quantized_arrays(search, latents, coded.residual, coded.level, faulty)
            written = {f"quantized/{group}/{name}": array for name, array in arrays.items()}
            bits = float(arrays["bits"].sum())
        if not coded.stored:
            written |= {"pixels": latents.pixels, "latents/z": latents.z, "samples/status": coded.status}
            if store_y:
                written["latents/y"] = latents.y
        seconds = {**coded.seconds, "search": time.perf_counter() - started}
        store.write_shard(place, fingerprint, coded.shard.number, written, coded.shard.crops, seconds)
        sources = [crop.source for crop in coded.shard.crops]
        named = [(sources[index], FAULTS[coded.status[index]]) for index in np.flatnonzero(faulty)] if sources else []
        pixels = int((~faulty).sum()) * latents.pixels.shape[2] * latents.pixels.shape[3]
        return ShardReport(coded.shard.number, len(faulty), tuple(named), bits, pixels)

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
