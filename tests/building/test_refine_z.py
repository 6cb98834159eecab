"""z moved together with y: what it gains, its gradient, the files and stores that follow, and who refuses."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
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
from lic_dist.building.refined import check_refined, record_fields, refined_identity, refinement_of
from lic_dist.cache.reader import LatentCache
from lic_dist.codec import tiles
from lic_dist.codec.codec import ImageCodec
from lic_dist.errors import LicError
from lic_dist.models import checkpoint, refine
from lic_dist.models.checkpoint import Checkpoint
from lic_dist.models.refine import BETAS, RATE, Z_RATE, Refinement, error_gradient, refine_both, weights_of
from lic_dist.models.stages import bits_of, dequantize_z, only_side, only_stage, to_input
from lic_dist.quantization.record import QuantizerRecord
from tests.codec.test_families import made
from tests.conftest import picture
from tests.factorized import skewed
from tests.stores import FIXED, experiment

STEPS, LMBDA = 6, 0.0035
BOTH = Refinement(STEPS, LMBDA, z=True)


@pytest.fixture(scope="module")
def loaded() -> Checkpoint:
    return checkpoint.load("base-0.0035")


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
    return np.stack([picture(seed, 128, 128).transpose(2, 0, 1) for seed in (3, 5)])


def loss(loaded: Checkpoint, x: Tensor, y: Tensor, z_hat: Tensor) -> Tensor:
    """lmbda 255^2 MSE + bpp of y and z, times the pixels: of y in place of y_hat."""
    codec = loaded.codec
    bits = bits_of(codec.likelihood(y, only_stage(codec, (z_hat,)))) + bits_of(only_side(codec).likelihood(z_hat))
    return LMBDA * 255**2 / 3 * (codec.synthesise(y) - x).square().sum() + bits


def test_moving_z_too_lowers_the_whole_loss(loaded: Checkpoint, pixels: np.ndarray) -> None:
    """z stays close: most elements stay as h_a gives them, and the loss of those that move counts their own bits."""
    x, costs, zs = to_input(torch.from_numpy(pixels), torch.device("cpu")), [], []
    for refinement in (replace(BOTH, z=False), BOTH):
        latents, _ = encode(loaded.model, pixels, 2, refinement)
        z = torch.from_numpy(latents.z)
        with torch.no_grad():
            costs.append(float(loss(loaded, x, torch.from_numpy(latents.y).float(), dequantize_z(loaded.model, z))))
        zs.append(z)
    assert costs[1] < 0.999 * costs[0] and 0 < float((zs[0] != zs[1]).float().mean()) < 0.3


def test_the_gradient_of_z_passes_through_its_rounding(loaded: Checkpoint, pixels: np.ndarray) -> None:
    codec, x = loaded.codec, to_input(torch.from_numpy(pixels[:1]), torch.device("cpu"))
    side = only_side(codec)
    with torch.no_grad():
        y = codec.analyse(x).half()
        z = side.centred(codec.hyper_analyse(y.float())[0])
    found_y, found_z = refine_both(codec, y, partial(error_gradient, codec, x, BOTH.error), replace(BOTH, steps=2))
    own_y, own_z = y.float().requires_grad_(True), z.clone().requires_grad_(True)
    optimizer = torch.optim.Adam([{"params": [own_y]}, {"params": [own_z]}], lr=RATE, betas=BETAS)
    for step in range(2):
        for group, rate in zip(optimizer.param_groups, (RATE, Z_RATE), strict=True):
            group["lr"] = rate * (1 - step / 2)
        z_hat = side.dequantize(torch.round(own_z.detach())).requires_grad_(True)
        cost = loss(loaded, x, own_y, z_hat)
        own_y.grad, own_z.grad = torch.autograd.grad(cost, (own_y, z_hat))  # z_hat counts in z's own unit here
        optimizer.step()
    apart = (found_y.float() - own_y.detach()).abs()
    assert float((apart < 0.01).float().mean()) > 0.995 and found_z.dtype == torch.int32
    assert float((found_z != torch.round(own_z.detach())).float().mean()) < 0.01
    assert not torch.equal(found_z, torch.round(z).int())


@pytest.mark.slow
def test_a_file_of_moved_z_costs_less_and_decodes_without_knowing(
    loaded: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
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
    assert plain.tile_count(150, 200) == 4 and plain.decode(many.data).shape == image.shape
    monkeypatch.setattr(refine, "MOST_POSITIONS", 4 * 8)
    with pytest.raises(LicError, match="y of 12x16 positions is too large to refine together with z"):
        codec.encode(image)


def test_contexts_follow_z() -> None:
    codec = made("mbt2018").codec
    x = torch.rand((1, 3, 64, 64), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        y = codec.analyse(x)
        moved, z = refine_both(codec, y.half(), partial(error_gradient, codec, x, BOTH.error), BOTH)
    assert bool(torch.isfinite(moved).all()) and not torch.equal(moved, y.half()) and z.shape[2:] == (1, 1)


def test_models_without_z_and_stores_of_unmoved_z_refuse(loaded: Checkpoint) -> None:
    factorized = skewed()
    with pytest.raises(LicError, match="bmshj2018-factorized has no z to refine"):
        encode(factorized.model, np.zeros((1, 3, 64, 64), np.uint8), 1, BOTH)
    plain, both = (refinement_of(config.Quantizer(refine=6, refine_z=one), LMBDA) for one in (False, True))
    assert both == BOTH and str(both) == "6 steps of refinement of y and z"
    assert refined_identity(loaded, both) == {"refined": {**refined_identity(loaded, plain)["refined"], "z": True}}
    cache: Any = SimpleNamespace(storage="a.zarr", identity=refined_identity(loaded, both))
    check_refined(cache, both)
    with pytest.raises(LicError, match="y after 6 steps of refinement of y and z, the quantizer asks for 6 steps"):
        check_refined(cache, plain)
    record = QuantizerRecord.from_json(loaded.quantizers["tcq8"])
    moved = replace(record, **record_fields(both))
    assert QuantizerRecord.from_json(moved.to_json()).refine_z and moved.digest != replace(moved, refine_z=False).digest
    assert '"refine_z"' not in replace(moved, refine_z=False).to_json()


@pytest.mark.slow
def test_a_store_holds_the_moved_z_and_its_record_says_so(base: Path, photos: Path, tmp_path: Path) -> None:
    asked = {**FIXED, "refine": 2, "refine_z": True, "refine_distortion": "balanced"}
    build(experiment(base, photos, tmp_path / "a.zarr", quantizer=asked))
    cache, parent = LatentCache.open(tmp_path / "a.zarr"), checkpoint.load(str(base))
    record, weights = QuantizerRecord.from_json(cache.record_json("tcq8")), weights_of("balanced", parent.spec.lmbda)
    assert (record.refine, record.refine_z, record.refine_distortion) == (2, True, weights)
    said = cache.identity["refined"]
    assert (said["steps"], said["z"], said["distortion"]) == (2, True, weights)
    read = cache.shard(0, ("pixels", "latents/y", "latents/z"))
    batch = cache.header.batch
    own, _ = encode(parent.model, read["pixels"], batch, Refinement(2, parent.spec.lmbda, weights, z=True))
    assert np.array_equal(read["latents/y"], own.y) and np.array_equal(read["latents/z"], own.z)
    with pytest.raises(LicError, match="after 2 steps of refinement of y and z for .*, the quantizer asks for 2"):
        requantize(experiment(base, photos, tmp_path / "a.zarr", quantizer={**asked, "refine_z": False, "group": "b"}))
    requantize(experiment(base, photos, tmp_path / "a.zarr", quantizer={**asked, "name": "rdoq", "group": "rdoq"}))
    assert len(cache.written("rdoq")) == cache.num_shards
