"""Looking after a store: repair what is damaged, finish what was killed, set bad photos aside, estimate, inspect."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from lic_dist.building import pilot
from lic_dist.building.build import build, repair, requantize
from lic_dist.building.estimate import describe, estimate
from lic_dist.building.job import prepare
from lic_dist.cache import store
from lic_dist.cache.reader import LatentCache
from lic_dist.cache.storages import open_storage
from lic_dist.cache.verify import verify
from lic_dist.errors import LicError
from tests.app.test_cli import lic_dist, refused, write
from tests.stores import FIXED, contents, damage, experiment, no_photos


@pytest.mark.slow
def test_repair_writes_just_what_is_damaged(mine: Path, base: Path, photos: Path) -> None:
    asked = experiment(base, photos, mine, quantizer=FIXED)
    requantize(no_photos(base, mine, states=16, group="tcq16"))
    before = contents(mine)
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
    assert verify(mine) == [] and contents(mine) == before
    kept = {path for path, time in times.items() if path.exists() and path.stat().st_mtime_ns == time}
    assert {mine / "quantized/tcq8/k/c/1/0/0/0", mine / "quantized/tcq16/k/c/1/0/0/0"} <= kept
    assert repair(asked, verify(mine)) == 0


@pytest.mark.slow
def test_repair_of_a_store_without_y_encodes_again(base: Path, photos: Path, tmp_path: Path) -> None:
    asked = experiment(base, photos, tmp_path / "a.zarr", quantizer=FIXED, cache={"store_y": False})
    build(asked)
    before = contents(tmp_path / "a.zarr")
    damage(tmp_path / "a.zarr/quantized/tcq8/k/c/0/0/0/0", "cut")
    damage(tmp_path / "a.zarr/latents/z/c/1/0/0/0", "cut")
    repair(asked, verify(tmp_path / "a.zarr"))
    assert verify(tmp_path / "a.zarr") == [] and contents(tmp_path / "a.zarr") == before


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


def test_a_killed_planner_is_completed_by_the_next(mine: Path, base: Path, photos: Path) -> None:
    before = contents(mine)
    for left in ("quantized/tcq8/bits/zarr.json", "quantized/tcq8/zarr.json", "latents/zarr.json", "pixels/zarr.json"):
        (mine / left).unlink()
    asked = experiment(base, photos, mine, quantizer=FIXED)
    assert build(asked).shards_built == 0
    assert contents(mine) == before and verify(mine) == []


def test_a_build_whose_store_is_taken_away_does_not_call_it_done(
    mine: Path, base: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.invalidate_shard(mine, 0)
    asked, written = experiment(base, photos, mine, quantizer=FIXED), store.write_shard

    def lose_another(*arguments: object, **options: object) -> None:
        written(*arguments, **options)
        store.invalidate_shard(mine, 2)

    monkeypatch.setattr("lic_dist.cache.store.write_shard", lose_another)
    with pytest.raises(LicError, match="1 shard of .* is gone again"):
        build(asked)


def test_what_lies_beside_a_store_is_its_own(base: Path, photos: Path, tmp_path: Path) -> None:
    keys = set()
    for name in ("p-0.5", "p-0.25", "a.v1", "a.v1.zarr2", "x", "y.zarr"):
        around, key = open_storage(tmp_path / name).sibling(".tcq8.json")
        assert around == open_storage(tmp_path)
        keys.add(key)
    assert len(keys) == 6 and "y.tcq8.json" in keys


@pytest.mark.slow
def test_too_many_bad_photos_stop_no_sweep_and_lose_no_figures(base: Path, photos: Path, tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    shutil.copytree(photos, folder)
    (folder / "train" / "bad.png").write_bytes(b"not a picture")
    asked = experiment(base, folder, tmp_path / "a.zarr", quantizer=FIXED)
    document = asked.model_dump(mode="json", exclude_none=True)
    document["cache"]["path"] += "-{images.seed}"
    file = write(tmp_path / "x.yaml", **{**document, "sweep": {"images.seed": [1, 2]}})
    done = lic_dist("cache", "build", file, "--json", tmp_path / "figures.json")
    refused(done, 3, "3 of 27 samples were set aside: 3 not an image")
    assert [one["shards_built"] for one in json.loads((tmp_path / "figures.json").read_text())] == [3, 3]


@pytest.mark.slow
def test_strict_stops_at_the_first_bad_photo_and_loses_nothing(
    base: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "photos"
    shutil.copytree(photos, folder)
    asked = experiment(base, folder, tmp_path / "a.zarr", quantizer=FIXED, images={"tolerate": 0.5})
    pilot.prepare_record(prepare(asked))
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


def test_the_estimate_is_near_what_the_build_then_takes(made: Path, base: Path, photos: Path, tmp_path: Path) -> None:
    found = estimate(prepare(experiment(base, photos, tmp_path / "b.zarr", quantizer=FIXED)))
    assert not (tmp_path / "b.zarr").exists()
    assert (found.samples, found.held_out, found.shards) == (24, 6, 3)
    for name in ("pixels", "latents/y", "latents/z", "quantized/tcq8/k"):
        real = sum(file.stat().st_size for file in (made / name).rglob("c/**/*") if file.is_file())
        assert 0.6 * real < found.bytes[name] < 1.6 * real, name
    assert set(found.seconds) == {"read", "encode", "search"} and found.wall_seconds == sum(found.seconds.values())
    text = "\n".join(describe(found))
    assert "24 samples (6 held out) in 3 shards" in text and "free:" in text and "time, about" in text


@pytest.mark.slow
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
