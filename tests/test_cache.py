"""The cache: format, resume, refusal, verification, and the same bytes from every way of building."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st

from lic_dist.cache import layout, markers, plan, store
from lic_dist.cache.folder import Folder
from lic_dist.cache.inspect import describe, inspect, pace
from lic_dist.cache.plan import Geometry, Plan, differences, fingerprint
from lic_dist.cache.reader import LatentCache
from lic_dist.cache.verify import Finding, verify
from lic_dist.engine.stages import Stage, run
from lic_dist.errors import LicError
from lic_dist.images import FAULTS, Crop

HERE = Path(__file__).parent
GEOMETRY = Geometry(crop=32, y_channels=6, y_size=2, z_channels=4, z_size=1)
IDENTITY = {"format": 1, "model": {"architecture": "mbt2018-mean", "encoder_sha256": "ab" * 32}, "crop": 32}
RECORD = '{"name": "tcq"}'


def make_plan(samples: int = 10, shard: int = 4, **changes) -> Plan:
    crops = tuple(
        Crop(f"ordner/ä{n}.png", hashlib.sha256(b"%d" % n).hexdigest(), n, 2 * n, n % 2 == 1, n >= samples - 2)
        for n in range(samples)
    )
    return Plan(crops, GEOMETRY, shard, 2, {**IDENTITY, **changes})


def synthetic(count: int, shard: int, faulty: int | None = None, group: str | None = "tcq8") -> dict[str, np.ndarray]:
    """What an encoder and a search would make of a shard; a pure function of its number."""
    rng = np.random.default_rng(shard)
    arrays = {
        "pixels": rng.integers(1, 256, (count, 3, 32, 32), np.uint8),
        "latents/y": rng.normal(0, 3, (count, 6, 2, 2)).astype(np.float16),
        "latents/z": rng.integers(-9, 9, (count, 4, 1, 1)).astype(np.int16),
        "samples/status": np.zeros(count, np.uint8),
    }
    if faulty is not None:
        arrays["samples/status"][faulty] = FAULTS.index("truncated")
    if group:
        arrays[f"quantized/{group}/k"] = np.rint(arrays["latents/y"]).astype(np.int16)
        arrays[f"quantized/{group}/bits"] = np.full(count, 1024.0, np.float32)
        arrays[f"quantized/{group}/distortion"] = np.full(count, 0.5, np.float32)
    return arrays


def make_builder(path: Path, planned: Plan):
    def build(shard: int) -> int:
        count = len(planned.crops_of(shard))
        arrays = synthetic(count, shard, faulty=1 if shard == 1 else None)
        store.write_shard(str(path), planned.fingerprint, shard, arrays, planned.crops_of(shard), {"all": 0.1})
        return count

    return build


def create(path: Path, planned: Plan) -> None:
    store.create(str(path), planned)
    store.create_group(str(path), "tcq8", RECORD, {"record": "cd" * 32})


def build(path: Path, planned: Plan, **engine) -> list[tuple[int, int]]:
    stage = Stage("build", partial(make_builder, path, planned), workers=2 if engine else 1)
    done = list(run([stage], store.pending(path), **engine))
    Folder(path).sweep()
    return done


def objects(path: Path) -> dict[str, str]:
    """sha256 of every array object, and every zarr.json, of a store."""
    return {
        file.relative_to(path).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in path.rglob("*")
        if file.is_file() and markers.FOLDER not in file.relative_to(path).parts
    }


@pytest.fixture()
def built(tmp_path) -> Path:
    create(tmp_path / "a.zarr", make_plan())
    build(tmp_path / "a.zarr", make_plan())
    return tmp_path / "a.zarr"


# plan


@given(st.integers(1, 500), st.integers(1, 80))
def test_shards_hold_every_sample_once(samples, shard):
    planned = Plan(tuple(range(samples)), GEOMETRY, shard, 1, {})
    assert [n for s in range(planned.num_shards) for n in planned.crops_of(s)] == list(range(samples))


def test_fingerprint_is_of_the_content():
    assert fingerprint({"b": 1, "a": [1.5, "x"]}) == fingerprint({"a": (1.5, "x"), "b": 1})
    assert fingerprint({}) == "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"
    with pytest.raises(ValueError, match="not plain JSON"):
        make_plan(bad={1, 2})


def test_differences_name_each_field():
    found = {"model": {"encoder_sha256": "ab" * 32, "N": 48}, "crop": 256, "list": [1, 2]}
    expected = {"model": {"encoder_sha256": "cd" * 32, "N": 48}, "crop": 128, "list": (1, 2), "new": None}
    assert differences(found, expected) == [
        "crop: store has 256, this job has 128",
        "model.encoder_sha256: store has abababab…, this job has cdcdcdcd…",
        "new: store has nothing, this job has null",
    ]
    assert differences({"d": "a" * 63 + "b"}, {"d": "a" * 64})[0].count("a" * 63) == 2  # shown whole
    assert differences(found, found) == []


def test_no_crops_is_an_error_of_the_user():
    with pytest.raises(LicError, match="no samples"):
        Plan((), GEOMETRY, 4, 1, {})


# format


@pytest.mark.filterwarnings("ignore:Object at")
def test_format_is_what_the_design_says(built):
    root = zarr.open_group(str(built), mode="r")
    assert root.attrs["num_samples"] == 10 and root.attrs["format"] == 1
    shapes = {name: (array.dtype.name, array.shape) for name, array in arrays_of(root).items()}
    assert shapes == {
        "pixels": ("uint8", (12, 3, 32, 32)),
        "latents/y": ("float16", (12, 6, 2, 2)),
        "latents/z": ("int16", (12, 4, 1, 1)),
        "quantized/tcq8/k": ("int16", (12, 6, 2, 2)),
        "quantized/tcq8/bits": ("float32", (12,)),
        "quantized/tcq8/distortion": ("float32", (12,)),
        "samples/source": ("uint8", (12, 14)),
        "samples/digest": ("uint8", (12, 64)),
        "samples/crop_y": ("int32", (12,)),
        "samples/crop_x": ("int32", (12,)),
        "samples/flip": ("bool", (12,)),
        "samples/held_out": ("bool", (12,)),
        "samples/status": ("uint8", (12,)),
    }
    for array in arrays_of(root).values():
        assert array.shards[0] == 4 and array.chunks[1:] == array.shape[1:]
        assert array.metadata.dimension_names[0] == "sample"
        assert len(array.metadata.dimension_names) == array.ndim
    assert root["samples/status"].attrs["names"][3] == "truncated"
    assert root["samples/status"][:].tolist() == [0, 0, 0, 0, 0, 3, 0, 0, 0, 0, 255, 255]
    assert not root["pixels"][10:].any()
    assert bytes(root["samples/source"][1]).rstrip(b"\0").decode() == "ordner/ä1.png"


def arrays_of(group) -> dict[str, zarr.Array]:
    return {name: node for name, node in group.members(max_depth=None) if isinstance(node, zarr.Array)}


def test_only_codecs_of_every_reader(built):
    document = json.loads((built / "pixels" / "zarr.json").read_text())
    (sharding,) = document["codecs"]
    assert sharding["name"] == "sharding_indexed"
    assert [codec["name"] for codec in sharding["configuration"]["codecs"]] == ["bytes", "blosc", "crc32c"]
    assert document["chunk_key_encoding"]["configuration"]["separator"] == "/"


def test_inner_chunks_divide_the_shard():
    assert [layout.inner_chunk(n, 98304) for n in (64, 4, 9, 7, 13, 10)] == [8, 4, 3, 7, 1, 5]
    assert layout.inner_chunk(64, 4) == 64  # rows of samples/*: one chunk a shard


def test_all_zero_shards_have_objects(tmp_path):
    planned = make_plan(4)
    store.create(tmp_path / "z.zarr", planned)
    zeros = {name: np.zeros_like(array) for name, array in synthetic(4, 0, group=None).items()}
    store.write_shard(tmp_path / "z.zarr", planned.fingerprint, 0, zeros, planned.crops)
    assert (tmp_path / "z.zarr/pixels/c/0/0/0/0").is_file()
    assert verify(tmp_path / "z.zarr") == [] and store.pending(tmp_path / "z.zarr") == []


# identity


def test_create_is_idempotent_and_leaves_nothing_beside(built):
    before = objects(built)
    create(built, make_plan())
    assert objects(built) == before
    assert [entry.name for entry in built.parent.iterdir()] == ["a.zarr"]


def test_another_identity_is_refused_naming_the_fields(built):
    other = make_plan(model={"architecture": "mbt2018-mean", "encoder_sha256": "cd" * 32}, crop=64)
    with pytest.raises(LicError) as caught:
        store.create(built, other)
    assert "crop: store has 32, this job has 64; model.encoder_sha256: store has abab" in caught.value.message
    with pytest.raises(LicError, match="holds another cache: fingerprint"):
        store.write_shard(built, other.fingerprint, 0, synthetic(4, 0), other.crops_of(0))
    with pytest.raises(LicError, match="num_samples: store has 10, this job has 11"):
        store.create(built, make_plan(11))
    with pytest.raises(LicError, match="store_y: store has true, this job has false"):
        store.create(built, make_plan(), store_y=False)
    with pytest.raises(LicError, match="record: store has cdcdcdcd…, this job has efefefef…"):
        store.create_group(built, "tcq8", RECORD, {"record": "ef" * 32})


@pytest.mark.parametrize("round_", range(5))
def test_of_planners_at_once_one_wins_and_the_others_agree_or_are_refused(tmp_path, round_):
    plans = [make_plan(), make_plan(crop=64), make_plan(11), make_plan()]

    def create_both(planned: Plan) -> str:
        try:
            create(tmp_path / "a.zarr", planned)
        except LicError as error:
            return error.message
        return planned.fingerprint

    with ThreadPoolExecutor(len(plans)) as pool:
        told = list(pool.map(create_both, plans))
    won = LatentCache.open(tmp_path / "a.zarr")
    winners = [planned for planned, said in zip(plans, told, strict=True) if said == planned.fingerprint]
    assert winners and all(planned.num_samples == won.num_samples for planned in winners)
    refused = [said for said in told if "this job has" in said]
    assert len(refused) + len(winners) == len(plans)
    build(tmp_path / "a.zarr", winners[0])
    assert verify(tmp_path / "a.zarr") == [] and won.groups == ("tcq8",)


def test_what_is_not_a_cache_is_refused(tmp_path):
    with pytest.raises(LicError, match="no cache at"):
        LatentCache.open(tmp_path / "absent.zarr")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "precious.txt").write_text("mine")
    with pytest.raises(LicError, match="holds precious.txt"):
        store.create(tmp_path / "notes", make_plan())
    assert (tmp_path / "notes" / "precious.txt").read_text() == "mine"
    zarr.create_group(str(tmp_path / "other.zarr"))
    with pytest.raises(LicError, match="is not a cache of lic_dist"):
        store.create(tmp_path / "other.zarr", make_plan())


@pytest.mark.parametrize("name", ["", "..", "a/b", ".hidden", "_progress"])
def test_group_names_stay_inside_the_store(built, name):
    with pytest.raises(LicError, match="cannot name a group"):
        store.create_group(built, name, RECORD, {})


# writing


def test_shards_are_written_whole(tmp_path):
    planned = make_plan()
    create(tmp_path / "a.zarr", planned)
    whole = synthetic(4, 0)
    broken = [
        {name: array for name, array in whole.items() if name != "latents/z"},
        {name: array for name, array in whole.items() if name != "quantized/tcq8/bits"},
        {**whole, "latents/x": whole["latents/y"]},
        {**whole, "pixels": whole["pixels"][:3]},
        {**whole, "latents/y": whole["latents/y"].astype(np.float32)},
        {**whole, "quantized/tcq8/bits": np.full(4, np.nan, np.float32)},
        {},
    ]
    for arrays in broken:
        with pytest.raises(ValueError):
            store.write_shard(tmp_path / "a.zarr", planned.fingerprint, 0, arrays, planned.crops_of(0))
    with pytest.raises(ValueError, match="3 crops for the 4 samples"):
        store.write_shard(tmp_path / "a.zarr", planned.fingerprint, 0, whole, planned.crops[:3])
    with pytest.raises(LicError, match="no group 'sq'"):
        store.write_shard(tmp_path / "a.zarr", planned.fingerprint, 0, synthetic(4, 0, group="sq"), planned.crops_of(0))
    assert store.pending(tmp_path / "a.zarr", "tcq8") == [0, 1, 2]


def test_faulty_samples_are_zeros_and_not_counted(built):
    cache = LatentCache.open(built)
    rows = cache.shard(1, ("pixels", "latents/y", "quantized/tcq8/k", "quantized/tcq8/bits"))
    assert all(not array[1].any() and array[0].any() for array in rows.values())
    marker = markers.read_marker(Folder(built), cache.fingerprint, 1)
    assert (marker.samples, marker.faulty, marker.bits) == (4, 1, None)
    marker = markers.read_marker(Folder(built), cache.group_attributes("tcq8")["fingerprint"], 1)
    assert (marker.bits, marker.distortion, marker.seconds) == (3 * 1024.0, 1.5, {"all": 0.1})


def test_groups_are_added_later_with_markers_of_their_own(built):
    planned = make_plan()
    assert LatentCache.open(built).samples["digest"].tolist() == [crop.digest for crop in planned.crops]
    store.create_group(built, "sq", RECORD, {"record": "ef" * 32})
    assert store.pending(built) == [] and store.pending(built, "sq") == [0, 1, 2]
    arrays = {name: array for name, array in synthetic(4, 1, group="sq").items() if name.startswith("quantized")}
    store.write_shard(built, planned.fingerprint, 1, arrays)
    assert store.pending(built, "sq") == [0, 2] and store.pending(built, "tcq8") == []
    k = LatentCache.open(built).shard(1, ["quantized/sq/k"])["quantized/sq/k"]
    assert not k[1].any() and k[0].any()  # the base says that sample 1 is faulty
    assert LatentCache.open(built).groups == ("sq", "tcq8")


def test_a_group_needs_its_latents(tmp_path):
    planned = make_plan()
    create(tmp_path / "a.zarr", planned)
    arrays = {name: array for name, array in synthetic(4, 0).items() if name.startswith("quantized")}
    with pytest.raises(LicError, match="holds no latents yet"):
        store.write_shard(tmp_path / "a.zarr", planned.fingerprint, 0, arrays)


# resume


def test_the_same_bytes_from_every_way_of_building(tmp_path, monkeypatch):
    planned = make_plan(18)
    paths = {name: tmp_path / f"{name}.zarr" for name in ("local", "ray", "resumed", "killed")}
    for path in paths.values():
        create(path, planned)
    build(paths["local"], planned)

    search_path = os.pathsep.join(filter(None, [str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH")]))
    monkeypatch.setenv("PYTHONPATH", search_path)
    assert sorted(build(paths["ray"], planned, engine="ray", num_cpus=2)) == [
        (0, 4),
        (1, 4),
        (2, 4),
        (3, 4),
        (4, 2),
    ]
    import ray

    assert not ray.is_initialized()  # the engine ended what it had started

    make_builder(paths["resumed"], planned)(3)
    make_builder(paths["resumed"], planned)(1)
    assert store.pending(paths["resumed"]) == [0, 2, 4]
    build(paths["resumed"], planned)

    die_while_writing(paths["killed"], planned, shard=2)
    assert store.pending(paths["killed"]) == [0, 1, 2, 3, 4]
    build(paths["killed"], planned)

    expected = objects(paths["local"])
    assert sum("/c/" in name for name in expected) == 13 * 5
    for path in paths.values():
        assert objects(path) == expected
        assert verify(path) == []


def die_while_writing(path: Path, planned: Plan, shard: int) -> None:
    """A process writes a shard and is gone before its last object: no marker, an unfinished file, a free lock."""
    code = f"""
import os, pickle, sys
sys.path[:0] = [{str(HERE)!r}, {str(HERE.parent)!r}]
import test_cache
from lic_dist.cache import markers
count = 0
def fsync(handle, original=os.fsync):
    global count
    count += 1
    if count == 17:
        os._exit(9)
    return original(handle)
os.fsync = fsync
test_cache.make_builder(*pickle.loads(bytes.fromhex({pickle.dumps((path, planned)).hex()!r})))({shard})
"""
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 9
    assert list((path / markers.FOLDER).rglob("*.lock")) and list(path.rglob("*.part"))


def test_pending_reads_markers_not_names(built):
    planned = make_plan()
    marker = built / markers.marker_key(planned.fingerprint, 0)
    text = marker.read_text()
    for broken in (
        "",
        text[:50],
        "[]",
        "{}",
        text.replace(planned.fingerprint, "0" * 64),
        text.replace(": 0", ": 5"),
    ):
        marker.write_text(broken)
        assert store.pending(built) == [0]
    marker.write_text(text)
    assert store.pending(built) == []
    (built / "latents/z/c/2/0/0/0").write_bytes(b"")
    assert store.pending(built) == [2]
    build(built, planned)
    assert verify(built) == []


def test_the_lock_excludes_a_second_writer(built):
    code = f"""
import sys
sys.path.insert(0, {str(HERE.parent)!r})
from lic_dist.cache import markers
from lic_dist.cache.place import place_of
with markers.owner(place_of({str(built)!r}), "f" * 64, 0):
    print("mine")
"""
    with markers.owner(Folder(built), "f" * 64, 0):
        other = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
        with pytest.raises(subprocess.TimeoutExpired):
            other.wait(1.0)
    assert other.communicate(timeout=60)[0] == b"mine\n"
    assert not list((built / markers.FOLDER).rglob("*.lock"))


def test_a_second_writer_leaves_a_finished_shard_alone(built):
    before = {file: (file.stat().st_mtime_ns, file.stat().st_ino) for file in built.rglob("*") if file.is_file()}
    make_builder(built, make_plan())(0)
    assert before == {
        file: (file.stat().st_mtime_ns, file.stat().st_ino) for file in built.rglob("*") if file.is_file()
    }
    store.forget(built, 0)
    make_builder(built, make_plan())(0)
    assert store.pending(built) == [] and verify(built) == []


def test_a_sweep_takes_what_the_killed_left_and_nothing_of_the_living(built):
    left = built / "_progress/abc/7.lock"
    left.parent.mkdir()
    left.touch()
    with Folder(built).lock("_progress/abc/8.lock"):
        Folder(built).sweep()
        assert not left.exists() and (built / "_progress/abc/8.lock").exists()
    assert not list(built.rglob("*.lock"))


def test_a_listing_survives_files_that_come_and_go(built):
    (built / "samples/crop_y/c/9").symlink_to(built / "nowhere")
    (built / "samples/crop_y/c/.0.host.12.0a0b0c0d.part").write_text("half")
    listed = Folder(built).listing("samples/crop_y")
    assert sorted(listed) == [f"samples/crop_y/{name}" for name in ("c/0", "c/1", "c/2", "zarr.json")]
    assert store.pending(built) == []


def test_groups_over_other_latents_are_not_done(built):
    planned, changed = make_plan(), synthetic(4, 0, group=None)
    changed["latents/y"][0] += 1
    store.forget(built, 0)
    store.write_shard(built, planned.fingerprint, 0, changed, planned.crops_of(0))
    assert store.pending(built) == [] and store.pending(built, "tcq8") == [0]
    group = f"_progress/{LatentCache.open(built).group_attributes('tcq8')['fingerprint'][:8]}"
    assert verify(built) == [Finding(0, group, "altered", "tcq8")]
    with pytest.raises(LicError, match="shard 0 of .*, group 'tcq8', is not written"):
        LatentCache.open(built).shard(0, ["quantized/tcq8/k"])


def forged(text: str) -> list[str]:
    marker = json.loads(text)
    name = next(iter(marker["objects"]))
    some = {key: value for key, value in marker["objects"].items() if key != name}
    changes = (
        {"objects": {}}, {"objects": some}, {"objects": {**some, name: 5}}, {"objects": 7}, {"samples": "x"},
        {"samples": 3}, {"seconds": ["a"]}, {"shard": -1}, {"objects": {**marker["objects"], "../x": {"bytes": 1}}},
    )  # fmt: skip
    return [json.dumps({**marker, **change}) for change in changes]


def test_forged_markers_count_as_not_written(built):
    file = built / markers.marker_key(make_plan().fingerprint, 1)
    text = file.read_text()
    for other in forged(text):
        file.write_text(other)
        assert store.pending(built) == [1]
        inspect(built)
        verify(built)
    file.write_text(text)
    (file.parent / "²3.json").write_text(text)
    (file.parent / "99999.json").write_text(text.replace('"shard": 1', '"shard": 99999'))
    assert store.pending(built) == [] and LatentCache.open(built).written() == [0, 1, 2]


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
        cache.samples  # noqa: B018
    if name != "source":
        with pytest.raises(LicError, match=f"samples/{name}"):
            cache.indices(held_out=False)


def test_load_takes_masks_and_refuses_what_are_no_numbers(built):
    cache = LatentCache.open(built)
    mask = cache.usable
    np.testing.assert_array_equal(
        cache.load(["latents/z"], mask)["latents/z"], cache.load(["latents/z"], np.flatnonzero(mask))["latents/z"]
    )
    with pytest.raises(IndexError):
        cache.load(["latents/z"], mask[:4])
    for wrong in ([1.9, 2.5], ["1"], np.array([0.0])):
        with pytest.raises(TypeError, match="samples have numbers"):
            cache.load(["latents/z"], wrong)
    with pytest.raises(TypeError, match="a sample has a number"):
        cache[1:3]


# verify


def damage(file: Path, how: str) -> None:
    data = file.read_bytes()
    if how == "remove":
        file.unlink()
    elif how == "cut":
        file.write_bytes(data[:-5])
    elif how == "empty":
        file.write_bytes(b"")
    elif how == "zero tail":
        file.write_bytes(data[: len(data) // 2] + bytes(len(data) - len(data) // 2))
    elif how == "zero bytes":
        file.write_bytes(bytes(len(data)))
    elif how == "flip":
        file.write_bytes(bytes([data[20] ^ 1]).join([data[:20], data[21:]]))


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
        store.forget(built, finding.shard, finding.group or None)
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
    store.forget(built, 1)
    key = make_plan().fingerprint
    (built / markers.marker_key(key, 2)).write_text("{")
    folder = f"_progress/{key[:8]}"
    assert verify(built) == [Finding(1, folder, "missing"), Finding(2, folder, "torn")]


# reading


def test_reading_gives_what_was_written(built):
    cache = pickle.loads(pickle.dumps(LatentCache.open(built)))
    assert len(cache) == cache.num_samples == 10 and cache.num_shards == 3
    expected = {
        name: np.concatenate([synthetic((4, 4, 2)[shard], shard)[name] for shard in range(3)])
        for name in ("pixels", "latents/z", "quantized/tcq8/k")
    }
    for array in expected.values():
        array[5] = 0
    loaded = cache.load(list(expected))
    for name, array in expected.items():
        np.testing.assert_array_equal(loaded[name], array)
        assert loaded[name].dtype == array.dtype
    picked = cache.load(["latents/z"], [9, 0, 5, 4, 0, -1])["latents/z"]
    np.testing.assert_array_equal(picked, expected["latents/z"][[9, 0, 5, 4, 0, 9]])
    np.testing.assert_array_equal(cache.load(["pixels"], slice(2, 9, 3))["pixels"], expected["pixels"][2:9:3])
    assert cache.load(["pixels"], [])["pixels"].shape == (0, 3, 32, 32)
    assert cache.shard(2)["pixels"].shape == (2, 3, 32, 32)
    np.testing.assert_array_equal(cache[-3]["quantized/tcq8/k"], expected["quantized/tcq8/k"][7])
    for bad in (lambda: cache[10], lambda: cache.load(["pixels"], [10]), lambda: cache.shard(3)):
        with pytest.raises(IndexError):
            bad()
    with pytest.raises(LicError, match="no array 'latents/w'"):
        cache.load(["latents/w"])


def test_samples_come_back_as_planned(built):
    cache = LatentCache.open(built)
    assert cache.samples["source"][3] == "ordner/ä3.png"
    assert cache.samples["digest"][3] == make_plan().crops[3].digest
    assert cache.samples["crop_x"].tolist() == list(range(0, 20, 2))
    assert cache.usable.tolist() == [n != 5 for n in range(10)]
    assert cache.indices(held_out=True).tolist() == [8, 9]
    assert cache.indices(held_out=False).tolist() == [0, 1, 2, 3, 4, 6, 7]
    assert cache.record_json("tcq8") == RECORD
    assert cache.identity == IDENTITY and cache.geometry == GEOMETRY
    with pytest.raises(LicError, match="it has: tcq8"):
        cache.record_json("sq")


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


def test_stores_without_y(tmp_path):
    planned = make_plan()
    store.create(tmp_path / "a.zarr", planned, store_y=False)
    arrays = synthetic(4, 0, group=None)
    del arrays["latents/y"]
    store.write_shard(tmp_path / "a.zarr", planned.fingerprint, 0, arrays, planned.crops_of(0))
    assert sorted(LatentCache.open(tmp_path / "a.zarr")[0]) == ["latents/z", "pixels", "samples/status"]


def test_inspect_counts(built):
    report = inspect(built)
    json.dumps(report)
    counts = {name: report[name] for name in ("num_samples", "usable", "held_out", "shards_written")}
    assert counts == {"num_samples": 10, "usable": 9, "held_out": 2, "shards_written": 3}
    assert {name: count for name, count in report["faults"].items() if count} == {"truncated": 1}
    group = report["groups"]["tcq8"]
    assert group["bits_per_pixel"] == 1.0 and group["distortion"] == 0.5 and group["shards_written"] == 3
    assert group["identity"] == {"group": "tcq8", "cache": make_plan().fingerprint, "record": "cd" * 32}
    assert report["identity"] == IDENTITY and report["fingerprint"] == make_plan().fingerprint
    assert report["arrays"]["pixels"]["raw_bytes"] == 10 * 3 * 32 * 32
    on_disk = sum(file.stat().st_size for file in built.rglob("*") if file.is_file())
    assert report["bytes"] == on_disk > report["arrays"]["pixels"]["bytes"] > 0.9 * 30720
    assert group["histogram_samples"] == sum(group["bits_per_pixel_histogram"]["counts"]) == 9
    text = "\n".join(describe(report))
    for shown in ("10 samples", "3 of 3 shards", "1 truncated", "1.0000 bpp", "median 0.5", "mbt2018-mean"):
        assert shown in text


def test_inspect_tells_pace_and_eta_of_the_running_build():
    steady = [100.0 + 10 * n for n in range(6)]
    told = pace(steady, now=154.0, left=320, shard=32)
    assert told == {"samples_per_second": 3.2, "eta_seconds": pytest.approx(96.0), "idle_seconds": 4.0}
    resumed = [0.0, 1.0, *(5000.0 + 10 * n for n in range(3))]  # the pause of the night is no work
    assert pace(resumed, 5020.0, 32, 32)["samples_per_second"] == 3.2
    assert pace(steady, 1000.0, 320, 32)["eta_seconds"] is None  # stopped
    assert pace(steady, 151.0, 0, 32)["eta_seconds"] is None  # done
    for few in ([], [3.0], [3.0, 3.0]):
        assert pace(few, 5.0, 32, 32)["samples_per_second"] is None


def test_a_plan_is_plain_data():
    assert pickle.loads(pickle.dumps(make_plan())) == make_plan()
    assert dataclasses.replace(make_plan(), shard=3).num_shards == plan.num_shards(10, 3) == 4
