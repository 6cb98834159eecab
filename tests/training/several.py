"""Base models of two small families whose y has two stages, and a store that is written without the building room."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from lic_dist import config
from lic_dist.building.calibrate import settings_of
from lic_dist.building.job import geometry_of, group_identity, model_identity
from lic_dist.building.latents import encode
from lic_dist.building.records import analytic_record
from lic_dist.cache import store
from lic_dist.cache.plan import Plan
from lic_dist.codec import walk
from lic_dist.data.photo import Crop
from lic_dist.models import checkpoint
from lic_dist.quantization.quantize import Quantizer
from lic_dist.quantization.record import QuantizerRecord
from tests.conftest import picture
from tests.families import CHECKERED, SLICED

SIZES = {"N": 4, "M": 6}
FAMILIES = pytest.mark.parametrize("architecture", [CHECKERED, SLICED], ids=["checkered", "sliced"])
TCQ = config.Quantizer(name="tcq", states=8, step=0.5, lambda_scale=0.1, shift=0.0, pilot=8, calibration=4, group="g")


def held_out(photos: Path) -> config.Images:
    return config.Images(path=photos, held_out="valid")


def base_section(out: Path, architecture: str, **changes: object) -> config.Train:
    settings = {
        **SIZES, "architecture": architecture, "lmbda": 0.05, "steps": 12, "batch": 4, "crop": 64, "lr": 3e-3,
        "warmup": 4, "evaluate_every": 4, "relaxation": "mixed", "out": out, **changes,
    }  # fmt: skip
    return config.Train(**settings)


def make_store(path: Path, parent: checkpoint.Checkpoint, section: config.Quantizer, samples: int = 20) -> None:
    """A store of crops 64x64, two shards, the last four held out; k are those of the search along the stages."""
    crops = tuple(
        Crop(f"{n}.png", hashlib.sha256(b"%d" % n).hexdigest(), 0, 0, False, n >= samples - 4) for n in range(samples)
    )
    identity = {"format": 1, "model": model_identity(parent), "crop": 64}
    plan = Plan(crops, geometry_of(parent, 64), samples // 2, 4, identity)
    made = analytic_record(
        parent, section.name, 8, float(section.step), float(section.lambda_scale), np.ones(parent.codec.channels)
    )
    record: QuantizerRecord = replace(made, notes={"rates": section.rates, "settings": settings_of(section)})
    store.create(str(path), plan)
    store.create_group(str(path), section.group, record.to_json(), group_identity(parent, record, plan.geometry))
    codec, quantizer = parent.codec, Quantizer(record)
    for shard in range(plan.num_shards):
        numbers = range(shard * plan.shard, (shard + 1) * plan.shard)
        pixels = np.stack([picture(n, 64, 64).transpose(2, 0, 1) for n in numbers])
        latents, _ = encode(parent.model, pixels, plan.batch)
        with torch.no_grad():
            sides_hat = (codec.sides[0].dequantize(torch.from_numpy(latents.z)),)
            coded = walk.search(codec, sides_hat, torch.from_numpy(latents.y).float(), quantizer)
        arrays = {
            "pixels": pixels,
            "latents/y": latents.y,
            "latents/z": latents.z,
            "samples/status": np.zeros(len(pixels), np.uint8),
            f"quantized/{section.group}/k": coded.k.numpy(),
            f"quantized/{section.group}/bits": np.ones(len(pixels), np.float32),
            f"quantized/{section.group}/distortion": np.ones(len(pixels), np.float32),
        }
        store.write_shard(str(path), plan.fingerprint, shard, arrays, plan.crops_of(shard), {"all": 0.1})
