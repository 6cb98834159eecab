"""Progress: the same bytes from every way of building, and what markers and locks say after a kill."""

from __future__ import annotations

import json
import pickle
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from lic_dist.cache import markers, store
from lic_dist.cache.folder import Folder
from lic_dist.cache.inspect import inspect
from lic_dist.cache.plan import Plan
from lic_dist.cache.reader import LatentCache
from lic_dist.cache.verify import Finding, verify
from lic_dist.errors import LicError
from tests.forked import python
from tests.stores import build, create, make_builder, make_plan, objects, synthetic

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_the_same_bytes_from_every_way_of_building(tmp_path):
    planned = make_plan(18)
    paths = {name: tmp_path / f"{name}.zarr" for name in ("local", "resumed", "killed")}
    for path in paths.values():
        create(path, planned)
    build(paths["local"], planned)

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
import os, pickle
from tests import stores
from lic_dist.cache import markers
count = 0
def fsync(handle, original=os.fsync):
    global count
    count += 1
    if count == 17:
        os._exit(9)
    return original(handle)
os.fsync = fsync
stores.make_builder(*pickle.loads(bytes.fromhex({pickle.dumps((path, planned)).hex()!r})))({shard})
"""
    assert python(code).returncode == 9
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


@pytest.mark.slow
def test_the_lock_excludes_a_second_writer(built):
    code = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from lic_dist.cache import markers
from lic_dist.cache.storages import open_storage
with markers.shard_lock(open_storage({str(built)!r}), "f" * 64, 0):
    print("mine", len(list(open_storage({str(built)!r}).root.rglob("*.lock"))))
"""
    with markers.shard_lock(Folder(built), "f" * 64, 0):
        other = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
        with pytest.raises(subprocess.TimeoutExpired):
            other.wait(1.0)
    assert other.communicate(timeout=60)[0] == b"mine 1\n"  # a third would wait for it
    assert not list((built / markers.FOLDER).rglob("*.lock"))


def test_a_second_writer_leaves_a_finished_shard_alone(built):
    before = {file: (file.stat().st_mtime_ns, file.stat().st_ino) for file in built.rglob("*") if file.is_file()}
    make_builder(built, make_plan())(0)
    assert before == {
        file: (file.stat().st_mtime_ns, file.stat().st_ino) for file in built.rglob("*") if file.is_file()
    }
    store.invalidate_shard(built, 0)
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


def test_a_sweep_of_an_append_passes_over_the_shards_before_it(built):
    dead = subprocess.Popen(["true"])
    dead.wait()
    name = f".0.{socket.gethostname()}.{dead.pid}.0a0b0c0d.part"
    old, new = (built / f"pixels/c/{shard}/0/0/{name}" for shard in (1, 2))
    for file in (old, new):
        file.write_text("half")
    Folder(built).sweep(since=2)
    assert old.exists() and not new.exists()
    Folder(built).sweep()
    assert not old.exists()


def test_a_listing_survives_files_that_come_and_go(built):
    (built / "samples/crop_y/c/9").symlink_to(built / "nowhere")
    (built / "samples/crop_y/c/.0.host.12.0a0b0c0d.part").write_text("half")
    listed = Folder(built).listing("samples/crop_y")
    assert sorted(listed) == [f"samples/crop_y/{name}" for name in ("c/0", "c/1", "c/2", "zarr.json")]
    assert store.pending(built) == []


def test_groups_over_other_latents_are_not_done(built):
    planned, changed = make_plan(), synthetic(4, 0, group=None)
    changed["latents/y"][0] += 1
    store.invalidate_shard(built, 0)
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


@pytest.mark.slow
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
