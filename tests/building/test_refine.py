"""Latents moved before the search: less L, each image for itself, the same files; what a refined store refuses."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from lic_dist.building.build import build, requantize
from lic_dist.building.job import prepare
from lic_dist.building.latents import encode
from lic_dist.cache.reader import LatentCache
from lic_dist.codec import tiles
from lic_dist.codec.codec import ImageCodec, padding
from lic_dist.errors import LicError
from lic_dist.models import checkpoint
from lic_dist.models.checkpoint import Checkpoint
from lic_dist.models.refine import Refinement
from lic_dist.models.stages import to_input
from lic_dist.quantization.record import QuantizerRecord
from tests.conftest import picture
from tests.stores import FIXED, contents, experiment

STEPS = 4


@pytest.fixture(scope="module")
def loaded() -> Checkpoint:
    return checkpoint.load("base-0.0035")


@pytest.fixture(scope="module")
def record(loaded: Checkpoint) -> QuantizerRecord:
    return QuantizerRecord.from_json(loaded.quantizers["tcq8"])


def windows(count: int) -> np.ndarray:
    return np.stack([picture(seed, 64, 64).transpose(2, 0, 1) for seed in range(count)])


def test_a_refined_file_costs_less_and_decodes_without_knowing(loaded: Checkpoint, record: QuantizerRecord) -> None:
    image, costs = picture(3, 150, 200), []
    plain = ImageCodec(loaded.model, record)
    for steps in (0, 1, STEPS):
        coded = ImageCodec(loaded.model, replace(record, refine=steps)).encode(image)
        error = np.square(plain.decode(coded.data).astype(float) - image).mean()
        costs.append(record.lmbda * error + coded.coded_bits / (150 * 200))
    assert costs[2] < 0.98 * costs[1] < 0.98 * costs[0]


def test_images_of_a_batch_are_refined_each_for_itself(loaded: Checkpoint) -> None:
    pixels, refinement = windows(3), Refinement(STEPS, 0.05)
    together, _ = encode(loaded.model, pixels, 2, refinement)
    other, _ = encode(loaded.model, pixels[[2, 1]], 2, refinement)
    again, _ = encode(loaded.model, pixels[2:], 2, refinement)
    assert together.y[2].tobytes() == other.y[0].tobytes() == again.y[0].tobytes()
    plain, _ = encode(loaded.model, pixels, 2)
    assert plain.z.tobytes() == together.z.tobytes() and plain.y.tobytes() != together.y.tobytes()
    unmoved, _ = encode(loaded.model, pixels, 2, Refinement(0, 0.05))
    assert plain.y.tobytes() == unmoved.y.tobytes()


def test_latents_that_are_not_finite_are_reported_and_spoil_no_neighbour(loaded: Checkpoint) -> None:
    broken = checkpoint.load("base-0.0035").model
    hot, cold = np.full((1, 3, 64, 64), 255, np.uint8), np.zeros((1, 3, 64, 64), np.uint8)
    with torch.no_grad():
        first = next(one for one in broken.g_a.modules() if isinstance(one, torch.nn.Conv2d))
        first.bias.zero_()
        first.weight.fill_(1e36)
    latents, overflow = encode(broken, np.concatenate([cold, hot]), 2, Refinement(STEPS, 0.05))
    alone, _ = encode(broken, np.concatenate([cold, cold]), 2, Refinement(STEPS, 0.05))
    assert list(overflow) == [False, True] and np.isfinite(latents.y).all()
    assert latents.y[0].tobytes() == alone.y[0].tobytes()


@pytest.mark.parametrize("shape", [(300, 330), (65, 129)])
def test_the_gradient_in_tiles_is_the_whole_images_without_its_padding(
    loaded: Checkpoint, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    image = picture(5, *shape)
    left, right, top, bottom = padding(*shape)
    inside = slice(top, top + shape[0]), slice(left, left + shape[1])
    padded = np.pad(image, ((top, bottom), (left, right), (0, 0)), constant_values=99)
    x = to_input(torch.from_numpy(padded.transpose(2, 0, 1).copy())[None], torch.device("cpu"))
    y = torch.randn((1, loaded.spec.M, x.shape[2] // 16, x.shape[3] // 16), generator=torch.Generator().manual_seed(0))
    part = y.clone().requires_grad_(True)
    error = (loaded.model.g_s(part) - x)[..., inside[0], inside[1]]
    (whole,) = torch.autograd.grad(error.square().sum(), part)
    monkeypatch.setattr(tiles, "TILE", 128)
    grid = tiles.Grid.of(*shape, loaded.codec.strides)
    found = tiles.error_gradient(
        loaded.codec, grid, lambda rows, columns: x[..., rows, columns], inside, Refinement(1, 0.01).error, y
    )
    assert torch.allclose(found, whole, rtol=1e-4, atol=1e-4 * float(whole.abs().max()))


def test_a_record_keeps_its_steps_and_its_digest_names_them(record: QuantizerRecord) -> None:
    moved = replace(record, refine=STEPS)
    assert QuantizerRecord.from_json(moved.to_json()).refine == STEPS
    assert moved.digest != record.digest and moved.decoding_digest == record.decoding_digest
    assert '"refine"' not in record.to_json()
    with pytest.raises(ValueError, match="number of steps, not -1"):
        replace(record, refine=-1)


@pytest.mark.slow
def test_a_refined_store_knows_its_steps_and_its_whole_model(base: Path, photos: Path, tmp_path: Path) -> None:
    asked = {**FIXED, "refine": 2}
    plain, store = tmp_path / "plain.zarr", tmp_path / "refined.zarr"
    build(experiment(base, photos, plain, quantizer=FIXED))
    build(experiment(base, photos, store, quantizer=asked))
    cache = LatentCache.open(store)
    assert cache.identity["refined"]["steps"] == 2 and "refined" not in LatentCache.open(plain).identity
    assert QuantizerRecord.from_json(cache.record_json("tcq8")).refine == 2
    found, other = contents(store), contents(plain)
    assert [key for key in found if key.startswith("latents/y")] and all(
        (found[key] == other[key]) == key.startswith(("pixels", "latents/z", "samples"))
        for key in found
        if not key.startswith("quantized") and not key.endswith("json")
    )
    with pytest.raises(LicError, match="refined.steps: store has 2, this job has nothing"):
        build(experiment(base, photos, store, quantizer={**FIXED, "group": "plain"}))
    with pytest.raises(LicError, match="after 2 steps of refinement, the quantizer asks for 3"):
        requantize(experiment(base, photos, store, quantizer={**asked, "refine": 3, "group": "more"}))
    requantize(experiment(base, photos, store, quantizer={**asked, "name": "rdoq", "group": "rdoq"}))
    assert len(cache.written("rdoq")) == cache.num_shards

    no_quantizer = experiment(base, photos, plain).model_copy(update={"quantizer": None})
    assert prepare(no_quantizer).plan.fingerprint == LatentCache.open(plain).fingerprint  # a repair needs none

    other_decoder = checkpoint.load(str(base))
    with torch.no_grad():
        other_decoder.model.g_s[0].weight *= 1.01
    checkpoint.save(other_decoder, tmp_path / "other.pth.tar")
    with pytest.raises(LicError, match="refined.decoder_sha256: store has"):
        build(experiment(tmp_path / "other.pth.tar", photos, store, quantizer=asked))
