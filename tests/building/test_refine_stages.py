"""Models of several stages, searched again by the decoder's answer: contexts follow, and so do corrections."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from lic_dist.building.build import build, requantize
from lic_dist.building.latents import WalkedInput, encode, refined
from lic_dist.cache.reader import LatentCache
from lic_dist.codec import tiles, walk
from lic_dist.codec.codec import ImageCodec
from lic_dist.models import checkpoint
from lic_dist.models.checkpoint import Checkpoint
from lic_dist.models.stages import dequantize_z, to_input
from lic_dist.quantization.quantize import Quantizer
from lic_dist.quantization.record import QuantizerRecord
from tests.codec.test_families import SEVERAL, made, record
from tests.conftest import picture
from tests.families import SLICED
from tests.stores import FIXED, contents, experiment

Loads = Callable[[str], Checkpoint]


@pytest.fixture(scope="module")
def loads(checkpoints: dict[str, Path]) -> Loads:
    """The trained model of slices with corrections, or one of random weights."""
    return lambda name: checkpoint.load(str(checkpoints[name]), name) if name in checkpoints else made(name)


@pytest.mark.parametrize("name", [*SEVERAL, SLICED])
@pytest.mark.slow
def test_no_picture_ends_with_more_loss_than_it_had(name: str, loads: Loads) -> None:
    loaded = loads(name)
    codec, pixels = loaded.codec, np.stack([picture(seed, 64, 64).transpose(2, 0, 1) for seed in range(2)])
    latents, _ = encode(loaded.model, pixels, 2)
    given, losses, x = (
        replace(record(loaded, "tcq"), lmbda=0.01),
        [],
        to_input(torch.from_numpy(pixels), torch.device("cpu")),
    )
    for steps in (0, 3):
        quantizer = Quantizer(replace(given, refine=steps))
        aim = torch.from_numpy(refined(loaded.model, pixels, latents.y, latents.z, quantizer, 2)).float()
        with torch.no_grad():
            z_hat = dequantize_z(loaded.model, torch.from_numpy(latents.z))
            coded = walk.search(codec, (z_hat,), aim, quantizer, apart=True)
            errors = (codec.synthesise(coded.y_hat) - x).double().square().sum((1, 2, 3)).numpy()
        bits = walk.channel_bits(codec, quantizer, coded.k, coded.level).sum(1)
        losses.append(0.01 * 255**2 / 3 * errors + bits)
    assert (losses[1] <= losses[0] * (1 + 1e-6)).all() and (name != SLICED or losses[1].sum() < losses[0].sum())
    assert coded.apart is not None and float(coded.apart.double().square().sum()) == pytest.approx(
        float(coded.error.sum()), rel=1e-4
    )  # this record shifts nothing


@pytest.mark.parametrize("integer", [False, True])
@pytest.mark.parametrize("name", ["mbt2018", "cheng2020-anchor-checkerboard"])
@pytest.mark.slow
def test_a_refined_picture_of_many_tiles_goes_there_and_back(
    name: str, integer: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded, image = made(name), picture(6, 100, 150)
    monkeypatch.setattr(tiles, "TILE", 128)
    plain = ImageCodec(loaded.model, record(loaded, "tcq"), integer)
    encoded = ImageCodec(loaded.model, replace(plain.record, refine=2), integer).encode(image)
    assert not plain.grid(100, 150).is_one_tile
    assert np.array_equal(plain.decode_latents(encoded.data).k, encoded.k)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mbt2018", "cheng2020-anchor-checkerboard"])
def test_a_group_is_what_its_refined_search_finds_from_photos_and_from_the_store(
    name: str, photos: Path, tmp_path: Path
) -> None:
    model, path = tmp_path / "model.pth.tar", tmp_path / "a.zarr"
    checkpoint.save(made(name), model)
    asked = {**FIXED, "refine": 2}
    build(experiment(model, photos, path, quantizer=asked))
    requantize(experiment(model, photos, path, quantizer={**asked, "group": "again"}))
    found = contents(path)
    ks = [key for key in found if key.startswith("quantized/tcq8/k/c")]
    assert ks and all(found[key] == found[key.replace("tcq8", "again")] for key in ks)
    loaded, cache = checkpoint.load(str(model)), LatentCache.open(path)
    quantizer = Quantizer(QuantizerRecord.from_json(cache.record_json("tcq8")))
    read = cache.shard(0, ("pixels", "latents/y", "latents/z", "quantized/tcq8/k"))
    aim = refined(loaded.model, read["pixels"], read["latents/y"], read["latents/z"], quantizer, cache.header.batch)
    own = WalkedInput(loaded.model, aim, read["latents/z"], cache.header.batch).quantize(quantizer)
    assert np.array_equal(own.k, read["quantized/tcq8/k"]) and (aim != read["latents/y"]).any()
