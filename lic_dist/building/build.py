"""From an experiment file to a finished cache: scan, plan, pilot, build.

A job is a pure function of the experiment and the photos: every command computes it alike, and the store's identity
says whether it is the same job. The pilot (calibration and adapted tables) writes the quantizer record once; all
later steps take it as frozen input.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lic_dist import __version__, config, images
from lic_dist.building.calibrate import calibrate
from lic_dist.building.latents import Latents, encode
from lic_dist.building.records import fits
from lic_dist.building.shards import (
    Shard,
    ShardReport,
    make_encoder,
    make_reader,
    make_searcher,
    make_viewer,
)
from lic_dist.cache import store
from lic_dist.cache.plan import Geometry, Plan, differences
from lic_dist.cache.reader import LatentCache
from lic_dist.crops import plan_crops
from lic_dist.engine.stages import Stage, run
from lic_dist.errors import LicError, ToleranceError, UsageError
from lic_dist.images import Crop
from lic_dist.manifest import Manifest
from lic_dist.manifest import scan as scan_photos
from lic_dist.models import checkpoint as checkpoints
from lic_dist.models.checkpoint import Checkpoint
from lic_dist.models.parts import encoder_digest, entropy_digest
from lic_dist.progress import Progress
from lic_dist.quantization.record import SEARCHED, QuantizerRecord

Y_STRIDE, Z_STRIDE = 16, 64


@dataclass(frozen=True)
class Job:
    """What a cache build works on."""

    experiment: config.Experiment
    parent: Checkpoint
    photos: Manifest
    plan: Plan

    @property
    def images(self) -> config.Images:
        return config.need(self.experiment.images, "images")

    @property
    def quantizer(self) -> config.Quantizer:
        return config.need(self.experiment.quantizer, "quantizer")

    @property
    def cache(self) -> config.Cache:
        return config.need(self.experiment.cache, "cache")


@dataclass(frozen=True)
class BuildReport:
    """A finished build: samples in all, those set aside by reason, bits per pixel of the shards built now."""

    path: Path
    samples: int
    shards_built: int
    shards: int
    faults: dict[str, int]
    bpp: float
    seconds: float


def manifest_path(cache: Path) -> Path:
    """Where a cache's manifest lies: beside the store."""
    return cache.with_name(f"{cache.stem}.manifest.parquet")


def scan(experiment: config.Experiment, afresh: bool = False) -> Manifest:
    """The manifest of the experiment's photos: those that the one beside the store does not know are read."""
    section = config.need(experiment.images, "images")
    path = manifest_path(config.need(experiment.cache, "cache").path)
    known = Manifest.from_bytes(path.read_bytes()) if path.is_file() and not afresh else None
    return scan_photos(section.path, known, partial(_write_manifest, path))


def _write_manifest(path: Path, manifest: Manifest) -> None:
    """Write it whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    temporary.write_bytes(manifest.to_bytes())
    temporary.replace(path)


def prepare(experiment: config.Experiment, afresh: bool = False) -> Job:
    """Load the model, scan the photos and lay out the plan.

    Raises:
        LicError: no photos, none large enough, a checkpoint that does not load.
    """
    section, cache = config.need(experiment.images, "images"), config.need(experiment.cache, "cache")
    model_section = config.need(experiment.model, "model")
    parent = checkpoints.load(model_section.checkpoint, model_section.architecture, model_section.lmbda)
    photos = scan(experiment, afresh)
    crops = plan_crops(photos, section.crop, section.variations, section.seed, section.held_out)
    if not crops:
        raise LicError(f"no photo in {section.path} is as large as a crop of {section.crop}", hint="set images.crop")
    geometry = Geometry(section.crop, parent.spec.M, section.crop // Y_STRIDE, parent.spec.N, section.crop // Z_STRIDE)
    identity = {
        "format": 1,
        "model": model_identity(parent),
        "precision": "float32",
        "images": {
            "manifest_sha256": photos.digest,
            "crop": section.crop,
            "variations": section.variations,
            "seed": section.seed,
            "held_out": section.held_out,
        },
        "shard": cache.shard,
        "batch": cache.batch,
        "store_y": cache.store_y,
    }
    return Job(experiment, parent, photos, Plan(crops, geometry, cache.shard, cache.batch, identity))


def model_identity(parent: Checkpoint) -> dict[str, Any]:
    """What cached latents depend on of a model."""
    spec = parent.spec
    return {
        "architecture": spec.architecture,
        "N": spec.N,
        "M": spec.M,
        "encoder_sha256": encoder_digest(parent.model),
    }


def group_identity(parent: Checkpoint, record: QuantizerRecord) -> dict[str, Any]:
    """What cached indices depend on besides the latents."""
    return {"record_sha256": record.digest, "entropy_sha256": entropy_digest(parent.model)}


def check_cache(cache: LatentCache, parent: Checkpoint, group: str) -> None:
    """Refuse a cache of another encoder, or a group of another entropy model; each differing field is named.

    Raises:
        LicError: they differ, the cache has no such group, or not all of its shards are written.
    """
    found = differences({"model": cache.identity["model"]}, {"model": model_identity(parent)})
    if found:
        raise LicError(f"{cache.path} holds latents of another model: {'; '.join(found)}", hint="build a new cache")
    if group not in cache.groups:
        raise LicError(f"{cache.path} has no group '{group}'", hint=f"it has: {', '.join(cache.groups) or 'none'}")
    expected = group_identity(parent, QuantizerRecord.from_json(cache.record_json(group)))
    identity = cache.group_attributes(group)["identity"]
    found = differences({key: identity.get(key) for key in expected}, expected)
    if found:
        raise LicError(f"group '{group}' of {cache.path} does not fit: {'; '.join(found)}", hint="build a new group")
    written = len(cache.written(group))
    if written < cache.num_shards:
        raise LicError(
            f"group '{group}' of {cache.path} has {written} of {cache.num_shards} shards",
            hint="`lic-dist cache build` goes on where it stopped",
        )


def pilot_latents(job: Job) -> tuple[Latents, Latents]:
    """The pilot (the plan's first training samples) and the first held-out samples, encoded here and now.

    Raises:
        LicError: no held-out samples to calibrate on.
    """
    wanted: dict[str, list[Crop]] = {
        "pilot": [crop for crop in job.plan.crops if not crop.held_out][: job.quantizer.pilot],
        "held-out": [crop for crop in job.plan.crops if crop.held_out][: job.quantizer.calibration],
    }
    made = []
    for name, crops in wanted.items():
        if not crops:
            raise LicError(
                f"the plan has no {name} samples to calibrate on", hint="add photos or raise images.held_out"
            )
        pixels, status = images.read_crops(job.images.path, crops, job.images.crop)
        parts = []
        with Progress(f"encoding {name} crops", len(pixels), "crop") as bar:
            for first in range(0, len(pixels), job.plan.batch):
                chosen = status[first : first + job.plan.batch] == 0
                if not chosen.any():
                    continue
                part, overflow = encode(
                    job.parent.model, pixels[first : first + job.plan.batch][chosen], job.plan.batch
                )
                parts.append(Latents(part.pixels[~overflow], part.y[~overflow], part.z[~overflow]))
                bar.advance(int(chosen.sum()))
        if not parts:
            raise LicError(
                f"every {name} photo changed or became unreadable since the scan", hint="`lic-dist cache scan`"
            )
        made.append(
            Latents(
                np.concatenate([part.pixels for part in parts]),
                np.concatenate([part.y for part in parts]),
                np.concatenate([part.z for part in parts]),
            )
        )
    return made[0], made[1]


def calibration_samples(cache: LatentCache, section: config.Quantizer) -> tuple[Latents, Latents]:
    """The pilot (first training samples) and the first held-out samples of a cache, as a build calibrates on them.

    Raises:
        UsageError: the cache does not keep y.
    """
    if not cache.header.store_y:
        raise UsageError("calibration needs y, which this cache does not keep", hint="build it with store_y: true")
    parts = []
    for held_out, most in ((False, section.pilot), (True, section.calibration)):
        read = cache.load(("pixels", "latents/y", "latents/z"), cache.indices(held_out)[:most])
        parts.append(Latents(read["pixels"], read["latents/y"], read["latents/z"]))
    return parts[0], parts[1]


def adapt(job: Job) -> QuantizerRecord:
    """The quantizer record of the job: the store's own, that of `cache adapt` beside it, else made on the pilot.

    Raises:
        LicError: the record found is not what the experiment asks for; each differing field is named.
    """
    group, beside = job.quantizer.group, record_path(job)
    if job.cache.path.exists() and group in (cache := LatentCache.open(job.cache.path)).groups:
        record, where = QuantizerRecord.from_json(cache.record_json(group)), f"group '{group}' of {job.cache.path}"
    elif beside.is_file():
        record, where = QuantizerRecord.load(beside), str(beside)
    else:
        return calibrate(job.parent, job.quantizer, *pilot_latents(job), batch=job.plan.batch)
    check_record(record, job.quantizer, job.parent, where)
    return record


def record_path(job: Job) -> Path:
    """Where `cache adapt` leaves the record of a job for its build."""
    return job.cache.path.with_name(f"{job.cache.path.stem}.{job.quantizer.group}.json")


def check_record(record: QuantizerRecord, section: config.Quantizer, parent: Checkpoint, where: str) -> None:
    """Refuse a record that is not what the quantizer section and the checkpoint ask for; each field is named."""
    expected: dict[str, Any] = {
        "name": section.name,
        "states": section.states if section.name == "tcq" else 1,
        "lmbda": parent.spec.lmbda,
        "rates": section.rates,
    }
    if section.step != "auto":
        expected["step"] = section.step
    if section.lambda_scale != "auto" and section.name in SEARCHED:
        expected["lambda_scale"] = section.lambda_scale
    if section.rounding != "auto" and section.name == "deadzone":
        expected["rounding"] = section.rounding
    found = {key: record.notes.get(key) if key == "rates" else getattr(record, key) for key in expected}
    lines = differences(found, expected)
    if lines or not fits(record, parent.model):
        why = "; ".join(lines) or "it was made for another prior of z or number of channels"
        raise LicError(f"{where} is another quantizer: {why}", hint="give quantizer.group another name")


def build(experiment: config.Experiment) -> BuildReport:
    """Build a cache, or what is left of it: scan, plan, pilot, every shard without a verified marker.

    Shards whose latents are there, but not this quantizer's indices, are quantized from the stored y.

    Raises:
        LicError: the path holds a store of another identity; each differing field is named.
        ToleranceError: the store is whole, but more samples were set aside than `images.tolerate` allows.
    """
    started = time.monotonic()
    job = prepare(experiment)
    path, group = job.cache.path, job.quantizer.group
    if path.exists():  # refuse another job's store before the pilot; leave none behind where the pilot fails
        store.create(path, job.plan, job.cache.store_y)
    record = adapt(job)
    store.create(path, job.plan, job.cache.store_y, provenance())
    store.create_group(path, group, record.to_json(), group_identity(job.parent, record), provenance())
    without_latents = set(store.pending(path, job.plan))
    pending = sorted(without_latents.union(store.pending(path, job.plan, group)))
    if not job.cache.store_y:
        without_latents.update(pending)
    reports = _run(job, record, [number for number in pending if number in without_latents], requantize=False)
    reports += _run(job, record, [number for number in pending if number not in without_latents], requantize=True)
    faults = _faults(job)
    pixels = sum(report.pixels for report in reports)
    bpp = sum(report.bits for report in reports) / pixels if pixels else float("nan")
    set_aside, asked = sum(faults.values()), len(job.photos) * job.images.variations
    if set_aside > job.images.tolerate * asked:
        reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(faults.items()))
        raise ToleranceError(
            f"{path} is built, but {set_aside} of {asked} samples were set aside: {reasons}",
            hint="photos changed since the scan: `lic-dist cache scan`, then build at another cache.path"
            if "changed" in faults
            else "raise images.tolerate if that is expected",
        )
    return BuildReport(
        path, job.plan.num_samples, len(pending), job.plan.num_shards, faults, bpp, time.monotonic() - started
    )


def provenance() -> dict[str, Any]:
    """Where and with what a store is made: kept beside the identity, never compared."""
    import platform
    import sys
    from importlib.metadata import version

    packages = ("torch", "compressai", "numpy", "numba", "zarr", "ray")
    return {
        "lic_dist": __version__,
        "packages": {name: version(name) for name in packages},
        "python": platform.python_version(),
        "host": platform.node(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine(),
        "argv": sys.argv,
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _faults(job: Job) -> dict[str, int]:
    """Samples set aside by reason: those of the store, and those of photos that the plan could not take."""
    status = LatentCache.open(job.cache.path).samples["status"]
    codes, counts = np.unique(status[status != 0], return_counts=True)
    faults = {images.FAULTS[code]: int(count) for code, count in zip(codes, counts, strict=True)}
    for reason, count in job.photos.set_aside(job.images.crop).items():
        faults[reason] = faults.get(reason, 0) + count * job.images.variations
    return faults


def _run(job: Job, record: QuantizerRecord, numbers: list[int], requantize: bool) -> list[ShardReport]:
    if not numbers:
        return []
    engine, model = job.experiment.engine, config.need(job.experiment.model, "model")
    source = (checkpoints.absolute(model.checkpoint), model.architecture, model.lmbda, job.plan.batch)
    path, group = str(job.cache.path.resolve()), job.quantizer.group
    stages = [
        Stage("read", partial(make_reader, str(job.images.path.resolve()), job.images.crop), engine.readers),
        Stage("encode", partial(make_encoder, *source), engine.encoders, engine.gpus_per_encoder),
        Stage("search", partial(make_searcher, path, job.plan, group, record.to_json()), engine.searchers),
    ]
    if requantize:
        stages[:2] = [Stage("view", partial(make_viewer, path, *source), engine.encoders, engine.gpus_per_encoder)]
    units = [Shard(number, tuple(job.plan.crops_of(number))) for number in numbers]
    reports = []
    left = sum(len(unit.crops) for unit in units)
    title = "quantizing the cache" if requantize else "building the cache"
    with Progress(title, job.plan.num_samples, "crop", done=job.plan.num_samples - left) as bar:
        for _, report in run(stages, units, engine=engine.name, address=engine.address, num_cpus=engine.num_cpus):
            reports.append(report)
            pixels = sum(one.pixels for one in reports)
            bar.advance(report.samples, bpp=sum(one.bits for one in reports) / max(pixels, 1))
    return reports
