"""A store read from the Icechunk repository that it was exported to: the same samples and streams; never written."""

from __future__ import annotations

import json
import pickle
import shutil
import sys
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from lic_dist.cache import growth, store
from lic_dist.cache.folder import Folder
from lic_dist.cache.icechunk_export import export
from lic_dist.cache.inspect import inspect
from lic_dist.cache.mixture import Mixture
from lic_dist.cache.reader import LatentCache
from lic_dist.cache.repository import Repository
from lic_dist.cache.storages import open_storage
from lic_dist.errors import LicError, UsageError
from tests.cache.test_growth import grow
from tests.stores import make_plan

pytest.importorskip("icechunk")
ARRAYS = ("pixels", "latents/y", "latents/z", "quantized/tcq8/k")


@pytest.fixture()
def exported(built: Path, tmp_path: Path) -> tuple[Path, str]:
    """A store of three snapshots, of which the last two mask two samples, and a repository of the first and last."""
    grow(Folder(built), masked=[2, 8])
    growth.name_snapshot(Folder(built), "whole")
    for snapshot in (0, 2):
        export(Folder(built), tmp_path / "repository", snapshot)
    return built, f"icechunk://{tmp_path / 'repository'}"


def batches(cache: LatentCache | Mixture) -> list[dict[str, bytes]]:
    stream = cache.stream(ARRAYS, batch=2, seed=3, step=1)
    return [{name: rows.numpy().tobytes() for name, rows in batch.items()} for batch in islice(stream, 12)]


@pytest.mark.slow
@pytest.mark.parametrize("snapshot", [0, "whole", None])
def test_it_reads_as_the_store_does(exported: tuple[Path, str], snapshot: int | str | None) -> None:
    path, url = exported
    cache, read = (LatentCache.open(where, snapshot=snapshot) for where in (path, url))
    assert (read.header, read.identity, read.groups) == (cache.header, cache.identity, cache.groups)
    assert json.loads(read.record_json("tcq8")) == json.loads(cache.record_json("tcq8"))
    assert read.written() == cache.written() == read.written("tcq8") and read.names == cache.names
    for name, column in cache.samples.items():
        assert np.array_equal(read.samples[name], column), name
    for part in (False, True):
        assert np.array_equal(read.indices(part), cache.indices(part))
    assert np.array_equal(read.masked, cache.masked) and (snapshot == 0 or len(cache.masked) == 2)
    assert batches(read) == batches(cache) == batches(pickle.loads(pickle.dumps(read)))
    assert batches(Mixture([read, read.at(0)], [2, 1])) == batches(Mixture([cache, cache.at(0)], [2, 1]))


@pytest.mark.slow
def test_an_open_one_stays_at_its_commit(built: Path, tmp_path: Path) -> None:
    export(Folder(built), tmp_path / "repository")
    read = LatentCache.open(f"icechunk://{tmp_path / 'repository'}")
    before = batches(read)
    grow(Folder(built), masked=[2, 8])
    export(Folder(built), tmp_path / "repository")
    assert batches(pickle.loads(pickle.dumps(read))) == before
    assert read.at().header.snapshot == 2 and len(read.masked) == 0 and len(read.at().masked) == 2


def test_a_lost_chunk_is_an_error_and_never_zeros(exported: tuple[Path, str]) -> None:
    read = LatentCache.open(exported[1])
    shutil.rmtree(Path(exported[1].removeprefix("icechunk://")) / "chunks")
    with pytest.raises(LicError, match="shard 0 of icechunk://.*, array pixels, does not decode"):
        read.shard(0, ["pixels"])


@pytest.mark.slow
def test_nothing_is_written_into_it_and_what_it_has_not_is_said(
    exported: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = exported[1]
    with pytest.raises(LicError, match="has no snapshot 1") as refused:
        LatentCache.open(url, snapshot=1)
    assert str(refused.value.hint).startswith("it has 0, 2, whole;")
    for write in (
        lambda: store.create(url, make_plan(seed=1)),
        lambda: store.invalidate_shard(url, 0),
        lambda: store.pending(url),
        lambda: inspect(url),
        lambda: growth.name_snapshot(open_storage(url), "mine"),
        open_storage(url).clear,
    ):
        with pytest.raises(LicError, match=r"is an export, which is read|holds another cache"):
            write()
    with pytest.raises(LicError, match="no group 'tcq16' in icechunk://"):
        LatentCache.open(url).written("tcq16")
    with pytest.raises(LicError, match="no Icechunk repository at"):
        LatentCache.open(f"icechunk://{tmp_path / 'nothing'}")
    assert not (tmp_path / "nothing").exists()
    with pytest.raises(UsageError, match="options are of object stores"):
        open_storage(url, {"region": "us-east-1"})
    monkeypatch.setitem(sys.modules, "icechunk", None)
    with pytest.raises(UsageError, match="needs the package icechunk"):
        Repository("anywhere")
