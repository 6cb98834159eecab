"""Real jobs of building in which photos are numbers, the encoder averages pixels, and a store is a bucket in memory."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
import pytest
import torch

from lic_dist import config
from lic_dist.building import build as building
from lic_dist.building import job, pilot, shards, work
from lic_dist.building.latents import Latents, QuantizerInput
from lic_dist.building.records import analytic_record
from lic_dist.cache import storages
from lic_dist.data import images
from lic_dist.data.manifest import Manifest
from lic_dist.data.photo import FAULTS, Crop, Photo
from lic_dist.data.source import PhotoSource
from lic_dist.engine.stages import Stage
from lic_dist.errors import LicError
from lic_dist.models.architectures import ModelSpec
from lic_dist.models.architectures import build as build_model
from lic_dist.models.checkpoint import Checkpoint, update_tables
from lic_dist.quantization.record import QuantizerRecord
from tests.memory import Memory

URL = "memory://life/a.zarr"
CROP, SHARD, HELD_OUT = 64, 2, 0.3
GROUPS = {"plain": ("base", 0.7), "fine": ("base", 0.4), "after": ("tuned", 0.7)}  # of which model, at which step


@lru_cache
def model(name: str) -> Checkpoint:
    """The base, or one whose h_s was trained: the same encoder, another entropy model."""
    torch.manual_seed(0)
    made = Checkpoint(build_model("mbt2018-mean", 1, 2).eval(), ModelSpec("mbt2018-mean", 1, 2, 0.01))
    if name == "tuned":
        made.model.h_s[0].weight.data.mul_(1.5)
    update_tables(made.model)
    return made


@lru_cache
def record(group: str) -> QuantizerRecord:
    of, step = GROUPS[group]
    return analytic_record(model(of), "sq", 1, step, 0.0, np.ones(2, np.float32))


@lru_cache
def record_text(group: str) -> str:
    return record(group).to_json()


@lru_cache
def experiment(group: str) -> config.Experiment:
    of, step = GROUPS[group]
    return config.Experiment.model_validate(
        {
            "model": {"checkpoint": of},
            "images": {"path": "/photos", "crop": CROP, "held_out": HELD_OUT, "tolerate": 1.0},
            "quantizer": {"name": "sq", "step": step, "group": group, "rates": "analytic"},
            "cache": {"path": URL, "shard": SHARD, "batch": 2},
            "engine": {"name": "local"},
        }
    )


@lru_cache
def digest_of(content: int) -> str:
    return hashlib.sha256(b"%d" % content).hexdigest()


@lru_cache(4096)
def pixels_of(crop: Crop) -> np.ndarray:
    """What a crop shows: a function of its photo's content and its place."""
    seed = int(crop.digest[:8], 16) + 7 * crop.crop_y + 11 * crop.crop_x + crop.flip
    coarse = np.random.default_rng(seed).integers(1, 256, (3, 4, 4), np.uint8)
    return coarse.repeat(16, axis=1).repeat(16, axis=2)


def encoded(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """y float16 [n, 2, 4, 4] and z int16 [n, 1, 1, 1] of pixels [n, 3, 64, 64]."""
    coarse = pixels[:, :2, ::16, ::16].astype(np.float32) / 16
    return coarse.astype(np.float16), pixels[:, 2:, :1, :1].astype(np.int16)


def searched(y: np.ndarray, step: float) -> dict[str, np.ndarray]:
    k = np.rint(y.astype(np.float32) / step).astype(np.int16)
    bits, error = np.abs(k).sum(axis=(1, 2, 3)), np.square(y - k * step).sum(axis=(1, 2, 3))
    return {"k": k, "bits": bits.astype(np.float32), "distortion": error.astype(np.float32)}


@dataclass
class Photos:
    """The folder of photos, and what of it the store's jobs have failed to read."""

    there: dict[str, int] = field(default_factory=dict)

    def manifest(self) -> Manifest:
        return Manifest.of(
            Photo(path, digest_of(content), 70, 72, 9, content, "") for path, content in sorted(self.there.items())
        )

    def scan(
        self, source: PhotoSource, known: Manifest | None, save: Callable[[Manifest], None], strict: bool
    ) -> Manifest:
        if not self.there:
            raise LicError("no photos in /photos")
        if (found := self.manifest()) != known:
            save(found)
        return found

    def read_crops(self, source: PhotoSource, crops: Sequence[Crop], size: int) -> tuple[np.ndarray, np.ndarray]:
        pixels, status = np.zeros((len(crops), 3, size, size), np.uint8), np.zeros(len(crops), np.uint8)
        for row, crop in enumerate(crops):
            content = self.there.get(crop.place or crop.source)
            if content is None or digest_of(content) != crop.digest:
                status[row] = FAULTS.index("unreadable" if content is None else "changed")
            else:
                pixels[row] = pixels_of(crop)
        return pixels, status


PHOTOS = Photos()


@contextlib.contextmanager
def in_memory() -> Iterator[None]:
    """The jobs read PHOTOS, encode and search as above, and write to a bucket in memory."""

    def encode(module: Any, read: Any, batch: int, z_steps: int) -> tuple[Latents, np.ndarray]:
        y, z = encoded(read.pixels)
        return Latents(read.pixels, y, z), read.status.copy()

    def inputs(module: Any, y: np.ndarray, z: np.ndarray, batch: int) -> QuantizerInput:
        return QuantizerInput(np.empty(0), np.empty(0), np.empty(0))

    def quantized(
        quantizer: Any, y: np.ndarray, z: Any, residual: Any, level: Any, faulty: np.ndarray
    ) -> dict[str, np.ndarray]:
        arrays = searched(y, quantizer.record.step)
        for values in arrays.values():
            values[faulty] = 0
        return arrays

    def prepared(at: job.Job, afresh: bool = False) -> QuantizerRecord:
        found = pilot.existing_record(at.storage, at.quantizer, at.parent, afresh)
        return found or record(at.quantizer.group)

    def run_here(stages: Sequence[Stage], units: Sequence[Any], **engine: Any) -> Iterator[tuple[Any, Any]]:
        works = [stage.make() for stage in stages]
        for unit in units:
            value = unit
            for one in works:
                value = one(value) if value is not None else None
            yield unit, value

    def parent(of: config.Experiment) -> Checkpoint:
        return model(of.model.checkpoint)

    texts = {id(record(group)): record_text(group) for group in GROUPS}
    known = {record_text(group): record(group) for group in GROUPS}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(storages, "Bucket", Memory)
        patch.setattr(job, "scan", PHOTOS.scan)
        patch.setattr(images, "read_crops", PHOTOS.read_crops)
        for module in (job, building):
            patch.setattr(module, "load_parent", parent)
        patch.setattr(building, "base_summary", lambda of: "")
        patch.setattr(building, "provenance", dict)
        patch.setattr(building, "prepare_record", prepared)
        patch.setattr(building, "existing_record", lambda storage, section, of: record(section.group))
        patch.setattr(building, "calibration_samples", None)
        patch.setattr(shards, "_load", lambda source: model(source.name_or_path))
        patch.setattr(shards, "_encoded", encode)
        patch.setattr(shards, "quantizer_input", inputs)
        patch.setattr(shards, "quantized_arrays", quantized)
        patch.setattr(QuantizerRecord, "from_json", known.__getitem__)
        patch.setattr(QuantizerRecord, "to_json", lambda self: texts[id(self)])
        patch.setattr(work, "_is_walked", lambda of, geometry: False)
        patch.setattr(work, "run", run_here)
        yield
