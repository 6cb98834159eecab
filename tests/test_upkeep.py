"""Looking after a store: quantize it again, repair it, refuse it by field, rebuild it, estimate it."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from lic_dist import config
from lic_dist.building import pilot
from lic_dist.building.build import build, repair, requantize
from lic_dist.building.estimate import describe, estimate
from lic_dist.building.job import check_cache, group_identity, prepare
from lic_dist.building.pilot import adapt, record_beside
from lic_dist.cache import store
from lic_dist.cache.place import place_of
from lic_dist.cache.plan import differences
from lic_dist.cache.reader import LatentCache
from lic_dist.cache.verify import verify
from lic_dist.errors import LicError, UsageError
from lic_dist.models import checkpoint
from lic_dist.quantization.quantize import Quantizer
from lic_dist.quantization.record import QuantizerRecord
from tests.test_building import experiment, objects
from tests.test_cache import damage
from tests.test_cli import lic_dist, refused, write

FIXED = {"step": 0.7, "lambda_scale": 0.1, "shift": 0.05}


@pytest.fixture(scope="module")
def made(base: Path, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("upkeep") / "a.zarr"
    build(experiment(base, photos, path, quantizer=FIXED))
    return path


@pytest.fixture()
def mine(made: Path, tmp_path: Path) -> Path:
    """A copy of the store, with the manifest that lies beside it."""
    shutil.copytree(made, tmp_path / "a.zarr")
    shutil.copy(made.parent / "a.manifest.parquet", tmp_path)
    return tmp_path / "a.zarr"


def no_photos(base: Path, path: Path, **quantizer: object) -> config.Experiment:
    return config.Experiment.model_validate(
        {
            "model": {"checkpoint": str(base)},
            "quantizer": {"pilot": 8, "calibration": 4, **FIXED, **quantizer},
            "cache": {"path": str(path)},
            "engine": {"name": "local"},
        }
    )


# requantize


def test_requantizing_needs_neither_photos_nor_encoder_and_equals_building(
    mine: Path, base: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = tmp_path / "built.zarr"
    build(experiment(base, photos, built, quantizer={**FIXED, "states": 4, "group": "tcq4"}))
    monkeypatch.setattr("lic_dist.building.latents.analyse", lambda *_: pytest.fail("the encoder ran"))
    monkeypatch.setattr("lic_dist.images.read_crops", lambda *_: pytest.fail("photos were read"))
    report = requantize(no_photos(base, mine, states=4, group="tcq4"))
    assert (report.shards_built, report.shards, report.samples) == (3, 3, 24) and report.bpp > 0
    assert LatentCache.open(mine).groups == ("tcq4", "tcq8") and verify(mine) == []
    for name in ("k", "bits", "distortion"):
        key = f"quantized/tcq4/{name}"
        assert np.array_equal(LatentCache.open(mine).load([key])[key], LatentCache.open(built).load([key])[key])
    assert requantize(no_photos(base, mine, states=4, group="tcq4")).shards_built == 0
    with pytest.raises(LicError, match="step: store has 0.7, this job has 0.9"):
        requantize(no_photos(base, mine, step=0.9, states=4, group="tcq4"))


def test_requantizing_goes_on_where_it_stopped(mine: Path, base: Path) -> None:
    requantize(no_photos(base, mine, name="rdoq", group="rdoq"))
    before = objects(mine)
    store.forget(mine, 1, "rdoq")
    assert requantize(no_photos(base, mine, name="rdoq", group="rdoq")).shards_built == 1
    assert objects(mine) == before


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


def test_requantizing_an_unfinished_store_or_one_without_y_is_refused(
    mine: Path, base: Path, photos: Path, tmp_path: Path
) -> None:
    store.forget(mine, 2)
    with pytest.raises(LicError, match="latents of 2 of 3 shards"):
        requantize(no_photos(base, mine, group="more"))
    bare = tmp_path / "bare.zarr"
    build(experiment(base, photos, bare, quantizer=FIXED, cache={"store_y": False}))
    with pytest.raises(UsageError, match="does not keep y"):
        requantize(no_photos(base, bare, group="more"))


# repair


def test_repair_writes_just_what_is_damaged(mine: Path, base: Path, photos: Path) -> None:
    asked = experiment(base, photos, mine, quantizer=FIXED)
    requantize(no_photos(base, mine, states=16, group="tcq16"))
    before = objects(mine)
    times = {path: path.stat().st_mtime_ns for path in mine.rglob("c/**/*") if path.is_file()}
    damage(mine / "pixels/c/1/0/0/0", "remove")
    damage(mine / "latents/y/c/2/0/0/0", "flip")
    damage(mine / "quantized/tcq8/k/c/0/0/0/0", "zero tail")
    damage(mine / "quantized/tcq16/bits/c/2", "zero bytes")
    shutil.rmtree(mine / "samples")
    (mine / "quantized/tcq16/distortion/zarr.json").unlink()
    findings = verify(mine)
    assert {(one.shard, one.array, one.what) for one in findings} >= {
        (1, "pixels", "missing"),
        (2, "latents/y", "altered"),
        (0, "quantized/tcq8/k", "torn"),
        (2, "quantized/tcq16/bits", "zero"),
        (0, "samples/status", "missing"),
        (-1, "samples/status/zarr.json", "missing"),
        (-1, "quantized/tcq16/distortion/zarr.json", "missing"),
    }
    assert repair(asked, findings) == 3 + 1 + 1
    assert verify(mine) == [] and objects(mine) == before
    kept = {path for path, time in times.items() if path.exists() and path.stat().st_mtime_ns == time}
    assert {mine / "quantized/tcq8/k/c/1/0/0/0", mine / "quantized/tcq16/k/c/1/0/0/0"} <= kept
    assert repair(asked, verify(mine)) == 0


def test_repair_of_a_store_without_y_encodes_again(base: Path, photos: Path, tmp_path: Path) -> None:
    asked = experiment(base, photos, tmp_path / "a.zarr", quantizer=FIXED, cache={"store_y": False})
    build(asked)
    before = objects(tmp_path / "a.zarr")
    damage(tmp_path / "a.zarr/quantized/tcq8/k/c/0/0/0/0", "cut")
    damage(tmp_path / "a.zarr/latents/z/c/1/0/0/0", "cut")
    repair(asked, verify(tmp_path / "a.zarr"))
    assert verify(tmp_path / "a.zarr") == [] and objects(tmp_path / "a.zarr") == before


def test_a_lost_record_is_put_back_from_beside_the_store_or_named(mine: Path, base: Path, photos: Path) -> None:
    asked = experiment(base, photos, mine, quantizer=FIXED)
    text = LatentCache.open(mine).record_json("tcq8")
    for spoil in (lambda file: file.unlink(), lambda file: file.write_text(text.replace("tcq", "qct"))):
        spoil(mine / "quantized/tcq8/record.json")
        (finding,) = verify(mine)
        assert (finding.shard, finding.array) == (-1, "quantized/tcq8/record.json")
        with pytest.raises(LicError, match="record of group 'tcq8' of .* is lost"):
            repair(asked, [finding])
        (mine.parent / "a.tcq8.json").write_text(text)
        assert repair(asked, [finding]) == 0
        assert verify(mine) == []
        (mine.parent / "a.tcq8.json").unlink()


def test_a_second_group_without_y_comes_from_the_stored_pixels(
    base: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.zarr"
    build(experiment(base, photos, path, quantizer=FIXED, cache={"store_y": False}))
    before = {file: file.stat().st_mtime_ns for file in path.rglob("*") if file.is_file() and "tcq4" not in str(file)}
    more = experiment(base, photos, path, quantizer={**FIXED, "states": 4, "group": "tcq4"}, cache={"store_y": False})
    record = adapt(prepare(more))
    around, key = record_beside(prepare(more).place, "tcq4")
    around.put(key, record.to_json().encode())
    monkeypatch.setattr("lic_dist.images.read_crops", lambda *_: pytest.fail("photos were read"))
    assert build(more).shards_built == 3 and verify(path) == []
    assert before == {file: file.stat().st_mtime_ns for file in before}
    monkeypatch.undo()
    whole = tmp_path / "whole.zarr"
    build(experiment(base, photos, whole, quantizer={**FIXED, "states": 4, "group": "tcq4"}))
    k = "quantized/tcq4/k"
    assert np.array_equal(LatentCache.open(path).load([k])[k], LatentCache.open(whole).load([k])[k])


def test_requantizing_does_not_read_pixels(mine: Path, base: Path) -> None:
    requantize(no_photos(base, mine, name="sq", group="flat"))
    (mine.parent / "a.again.json").write_text(LatentCache.open(mine).record_json("flat"))  # nothing to calibrate
    for shard in range(3):
        damage(mine / f"pixels/c/{shard}/0/0/0", "flip")
    assert requantize(no_photos(base, mine, name="sq", group="again")).shards_built == 3


# identity


def test_every_field_of_the_identity_is_refused_by_its_name(
    mine: Path, base: Path, photos: Path, tmp_path: Path
) -> None:
    changes = {
        "images.crop": {"images": {"crop": 128}},
        "images.variations": {"images": {"variations": 2}},
        "images.seed": {"images": {"seed": 1}},
        "images.held_out": {"images": {"held_out": 0.5}},
        "shard": {"cache": {"shard": 4}},
        "batch": {"cache": {"batch": 2}},
        "store_y": {"cache": {"store_y": False}},
    }
    for field, change in changes.items():
        with pytest.raises(LicError, match=rf"{field}: store has .*, this job has"):
            build(experiment(base, photos, mine, quantizer=FIXED, **change))
    more = tmp_path / "more"
    shutil.copytree(photos, more)
    shutil.copy(photos / "train" / "0.png", more / "train" / "copy.png")
    with pytest.raises(LicError, match=r"images\.manifest_sha256"):
        build(experiment(base, more, mine, quantizer=FIXED))
    loaded = checkpoint.load(str(base))
    with torch.no_grad():
        loaded.model.entropy_bottleneck.quantiles[0, 0, 1] += 0.01  # a median of z: on the encoder's side
    checkpoint.save(loaded, tmp_path / "moved.pth.tar")
    with pytest.raises(LicError, match=r"model\.encoder_sha256"):
        build(experiment(tmp_path / "moved.pth.tar", photos, mine, quantizer=FIXED))
    job = prepare(experiment(base, photos, mine, quantizer=FIXED))
    known = {"format", "model", "precision", "images", "shard", "batch", "store_y"}
    assert set(job.plan.identity) == known
    for field in ("format", "precision", "model.architecture", "model.N", "model.M"):
        identity = copy.deepcopy(job.plan.identity)
        *sections, last = field.split(".")
        target = identity[sections[0]] if sections else identity
        target[last] = "other"
        with pytest.raises(LicError, match=rf"{field}: store has .*, this job has other"):
            store.create(mine, type(job.plan)(job.plan.crops, job.plan.geometry, 8, 4, identity))


def test_every_field_of_a_groups_identity_is_refused_by_its_name(mine: Path, base: Path) -> None:
    loaded = checkpoint.load(str(base))
    cache = LatentCache.open(mine)
    identity = cache.group_attributes("tcq8")["identity"]
    assert set(identity) == {"group", "cache", "record_sha256", "entropy_sha256"}
    ours = group_identity(loaded, QuantizerRecord.from_json(cache.record_json("tcq8")))
    assert differences({key: identity[key] for key in ours}, ours) == []
    for field in ours:
        with pytest.raises(LicError, match=rf"group 'tcq8' .*: {field}: store has"):
            store.create_group(mine, "tcq8", cache.record_json("tcq8"), {**ours, field: "0" * 64})
    with pytest.raises(LicError, match="another record.json"):
        shutil.rmtree(mine / "quantized/tcq8/k")
        (mine / "quantized/tcq8/zarr.json").unlink()
        store.create_group(mine, "tcq8", "{}", ours)


def test_a_killed_planner_is_completed_by_the_next(mine: Path, base: Path, photos: Path) -> None:
    before = objects(mine)
    for left in ("quantized/tcq8/bits/zarr.json", "quantized/tcq8/zarr.json", "latents/zarr.json", "pixels/zarr.json"):
        (mine / left).unlink()
    asked = experiment(base, photos, mine, quantizer=FIXED)
    assert build(asked).shards_built == 0
    assert objects(mine) == before and verify(mine) == []


# rebuild, strict


def test_rebuild_asks_and_then_starts_anew(mine: Path, base: Path, photos: Path) -> None:
    asked = experiment(base, photos, mine, quantizer={**FIXED, "step": 0.9}, images={"seed": 7})
    file = write(mine.parent / "x.yaml", **asked.model_dump(mode="json", exclude_none=True, exclude={"sweep"}))
    refused(lic_dist("cache", "build", file), 1, "images.seed")
    refused(lic_dist("cache", "build", file, "--rebuild"), 2, "--rebuild removes this store", "--yes")
    assert LatentCache.open(mine).identity["images"]["seed"] == 0
    done = lic_dist("cache", "build", file, "--rebuild", "--yes")
    assert done.returncode == 0 and "3 of 3 shards built now" in done.stdout, done.stderr
    assert LatentCache.open(mine).identity["images"]["seed"] == 7


def test_rebuild_removes_nothing_before_it_can_build(mine: Path, base: Path, photos: Path) -> None:
    around, key = record_beside(prepare(experiment(base, photos, mine, quantizer=FIXED)).place, "tcq8")
    around.put(key, LatentCache.open(mine).record_json("tcq8").encode())
    before = objects(mine)
    with pytest.raises(LicError, match="a.tcq8.json is another quantizer: step"):
        build(experiment(base, photos, mine, quantizer={**FIXED, "step": 0.9}), rebuild=True)
    assert objects(mine) == before


def test_a_store_of_another_version_is_refused_and_can_be_rebuilt(mine: Path, base: Path, photos: Path) -> None:
    document = json.loads((mine / "zarr.json").read_text())
    del document["attributes"]["num_held_out"]
    (mine / "zarr.json").write_text(json.dumps(document))
    asked = experiment(base, photos, mine, quantizer=FIXED)
    with pytest.raises(LicError, match="num_held_out") as caught:
        build(asked)
    assert "--rebuild" in caught.value.hint
    assert build(asked, rebuild=True).shards_built == 3


def test_a_rebuild_killed_while_it_removes_leaves_no_half_store(
    mine: Path, base: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = experiment(base, photos, mine, quantizer=FIXED)

    def die(path: Path) -> None:
        (path / "zarr.json").unlink()
        raise KeyboardInterrupt

    monkeypatch.setattr("shutil.rmtree", die)
    with pytest.raises(KeyboardInterrupt):
        build(asked, rebuild=True)
    monkeypatch.undo()
    assert not mine.exists()
    assert build(asked).shards_built == 3


def test_a_linked_store_is_rebuilt_where_it_lies(mine: Path, base: Path, photos: Path, tmp_path: Path) -> None:
    link = tmp_path / "elsewhere" / "link.zarr"
    link.parent.mkdir()
    link.symlink_to(mine)
    assert build(experiment(base, photos, link, quantizer=FIXED), rebuild=True).shards_built == 3
    assert link.is_symlink() and verify(mine) == []
    link.unlink()
    link.symlink_to(tmp_path / "nowhere")
    with pytest.raises(LicError, match="link to nothing"):
        build(experiment(base, photos, link, quantizer=FIXED))
    (tmp_path / "file.zarr").write_text("mine")
    with pytest.raises(LicError, match="is a file"):
        build(experiment(base, photos, tmp_path / "file.zarr", quantizer=FIXED))


def test_a_build_whose_store_is_taken_away_does_not_call_it_done(
    mine: Path, base: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.forget(mine, 0)
    asked, written = experiment(base, photos, mine, quantizer=FIXED), store.write_shard

    def lose_another(*arguments: object, **options: object) -> None:
        written(*arguments, **options)
        store.forget(mine, 2)

    monkeypatch.setattr("lic_dist.cache.store.write_shard", lose_another)
    with pytest.raises(LicError, match="1 shards of .* are gone again"):
        build(asked)


def test_what_lies_beside_a_store_is_its_own(base: Path, photos: Path, tmp_path: Path) -> None:
    keys = set()
    for name in ("p-0.5", "p-0.25", "a.v1", "a.v1.zarr2", "x", "y.zarr"):
        around, key = place_of(tmp_path / name).beside(".tcq8.json")
        assert around == place_of(tmp_path)
        keys.add(key)
    assert len(keys) == 6 and "y.tcq8.json" in keys


def test_settings_that_made_a_record_are_part_of_what_is_asked_for(mine: Path, base: Path, photos: Path) -> None:
    for change in ({"weights": "uniform"}, {"pilot": 9}, {"adapt_rounds": 1}, {"calibration": 5}):
        with pytest.raises(LicError, match=rf"another quantizer: {next(iter(change))}: store has"):
            build(experiment(base, photos, mine, quantizer={**FIXED, **change}))


def test_too_many_bad_photos_stop_no_sweep_and_lose_no_figures(base: Path, photos: Path, tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    shutil.copytree(photos, folder)
    (folder / "train" / "bad.png").write_bytes(b"not a picture")
    asked = experiment(base, folder, tmp_path / "a.zarr", quantizer=FIXED)
    document = asked.model_dump(mode="json", exclude_none=True)
    file = write(tmp_path / "x.yaml", **{**document, "sweep": {"images.seed": [1, 2]}})
    done = lic_dist("cache", "build", file, "--json", tmp_path / "figures.json")
    refused(done, 3, "3 of 27 samples were set aside: 3 not an image")
    assert [one["shards_built"] for one in json.loads((tmp_path / "figures.json").read_text())] == [3, 3]


def test_a_sweep_of_quantizers_and_learning_rates_rebuilds_one_store_once(
    base: Path, photos: Path, tmp_path: Path
) -> None:
    document = experiment(base, photos, tmp_path / "a.zarr", quantizer=FIXED).model_dump(mode="json", exclude_none=True)
    sweep = {"finetune.lr": [1e-3, 1e-4], "quantizer.states": [4, 8]}
    file = write(tmp_path / "x.yaml", **{**document, "sweep": sweep})
    for _ in range(2):
        done = lic_dist("cache", "build", file, "--rebuild", "--yes", "--json", tmp_path / "figures.json")
        assert done.returncode == 0, done.stderr
        built = [one["shards_built"] for one in json.loads((tmp_path / "figures.json").read_text())]
        assert built == [3, 3, 0, 0]
    cache, group = LatentCache.open(tmp_path / "a.zarr"), document["quantizer"]["group"]
    assert [len(cache.written(f"{group}-{states}")) for states in (4, 8)] == [cache.num_shards] * 2


def test_rebuild_removes_nothing_but_a_store_of_ours(base: Path, photos: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "precious.txt").write_text("mine")
    with pytest.raises(LicError, match="holds precious.txt"):
        build(experiment(base, photos, tmp_path / "mine", quantizer=FIXED), rebuild=True)
    (tmp_path / "mine" / "zarr.json").write_text('{"attributes": {}}')
    with pytest.raises(LicError, match="not a cache of lic_dist"):
        build(experiment(base, photos, tmp_path / "mine", quantizer=FIXED), rebuild=True)
    assert (tmp_path / "mine" / "precious.txt").read_text() == "mine"


def test_strict_stops_at_the_first_bad_photo_and_loses_nothing(
    base: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "photos"
    shutil.copytree(photos, folder)
    asked = experiment(base, folder, tmp_path / "a.zarr", quantizer=FIXED, images={"tolerate": 0.5})
    pilot.adapt(prepare(asked))
    prepared = prepare(asked)
    monkeypatch.setattr("lic_dist.building.build.prepare", lambda *_, **__: prepared)
    (folder / "train" / "3.png").write_bytes(b"gone")
    with pytest.raises(LicError, match=r"train/3\.png: changed") as caught:
        build(asked, strict=True)
    assert caught.value.exit_code == 1
    done = LatentCache.open(tmp_path / "a.zarr").written()
    assert done
    assert build(asked).shards_built == 3 - len(done)
    monkeypatch.undo()
    file = write(tmp_path / "x.yaml", **asked.model_dump(mode="json", exclude_none=True, exclude={"sweep"}))
    refused(lic_dist("cache", "scan", file, "--strict"), 1, "3.png", "not an image")


# estimate


def test_the_estimate_is_near_what_the_build_then_takes(made: Path, base: Path, photos: Path, tmp_path: Path) -> None:
    found = estimate(prepare(experiment(base, photos, tmp_path / "b.zarr", quantizer=FIXED)))
    assert not (tmp_path / "b.zarr").exists()
    assert (found.samples, found.held_out, found.shards) == (24, 6, 3)
    for name in ("pixels", "latents/y", "latents/z", "quantized/tcq8/k"):
        real = sum(file.stat().st_size for file in (made / name).rglob("c/**/*") if file.is_file())
        assert 0.6 * real < found.bytes[name] < 1.6 * real, name
    assert set(found.seconds) == {"read", "encode", "search"} and found.wall == sum(found.seconds.values())
    text = "\n".join(describe(found))
    assert "24 samples (6 held out) in 3 shards" in text and "free:" in text and "time, about" in text


def test_a_group_decodes_as_its_record_says(mine: Path) -> None:
    cache = LatentCache.open(mine)
    quantizer = Quantizer(QuantizerRecord.from_json(cache.record_json("tcq8")))
    k = cache.shard(0, ["quantized/tcq8/k"])["quantized/tcq8/k"]
    level = quantizer.dequantize(k.reshape(k.shape[0] * k.shape[1], -1))
    assert level.shape == (8 * 12, 16) and np.abs(level).max() > 0


def test_the_commands_plan_quantize_inspect_and_verify(mine: Path, base: Path, photos: Path, tmp_path: Path) -> None:
    asked = experiment(base, photos, mine, quantizer=FIXED)
    file = write(tmp_path / "x.yaml", **asked.model_dump(mode="json", exclude_none=True, exclude={"sweep"}))
    planned = lic_dist("cache", "plan", file, "--json", tmp_path / "plan.json")
    assert "24 samples (6 held out) in 3 shards" in planned.stdout and (tmp_path / "plan.json").stat().st_size
    again = lic_dist("cache", "requantize", file, "--set", "quantizer.states=4", "--set", "quantizer.group=tcq4")
    assert again.returncode == 0 and "3 of 3 shards built now" in again.stdout, again.stderr
    for target in (file, mine):
        shown = lic_dist("cache", "inspect", target, "--plot", tmp_path / "a.png", "--json", tmp_path / "a.json")
        assert "group tcq4: 3 of 3 shards" in shown.stdout and "median" in shown.stdout, shown.stderr
    assert (tmp_path / "a.png").stat().st_size > 10_000
    assert set(json.loads((tmp_path / "a.json").read_text())["groups"]) == {"tcq4", "tcq8"}
    assert f"{mine}: whole" in lic_dist("cache", "verify", file).stdout
    refused(lic_dist("cache", "inspect", tmp_path / "none.zarr"), 1, "no cache at")
