"""z refined before y: the bits that it saves, its gradient, the files and stores that follow, and who refuses."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lic_dist import config
from lic_dist.building.build import build, requantize
from lic_dist.building.latents import encode
from lic_dist.building.refined import asked_refinement, check_refined, record_fields, refined_identity
from lic_dist.cache.reader import LatentCache
from lic_dist.codec import tiles
from lic_dist.codec.codec import ImageCodec
from lic_dist.errors import LicError
from lic_dist.models import checkpoint, refine
from lic_dist.models.checkpoint import Checkpoint
from lic_dist.models.refine import Z_BETAS, Z_RATE, refine_z
from lic_dist.models.stages import bits_of, dequantize_z, only_side, only_stage, to_input
from lic_dist.quantization.record import QuantizerRecord
from tests.codec.test_families import made
from tests.conftest import picture
from tests.factorized import skewed
from tests.stores import FIXED, experiment

STEPS = 6


@pytest.fixture(scope="module")
def loaded() -> Checkpoint:
    return checkpoint.load("base-0.0035")


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
    return np.stack([picture(seed, 128, 128).transpose(2, 0, 1) for seed in (3, 5)])


def bits(loaded: Checkpoint, y: Tensor, z_hat: Tensor) -> Tensor:
    """Bits of y, in place of y_hat, and z."""
    codec = loaded.codec
    return bits_of(codec.likelihood(y, only_stage(codec, (z_hat,)))) + bits_of(only_side(codec).likelihood(z_hat))


def test_steps_save_bits_and_leave_y(loaded: Checkpoint, pixels: np.ndarray) -> None:
    """z stays close: most elements stay as h_a gives them."""
    found = [encode(loaded.model, pixels, 2, steps)[0] for steps in (0, STEPS)]
    assert np.array_equal(found[0].y, found[1].y)
    y = torch.from_numpy(found[0].y).float()
    with torch.no_grad():
        costs = [float(bits(loaded, y, dequantize_z(loaded.model, torch.from_numpy(one.z)))) for one in found]
    assert costs[1] < 0.999 * costs[0] and 0 < float((found[0].z != found[1].z).mean()) < 0.3
    alone, _ = encode(loaded.model, pixels[1:], 2, STEPS)
    assert np.array_equal(alone.z[0], found[1].z[1])


def test_the_gradient_passes_through_the_rounding(loaded: Checkpoint, pixels: np.ndarray) -> None:
    codec, x = loaded.codec, to_input(torch.from_numpy(pixels[:1]), torch.device("cpu"))
    side = only_side(codec)
    with torch.no_grad():
        y = codec.analyse(x)
        z = side.centred(codec.hyper_analyse(y)[0])
    found, own = refine_z(codec, y, 2), z.clone().requires_grad_(True)
    optimizer = torch.optim.Adam([own], betas=Z_BETAS)
    for step in range(2):
        optimizer.param_groups[0]["lr"] = Z_RATE * (1 - step / 2)
        z_hat = side.dequantize(torch.round(own.detach())).requires_grad_(True)
        (own.grad,) = torch.autograd.grad(bits(loaded, y, z_hat), z_hat)  # z_hat counts in z's own unit here
        optimizer.step()
    assert found.dtype == torch.int32 and float((found != torch.round(own.detach())).float().mean()) < 0.01
    assert not torch.equal(found, torch.round(z).int())


@pytest.mark.slow
def test_a_file_of_refined_z_decodes_without_knowing(loaded: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    record, image = QuantizerRecord.from_json(loaded.quantizers["tcq8"]), picture(3, 150, 200)
    plain = ImageCodec(loaded.model, record)
    for integer in (False, True):
        codec = ImageCodec(loaded.model, replace(record, refine=4, refine_z=True), integer)
        encoded = codec.encode(image)
        assert np.array_equal(plain.decode(encoded.data), codec.picture(encoded))
    only_y = ImageCodec(loaded.model, replace(record, refine=4)).encode(image)
    assert encoded.z.shape == only_y.z.shape and not np.array_equal(encoded.z, only_y.z)
    monkeypatch.setattr(tiles, "TILE", 128)
    many = codec.encode(image)
    assert not plain.grid(150, 200).is_one_tile and plain.decode(many.data).shape == image.shape
    monkeypatch.setattr(refine, "MOST_POSITIONS", 4 * 8)
    with pytest.raises(LicError, match="y of 12x16 positions is too large to refine z"):
        codec.encode(image)


def test_contexts_follow_z() -> None:
    codec = made("mbt2018").codec
    x = torch.rand((1, 3, 64, 64), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        z = refine_z(codec, codec.analyse(x).half(), STEPS)
    assert z.shape[2:] == (1, 1) and z.dtype == torch.int32


def test_models_without_z_and_stores_of_another_z_refuse(loaded: Checkpoint) -> None:
    with pytest.raises(LicError, match="bmshj2018-factorized has no z to refine"):
        encode(skewed().model, np.zeros((1, 3, 64, 64), np.uint8), 1, STEPS)
    plain, both = (asked_refinement(config.Quantizer(refine=6, refine_z=one), 0.01) for one in (False, True))
    assert (plain.z_steps, both.z_steps) == (0, 6) and refined_identity(loaded, 0) == {}
    cache: Any = SimpleNamespace(storage="a.zarr", identity=refined_identity(loaded, 6))
    check_refined(cache, both)
    with pytest.raises(LicError, match="a.zarr holds z after 6 steps of refinement, the quantizer asks for 0"):
        check_refined(cache, plain)
    cache.identity = {"refined": {"steps": 8, "lmbda": 0.01, "decoder_sha256": "", "entropy_sha256": ""}}
    with pytest.raises(LicError, match="a.zarr holds y refined by lic_dist 0.1.0"):
        check_refined(cache, plain)
    record = QuantizerRecord.from_json(loaded.quantizers["tcq8"])
    moved = replace(record, **record_fields(both))
    assert QuantizerRecord.from_json(moved.to_json()).refine_z and moved.digest != replace(moved, refine_z=False).digest
    assert '"refine_z"' not in replace(moved, refine_z=False).to_json()


@pytest.mark.slow
def test_a_store_holds_the_refined_z_and_says_so(base: Path, photos: Path, tmp_path: Path) -> None:
    asked = {**FIXED, "refine": 2, "refine_z": True}
    build(experiment(base, photos, tmp_path / "a.zarr", quantizer=asked))
    cache, parent = LatentCache.open(tmp_path / "a.zarr"), checkpoint.load(str(base))
    record = QuantizerRecord.from_json(cache.record_json("tcq8"))
    assert (record.refine, record.refine_z, cache.identity["refined"]["z_steps"]) == (2, True, 2)
    read = cache.shard(0, ("pixels", "latents/y", "latents/z"))
    own, _ = encode(parent.model, read["pixels"], cache.header.batch, 2)
    assert np.array_equal(read["latents/y"], own.y) and np.array_equal(read["latents/z"], own.z)
    with pytest.raises(LicError, match="z after 2 steps of refinement, the quantizer asks for 0"):
        requantize(experiment(base, photos, tmp_path / "a.zarr", quantizer={**asked, "refine_z": False, "group": "b"}))
    requantize(experiment(base, photos, tmp_path / "a.zarr", quantizer={**asked, "name": "rdoq", "group": "rdoq"}))
    assert len(cache.written("rdoq")) == cache.num_shards
