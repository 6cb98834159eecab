"""The order in which a store is written, by what the kernel is asked for: a kill leaves nothing half done."""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path

import pytest

from lic_dist.cache import markers, store
from tests.stores import RECORD, create, make_builder, make_plan


@pytest.fixture()
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """What is asked of the kernel from here on: ("sync", file), ("rename", file), ("remove", file), ("lock", file)."""
    calls: list[tuple[str, str]] = []
    sync, rename, remove, lock = os.fsync, os.replace, os.unlink, fcntl.flock

    def synced(handle: int) -> None:
        calls.append(("sync", os.readlink(f"/proc/self/fd/{handle}")))
        sync(handle)

    def renamed(old: Path, new: Path, **options: int) -> None:
        calls.append(("rename", str(new)))
        assert calls[-2] == ("sync", str(old)), "a file takes its name before it is on disk"
        rename(old, new, **options)

    def removed(path: Path, **options: int) -> None:
        if os.path.exists(path):
            calls.append(("remove", str(path)))
        remove(path, **options)

    def locked(handle: int, how: int) -> None:
        calls.append(("lock", os.readlink(f"/proc/self/fd/{handle}")))
        lock(handle, how)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", renamed)
    monkeypatch.setattr(os, "unlink", removed)
    monkeypatch.setattr(fcntl, "flock", locked)
    return calls


def names(folder: Path, calls: list[tuple[str, str]], what: str) -> list[str]:
    return [Path(file).relative_to(folder).as_posix() for call, file in calls if call == what]


def test_a_shard_loses_its_marker_first_and_gets_it_last_under_its_lock(
    built: Path, asked: list[tuple[str, str]]
) -> None:
    planned = make_plan()
    marker = markers.marker_key(planned.fingerprint, 0)
    recorded = json.loads((built / marker).read_text())
    (built / "pixels/c/0/0/0/0").write_bytes(b"torn")
    asked.clear()
    make_builder(built, planned)(0)
    base = asked[: next(i for i, one in enumerate(asked) if i and one[0] == "lock")]
    lock = marker.replace(".json", ".lock")
    assert base[0] == ("lock", str(built / lock)) and base[1] == ("remove", str(built / marker))
    assert base[-1] == ("remove", str(built / lock))
    written = names(built, base, "rename")
    assert written[-1] == marker and sorted(written[:-1]) == sorted(recorded["objects"])
    for file in written:  # its folder too is brought to disk, before the next file
        at = base.index(("rename", str(built / file)))
        assert base[at + 1] == ("sync", str((built / file).parent))
    assert store.pending(built) == []


def test_a_group_is_there_when_its_record_and_arrays_are(tmp_path: Path, asked: list[tuple[str, str]]) -> None:
    path = tmp_path / "a.zarr"
    create(path, make_plan())
    asked.clear()
    store.create_group(path, "sq", RECORD, {"record": "ef" * 32})
    written = names(path / "quantized/sq", asked, "rename")
    assert written[0] == "record.json" and written[-1] == "zarr.json"
    assert sorted(written[1:-1]) == ["bits/zarr.json", "distortion/zarr.json", "k/zarr.json"]
