"""What the tests of stores share: a synthetic one, a real one's experiment, what a store holds, and damage."""

from __future__ import annotations

import hashlib
from functools import partial
from pathlib import Path

import numpy as np

from lic_dist import config
from lic_dist.cache import markers, store
from lic_dist.cache.folder import Folder
from lic_dist.cache.plan import Geometry, Plan
from lic_dist.cache.reader import LatentCache
from lic_dist.data.photo import FAULTS, Crop
from lic_dist.engine.run import run
from lic_dist.engine.stages import Stage

GEOMETRY = Geometry(crop=32, y_channels=6, y_size=2, z_channels=4, z_size=1)
IDENTITY = {"format": 1, "model": {"architecture": "mbt2018-mean", "encoder_sha256": "ab" * 32}, "crop": 32}
RECORD = '{"name": "tcq"}'
FIXED = {"step": 0.7, "lambda_scale": 0.1, "shift": 0.05}


def make_plan(samples: int = 10, shard: int = 4, **changes) -> Plan:
    crops = tuple(
        Crop(f"ordner/ä{n}.png", hashlib.sha256(b"%d" % n).hexdigest(), n, 2 * n, n % 2 == 1, n >= samples - 2)
        for n in range(samples)
    )
    return Plan(crops, GEOMETRY, shard, 2, {**IDENTITY, **changes})


def synthetic(count: int, shard: int, faulty: int | None = None, group: str | None = "tcq8") -> dict[str, np.ndarray]:
    """What an encoder and a search would make of a shard; a pure function of its number."""
    rng = np.random.default_rng(shard)
    arrays = {
        "pixels": rng.integers(1, 256, (count, 3, 32, 32), np.uint8),
        "latents/y": rng.normal(0, 3, (count, 6, 2, 2)).astype(np.float16),
        "latents/z": rng.integers(-9, 9, (count, 4, 1, 1)).astype(np.int16),
        "samples/status": np.zeros(count, np.uint8),
    }
    if faulty is not None:
        arrays["samples/status"][faulty] = FAULTS.index("truncated")
    if group:
        arrays[f"quantized/{group}/k"] = np.rint(arrays["latents/y"]).astype(np.int16)
        arrays[f"quantized/{group}/bits"] = np.full(count, 1024.0, np.float32)
        arrays[f"quantized/{group}/distortion"] = np.full(count, 0.5, np.float32)
    return arrays


def make_builder(path: Path, planned: Plan):
    def build(shard: int) -> int:
        count = len(planned.crops_of(shard))
        arrays = synthetic(count, shard, faulty=1 if shard == 1 else None)
        store.write_shard(str(path), planned.fingerprint, shard, arrays, planned.crops_of(shard), {"all": 0.1})
        return count

    return build


def create(path: Path, planned: Plan) -> None:
    store.create(str(path), planned)
    store.create_group(str(path), "tcq8", RECORD, {"record": "cd" * 32})


def build(path: Path, planned: Plan, **engine) -> list[tuple[int, int]]:
    stage = Stage("build", partial(make_builder, path, planned), workers=2 if engine else 1)
    done = list(run([stage], store.pending(path), **engine))
    Folder(path).sweep()
    return done


def objects(path: Path) -> dict[str, str]:
    """sha256 of every array object, and every zarr.json, of a store."""
    return {
        file.relative_to(path).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in path.rglob("*")
        if file.is_file() and markers.FOLDER not in file.relative_to(path).parts
    }


def contents(path: Path) -> dict[str, str]:
    """sha256 of every array object and of tcq8's record, and the identity: what builds of one plan have in common."""
    cache = LatentCache.open(path)
    arrays = {name: digest for name, digest in objects(path).items() if "/c/" in name}
    record = hashlib.sha256(cache.record_json("tcq8").encode()).hexdigest()
    return {**arrays, "identity": cache.fingerprint, "record": record}


def experiment(base: Path, photos: Path, path: Path, **changes: dict) -> config.Experiment:
    document: dict = {
        "model": {"checkpoint": str(base)},
        "images": {"path": str(photos), "crop": 64, "variations": 3, "held_out": "valid"},
        "quantizer": {"name": "tcq", "states": 8, "pilot": 8, "calibration": 4, "group": "tcq8"},
        "cache": {"path": str(path), "shard": 8, "batch": 4},
        "engine": {"name": "local"},
    }
    for name, section in changes.items():
        document[name] = {**document.get(name, {}), **section}
    return config.Experiment.model_validate(document)


def no_photos(base: Path, path: Path, **quantizer: object) -> config.Experiment:
    """To quantize a store again, which needs none."""
    return config.Experiment.model_validate(
        {
            "model": {"checkpoint": str(base)},
            "quantizer": {"pilot": 8, "calibration": 4, **FIXED, **quantizer},
            "cache": {"path": str(path)},
            "engine": {"name": "local"},
        }
    )


def damage(file: Path, how: str) -> None:
    data = file.read_bytes()
    if how == "remove":
        file.unlink()
    elif how == "cut":
        file.write_bytes(data[:-5])
    elif how == "empty":
        file.write_bytes(b"")
    elif how == "zero tail":
        file.write_bytes(data[: len(data) // 2] + bytes(len(data) - len(data) // 2))
    elif how == "zero bytes":
        file.write_bytes(bytes(len(data)))
    elif how == "flip":
        file.write_bytes(bytes([data[20] ^ 1]).join([data[:20], data[21:]]))
