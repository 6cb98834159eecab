"""Latents of models of several stages, moved before the search: contexts follow them, and so do corrections."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from lic_dist.building.build import build, requantize
from lic_dist.building.latents import encode
from lic_dist.building.records import analytic_record
from lic_dist.cache.reader import LatentCache
from lic_dist.codec import tiles
from lic_dist.codec.codec import ImageCodec
from lic_dist.errors import LicError
from lic_dist.models import checkpoint, refine
from lic_dist.models.checkpoint import Checkpoint
from lic_dist.models.protocol import CodecModel, Sides, Stage
from lic_dist.models.refine import BETAS, RATE, Refinement, error_gradient, refine_latents
from lic_dist.models.stages import analyse, bits_of, dequantize_z, to_input
from lic_dist.quantization.record import QuantizerRecord
from tests.building.test_stages import assert_walked
from tests.codec.test_families import SEVERAL, made, record
from tests.conftest import picture
from tests.families import SLICED
from tests.stores import FIXED, experiment

STEPS, LMBDA = 3, 0.01
Loads = Callable[[str], Checkpoint]


@pytest.fixture(scope="module")
def loads(checkpoints: dict[str, Path]) -> Loads:
    """The trained model of slices with corrections, or one of random weights."""
    return lambda name: checkpoint.load(str(checkpoints[name]), name) if name in checkpoints else made(name)


def loss(codec: CodecModel, x: Tensor, sides_hat: Sides, y: Tensor) -> Tensor:
    """lmbda 255^2 MSE + bpp, times the pixels: of y in place of y_hat."""
    given = codec.given(sides_hat, y)
    squared = (codec.synthesise(given.y_hat) - x).square().sum()
    bits = bits_of(codec.likelihood(y, Stage(given.means, given.scales)))
    return LMBDA * 255**2 / 3 * squared + bits


@pytest.mark.parametrize("name", [*SEVERAL, SLICED])
def test_steps_descend_the_loss_through_contexts_and_corrections(name: str, loads: Loads) -> None:
    loaded = loads(name)
    codec, pixels = loaded.codec, np.stack([picture(seed, 64, 64).transpose(2, 0, 1) for seed in range(2)])
    x = to_input(torch.from_numpy(pixels), torch.device("cpu"))
    y, z = analyse(loaded.model, x)
    sides_hat = (dequantize_z(loaded.model, z),)
    with torch.no_grad():
        refinement = Refinement(STEPS, LMBDA)
        moved = refine_latents(codec, y, sides_hat, partial(error_gradient, codec, x, refinement.error), refinement)
        costs = [float(loss(codec, x, sides_hat, values.float())) for values in (y, moved)]
    assert moved.dtype == torch.float16 and costs[1] < costs[0]
    expected = y.float().requires_grad_(True)
    optimizer = torch.optim.Adam([expected], lr=RATE, betas=BETAS)
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = RATE * (1 - step / STEPS)
        (expected.grad,) = torch.autograd.grad(loss(codec, x, sides_hat, expected), expected)
        optimizer.step()
    apart = (moved.float() - expected.detach()).abs()  # Adam makes much of gradients that nearly vanish
    assert float((apart < 0.01).float().mean()) > 0.995 and float((expected.detach() - y).abs().mean()) > 0.05


def test_a_refined_file_of_slices_costs_less(loads: Loads) -> None:
    loaded, image, costs = loads(SLICED), picture(3, 128, 192), []
    given = analytic_record(loaded, "tcq", 8, 0.6, 0.2, np.ones(12))
    plain = ImageCodec(loaded.model, given)
    for steps in (0, 4):
        coded = ImageCodec(loaded.model, replace(given, refine=steps)).encode(image)
        error = np.square(plain.decode(coded.data).astype(float) - image).mean()
        costs.append(given.lmbda * error + coded.coded_bits / (128 * 192))
    assert costs[1] < costs[0]


@pytest.mark.parametrize("integer", [False, True])
@pytest.mark.parametrize("name", ["mbt2018", "cheng2020-anchor-checkerboard"])
@pytest.mark.slow
def test_a_refined_picture_of_many_tiles_goes_there_and_back(
    name: str, integer: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded, image = made(name), picture(6, 100, 150)
    monkeypatch.setattr(tiles, "TILE", 128)
    plain = ImageCodec(loaded.model, record(loaded, "tcq"), integer)
    encoded = ImageCodec(loaded.model, replace(plain.record, refine=1), integer).encode(image)
    assert plain.tile_count(100, 150) == 2 and not np.array_equal(encoded.k, plain.encode(image).k)
    assert np.array_equal(plain.decode_latents(encoded.data).k, encoded.k)


def test_contexts_of_a_picture_too_large_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refine, "MOST_POSITIONS", 4 * 8)
    loaded = made("mbt2018")
    codec = ImageCodec(loaded.model, replace(record(loaded, "tcq"), refine=1))
    codec.encode(picture(1, 64, 128))
    with pytest.raises(LicError, match="y of 8x8 positions is too large to refine under mbt2018's contexts"):
        codec.encode(picture(1, 128, 128))
    one = made("mbt2018-mean")
    ImageCodec(one.model, replace(record(one, "tcq"), refine=1)).encode(picture(1, 128, 128))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mbt2018", "cheng2020-anchor-checkerboard"])
def test_stores_of_refined_latents_are_built_and_quantized_again(name: str, photos: Path, tmp_path: Path) -> None:
    model, path = tmp_path / "model.pth.tar", tmp_path / "a.zarr"
    checkpoint.save(made(name), model)
    asked = {**FIXED, "refine": 2}
    build(experiment(model, photos, path, quantizer=asked))
    loaded, cache = checkpoint.load(str(model)), LatentCache.open(path)
    assert_walked(path, loaded.codec)
    assert cache.identity["refined"]["steps"] == 2
    assert QuantizerRecord.from_json(cache.record_json("tcq8")).refine == 2
    pixels, y = (cache.shard(0, ("pixels", "latents/y"))[key] for key in ("pixels", "latents/y"))
    moved, plain = (encode(loaded.model, pixels, 4, Refinement(steps, loaded.spec.lmbda))[0].y for steps in (2, 0))
    assert np.array_equal(y, moved) and np.abs(y.astype(float) - plain).mean() > 0.01
    requantize(experiment(model, photos, path, quantizer={**asked, "name": "rdoq", "group": "rdoq"}))
    assert_walked(path, loaded.codec, "rdoq")
    with pytest.raises(LicError, match="after 2 steps of refinement, the quantizer asks for 0"):
        requantize(experiment(model, photos, path, quantizer={**FIXED, "group": "more"}))
