"""Quantizing a store again, and adding a group to it, from what it keeps."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from lic_dist.building.build import build, requantize
from lic_dist.building.job import check_cache, prepare
from lic_dist.building.pilot import prepare_record, record_location
from lic_dist.cache import store
from lic_dist.cache.reader import LatentCache
from lic_dist.cache.verify import verify
from lic_dist.errors import LicError, UsageError
from lic_dist.models import checkpoint
from lic_dist.quantization.quantize import Quantizer
from lic_dist.quantization.record import QuantizerRecord
from tests.stores import FIXED, contents, damage, experiment, no_photos


@pytest.mark.slow
def test_requantizing_needs_neither_photos_nor_encoder_and_equals_building(
    mine: Path, base: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = tmp_path / "built.zarr"
    build(experiment(base, photos, built, quantizer={**FIXED, "states": 4, "group": "tcq4"}))
    monkeypatch.setattr("lic_dist.building.latents.analyse", lambda *_: pytest.fail("the encoder ran"))
    monkeypatch.setattr("lic_dist.data.images.read_crops", lambda *_: pytest.fail("photos were read"))
    report = requantize(no_photos(base, mine, states=4, group="tcq4"))
    assert (report.shards_built, report.shards, report.samples) == (3, 3, 24) and report.bpp > 0
    assert LatentCache.open(mine).groups == ("tcq4", "tcq8") and verify(mine) == []
    for name in ("k", "bits", "distortion"):
        key = f"quantized/tcq4/{name}"
        assert np.array_equal(LatentCache.open(mine).load([key])[key], LatentCache.open(built).load([key])[key])
    assert requantize(no_photos(base, mine, states=4, group="tcq4")).shards_built == 0
    with pytest.raises(LicError, match="step: store has 0.7, this job has 0.9"):
        requantize(no_photos(base, mine, step=0.9, states=4, group="tcq4"))


@pytest.mark.slow
def test_requantizing_goes_on_where_it_stopped(mine: Path, base: Path) -> None:
    requantize(no_photos(base, mine, name="rdoq", group="rdoq"))
    before = contents(mine)
    store.invalidate_shard(mine, 1, "rdoq")
    assert requantize(no_photos(base, mine, name="rdoq", group="rdoq")).shards_built == 1
    assert contents(mine) == before


@pytest.mark.slow
def test_requantizing_takes_another_entropy_model_but_not_another_encoder(
    mine: Path, base: Path, tmp_path: Path
) -> None:
    loaded = checkpoint.load(str(base))
    with torch.no_grad():
        loaded.model.h_s[0].weight.mul_(1.01)
    checkpoint.save(loaded, tmp_path / "finetuned.pth.tar")
    requantize(no_photos(tmp_path / "finetuned.pth.tar", mine, group="after"))
    cache = LatentCache.open(mine)
    check_cache(cache, checkpoint.load(str(tmp_path / "finetuned.pth.tar")), "after")
    with pytest.raises(LicError, match="entropy_sha256"):
        check_cache(cache, checkpoint.load(str(base)), "after")
    with torch.no_grad():
        loaded.model.g_a[0].weight.mul_(1.01)
    checkpoint.save(loaded, tmp_path / "other.pth.tar")
    with pytest.raises(LicError, match="model.encoder_sha256"):
        requantize(no_photos(tmp_path / "other.pth.tar", mine, group="other"))


@pytest.mark.slow
def test_requantizing_an_unfinished_store_or_one_without_y_is_refused(
    mine: Path, base: Path, photos: Path, tmp_path: Path
) -> None:
    store.invalidate_shard(mine, 2)
    with pytest.raises(LicError, match="latents of 2 of 3 shards"):
        requantize(no_photos(base, mine, group="more"))
    bare = tmp_path / "bare.zarr"
    build(experiment(base, photos, bare, quantizer=FIXED, cache={"store_y": False}))
    with pytest.raises(UsageError, match="does not keep y"):
        requantize(no_photos(base, bare, group="more"))


@pytest.mark.slow
def test_requantizing_does_not_read_pixels(mine: Path, base: Path) -> None:
    requantize(no_photos(base, mine, name="sq", group="flat"))
    (mine.parent / "a.again.json").write_text(LatentCache.open(mine).record_json("flat"))  # nothing to calibrate
    for shard in range(3):
        damage(mine / f"pixels/c/{shard}/0/0/0", "flip")
    assert requantize(no_photos(base, mine, name="sq", group="again")).shards_built == 3


@pytest.mark.slow
def test_a_second_group_without_y_comes_from_the_stored_pixels(
    base: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.zarr"
    build(experiment(base, photos, path, quantizer=FIXED, cache={"store_y": False}))
    before = {file: file.stat().st_mtime_ns for file in path.rglob("*") if file.is_file() and "tcq4" not in str(file)}
    more = experiment(base, photos, path, quantizer={**FIXED, "states": 4, "group": "tcq4"}, cache={"store_y": False})
    record = prepare_record(prepare(more))
    around, key = record_location(prepare(more).storage, "tcq4")
    around.put(key, record.to_json().encode())
    monkeypatch.setattr("lic_dist.data.images.read_crops", lambda *_: pytest.fail("photos were read"))
    assert build(more).shards_built == 3 and verify(path) == []
    assert before == {file: file.stat().st_mtime_ns for file in before}
    monkeypatch.undo()
    whole = tmp_path / "whole.zarr"
    build(experiment(base, photos, whole, quantizer={**FIXED, "states": 4, "group": "tcq4"}))
    k = "quantized/tcq4/k"
    assert np.array_equal(LatentCache.open(path).load([k])[k], LatentCache.open(whole).load([k])[k])


def test_a_group_decodes_as_its_record_says(mine: Path) -> None:
    cache = LatentCache.open(mine)
    quantizer = Quantizer(QuantizerRecord.from_json(cache.record_json("tcq8")))
    k = cache.shard(0, ["quantized/tcq8/k"])["quantized/tcq8/k"]
    level = quantizer.dequantize(k.reshape(k.shape[0] * k.shape[1], -1))
    assert level.shape == (8 * 12, 16) and np.abs(level).max() > 0
