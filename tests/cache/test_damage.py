"""Damage: every loss of an object or attribute is named, healed by building, and never read as values."""

from __future__ import annotations

import json

import pytest
import zarr

from lic_dist.cache import markers, store
from lic_dist.cache.inspect import inspect
from lic_dist.cache.reader import LatentCache
from lic_dist.cache.verify import Finding, verify
from lic_dist.errors import LicError
from tests.stores import (
    create,
    damage,
    make_builder,
    make_plan,
    objects,
)


@pytest.mark.parametrize(
    "change",
    [
        {"num_samples": None}, {"num_samples": -1}, {"num_samples": 10**15}, {"shard": 0}, {"shard": "4"},
        {"geometry": [1]}, {"geometry": {"crop": 32}}, {"fingerprint": "0" * 64}, {"identity": 5}, {"store_y": "no"},
        {"format": "1"}, {"source_bytes": 0},
    ],
)  # fmt: skip
def test_hostile_attributes_are_one_line(built, change):
    document = json.loads((built / "zarr.json").read_text())
    document["attributes"] |= change
    (built / "zarr.json").write_text(json.dumps(document))
    for use in (LatentCache.open, verify, inspect, lambda path: store.create(path, make_plan())):
        with pytest.raises(LicError) as caught:
            use(built)
        assert "\n" not in caught.value.message


def test_a_lost_or_torn_root_is_put_back_for_the_same_plan_alone(built):
    before = objects(built)
    for spoil in (lambda file: file.unlink(), lambda file: file.write_text("{")):
        spoil(built / "zarr.json")
        with pytest.raises(LicError, match="no cache and not empty"):
            store.create(built, make_plan(crop=64))
        create(built, make_plan())
        assert objects(built) == before and verify(built) == []


def test_a_broken_group_is_named_and_put_back(built):
    before = objects(built)
    for text in ('{"attributes": {}}', "{", '{"attributes": {"identity": {"a": 1}, "fingerprint": "0"}}'):
        (built / "quantized/tcq8/zarr.json").write_text(text)
        what = "torn" if text == "{" else "altered"
        assert Finding(-1, "quantized/tcq8/zarr.json", what, "tcq8") in verify(built)
        assert inspect(built)["groups"] == {} and LatentCache.open(built).groups == ()
        create(built, make_plan())
        assert objects(built) == before
    (built / "pixels/zarr.json").write_text((built / "latents/y/zarr.json").read_text())
    assert verify(built)[0] == Finding(-1, "pixels/zarr.json", "altered")
    create(built, make_plan())
    assert objects(built) == before


@pytest.mark.parametrize("name", ["source", "held_out", "status"])
@pytest.mark.parametrize("how", ["remove", "empty", "flip"])
def test_lost_rows_of_samples_are_never_values(built, name, how):
    file = next((built / f"samples/{name}/c/2").rglob("*")) if name == "source" else built / f"samples/{name}/c/2"
    damage(file, how)
    cache = LatentCache.open(built)
    with pytest.raises(LicError, match=f"samples/{name}"):
        _ = cache.samples
    if name != "source":
        with pytest.raises(LicError, match=f"samples/{name}"):
            cache.indices(held_out=False)


@pytest.mark.parametrize(
    ("how", "what"),
    [
        ("remove", "missing"),
        ("cut", "torn"),
        ("empty", "torn"),
        ("zero tail", "torn"),
        ("zero bytes", "zero"),
        ("flip", "altered"),
    ],
)
def test_verify_tells_damages_apart_and_building_heals_them(built, how, what):
    before = objects(built)
    damage(built / "latents/y/c/1/0/0/0", how)
    damage(built / "samples/source/c/2/0", how)
    damage(built / "quantized/tcq8/k/c/0/0/0/0", how)
    assert verify(built) == [
        Finding(1, "latents/y", what),
        Finding(2, "samples/source", what),
        Finding(0, "quantized/tcq8/k", what, "tcq8"),
    ]
    for finding in verify(built):
        store.invalidate_shard(built, finding.shard, finding.group or None)
    assert store.pending(built) == [1, 2] and store.pending(built, "tcq8") == [0, 1, 2]
    for shard in range(3):
        make_builder(built, make_plan())(shard)
    assert verify(built) == [] and objects(built) == before


def test_verify_sees_what_was_written_over(built):
    with zarr.config.set({"array.write_empty_chunks": True}):
        zarr.open_array(str(built), path="pixels", mode="r+")[4:8] = 0
        zarr.open_array(str(built), path="latents/z", mode="r+")[5, 0] = 77
    zarr.open_array(str(built), path="quantized/tcq8/k", mode="r+")[8:12] = 0  # the default: object dropped
    assert [(finding.shard, finding.array, finding.what) for finding in verify(built)] == [
        (1, "pixels", "zero"),
        (1, "latents/z", "altered"),
        (2, "quantized/tcq8/k", "missing"),
    ]


def test_verify_reports_unwritten_shards_and_broken_markers(built):
    store.invalidate_shard(built, 1)
    key = make_plan().fingerprint
    (built / markers.marker_key(key, 2)).write_text("{")
    folder = f"_progress/{key[:8]}"
    assert verify(built) == [Finding(1, folder, "missing"), Finding(2, folder, "torn")]


def test_unwritten_shards_are_not_read_as_zeros(tmp_path):
    planned = make_plan()
    create(tmp_path / "a.zarr", planned)
    make_builder(tmp_path / "a.zarr", planned)(0)
    cache = LatentCache.open(tmp_path / "a.zarr")
    assert cache.usable.tolist() == [True] * 4 + [False] * 6
    assert cache.written() == [0] and cache.written("tcq8") == [0]
    assert cache.load(["pixels"], range(4))["pixels"].any()
    for read in (lambda: cache.shard(1), lambda: cache.load(["pixels"]), lambda: cache[5]):
        with pytest.raises(LicError, match="is not written"):
            read()
    (tmp_path / "a.zarr/latents/z/c/0/0/0/0").write_bytes(b"")  # Zarr itself reads zeros here
    with pytest.raises(LicError, match="shard 0 of .*latents/z, has lost its object"):
        cache.shard(0)
    with pytest.raises(LicError, match="has lost an object"):
        LatentCache.open(tmp_path / "a.zarr").shard(0)


@pytest.mark.parametrize("how", ["cut", "zero tail", "flip"])
def test_damage_met_while_reading_names_shard_and_array(built, how):
    damage(built / "quantized/tcq8/k/c/1/0/0/0", how)
    match = "is not written" if how == "cut" else "shard 1 of .*, array quantized/tcq8/k, does not decode"
    with pytest.raises(LicError, match=match):
        LatentCache.open(built).load(["quantized/tcq8/k"])


@pytest.mark.parametrize(
    "spoil", [lambda text: text[:-9], lambda text: text.replace('"blosc"', '"blosd"'), lambda _: ""]
)
def test_an_array_whose_document_is_torn_or_altered_is_one_line_and_put_back(built, spoil):
    before, file = objects(built), built / "latents/z/zarr.json"
    file.write_text(spoil(file.read_text()))
    with pytest.raises(LicError, match="latents/z/zarr.json is lost or altered"):
        LatentCache.open(built).load(["latents/z"])
    assert [one.array for one in verify(built)] == ["latents/z/zarr.json"]
    create(built, make_plan())
    assert objects(built) == before and verify(built) == []
