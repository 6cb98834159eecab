"""The cache: its format, who may write into it, and what a shard must hold."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import zarr

from lic_dist.cache import layout, markers, store
from lic_dist.cache.folder import Folder
from lic_dist.cache.plan import Plan
from lic_dist.cache.reader import LatentCache
from lic_dist.cache.verify import verify
from lic_dist.errors import LicError
from tests.stores import (
    RECORD,
    build,
    create,
    make_plan,
    objects,
    synthetic,
)


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


def test_stores_without_y(tmp_path):
    planned = make_plan()
    store.create(tmp_path / "a.zarr", planned, store_y=False)
    arrays = synthetic(4, 0, group=None)
    del arrays["latents/y"]
    store.write_shard(tmp_path / "a.zarr", planned.fingerprint, 0, arrays, planned.crops_of(0))
    assert sorted(LatentCache.open(tmp_path / "a.zarr")[0]) == ["latents/z", "pixels", "samples/status"]
