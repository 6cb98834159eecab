"""Builds from photos in a bucket, and of photos that have moved into archives: the bytes of a build from the folder."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("moto.server")
pytest.importorskip("obstore")

from lic_dist.building.build import build, repair
from lic_dist.building.job import prepare
from lic_dist.building.reading import Target, make_reader
from lic_dist.building.work import Units
from lic_dist.cache import layout, store
from lic_dist.cache.reader import LatentCache
from lic_dist.cache.verify import verify
from lic_dist.engine.run import run
from lic_dist.engine.stages import Stage
from lic_dist.errors import LicError
from tests.building.test_append import add
from tests.data import packing
from tests.data.remote import bucket
from tests.stores import FIXED, contents, experiment


@pytest.mark.slow
def test_a_build_from_a_bucket_that_is_killed_ends_with_the_bytes_of_one_from_the_folder(
    photos: Path, base: Path, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forked_workers: None
) -> None:
    path = tmp_path / "a.zarr"
    with bucket() as (options, put):
        for name, data in packing.files_of(photos).items():
            put(f"places/{name}", data)
        where = {"path": "s3://photos/places", "options": options}
        asked = experiment(base, photos, path, quantizer=FIXED, images=where)
        write_shard, written = store.write_shard, []

        def killed(*arguments: object, **named: object) -> object:
            written.append(1)
            if len(written) == 2:
                raise KeyboardInterrupt
            return write_shard(*arguments, **named)

        with monkeypatch.context() as patch:
            patch.setattr(store, "write_shard", killed)
            with pytest.raises(KeyboardInterrupt):
                build(asked)
        assert 0 < len(store.pending(path)) < 3
        assert build(asked).shards_built == 2
        assert contents(path) == contents(made)

        job = prepare(asked)
        header = layout.read_header(job.storage)
        for shard in range(3):
            store.invalidate_shard(job.storage, shard)
        target = Target(job.storage, header.fingerprint)
        read = {}
        for readers in (1, 2):
            stage = Stage("read", partial(make_reader, target, job.source, 64), readers)
            found = run([stage], Units(range(3), job.plan))
            read[readers] = {unit.number: one.pixels for unit, one in found}
        assert all(np.array_equal(read[1][shard], read[2][shard]) for shard in range(3))
    assert np.array_equal(
        np.concatenate([read[2][n] for n in range(3)]), LatentCache.open(made).load(["pixels"])["pixels"]
    )


@pytest.mark.slow
def test_a_store_goes_on_from_archives_into_which_its_photos_have_moved(photos: Path, base: Path, mine: Path) -> None:
    sets = mine.parent / "sets"
    for part in ("train", "valid"):
        files = list(packing.files_of(photos / part).items())
        packing.tar(sets / part / "0.tar", files[1:] + files[:1])
    asked = experiment(base, sets / "*" / "*.tar", mine, quantizer=FIXED)
    assert build(asked).shards_built == 0
    (mine.parent / "more").mkdir()
    add(mine.parent / "more", range(20, 22))
    packing.tar(sets / "train" / "1.tar", packing.files_of(mine.parent / "more" / "train"))
    with pytest.raises(LicError, match="since then 2 added, 0 vanished, 0 changed, 8 moved"):
        build(asked)
    report = build(asked, append=True)
    assert (report.samples, report.snapshot) == (30, 1) and verify(mine) == []
    before = contents(mine)
    (mine / "pixels/c/1/0/0/0").unlink()
    assert repair(asked, verify(mine)) == 1 and contents(mine) == before  # its photos are found where they are now
    assert set(LatentCache.open(mine).samples["source"][24:]) == {"train/1.tar/20.png", "train/1.tar/21.png"}
