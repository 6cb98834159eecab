"""Photos read a second by so many processes: JPEGs of one size, decoded, checked and cut as a build's readers do."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from lic_dist.benchmarks.data import sides
from lic_dist.data import images
from lic_dist.data.photo import Crop
from lic_dist.data.sources.opening import open_source

QUALITY, CROP = 92, 256


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
