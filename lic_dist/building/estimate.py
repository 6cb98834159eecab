"""Estimate what a build will take from one batch of its own crops: bytes of each array, seconds of each stage."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from lic_dist import config
from lic_dist.building.calibrate import SEARCH_SPACES
from lic_dist.building.job import Job
from lic_dist.building.latents import WalkedInput, encode, inputs_of
from lic_dist.building.records import analytic_record
from lic_dist.building.shards import group_arrays
from lic_dist.building.threads import one_thread
from lic_dist.cache import layout
from lic_dist.data import images
from lic_dist.errors import LicError
from lic_dist.quantization.quantize import Quantizer
from lic_dist.text import clock, counted

LEAST_CROPS = 8  # at least so many crops


@dataclass(frozen=True)
class Estimate:
    """A plan in figures: `bytes` of the store by array; `seconds` that one worker of a stage takes for all samples."""

    path: str
    fingerprint: str
    samples: int
    held_out: int
    shards: int
    bytes: dict[str, int]
    seconds: dict[str, float]
    free: int | None
    workers: dict[str, int]
    cores: int | None

    @property
    def wall_seconds(self) -> float:
        """Seconds that the build takes: those of the slowest stage, or all work divided by the cores if these are too
        few.

        `cores` is None for a remote cluster.
        """
        slowest = max(seconds / self.workers[name] for name, seconds in self.seconds.items())
        return max(slowest, sum(self.seconds.values()) / self.cores) if self.cores else slowest

    @property
    def machine_hours(self) -> float:
        """Hours of machines like the one that made the estimate: this one until the build ends; of a remote cluster
        all the work, with every core at work.
        """
        return (self.wall_seconds if self.cores else sum(self.seconds.values()) / (os.cpu_count() or 1)) / 3600


@one_thread()
def estimate(job: Job) -> Estimate:
    """Read, encode, search and compress one batch of the plan's first crops, and scale up the figures.

    Raises:
        LicError: none of the crops can be read.
    """
    plan, engine = job.plan, job.workers.engine
    count = min(plan.num_samples, max(LEAST_CROPS, plan.batch))
    started = time.perf_counter()
    crops = [plan.crops[number] for number in range(count)]
    pixels, status = images.read_crops(job.source, crops, job.images.crop)
    read = time.perf_counter() - started
    if not (status == 0).any():
        raise LicError(f"none of the first {count} crops can be read", hint="`lic-dist cache scan`")
    encode(job.parent.model, pixels[:1], plan.batch)  # the first call of a model is slower
    started = time.perf_counter()
    latents, _ = encode(job.parent.model, pixels, plan.batch, job.refinement.z_steps)
    inputs = inputs_of(job.parent.model, latents.y, latents.z, plan.batch)
    encoded = time.perf_counter() - started
    section = job.quantizer
    strength, step, *_ = SEARCH_SPACES[section.name].start
    weights = np.full(job.parent.codec.channels, 0.02)
    quantizer = Quantizer(analytic_record(job.parent, section.name, section.states, step, strength, weights))
    faulty = status != 0
    inputs.quantize(quantizer)  # compiles
    started = time.perf_counter()
    found = inputs.quantize(quantizer)
    arrays = group_arrays(quantizer.record, found.k, latents.z, found.bits, found.error, faulty)
    values = {f"quantized/{section.group}/{name}": array for name, array in arrays.items()}
    values |= {"pixels": pixels, "latents/y": latents.y, "latents/z": latents.z}
    sizes = {}
    for spec in (
        *layout.base_arrays(plan.geometry, job.store_y),
        *layout.group_arrays(section.group, plan.geometry),
    ):
        if spec.name in values:
            document = layout.array_document(spec, 1, count)
            sizes[spec.name] = len(layout.encode(document, 0, values[spec.name])) * plan.num_samples // count
    searched = time.perf_counter() - started
    scale = plan.num_samples / count
    seconds = {"read": read * scale, "encode": encoded * scale, "search": searched * scale}
    if isinstance(inputs, WalkedInput):
        seconds = {"read": seconds["read"], "code": seconds["encode"] + seconds["search"]}
    return Estimate(
        str(job.storage),
        plan.fingerprint,
        plan.num_samples,
        plan.num_held_out,
        plan.num_shards,
        sizes,
        seconds,
        job.storage.free_bytes(),
        *_workers(engine, seconds),
    )


def _workers(engine: config.Engine, stages: Iterable[str]) -> tuple[dict[str, int], int | None]:
    if engine.name == "local":
        return dict.fromkeys(stages, 1), 1
    cores = None if engine.address or os.environ.get("RAY_ADDRESS") else engine.num_cpus or os.cpu_count()
    pools = {"read": engine.readers, "search": engine.searchers}
    return {name: config.bounds(pools.get(name, engine.encoders))[1] for name in stages}, cores


def describe(found: Estimate) -> list[str]:
    """Return the estimate in lines for a terminal."""
    total = sum(found.bytes.values())
    lines = [
        f"{found.path}: {counted(found.samples, 'sample')} ({found.held_out} held out) "
        f"in {counted(found.shards, 'shard')}, fingerprint {found.fingerprint[:12]}"
    ]
    lines += [f"  {name:<28} {size / 1e6:12.1f} MB" for name, size in found.bytes.items()]
    free = (
        ""
        if found.free is None
        else f"; free: {found.free / 1e6:.1f} MB" + (" (TOO LITTLE)" if found.free < total else "")
    )
    lines.append(f"  {'in all, about':<28} {total / 1e6:12.1f} MB{free}")
    work = ", ".join(f"{name} {clock(seconds)} / {found.workers[name]}" for name, seconds in found.seconds.items())
    lines.append(f"time, about {clock(found.wall_seconds)} once started (work / workers: {work})")
    return lines


def price(found: Estimate, per_hour: float) -> str:
    """Return what a build costs at a price of a machine hour, in a line that says what it assumes."""
    hours = found.machine_hours
    assumed = "this machine until the build ends" if found.cores else "machines like this one, every core at work"
    return (
        f"price, about {hours * per_hour:.2f}: {hours:.3g} machine hours at {per_hour:g} ({assumed}; "
        "without start, calibration, transfers and storage)"
    )
