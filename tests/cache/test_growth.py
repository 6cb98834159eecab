"""A store that grows: old bytes untouched, whatever is killed when; snapshots read what they read before."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import zarr

from lic_dist.cache import chain, growth, layout, store
from lic_dist.cache.folder import Folder
from lic_dist.cache.inspect import describe, inspect
from lic_dist.cache.reader import LatentCache
from lic_dist.cache.storage import Storage
from lic_dist.cache.verify import Finding, verify
from lic_dist.data.manifest import Manifest
from lic_dist.data.photo import Crop, Photo
from lic_dist.errors import LicError, UsageError
from tests.stores import create, damage, make_plan, objects, synthetic

LONG = "ein langer Ordner/" * 3  # paths of three times the bytes of those of the plan


def crops(first: int, count: int, folder: str = "ordner/", held_out: int = 1) -> tuple[Crop, ...]:
    numbers = range(first, first + count)
    digests = [hashlib.sha256(b"%d" % n).hexdigest() for n in numbers]
    return tuple(
        Crop(f"{folder}ä{n}.png", digest, n, n, False, n >= first + count - held_out)
        for n, digest in zip(numbers, digests, strict=True)
    )


def photos(samples: Sequence[Crop]) -> growth.Photos:
    manifest = Manifest.of([Photo(one.source, one.digest, 99, 99, 9, 9, "") for one in samples])
    longest = max((len(one.source.encode()) for one in samples), default=0)
    held_out = sum(one.held_out for one in samples)
    return growth.Photos(manifest.to_bytes(), manifest.digest, len(samples), held_out, longest)


ADDED = [crops(10, 5), crops(15, 3, LONG)]
GROWN = replace(make_plan(), later=tuple(ADDED))


def grow(storage: Storage, added: Sequence[Sequence[Crop]] = tuple(ADDED), masked: Sequence[int] = ()) -> None:
    """Append each of `added`, or what is left of it; the first also masks."""
    header = growth.adopt(storage)
    if header.snapshot == 0:
        growth.upgrade(storage, photos(make_plan().crops))
    for number, samples in enumerate(added, start=1):
        if header.snapshot < number:
            mask = np.array(masked if number == 1 else (), np.int64)
            header = growth.declare(storage, photos(samples), mask)
        if header.snapshot == number:
            store.create_group(storage, "tcq8", '{"name": "tcq"}', {"record": "cd" * 32})
            plan = replace(make_plan(), later=tuple(added[:number]))
            for shard in sorted({*store.pending(storage), *store.pending(storage, "tcq8")}):
                count = len(plan.crops_of(shard))
                store.write_shard(storage, plan.fingerprint, shard, synthetic(count, shard), plan.crops_of(shard))
            header = growth.finish(storage)


@pytest.fixture()
def grown(built: Path) -> Path:
    grow(Folder(built))
    return built


def old_files(path: Path) -> dict[Path, tuple[int, bytes]]:
    """All objects of data and markers, with their times."""
    files = [file for file in path.rglob("*") if file.is_file() and ("c" in file.parts or "_progress" in file.parts)]
    return {file: (file.stat().st_mtime_ns, file.read_bytes()) for file in files}


@pytest.mark.slow
def test_growing_touches_nothing_old_and_gives_rows_like_a_store_of_the_added_alone(
    built: Path, tmp_path: Path
) -> None:
    before, fingerprint = old_files(built), LatentCache.open(built).fingerprint
    grow(Folder(built))
    after = old_files(built)
    assert before.items() <= after.items() and verify(built) == []
    cache = LatentCache.open(built)
    assert (cache.num_samples, len(cache), cache.num_shards, cache.fingerprint) == (18, 23, 6, fingerprint)
    assert cache.samples["status"].tolist() == [0] * 5 + [3] + [0] * 4 + [255] * 2 + [0] * 5 + [255] * 3 + [0] * 3
    assert cache.indices(held_out=False).tolist() == [*range(5), 6, 7, 12, 13, 14, 15, 20, 21]
    assert cache.indices(held_out=True).tolist() == [8, 9, 16, 22]
    planned = [*make_plan().crops, *ADDED[0], *ADDED[1]]
    there = [row for row, status in enumerate(cache.samples["status"]) if status != 255]
    assert cache.samples["source"][there].tolist() == [one.source for one in planned]
    assert cache.samples["digest"][there].tolist() == [one.digest for one in planned]

    alone = tmp_path / "alone.zarr"
    store.create(alone, replace(make_plan(), crops=ADDED[0]))
    store.create_group(alone, "tcq8", '{"name": "tcq"}', {"record": "cd" * 32})
    for shard in (0, 1):
        count = (4, 1)[shard]
        store.write_shard(
            alone, make_plan().fingerprint, shard, synthetic(count, 3 + shard), ADDED[0][4 * shard : 4 * shard + 4]
        )
    for name in LatentCache.open(alone).names:
        rows = LatentCache.open(alone).load([name])[name]
        assert np.array_equal(cache.load([name], slice(12, 17))[name], rows), name
        here, of_alone = (sorted((path / name / "c").rglob("*")) for path in (built, alone))
        assert [file.read_bytes() for file in of_alone if file.is_file()] == [
            file.read_bytes()
            for file in here
            if file.is_file() and file.relative_to(built / name / "c").parts[0] in "34"
        ]


def test_plain_zarr_reads_a_grown_store_by_its_status(grown: Path) -> None:
    root = zarr.open_group(str(grown), mode="r")
    assert root["pixels"].shape == (24, 3, 32, 32) and root["quantized/tcq8/k"].shape[0] == 24
    good = np.flatnonzero(root["samples/status"][:] == 0)
    assert good.tolist() == np.flatnonzero(LatentCache.open(grown).usable).tolist()
    assert bytes(root["samples/source"][20]).rstrip(b"\0").decode() == f"{LONG}ä15.png"
    assert bytes(root["samples/source"][1]).rstrip(b"\0").decode() == "ordner/ä1.png"
    assert root.attrs["format"] == 2 and root.attrs["num_samples"] == 10


@pytest.mark.slow
def test_snapshots_read_what_they_read_before(built: Path) -> None:
    before = LatentCache.open(built)
    names, columns, part = before.names, before.samples, before.indices(held_out=False)
    rows = before.load(names)
    grow(Folder(built), masked=[2, 9])
    for cache in (before, LatentCache.open(built, snapshot=0)):
        assert len(cache) == 10 and cache.header.digest == cache.fingerprint
        assert all(np.array_equal(cache.load(names)[name], rows[name]) for name in names)
        assert all(np.array_equal(cache.samples[name], columns[name]) for name in columns)
        assert cache.indices(held_out=False).tolist() == part.tolist()
        with pytest.raises(IndexError):
            cache.shard(3)
    middle = LatentCache.open(built, snapshot=1)
    assert len(middle) == 17 and middle.masked.tolist() == [2, 9]
    assert middle.indices(held_out=False).tolist() == [0, 1, 3, 4, 6, 7, 12, 13, 14, 15]
    assert middle.indices(held_out=True).tolist() == [8, 16]
    assert middle.samples["status"][[2, 9, 5, 10]].tolist() == [254, 254, 3, 255]
    assert middle.load(["samples/status"], [2])["samples/status"].tolist() == [0]  # the bytes are what they were


def test_names_are_for_ever_and_survive_growing(built: Path) -> None:
    storage = Folder(built)
    assert growth.name_snapshot(storage, "first") == 0  # a store of format 1 takes names as it is
    assert json.loads((built / "zarr.json").read_text())["attributes"]["format"] == 1
    grow(storage)
    assert growth.name_snapshot(storage, "release-1") == 2 and growth.name_snapshot(storage, "first", 0) == 0
    assert growth.snapshot_names(storage) == {"first": 0, "release-1": 2}
    assert len(LatentCache.open(built, snapshot="first")) == 10 and len(LatentCache.open(built, snapshot="1")) == 17
    with pytest.raises(LicError, match="snapshot 0 of .* is 'first' already"):
        growth.name_snapshot(storage, "first")
    with pytest.raises(UsageError, match="'3' cannot name a snapshot"):
        growth.name_snapshot(storage, "3")
    for absent in (3, -1, "second"):
        with pytest.raises(LicError, match="has no snapshot") as caught:
            LatentCache.open(built, snapshot=absent)
        assert "0 to 2, first, release-1" in (caught.value.hint or "")


class Killed(BaseException):
    """The process ends."""


class Dying(Folder):
    """A folder whose process is killed before the n-th write."""

    left: ClassVar[int] = 0
    keys: ClassVar[list[str]] = []

    def spend(self, key: str) -> None:
        Dying.left -= 1
        Dying.keys.append(key)
        if Dying.left < 0:
            raise Killed

    def put(self, key: str, data: bytes) -> None:
        self.spend(key)
        super().put(key, data)

    def delete(self, key: str) -> None:
        self.spend(key)
        super().delete(key)

    def absolute(self) -> Dying:
        return self


@pytest.mark.slow
def test_killed_before_any_write_it_is_valid_and_goes_on_to_the_same_bytes(built: Path, tmp_path: Path) -> None:
    def grow_masking(storage: Storage) -> None:
        grow(storage, masked=[2])

    def dying(path: Path, after: int) -> Dying:
        Dying.left, Dying.keys = after, []
        return Dying(path)

    shutil.copytree(built, whole := tmp_path / "whole.zarr")
    grow_masking(dying(whole, 10**6))
    keys = list(Dying.keys)
    roots = json.loads((whole / "zarr.json").read_text())["attributes"]["chain"]
    expected = {name: digest for name, digest in objects(whole).items() if name.split("/")[-1] != "zarr.json"}
    expected = {name: digest for name, digest in expected.items() if not name.startswith("_chain/")}
    chosen = [n for n, key in enumerate(keys) if key.startswith(("_chain/", "zarr")) or n % 11 == 0]  # most are shards'
    assert len(chosen) > 20 and {"_chain/1.json", "_chain/root.json", "zarr.json", "pixels/zarr.json"} <= set(keys)
    names, states = ("latents/z", "quantized/tcq8/k", "samples/source"), set()
    for after in chosen:
        shutil.copytree(built, path := tmp_path / f"{after}.zarr")
        before, old = LatentCache.open(path), old_files(path)
        rows = before.load(names)
        with pytest.raises(Killed):
            grow_masking(dying(path, after))
        newest = LatentCache.open(path)
        states.add(newest.header.snapshot)
        assert newest.header.digest == roots[newest.header.snapshot]["digest"]
        assert newest.usable.sum() == [9, 13, 16][newest.header.snapshot]
        for cache in (before, newest):
            assert all(np.array_equal(cache.load(names, slice(0, 10))[name][:, :14], rows[name]) for name in names)
        assert {one.what for one in verify(path)} <= {"missing"}
        grow_masking(Folder(path))
        assert verify(path) == [] and old.items() <= old_files(path).items()
        root = json.loads((path / "zarr.json").read_text())["attributes"]["chain"]
        assert [{**one, "time": ""} for one in root] == [{**one, "time": ""} for one in roots]
        assert objects(path).items() >= expected.items()
        shutil.rmtree(path)
    assert states == {0, 1}


def test_an_unfinished_append_is_named_and_others_are_refused(built: Path) -> None:
    storage = Folder(built)
    growth.upgrade(storage, photos(make_plan().crops))
    growth.declare(storage, photos(ADDED[0]), np.arange(0))
    with pytest.raises(LicError, match=r"append 1 of .* is unfinished \(5 samples, 0 masked, begun 2"):
        growth.declare(storage, photos(ADDED[1]), np.arange(0))
    with pytest.raises(LicError, match="has 2 unfinished shards"):
        growth.finish(storage)
    assert len(LatentCache.open(built)) == 10
    assert any("unfinished: `lic-dist cache append`" in line for line in describe(inspect(built)))
    report = inspect(built)
    assert (report["num_shards"], report["shards_written"], report["unwritten"]) == (5, 3, 5)


def test_a_claim_that_is_not_in_the_root_yet_excludes_others(built: Path) -> None:
    storage = Folder(built)
    growth.upgrade(storage, photos(make_plan().crops))
    root = (built / "zarr.json").read_bytes()
    growth.declare(storage, photos(ADDED[0]), np.arange(0))
    (built / "zarr.json").write_bytes(root)
    with pytest.raises(LicError, match="append 1 of .* is unfinished"):
        growth.declare(storage, photos(ADDED[1]), np.arange(0))
    assert growth.adopt(storage).snapshot == 1


def test_a_group_that_has_not_followed_is_named_and_not_read(grown: Path) -> None:
    cache = LatentCache.open(grown, snapshot=1)
    arrays = {name: rows for name, rows in synthetic(4, 0, group="sq").items() if name.startswith("quantized")}
    store.create_group(grown, "sq", "{}", {})
    for shard in range(3):
        count = cache.header.count(shard)
        store.write_shard(grown, cache.fingerprint, shard, {name: rows[:count] for name, rows in arrays.items()})
    assert LatentCache.open(grown, snapshot=0).written("sq") == [0, 1, 2]
    assert store.pending(grown, "sq") == [3, 4, 5] and store.pending(grown, "sq", cache.header) == [3, 4]
    with pytest.raises(LicError, match=r"shard 3 of .* group 'sq', is not written"):
        cache.load(["quantized/sq/k"])
    assert "group sq: 3 of 6 shards" in "\n".join(describe(inspect(grown)))
    assert {(one.group, one.shard, one.what) for one in verify(grown)} == {("sq", n, "missing") for n in (3, 4, 5)}


def test_the_stream_serves_every_usable_sample_once_an_epoch(grown: Path) -> None:
    cache = LatentCache.open(grown)
    part = cache.indices(held_out=False)
    whole = cache.load(["latents/z"])["latents/z"]
    seen: list[int] = []
    for batch in cache.stream(["latents/z"], batch=1, streams=1):
        seen += batch["sample"].tolist()
        assert np.array_equal(batch["latents/z"].numpy(), whole[batch["sample"].numpy()])
        if len(seen) == len(part):
            break
    assert sorted(seen) == part.tolist()
    samples = cache.dataset(["latents/z"])
    assert [int(samples[n]["sample"]) for n in range(len(samples))] == part.tolist()
    assert all(np.array_equal(samples[n]["latents/z"].numpy(), whole[part[n]]) for n in range(len(samples)))


def test_xarray_has_a_row_for_every_row(grown: Path) -> None:
    pytest.importorskip("xarray")
    found = LatentCache.open(grown).to_xarray()
    assert found.sizes["sample"] == 23 and found["status"].values[10] == 255
    assert np.array_equal(found["latents/z"].values, LatentCache.open(grown).load(["latents/z"])["latents/z"])


@pytest.mark.parametrize("which", ["manifest", "mask"])
@pytest.mark.parametrize("how", ["remove", "cut"])
def test_damaged_manifests_and_masks_are_named(built: Path, which: str, how: str) -> None:
    grow(Folder(built), masked=[3])
    last = LatentCache.open(built).header.chain[1]
    key = chain.manifest_key(last.manifest_sha256) if which == "manifest" else chain.mask_key(last.mask_sha256)
    damage(built / key, how)
    assert verify(built) == [Finding(-1, key, "missing" if how == "remove" else "altered")]
    if which == "mask":
        with pytest.raises(LicError, match="mask.json is lost or altered"):
            LatentCache.open(built).indices(held_out=False)
        assert len(LatentCache.open(built, snapshot=0).indices(held_out=False)) == 7


def test_damage_is_named_by_shard_in_every_instalment(grown: Path) -> None:
    damage(grown / "pixels/c/4/0/0/0", "flip")
    damage(grown / "samples/source/c/5/1", "remove")
    damage(grown / "quantized/tcq8/k/c/3/0/0/0", "cut")
    found = {(one.group, one.shard, one.array, one.what) for one in verify(grown)}
    assert found == {
        ("", 4, "pixels", "altered"),
        ("", 5, "samples/source", "missing"),
        ("tcq8", 3, "quantized/tcq8/k", "torn"),
    }
    with pytest.raises(LicError, match="shard 4 .* pixels"):
        LatentCache.open(grown).load(["pixels"])


@pytest.mark.parametrize(
    "change",
    [
        {"chain": []}, {"chain": None}, {"chain": [{}]}, {"chain": {"0": 1}}, {"format": 3},
        {1: {"first_shard": 2}}, {1: {"num_samples": -1}}, {1: {"manifest_sha256": "0" * 64}}, {0: {"complete": False}},
        {1: {"num_held_out": 6}}, {0: {"digest": "ab"}}, {1: {"num_samples": 2**50}}, {1: {"complete": False}},
    ],
)  # fmt: skip
def test_a_hostile_chain_is_one_line(grown: Path, change: dict[Any, Any]) -> None:
    document = json.loads((grown / "zarr.json").read_text())
    for key, value in change.items():
        if isinstance(key, int):
            document["attributes"]["chain"][key] |= value
        else:
            document["attributes"][key] = value
    (grown / "zarr.json").write_text(json.dumps(document))
    for use in (LatentCache.open, verify, inspect):
        with pytest.raises(LicError) as caught:
            use(grown)
        assert "\n" not in caught.value.message


def test_a_lost_root_comes_back_with_its_chain(grown: Path) -> None:
    root = (grown / "zarr.json").read_bytes()
    for spoil in (lambda file: file.unlink(), lambda file: file.write_text("{")):
        spoil(grown / "zarr.json")
        growth.restore_root(Folder(grown))
        assert (grown / "zarr.json").read_bytes() == root and verify(grown) == []


def test_planners_of_the_first_plan_do_not_shrink_a_grown_store(grown: Path) -> None:
    before = objects(grown)
    create(grown, make_plan())
    assert objects(grown) == before
    header = layout.read_header(Folder(grown)).at(0)
    store.put_documents(Folder(grown), layout.arrays_of(header), header)  # one that has read the root before
    assert objects(grown) == before


def test_a_store_of_format_1_is_upgraded_in_place_and_nothing_is_copied(built: Path) -> None:
    before = {file: (file.stat().st_mtime_ns, file.read_bytes()) for file in built.rglob("*") if file.is_file()}
    cache = LatentCache.open(built)
    growth.upgrade(Folder(built), photos(make_plan().crops))
    changed = [file for file, then in before.items() if (file.stat().st_mtime_ns, file.read_bytes()) != then]
    assert changed == [built / "zarr.json"]
    again = LatentCache.open(built)
    assert (again.fingerprint, again.header.digest, len(again)) == (cache.fingerprint, cache.fingerprint, 10)
    assert verify(built) == []
    create(built, make_plan())  # the same job goes on with it
    assert {file.name for file in built.glob("_chain/*")} == {
        "root.json",
        Path(next(built.glob("_chain/*.parquet"))).name,
    }


def test_the_root_of_a_store_that_never_grew_is_that_of_0_1_0(built: Path) -> None:
    golden = {
        "format": 1, "num_samples": 10, "num_held_out": 2, "shard": 4, "batch": 2,
        "geometry": {"crop": 32, "y_channels": 6, "y_size": 2, "z_channels": 4, "z_size": 1},
        "store_y": True, "source_bytes": 14,
        "identity": {"format": 1, "model": {"architecture": "mbt2018-mean", "encoder_sha256": "ab" * 32}, "crop": 32},
        "provenance": {}, "fingerprint": "86c74658b6f7ec7f901e6497493ae89494a69f205dda43d5d53e145d19d3b606",
    }  # fmt: skip
    found = json.loads((built / "zarr.json").read_text())["attributes"]
    assert found == golden and list(found) == list(golden) and not (built / "_chain").exists()
    assert LatentCache.open(built).header.chain == (
        chain.Instalment(0, 10, 2, 14, "", 0, "", golden["fingerprint"], "", True),
    )
