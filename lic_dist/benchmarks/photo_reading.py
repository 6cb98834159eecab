"""Photos read a second by so many processes: JPEGs of one size, decoded, checked and cut as a build's readers do, from
a folder, and from a bucket beside it.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from PIL import Image

from lic_dist.benchmarks.data import sides
from lic_dist.benchmarks.slow_bucket import URL, slow_bucket
from lic_dist.data import images
from lic_dist.data.photo import Crop
from lic_dist.data.source import PhotoSource
from lic_dist.data.sources.opening import open_source
from lic_dist.remote import object_store

QUALITY, CROP, SHARD = 92, 256, 64


def rates(megapixels: float, budget: float, counts: tuple[int, ...] = ()) -> dict[str, float]:
    """Return photos a second by the number of processes that read: `counts`, or the powers of two and all cores."""
    cores = os.cpu_count() or 1
    counts = counts or tuple(sorted({*(1 << n for n in range(cores.bit_length()) if 1 << n <= cores), cores}))
    with tempfile.TemporaryDirectory(prefix="lic_dist-bench-") as name:
        crop = _photo(Path(name), megapixels)
        context = multiprocessing.get_context("spawn")  # forked ones inherit torch's threads
        with ProcessPoolExecutor(max(counts), context) as pool:
            list(pool.map(_read, [name] * max(counts), [crop] * max(counts), [0.1] * max(counts)))
            found = {}
            for count in counts:
                share = budget / len(counts)
                done = pool.map(_read, [name] * count, [crop] * count, [share] * count)
                found[str(count)] = sum(done)
    return found


def _photo(folder: Path, megapixels: float) -> Crop:
    height, width = sides(megapixels)
    rows, columns = np.mgrid[:height, :width] / 50
    planes = np.stack([np.sin(rows + n * columns) + np.cos(columns * (3 - n)) for n in range(3)], axis=-1)
    noise = np.random.default_rng(0).normal(0, 8, planes.shape)
    Image.fromarray(np.clip(128 + 50 * planes + noise, 0, 255).astype(np.uint8)).save(folder / "0.jpg", quality=QUALITY)
    digest = hashlib.sha256((folder / "0.jpg").read_bytes()).hexdigest()
    return Crop("0.jpg", digest, (height - CROP) // 2, (width - CROP) // 2, False, False)


def _read(folder: str, crop: Crop, seconds: float) -> float:
    """Read one photo again and again; return how many a second."""
    source = open_source(folder)
    started, done = time.perf_counter(), 0
    while not done or time.perf_counter() - started < seconds:
        _, status = images.read_crops(source, [crop], CROP)
        assert not status.any()
        done += 1
    return done / (time.perf_counter() - started)


def from_a_bucket(megapixels: float, rounds: int, milliseconds: float = 20.0) -> dict[str, Any]:
    """Measure photos a second from a folder and from a bucket (slow_bucket.py), in turn, with 1 process and with all.

    In a round each process reads a shard of SHARD photos from each, as a build's readers do. `ratio` is the median over
    rounds of the bucket's rate over the folder's in the same round.
    """
    import obstore

    counts = sorted({1, os.cpu_count() or 1})
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(prefix="lic_dist-bench-") as name, slow_bucket(milliseconds) as options:
        crop, folder = _photo(Path(name), megapixels), Path(name)
        crops = [replace(crop, source=f"{number}.jpg") for number in range(SHARD)]
        data, store = (folder / crop.source).read_bytes(), object_store(URL, tuple(sorted(options.items())))
        for one in crops:
            (folder / one.source).write_bytes(data)
            obstore.put(store, one.source, data)
        sources = {"folder": open_source(folder), "bucket": open_source(URL, options)}
        rates: dict[str, Any] = {}
        with ProcessPoolExecutor(max(counts), context) as pool:
            for source in sources.values():  # processes start, connections open
                list(pool.map(_read_shard, [source] * max(counts), [crops] * max(counts)))
            for count in counts:
                found: dict[str, list[float]] = {where: [] for where in sources}
                work: dict[str, list[float]] = {where: [] for where in sources}
                for _ in range(rounds):
                    for where, source in sources.items():
                        started = time.perf_counter()
                        seconds = list(pool.map(_read_shard, [source] * count, [crops] * count))
                        work[where].append(1000 * sum(seconds) / (count * SHARD))
                        found[where].append(count * SHARD / (time.perf_counter() - started))
                ratios = [bucket / local for bucket, local in zip(found["bucket"], found["folder"], strict=True)]
                rates[str(count)] = {
                    **{where: median(values) for where, values in found.items()},
                    "ratio": median(ratios),
                    "ratios": ratios,
                    "milliseconds_of_cpu": {where: median(values) for where, values in work.items()},
                }
    return {"rounds": rounds, "megapixels": megapixels, "milliseconds": milliseconds, "processes": rates}


def _read_shard(source: PhotoSource, crops: Sequence[Crop]) -> float:
    """Read a shard; return the CPU time of all threads of this process, in seconds."""
    started = time.process_time()
    _, status = images.read_crops(source, crops, CROP)
    assert not status.any()
    return time.process_time() - started
