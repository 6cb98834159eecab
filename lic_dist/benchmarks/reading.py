"""Measure what a cache takes on disk, and how fast its shards are read."""

from __future__ import annotations

import io
import itertools
import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from PIL import Image
from zarr.codecs import BloscCodec, ZstdCodec
from zarr.storage import MemoryStore

from lic_dist import config
from lic_dist.benchmarks.building import BATCH, FIXED, variations_for
from lic_dist.benchmarks.data import BASE, photographs
from lic_dist.building.build import build
from lic_dist.building.calibrate import z_bits
from lic_dist.building.threads import one_thread
from lic_dist.cache.inspect import inspect
from lic_dist.cache.layout import inner_chunk
from lic_dist.cache.order import Order
from lic_dist.cache.reader import LatentCache
from lic_dist.cache.stream import ShardStream
from lic_dist.quantization.record import QuantizerRecord
from lic_dist.training.samples import array_names

CODECS: dict[str, Any] = {
    "zstd, level 1": ZstdCodec(level=1),
    "zstd, level 9": ZstdCodec(level=9),
    "zstd, shuffled bytes": BloscCodec(cname="zstd", clevel=5, shuffle="shuffle"),
    "zstd, shuffled bits": BloscCodec(cname="zstd", clevel=5, shuffle="bitshuffle"),
}
TRIES = 5  # of which the medians are reported


def build_cache(folder: Path | None, work: Path, crops: int, model: str = BASE) -> Path:
    """Build a cache with TCQ-8 over so many crops of photographs, for the shipped model or another; return its path."""
    source = folder or photographs()
    experiment = config.Experiment.model_validate(
        {
            "model": {"checkpoint": model},
            "images": {
                "path": str(source),
                "variations": variations_for(source, crops),
                "held_out": 0.2,
                "tolerate": 1.0,
            },
            "quantizer": {**FIXED, "group": "tcq8"},
            "cache": {"path": str(work / "a.zarr")},
            "engine": {"name": "local"},
        }
    )
    build(experiment)
    return work / "a.zarr"


def size(folder: Path | None, crops: int) -> dict[str, Any]:
    """Measure bytes of the arrays as stored, k and z against their entropy-coded size, and other codecs with read
    rates.

    The bits are those of the integer tables that the coder writes with. WebP is no codec of Zarr's core; it shows how
    small the pixels could be.
    """
    with tempfile.TemporaryDirectory(prefix="lic_dist-bench-") as name:
        store = build_cache(folder, Path(name), crops)
        report, cache = inspect(store), LatentCache.open(store)
        arrays = {name: one for name, one in report["arrays"].items() if not name.startswith("samples/")}
        whole = cache.load(("pixels", "latents/y", "latents/z", "quantized/tcq8/k"), cache.usable.nonzero()[0])
        record = QuantizerRecord.from_json(cache.record_json("tcq8"))
        bits = report["groups"]["tcq8"]["bits_per_pixel"] * report["usable"] * cache.geometry.crop**2
        of_z = float(z_bits(record, whole["latents/z"]).sum())
        group = sum(one["bytes"] for name, one in arrays.items() if name.startswith("quantized/tcq8/"))
        return {
            "samples": report["num_samples"],
            "arrays": arrays,
            "group_to_entropy_coded": group / ((bits - of_z) / 8),
            "z_to_entropy_coded": arrays["latents/z"]["bytes"] / (of_z / 8),
            "codecs": {name: _codecs(values, cache.header.shard) for name, values in whole.items()},
        }


def _codecs(values: NDArray[Any], shard: int) -> dict[str, dict[str, float]]:
    values = values[:shard]
    rows = {}
    for name, codec in CODECS.items():
        rows[name] = _measured(*_in_memory(values, codec), values)
    if values.dtype == np.uint8:
        files = [_webp(one) for one in values]
        rows["lossless WebP"] = _measured(sum(map(len, files)), lambda: [_picture(file) for file in files], values)
    return rows


def _measured(size: int, read: Callable[[], Any], values: NDArray[Any]) -> dict[str, float]:
    read()
    times = []
    for _ in range(TRIES):
        started = time.perf_counter()
        read()
        times.append(time.perf_counter() - started)
    return {"part_of_raw": size / values.nbytes, "samples_per_second": len(values) / median(times)}


def _in_memory(values: NDArray[Any], codec: Any) -> tuple[int, Callable[[], Any]]:
    chunk = inner_chunk(len(values), values[0].nbytes)
    store = MemoryStore()
    array = zarr.create_array(
        store,
        shape=values.shape,
        dtype=values.dtype,
        chunks=(chunk, *values.shape[1:]),
        shards=values.shape,
        compressors=codec,
    )
    array[:] = values
    return array.nbytes_stored(), lambda: array[:]


def _webp(crop: NDArray[np.uint8]) -> bytes:
    data = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(crop.transpose(1, 2, 0))).save(data, "WEBP", lossless=True, method=0)
    return data.getvalue()


def _picture(file: bytes) -> NDArray[np.uint8]:
    return np.asarray(Image.open(io.BytesIO(file)))


def loading(folder: Path | None, crops: int) -> dict[str, Any]:
    """Measure samples a second of whole shards by array and codec pipeline, one process, and the stream's
    amplification.

    Amplification is the number of shards that a stream in batches of 8 decodes for each one that an epoch needs.
    """
    with tempfile.TemporaryDirectory(prefix="lic_dist-bench-") as name, one_thread():
        store = build_cache(folder, Path(name), crops)
        cache, names = LatentCache.open(store), array_names(("tcq8",), with_y=False)
        order = Order(cache.indices(held_out=False), cache.header.shard, BATCH, seed=0)
        return {
            "samples": len(cache),
            "amplification": _amplification(cache, names, order),
            "whole_shards": _shard_rates(store, names),
        }


def _amplification(cache: LatentCache, names: tuple[str, ...], order: Order) -> float:
    """Return the shards decoded in one epoch of every stream, per shard that holds samples of the part."""
    stream = ShardStream(cache, names, order)
    steps = len(order.part) // order.batch
    for _ in itertools.islice(stream, steps):
        pass
    return stream.reads / len(np.unique(order.part // cache.header.shard))


def _shard_rates(store: Path, names: tuple[str, ...]) -> dict[str, float]:
    rates = {}
    for pipeline in ("zarr", "zarrs"):
        if pipeline == "zarrs" and find_spec("zarrs") is None:
            continue
        cache = LatentCache.open(store, pipeline=pipeline)
        for array in names:
            times = []
            for _ in range(TRIES):
                started = time.perf_counter()
                for shard in range(cache.num_shards):
                    cache.shard(shard, (array,))
                times.append(time.perf_counter() - started)
            rates[f"{array}, {pipeline}"] = len(cache) / median(times[1:])
    return rates
