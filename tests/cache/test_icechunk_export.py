"""Snapshots in an Icechunk repository: the store's arrays, one commit each, and refusals that leave it as it was."""

from __future__ import annotations

import json
import sys
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

from lic_dist.app.commands import exports as commands
from lic_dist.cache import growth, store
from lic_dist.cache.folder import Folder
from lic_dist.cache.icechunk_export import export
from lic_dist.cache.reader import LatentCache
from lic_dist.errors import LicError, UsageError
from tests.cache.test_growth import grow
from tests.stores import create, make_plan

icechunk = pytest.importorskip("icechunk")


@pytest.fixture()
def grown(built: Path) -> Path:
    """A store of three snapshots, of which the second masks two samples of the first."""
    grow(Folder(built), masked=[2, 8])
    growth.name_snapshot(Folder(built), "whole")
    return built


def opened(path: Path, **at: str) -> Any:
    repository = icechunk.Repository.open(icechunk.local_filesystem_storage(str(path)))
    return zarr.open_group(repository.readonly_session(**(at or {"branch": "main"})).store, mode="r")


def commits(path: Path) -> list[str]:
    repository = icechunk.Repository.open(icechunk.local_filesystem_storage(str(path)))
    return [one.message for one in repository.ancestry(branch="main")]


def require_same(cache: LatentCache, root: Any) -> None:
    for name in (*cache.names, "samples/source", "samples/crop_y", "samples/held_out"):
        if name != "samples/status":
            stored = zarr.open_array(cache.storage.zarr_store(), path=name, mode="r")
            length = cache.num_shards * cache.shard_length
            assert root[name].shape[0] == length
            assert np.array_equal(root[name][:], stored[:length, ...] if name != "samples/source" else
                                  stored[:length, : root[name].shape[1]]), name  # fmt: skip
    assert root["samples/status"][: len(cache)].tolist() == cache.samples["status"].tolist()


@pytest.mark.slow
def test_each_snapshot_is_a_commit_that_reads_as_it_does(grown: Path, tmp_path: Path) -> None:
    path = tmp_path / "repository"
    first = export(Folder(grown), path, 0)
    assert (first.snapshot, first.groups, first.written) == (0, ("tcq8",), first.objects)
    require_same(LatentCache.open(grown, snapshot=0), opened(path))
    again = export(Folder(grown), path, 0)
    assert (again.written, again.commit, len(commits(path))) == (0, first.commit, 2)  # Icechunk's own first one
    newest = export(Folder(grown), path)
    cache = LatentCache.open(grown)
    assert newest.snapshot == 2 and commits(path)[0].startswith("snapshot 2 of") and len(commits(path)) == 3
    require_same(cache, root := opened(path))
    assert newest.written == newest.objects - first.objects + 2  # new shards; the status of two that are masked in part
    assert root["samples/status"][[2, 8]].tolist() == [254, 254]
    require_same(LatentCache.open(grown, snapshot=0), opened(path, tag="snapshot-0"))
    assert opened(path, tag="whole").attrs["chain"][-1]["digest"] == cache.header.digest
    assert root["quantized/tcq8"].attrs["record"] == json.loads(cache.record_json("tcq8"))
    with pytest.raises(LicError, match=r"holds another store, or a later snapshot \(snapshot 2"):
        export(Folder(grown), path, 1)


@pytest.mark.slow
def test_a_killed_export_has_committed_nothing_and_goes_on(
    grown: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, reads = tmp_path / "repository", iter(range(100))
    get = Folder.get

    def dying(self: Folder, key: str) -> bytes:
        if "/c/" in key and next(reads) == 20:
            raise RuntimeError("killed")
        return get(self, key)

    with monkeypatch.context() as patch:
        patch.setattr(Folder, "get", dying)
        with pytest.raises(RuntimeError, match="killed"):
            export(Folder(grown), path)
    assert len(commits(path)) == 1
    with pytest.raises(zarr.errors.GroupNotFoundError):
        opened(path)
    export(Folder(grown), path)
    require_same(LatentCache.open(grown), opened(path))


@pytest.mark.slow
def test_what_cannot_be_exported_is_said(grown: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "x").touch()
    with pytest.raises(LicError, match="no Icechunk repository"):
        export(Folder(grown), tmp_path / "taken")
    other = tmp_path / "other.zarr"
    create(other, make_plan(seed=1))
    with pytest.raises(LicError, match="3 shards of .* are not written at snapshot 0"):
        export(Folder(other), tmp_path / "repository")
    export(Folder(grown), tmp_path / "repository", 0)
    store.invalidate_shard(grown, 4, "tcq8")
    assert export(Folder(grown), tmp_path / "repository").groups == ()
    monkeypatch.setitem(sys.modules, "icechunk", None)
    with pytest.raises(UsageError, match="this needs the package icechunk"):
        export(Folder(grown), tmp_path / "repository")


def test_a_commit_of_somebody_else_meanwhile_is_kept(
    built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "repository"

    def meanwhile(*_: object) -> None:
        repository = icechunk.Repository.open(icechunk.local_filesystem_storage(str(path)))
        session = repository.writable_session("main")
        zarr.create_group(session.store)
        session.commit("theirs")

    monkeypatch.setattr("lic_dist.cache.icechunk_export._require_earlier", meanwhile)
    with pytest.raises(LicError, match="another job has committed to"):
        export(Folder(built), path)
    assert commits(path)[0] == "theirs"


def test_the_command_says_what_it_wrote(built: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    commands.export(str(built), icechunk=str(tmp_path / "repository"), out=tmp_path / "a.json")
    told = json.loads((tmp_path / "a.json").read_text())
    assert f"snapshot 0, commit {told['commit']}, groups: tcq8; 39 of 39 objects" in capsys.readouterr().out


@pytest.mark.slow
def test_a_repository_in_a_bucket(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = pytest.importorskip("moto.server").ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    url = f"http://127.0.0.1:{server.get_host_and_port()[1]}"
    for name, value in {"AWS_ENDPOINT_URL": url, "AWS_REGION": "us-east-1", "AWS_ACCESS_KEY_ID": "a",
                        "AWS_SECRET_ACCESS_KEY": "b"}.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    try:
        with pytest.raises(LicError, match="no repository at s3://bucket/x/y"):
            export(Folder(built), "s3://bucket/x/y")
        urllib.request.urlopen(urllib.request.Request(f"{url}/bucket", method="PUT")).close()
        done = export(Folder(built), "s3://bucket/x/y")
        assert done.written == done.objects and export(Folder(built), "s3://bucket/x/y").commit == done.commit
        how = {"region": "us-east-1", "endpoint_url": url, "allow_http": True, "force_path_style": True}
        where = icechunk.s3_storage(bucket="bucket", prefix="x/y", from_env=True, **how)
        session = icechunk.Repository.open(where).readonly_session(branch="main")
        require_same(LatentCache.open(built), zarr.open_group(session.store, mode="r"))
        read, cache = LatentCache.open("icechunk://s3://bucket/x/y"), LatentCache.open(built)
        assert np.array_equal(read.load(["pixels"])["pixels"], cache.load(["pixels"])["pixels"])
    finally:
        server.stop()
