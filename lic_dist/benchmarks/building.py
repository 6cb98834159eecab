"""Measure how fast a cache is built compared with the bare work, and the memory of its workers for long photo lists."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from lic_dist import config
from lic_dist.benchmarks.data import photographs
from lic_dist.benchmarks.growth import peak, reset_peak
from lic_dist.building.build import build
from lic_dist.building.job import prepare
from lic_dist.building.latents import encode, quantizer_input
from lic_dist.building.threads import one_thread
from lic_dist.cache.reader import LatentCache
from lic_dist.cache.storages import open_storage
from lic_dist.cache.store import finished_markers
from lic_dist.data import images
from lic_dist.data.manifest import scan
from lic_dist.models import checkpoint as checkpoints
from lic_dist.models.architectures import ModelSpec
from lic_dist.models.architectures import build as build_model
from lic_dist.models.checkpoint import Checkpoint
from lic_dist.progress import Progress
from lic_dist.quantization.quantize import Quantizer
from lic_dist.quantization.record import QuantizerRecord

N, M, CROP, BATCH, SHARD = 128, 192, 256, 8, 64
FIXED = {"step": 0.7, "lambda_scale": 0.14, "pilot": 64, "calibration": 16}
BARE_SHARDS = 4  # of the bare loop, after each build
MIB = 2**20
POLL = 0.1  # seconds between two looks at the workers' memory


def throughput(folder: Path | None, crops: int, rounds: int) -> dict[str, Any]:
    """Measure crops a second of the bare loop (encode, search; crops in RAM), of a local build and of a build on Ray.

    The model is an untrained mbt2018-mean of N = 128, M = 192; batches of 8 crops of 256x256, one thread a worker, one
    encoder. The bare loop runs after each build, since machines drift; the `ratio` of a build is to the mean of those
    before and after it. A build's steady rate is that of its shards' markers, without start and end. `busy` is the part
    of the steady time in which its encoder encodes, which waits for photos, or for what is written, in the rest.
    """
    with tempfile.TemporaryDirectory(prefix="lic_dist-bench-") as name:
        work = Path(name)
        source = folder or photographs()
        model = untrained(work, N, M)
        variations = variations_for(source, crops)

        def asked(engine: str) -> config.Experiment:
            return config.Experiment.model_validate(
                {
                    "model": {"checkpoint": str(model)},
                    "images": {"path": str(source), "crop": CROP, "variations": variations, "tolerate": 1.0,
                               "held_out": 0.2},
                    "quantizer": {**FIXED, "group": "tcq8"},
                    "cache": {"path": str(work / "a.zarr"), "shard": SHARD, "batch": BATCH},
                    "engine": {"name": engine, "num_cpus": 3},
                }
            )  # fmt: skip

        pixels = _some_crops(asked("local"), SHARD)
        figures: dict[str, Any] = {"bare": [], "local": [], "ray": []}
        for engine in ("local", "ray") * rounds:
            started = time.monotonic()
            build(asked(engine), rebuild=True)
            wall, found = time.monotonic() - started, _steady_rate(work / "a.zarr")
            record = QuantizerRecord.from_json(LatentCache.open(work / "a.zarr").record_json("tcq8"))
            figures["bare"].append(_bare_loop_rate(checkpoints.load(str(model)), record, pixels))
            around = mean(figures["bare"][-2:])
            found["wall"], found["start_and_end"] = wall, wall - found["crops"] / found["crops_per_second"]
            found["ratio"] = found["crops_per_second"] / around
            found["busy"] = found["crops_per_second"] * found["seconds_a_crop"]["encode"]
            figures[engine].append(found)
    return figures


def variations_for(source: Path, crops: int) -> int:
    """Return the crops of each photo that make `crops` in all."""
    usable = sum(not photo.fault and min(photo.width, photo.height) >= CROP for photo in scan(source))
    return -(-crops // usable)


def untrained(work: Path, n: int, m: int) -> Path:
    """Write the checkpoint of a freshly initialized mbt2018-mean to a folder; return its path."""
    torch.manual_seed(0)
    path = work / f"untrained-{n}-{m}.pth.tar"
    checkpoints.save(Checkpoint(build_model("mbt2018-mean", n, m), ModelSpec("mbt2018-mean", n, m, 0.013)), path)
    return path


def _some_crops(experiment: config.Experiment, count: int) -> NDArray[np.uint8]:
    job = prepare(experiment)
    pixels, _ = images.read_crops(job.source, job.plan.crops[:count], job.images.crop)
    return pixels


@one_thread()
def _bare_loop_rate(parent: Checkpoint, record: QuantizerRecord, pixels: NDArray[np.uint8]) -> float:
    """Return crops a second of encoding and searching data in RAM, by the build's functions, batches and one thread."""
    quantizer = Quantizer(record)

    def work() -> None:
        latents, _ = encode(parent.model, pixels, BATCH)
        inputs = quantizer_input(parent.model, latents.y, latents.z, BATCH)
        quantizer.quantize(inputs.residual, inputs.level)

    work()
    started = time.perf_counter()
    for _ in range(BARE_SHARDS):
        work()
    return BARE_SHARDS * len(pixels) / (time.perf_counter() - started)


def _steady_rate(store: Path) -> dict[str, Any]:
    """Return crops a second between the first and the last marker, and the seconds of a crop by stage from the
    markers.
    """
    cache = LatentCache.open(store)
    done = finished_markers(open_storage(store), cache.header, "tcq8")
    folder = store / "_progress" / cache.group_attributes("tcq8")["fingerprint"][:8]
    times = sorted(((folder / f"{shard}.json").stat().st_mtime, marker.samples) for shard, marker in done.items())
    rate = sum(samples for _, samples in times[1:]) / (times[-1][0] - times[0][0])
    stages = {
        name: sum(one.seconds[name] for one in done.values()) / len(cache) for name in ("read", "encode", "search")
    }
    return {"crops": len(cache), "crops_per_second": rate, "seconds_a_crop": stages, "shards": len(done)}


def memory(counts: tuple[int, ...]) -> dict[str, Any]:
    """Measure the peak resident MB of the heaviest worker on Ray, and of the driver, for each number of photos.

    Photos, model and shards (64 crops of 64x64) are small, so that whatever grows with the list shows.
    """
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="lic_dist-bench-") as name:
        work = Path(name)
        model = untrained(work, 8, 12)
        photos = work / "photos"
        for count in counts:
            _small_photos(photos, count)
            experiment = config.Experiment.model_validate(
                {
                    "model": {"checkpoint": str(model)},
                    "images": {"path": str(photos), "crop": 64, "tolerate": 1.0},
                    "quantizer": {**FIXED, "group": "tcq8"},
                    "cache": {"path": str(work / f"{count}.zarr"), "shard": SHARD, "batch": BATCH},
                    "engine": {"name": "ray", "num_cpus": 3},
                }
            )
            peaks: dict[str, float] = {}
            with _record_peaks(peaks):
                build(experiment)
            figures[str(count)] = peaks
    return figures


def growing(photos: int, added: int, rounds: int) -> dict[str, Any]:
    """Measure what an append costs beside the whole build: seconds on the wall and of CPU, in this process.

    Photos and model are small, so that whatever an append does besides its own shards shows. Each round adds `added`
    photos to the store of the round before. `least` is the part of the photos that are added: no append costs less.
    """
    figures: dict[str, Any] = {"photos": photos, "added": added, "least": added / photos, "appends": []}
    with tempfile.TemporaryDirectory(prefix="lic_dist-bench-") as name:
        work = Path(name)
        experiment = config.Experiment.model_validate(
            {
                "model": {"checkpoint": str(untrained(work, 8, 12))},
                "images": {"path": str(work / "photos"), "crop": 64, "tolerate": 1.0},
                "quantizer": {**FIXED, "shift": 0.05, "group": "tcq8"},
                "cache": {"path": str(work / "a.zarr"), "shard": SHARD, "batch": BATCH},
                "engine": {"name": "local"},
            }
        )
        for number in range(rounds + 1):
            _small_photos(work / "photos", photos + number * added)
            wall, cpu = time.monotonic(), time.process_time()
            report = build(experiment, append=number > 0)
            taken = {"wall": time.monotonic() - wall, "cpu": time.process_time() - cpu, "shards": report.shards_built}
            if number:
                figures["appends"].append(taken)
            else:
                figures["build"] = taken
    for clock in ("wall", "cpu"):
        figures[clock] = median(one[clock] for one in figures["appends"]) / figures["build"][clock]
    return figures


def _small_photos(folder: Path, count: int) -> None:
    folder.mkdir(exist_ok=True)
    present = len(list(folder.iterdir()))
    grid = np.mgrid[:72, :72].sum(0)
    with Progress("making photos", count, "photo", done=present) as bar:
        for number in range(present, count):
            rng = np.random.default_rng(number)
            plane = (np.sin(grid[..., None] * rng.uniform(0.01, 0.2, 3)) * 100 + 128).astype(np.uint8)
            Image.fromarray(plane).save(folder / f"{number}.jpg", quality=90)
            bar.advance()


@contextmanager
def _record_peaks(peaks: dict[str, float]) -> Iterator[None]:
    """Record peak resident MB, by Linux's VmHWM, of the heaviest actor below this process and of this process."""
    stop = threading.Event()

    def look() -> None:
        while not stop.wait(POLL):
            peaks["worker"] = max([peaks.get("worker", 0.0), *(peak(process) / MIB for process in _actors())])

    reset_peak()
    watcher = threading.Thread(target=look, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        stop.set()
        watcher.join()
        peaks["driver"] = peak(os.getpid()) / MIB


def _actors() -> list[int]:
    """Return the process ids of our Ray actors below this process."""
    parents, titles = {}, {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError, IndexError):  # a process that has just ended
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                titles[int(entry.name)] = (entry / "cmdline").read_text()

    def is_below(process: int) -> bool:
        while process in parents:
            process = parents[process]
            if process == os.getpid():
                return True
        return False

    return [process for process, title in titles.items() if title.startswith("ray::_Worker") and is_below(process)]


def planning(photos: int) -> dict[str, float]:
    """Measure the planning for so many photos, one crop each: seconds, and peak bytes a photo, manifest included."""
    done = subprocess.run(
        [sys.executable, "-c", _PLAN, str(photos)], capture_output=True, text=True, check=True, timeout=1800
    )
    told: dict[str, float] = json.loads(done.stdout)
    return told


_PLAN = """
import json, os, sys, time
from lic_dist.benchmarks import planned
from lic_dist.benchmarks.growth import peak
from lic_dist.data.manifest import Manifest
count = int(sys.argv[1])
before = peak(os.getpid())
manifest = Manifest.from_bytes(Manifest.of(planned.photos(count)).to_bytes())
started = time.monotonic()
plan = planned.plan(manifest)
seconds = time.monotonic() - started
started = time.monotonic()
[plan.crops_of(shard) for shard in range(0, plan.num_shards, 97)]
shard = (time.monotonic() - started) / len(range(0, plan.num_shards, 97))
print(json.dumps({"photos": count, "seconds": seconds, "bytes_a_photo": (peak(os.getpid()) - before) / count,
                  "seconds_a_shard": shard}))
"""
