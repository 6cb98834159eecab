"""Caches of a model without a side latent: no z in the store, tables by channel, calibration and requantizing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from lic_dist import config
from lic_dist.building.build import build, repair, requantize
from lic_dist.building.calibrate import calibrate, measure
from lic_dist.building.latents import Latents, QuantizerInput, WalkedInput, encode, inputs_of
from lic_dist.building.records import analytic_record
from lic_dist.cache.inspect import inspect
from lic_dist.cache.reader import LatentCache
from lic_dist.cache.verify import verify
from lic_dist.codec.codec import ImageCodec
from lic_dist.codec.records import local_record
from lic_dist.errors import LicError
from lic_dist.models import checkpoint
from lic_dist.quantization.adaptation import adaptation_rounds
from lic_dist.quantization.quantize import Quantizer
from lic_dist.quantization.record import QuantizerRecord
from tests.conftest import picture
from tests.factorized import skewed
from tests.stores import FIXED, contents, damage, experiment, no_photos

BATCH = 4


@pytest.fixture(scope="module")
def latents() -> Latents:
    pixels = np.stack([picture(40 + seed, 64, 64).transpose(2, 0, 1) for seed in range(11)])
    return encode(skewed().model, pixels, BATCH)[0]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("factorized") / "checkpoint.pth.tar"
    checkpoint.save(skewed(), path)
    return path


@pytest.fixture(scope="module")
def store(saved: Path, photos: Path) -> Path:
    path = saved.parent / "a.zarr"
    build(experiment(saved, photos, path, quantizer=FIXED))
    return path


def test_a_store_has_no_z_and_its_reader_one_without_channels(store: Path) -> None:
    cache = LatentCache.open(store)
    assert not (store / "latents/z").exists() and "latents/z" not in cache.names and verify(store) == []
    geometry = cache.header.geometry
    assert (geometry.z_channels, geometry.z_size) == (0, geometry.y_size)
    read = cache.load(("latents/y", "latents/z"), [0, 9, 3])
    assert read["latents/z"].shape == (3, 0, *read["latents/y"].shape[2:])
    assert cache.shard(0)["latents/z"].dtype == np.int16
    batch = next(iter(cache.stream(("pixels", "latents/z", "quantized/tcq8/k"), batch=4, seed=0)))
    assert batch["latents/z"].shape == (4, 0, 4, 4) and batch["quantized/tcq8/k"].any()
    assert "latents/z" not in inspect(store)["arrays"]
    quantizer = Quantizer(QuantizerRecord.from_json(cache.record_json("tcq8")))
    y = cache.load(("latents/y",), [0, 1])["latents/y"]
    k = inputs_of(skewed().model, y, np.empty((2, 0, 4, 4), np.int16), BATCH).quantize(quantizer).k
    assert np.array_equal(k, cache.load(("quantized/tcq8/k",), [0, 1])["quantized/tcq8/k"])
    assert cache.usable.all()


@pytest.mark.slow
def test_it_is_quantized_again_and_repaired(store: Path, saved: Path, photos: Path) -> None:
    assert requantize(no_photos(saved, store, name="rdoq", group="rdoq")).shards_built == 3
    before = contents(store)
    damage(next(file for file in (store / "quantized/rdoq/k/c/1").rglob("*") if file.is_file()), "flip")
    damage(next(file for file in (store / "latents/y/c/2").rglob("*") if file.is_file()), "flip")
    assert len(verify(store)) == 2
    assert repair(experiment(saved, photos, store, quantizer=FIXED), verify(store)) == 2
    assert verify(store) == [] and contents(store) == before


def test_quantizers_take_residuals_about_the_medians_and_channels(latents: Latents) -> None:
    inputs = inputs_of(skewed().model, latents.y, latents.z, BATCH)
    assert isinstance(inputs, QuantizerInput) and latents.z.shape == (11, 0, 4, 4)
    medians = skewed().codec.prior.medians().numpy()  # type: ignore[union-attr]
    assert np.array_equal(inputs.residual.reshape(latents.y.shape), latents.y.astype(np.float32) - medians)
    level = inputs.level.reshape(latents.y.shape)
    record = analytic_record(skewed(), "tcq", 8, 0.7, 0.2, np.ones(24))
    walked = WalkedInput(skewed().model, latents.y, latents.z, BATCH)  # as of a family that corrects y_hat
    found = zip(walked.quantize(Quantizer(record)), inputs.quantize(Quantizer(record)), strict=True)
    assert all(np.allclose(one, other) for one, other in found)
    assert np.array_equal(walked.rounded(5), inputs.rounded(5))
    assert level.dtype == np.uint16 and level[7, :, 2, 1].tolist() == [*range(24)]


@pytest.mark.parametrize("name", ["sq", "deadzone", "rdoq", "tcq"])
def test_tables_of_counts_beat_the_prior_on_what_is_counted_and_hold_elsewhere(name: str, latents: Latents) -> None:
    """On other crops they may lose to a prior that fits; here y is what the prior says, and they lose little."""
    prior = skewed().codec.prior
    assert prior is not None
    first = analytic_record(skewed(), name, 8, 0.7, 0.2, np.full(24, 0.02))
    r = np.concatenate([_drawn(seed) for seed in range(3)])
    level = np.tile(np.arange(24, dtype=np.uint16)[:, None], (3 * 4, 256))
    pilot, fresh = slice(0, 8 * 24), slice(8 * 24, 12 * 24)
    *_, adapted = adaptation_rounds(first, [(r[pilot], level[pilot])], 1, cdf=prior.cdf)
    k = Quantizer(first).quantize(r, level)
    before, after = (Quantizer(one).bits(k, level) for one in (first, adapted))
    assert after[pilot].sum() < before[pilot].sum()
    assert after[fresh].sum() < 1.02 * before[fresh].sum()
    if not first.kind.searched:  # k are as the prior says, and nothing codes them in fewer bits
        assert after[fresh].sum() > 0.9995 * before[fresh].sum()


def _drawn(seed: int) -> np.ndarray:
    """Residuals that follow the prior, four images of 256 positions: float32 [4 * 24, 256]."""
    prior, grid = skewed().codec.prior, np.linspace(-60, 60, 6001)
    assert prior is not None
    below = prior.cdf(np.arange(24)[:, None], np.tile(grid, (24, 1)))
    drawn = np.random.default_rng(seed).random((4, 24, 256))
    values = np.stack([[np.interp(one, cdf, grid) for one, cdf in zip(image, below, strict=True)] for image in drawn])
    return values.reshape(-1, 256).astype(np.float32)


@pytest.mark.slow
@pytest.mark.parametrize("rates", ["adapted", "analytic"])
def test_calibration_lowers_L_and_measures_what_a_codec_writes(rates: str, latents: Latents) -> None:
    section = config.Quantizer(name="tcq", states=8, shift=0.05, rates=rates)
    held_out = Latents(latents.pixels[7:], latents.y[7:], latents.z[7:])
    pilot = Latents(latents.pixels[:7], latents.y[:7], latents.z[:7])
    begin = analytic_record(skewed(), "tcq", 8, 1.0, 1.0, np.ones(24))  # bits far too dear
    record = calibrate(skewed(), section, pilot, held_out, BATCH, warm_start=begin)
    trials = {(one["strength"], one["step"]): one["L"] for one in record.notes["calibration"]}
    assert record.notes["L"] == min(trials.values()) < trials[1.0, 1.0] and record.level_rule == "channel"
    codec = ImageCodec(skewed().model, record)
    written = sum(codec.encode(one.transpose(1, 2, 0)).coded_bits - 64 for one in held_out.pixels)  # without flushes
    found = measure(skewed(), record, held_out, inputs_of(skewed().model, held_out.y, held_out.z, BATCH))
    assert pytest.approx(record.notes["L"]) == found.L and found.bpp == pytest.approx(written / 4 / 64**2, abs=0.01)


def test_a_record_of_another_kind_of_model_is_refused(saved: Path, base: Path, tmp_path: Path) -> None:
    own = replace(analytic_record(skewed(), "tcq", 8, 0.7, 0.2, np.ones(24)), lmbda=0.05)
    own.save(tmp_path / "record.json")
    with pytest.raises(LicError, match="made for another model"):
        local_record(checkpoint.load(str(base)), str(tmp_path / "record.json"))
