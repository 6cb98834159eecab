"""The cache built from photos by the real job: same bytes whatever runs it, and what it refuses."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from lic_dist import config
from lic_dist.building import build as building
from lic_dist.building.build import build
from lic_dist.building.calibrate import calibrate, channel_weights, describe, measure, z_bits
from lic_dist.building.job import check_cache, prepare
from lic_dist.building.latents import encode, inputs_of, quantizer_input
from lic_dist.building.picture import calibration_plot
from lic_dist.building.pilot import calibration_samples, prepare_record, record_location
from lic_dist.building.records import analytic_record, named_record
from lic_dist.cache.mixture import Mixture
from lic_dist.cache.reader import LatentCache
from lic_dist.codec.records import compressai_record, fits
from lic_dist.data import images
from lic_dist.data.crops import plan_crops
from lic_dist.data.manifest import scan
from lic_dist.data.sources.opening import open_source
from lic_dist.errors import LicError, ToleranceError, UsageError
from lic_dist.models import checkpoint
from lic_dist.models.checkpoint import Checkpoint
from lic_dist.quantization.adaptation import adaptation_rounds as adapted_records
from lic_dist.quantization.quantize import Quantizer
from lic_dist.quantization.record import QuantizerRecord
from tests.stores import contents, experiment


@pytest.fixture(scope="module")
def store(base: Path, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cache") / "a.zarr"
    report = build(experiment(base, photos, path))
    assert (report.samples, report.shards_built, report.shards, report.faults) == (24, 3, 3, {})
    return path


@pytest.mark.slow
def test_the_store_holds_what_the_model_says(store: Path, base: Path, photos: Path) -> None:
    cache = LatentCache.open(store)
    loaded = checkpoint.load(str(base))
    crops = plan_crops(scan(photos), 64, 3, 0, "valid")
    pixels, _ = images.read_crops(open_source(photos), crops, 64)
    read = cache.load(("pixels", "latents/y", "latents/z", "quantized/tcq8/k", "quantized/tcq8/bits"))
    assert np.array_equal(read["pixels"], pixels)
    latents, overflow = encode(loaded.model, pixels, 4)
    assert not overflow.any() and np.array_equal(read["latents/z"], latents.z)
    assert np.array_equal(read["latents/y"], latents.y)
    quantizer = Quantizer(QuantizerRecord.from_json(cache.record_json("tcq8")))
    seen = quantizer_input(loaded.model, latents.y, latents.z, 4)
    k = quantizer.quantize(seen.residual, seen.level)
    assert np.array_equal(read["quantized/tcq8/k"].reshape(k.shape), k)
    bits = quantizer.bits(k, seen.level).reshape(24, -1).sum(1) + z_bits(quantizer.record, latents.z)
    assert np.allclose(read["quantized/tcq8/bits"], bits, rtol=1e-6)
    error = np.abs(quantizer.dequantize(k) - seen.residual)
    assert np.median(error) < quantizer.record.step


def test_building_again_builds_nothing(store: Path, base: Path, photos: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in store.rglob("*") if path.is_file()}
    assert build(experiment(base, photos, store)).shards_built == 0
    assert before == {path: path.stat().st_mtime_ns for path in store.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_a_build_cut_short_and_resumed_has_the_same_bytes(
    store: Path, base: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "cut.zarr"
    written = building.store.write_shard
    count = 0

    def die(*arguments: object, **options: object) -> None:
        nonlocal count
        count += 1
        if count == 2:
            raise KeyboardInterrupt
        written(*arguments, **options)

    monkeypatch.setattr("lic_dist.cache.store.write_shard", die)
    with pytest.raises(KeyboardInterrupt):
        build(experiment(base, photos, path))
    monkeypatch.setattr("lic_dist.cache.store.write_shard", written)
    assert build(experiment(base, photos, path)).shards_built == 2
    assert contents(path) == contents(store)


@pytest.mark.slow
def test_a_second_quantizer_is_added_from_stored_latents(
    store: Path, base: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "two.zarr"
    shutil.copytree(store, path)
    monkeypatch.setattr("lic_dist.data.images.read_crops", lambda *_: pytest.fail("photos were read"))
    section = {"name": "sq", "group": "sq-adapted"}
    with pytest.raises(pytest.fail.Exception):  # the pilot needs photos; quantizing alone does not
        build(experiment(base, photos, path, quantizer=section))
    monkeypatch.undo()
    assert build(experiment(base, photos, path, quantizer=section)).shards_built == 3
    cache = LatentCache.open(path)
    assert cache.groups == ("sq-adapted", "tcq8")
    sq, tcq = (cache.load((f"quantized/{group}/bits",))[f"quantized/{group}/bits"].sum() for group in cache.groups)
    assert sq != tcq and contents(store).items() <= contents(path).items()


def test_a_store_of_another_identity_is_refused_by_field(store: Path, base: Path, photos: Path) -> None:
    with pytest.raises(LicError, match=r"images\.seed"):
        build(experiment(base, photos, store, images={"seed": 5}))
    with pytest.raises(LicError, match="batch"):
        build(experiment(base, photos, store, cache={"batch": 8}))


def test_a_group_of_other_settings_is_refused_by_field(store: Path, base: Path, photos: Path) -> None:
    for changes, field in (({"states": 4}, "states"), ({"step": 0.9}, "step"), ({"name": "sq"}, "name")):
        with pytest.raises(LicError, match=field):
            build(experiment(base, photos, store, quantizer=changes))


def test_build_takes_the_record_that_adapt_left(base: Path, photos: Path, tmp_path: Path) -> None:
    job = prepare(experiment(base, photos, tmp_path / "a.zarr"))
    fixed = {"step": 0.8, "lambda_scale": 0.1}
    made = prepare_record(prepare(experiment(base, photos, tmp_path / "b.zarr", quantizer=fixed)))
    around, key = record_location(job.storage, job.quantizer.group)
    around.put(key, made.to_json().encode())
    build(experiment(base, photos, tmp_path / "a.zarr"))
    assert QuantizerRecord.from_json(LatentCache.open(tmp_path / "a.zarr").record_json("tcq8")).digest == made.digest


@pytest.mark.slow
def test_a_shard_whose_latents_were_forgotten_is_built_again(
    store: Path, base: Path, photos: Path, tmp_path: Path
) -> None:
    path = tmp_path / "hole.zarr"
    shutil.copytree(store, path)
    building.store.invalidate_shard(path, 1)
    assert build(experiment(base, photos, path)).shards_built == 1
    assert contents(path) == contents(store)


def test_a_half_built_cache_is_refused(store: Path, base: Path, tmp_path: Path) -> None:
    path = tmp_path / "half.zarr"
    shutil.copytree(store, path)
    building.store.invalidate_shard(path, 1, "tcq8")
    with pytest.raises(LicError, match="2 of 3 shards are written"):
        check_cache(LatentCache.open(path), checkpoint.load(str(base)), "tcq8")


def test_a_pilot_without_one_good_photo_is_one_line(base: Path, photos: Path, tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    shutil.copytree(photos, folder)
    job = prepare(experiment(base, folder, tmp_path / "a.zarr"))
    for file in (folder / "train").iterdir():
        file.write_bytes(b"gone")
    with pytest.raises(LicError, match="every pilot photo"):
        prepare_record(job)


def test_a_cache_of_another_encoder_or_entropy_model_is_refused_by_field(store: Path, base: Path) -> None:
    cache = LatentCache.open(store)
    check_cache(cache, checkpoint.load(str(base)), "tcq8")
    for part, field in (("g_a", "model.encoder_sha256"), ("h_s", "entropy_sha256")):
        other = checkpoint.load(str(base))
        with torch.no_grad():
            getattr(other.model, part)[0].weight[0, 0, 0, 0] += 1
        with pytest.raises(LicError, match=field):
            check_cache(cache, other, "tcq8")
    with pytest.raises(LicError, match="no group 'sq'"):
        check_cache(cache, checkpoint.load(str(base)), "sq")


@pytest.mark.slow
def test_faulty_photos_are_counted_and_tolerated_up_to_a_limit(base: Path, photos: Path, tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    shutil.copytree(photos, folder)
    (folder / "train" / "broken.png").write_bytes(b"")
    report = build(experiment(base, folder, tmp_path / "a.zarr", images={"tolerate": 0.2}))
    assert report.faults == {"not an image": 3}
    with pytest.raises(ToleranceError, match="3 not an image") as caught:
        build(experiment(base, folder, tmp_path / "a.zarr")).require_tolerated()
    assert caught.value.exit_code == 3


@pytest.mark.slow
def test_a_photo_that_changes_after_the_scan_is_set_aside(
    base: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "photos"
    shutil.copytree(photos, folder)
    job = experiment(base, folder, tmp_path / "a.zarr", images={"tolerate": 0.5})
    prepared = prepare(job)
    monkeypatch.setattr(building, "prepare", lambda *_, **__: prepared)
    shutil.copy(folder / "train" / "1.png", folder / "train" / "0.png")
    assert build(job).faults == {"changed": 3}
    cache = LatentCache.open(tmp_path / "a.zarr")
    assert cache.usable.sum() == 21
    changed = cache.samples["source"] == "train/0.png"
    assert not cache.load(("quantized/tcq8/k",), np.flatnonzero(changed))["quantized/tcq8/k"].any()


def test_a_photo_replaced_between_two_builds_is_noticed(base: Path, photos: Path, tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    shutil.copytree(photos, folder)
    job = experiment(base, folder, tmp_path / "a.zarr")
    before = prepare(job).plan
    assert prepare(job).plan == before
    shutil.copy(folder / "train" / "1.png", folder / "train" / "0.png")
    after = prepare(job).plan
    assert after.fingerprint != before.fingerprint and after.num_samples == before.num_samples - 3


def test_weights_of_rounding_are_what_its_errors_cost_the_picture(store: Path, base: Path) -> None:
    loaded, section = checkpoint.load(str(base)), config.Quantizer(weights="rounding", pilot=8)
    pilot, _ = calibration_samples(Mixture([LatentCache.open(store)]), section)
    inputs = inputs_of(loaded.model, pilot.y, pilot.z, 4)
    weights, notes = channel_weights(loaded, section, inputs, pilot)
    y, y_hat = torch.from_numpy(pilot.y).double(), torch.from_numpy(inputs.rounded(8)).double()
    squared = (y_hat - y).square().sum(dim=(0, 2, 3)).numpy()
    measured = []
    for step in (1e-3, -1e-3):  # of each channel's errors, along which the picture's error changes
        moved = [y_hat + step * (y_hat - y) * (torch.arange(12) == c).view(1, -1, 1, 1) for c in range(12)]
        x = torch.from_numpy(pilot.pixels).double() / 255
        with torch.no_grad():
            decoded = [copy.deepcopy(loaded.model).double().g_s(one) for one in moved]
        measured.append([float((one - x).square().sum()) for one in decoded])
    slope = np.subtract(*measured) / 2e-3 / 2
    np.testing.assert_allclose(weights, np.maximum(slope / squared, 0), rtol=1e-3, atol=1e-6)
    assert len(notes["weights_standard_error"]) == 12


@pytest.mark.slow
def test_calibration_never_does_worse_than_its_start_and_keeps_its_trials(store: Path, base: Path) -> None:
    cache, loaded = LatentCache.open(store), checkpoint.load(str(base))
    section = config.Quantizer(name="tcq", pilot=8, calibration=4)
    pilot, held_out = calibration_samples(Mixture([cache]), section)
    record = calibrate(loaded, section, pilot, held_out, 4)
    table = record.notes["calibration"]
    losses = {(one["strength"], one["step"], one["shift"]): one["L"] for one in table}
    chosen = (record.lambda_scale, record.step, record.shift)
    assert losses[chosen] == min(losses.values()) <= losses[(0.2, 0.66, 0.06)]
    measured = measure(loaded, record, held_out, quantizer_input(loaded.model, held_out.y, held_out.z, 4))
    assert pytest.approx(record.notes["L"], abs=1e-12) == measured.L
    all_fixed = config.Quantizer(name="tcq", step=0.7, lambda_scale=0.1, shift=0.05)
    fixed = calibrate(loaded, all_fixed, pilot, held_out, 4)
    assert (fixed.step, fixed.lambda_scale, fixed.shift, len(fixed.notes["calibration"])) == (0.7, 0.1, 0.05, 1)
    one_free = config.Quantizer(name="tcq", step=0.7, lambda_scale=0.1, shift=0, spread="auto", adapt_rounds=1)
    spread = calibrate(loaded, one_free, pilot, held_out, 4)
    losses_of = {one.get("spread", 0.0): one["L"] for one in spread.notes["calibration"]}
    assert len(losses_of) > 1 and losses_of[spread.spread] == min(losses_of.values()) == spread.notes["L"]
    again = calibrate(loaded, section, pilot, held_out, 4, warm_start=record)
    assert again.notes["L"] <= record.notes["L"]
    outside = calibrate(loaded, config.Quantizer(name="tcq", step=1.50000001), pilot, held_out, 4)
    assert (
        outside.step == 1.50000001 and len(outside.notes["calibration"]) > 2
    )  # the other axis is searched all the same


@pytest.mark.slow
@pytest.mark.parametrize("name", ["deadzone", "rdoq", "tcq"])
def test_calibration_reports_its_rounds_and_its_prediction(store: Path, base: Path, name: str, tmp_path: Path) -> None:
    cache, loaded = LatentCache.open(store), checkpoint.load(str(base))
    section = config.Quantizer.model_validate({"name": name, "states": 16, "pilot": 8, "calibration": 4, "step": 0.8})
    pilot, held_out = calibration_samples(Mixture([cache]), section)
    record = calibrate(loaded, section, pilot, held_out, 4)
    notes = record.notes
    assert (record.name, record.states) == (name, 16 if name == "tcq" else 1)
    assert len(notes["adaptation"]) == 1 + (1 if name == "deadzone" else section.adapt_rounds)
    assert notes["adaptation"][-1]["L"] == notes["L"] and notes["adaptation"][1] != notes["adaptation"][0]
    assert min(one["L"] for one in notes["calibration"]) >= notes["L"] - 1e-12
    seen = quantizer_input(loaded.model, held_out.y, held_out.z, 4)
    level = Quantizer(record).dequantize(Quantizer(record).quantize(seen.residual, seen.level))
    error = ((seen.residual.astype(np.float64) - level) ** 2).reshape(4, 12, -1)
    predicted = (error * record.weights[:, None]).sum() / (4 * 3 * 64 * 64)
    assert notes["mse_predicted"] == pytest.approx(predicted) and min(notes["weights_standard_error"]) > 0
    lines = describe(record)
    assert (
        len(lines) == 3 + len(notes["adaptation"][1:]) and "adapted, round 1" in lines[2] and "predicted" in lines[-1]
    )
    calibration_plot(notes, tmp_path / "curve.png", name)
    assert (tmp_path / "curve.png").stat().st_size > 10_000


@pytest.mark.parametrize("name", ["deadzone", "rdoq"])
@pytest.mark.slow
def test_scalar_quantizers_build_groups_too(store: Path, base: Path, photos: Path, tmp_path: Path, name: str) -> None:
    path = tmp_path / "more.zarr"
    shutil.copytree(store, path)
    section = {"name": name, "group": name, "step": 0.9}
    assert build(experiment(base, photos, path, quantizer=section)).shards_built == 3
    cache = LatentCache.open(path)
    record = QuantizerRecord.from_json(cache.record_json(name))
    k = cache.load((f"quantized/{name}/k",))[f"quantized/{name}/k"]
    assert record.name == name and record.step == 0.9 and np.abs(k).max() > 1


def test_adapted_tables_cost_less_on_what_they_were_adapted_to(store: Path, base: Path) -> None:
    cache, loaded = LatentCache.open(store), checkpoint.load(str(base))
    pilot, _ = calibration_samples(Mixture([cache]), config.Quantizer(pilot=12))
    seen = quantizer_input(loaded.model, pilot.y, pilot.z, 4)
    plain = analytic_record(loaded, "sq", 1, 1.0, 1.0, np.ones(12))
    (adapted,) = adapted_records(plain, [(seen.residual, seen.level)], rounds=3)
    k = Quantizer(plain).quantize(seen.residual, seen.level)
    assert np.array_equal(k, Quantizer(adapted).quantize(seen.residual, seen.level))
    assert Quantizer(adapted).bits(k, seen.level).sum() < Quantizer(plain).bits(k, seen.level).sum()
    assert fits(adapted, loaded.model)


def test_records_are_found_by_name_and_path(base: Path, tmp_path: Path) -> None:
    loaded: Checkpoint = checkpoint.load(str(base))
    record = compressai_record(loaded)
    assert named_record(loaded, "sq").digest == record.digest
    loaded.quantizers["mine"] = record.to_json()
    record.save(tmp_path / "record.json")
    assert named_record(loaded, "mine").digest == named_record(loaded, str(tmp_path)).digest == record.digest
    with pytest.raises(UsageError, match="no quantizer 'none'"):
        named_record(loaded, "none")
