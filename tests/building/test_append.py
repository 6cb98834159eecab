"""Appending photos to a store: new shards alone, equal to a store of the added photos, resumed, masked, followed."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lic_dist import config
from lic_dist.building.build import build, repair, requantize
from lic_dist.building.job import check_cache
from lic_dist.cache import growth, store
from lic_dist.cache.folder import Folder
from lic_dist.cache.history import difference, history
from lic_dist.cache.reader import LatentCache
from lic_dist.cache.verify import verify
from lic_dist.errors import LicError
from lic_dist.models import checkpoint
from tests.app.test_cli import lic_dist, refused, write
from tests.conftest import picture
from tests.stores import FIXED, contents, damage, experiment, no_photos

LONG = "a folder of a long name, longer than those before"


def add(folder: Path, seeds: range, part: str = "train") -> None:
    (folder / part).mkdir(exist_ok=True)
    for seed in seeds:
        Image.fromarray(picture(seed, 140 + 8 * (seed % 4), 200)).save(folder / part / f"{seed}.png")


@pytest.fixture()
def folder(photos: Path, tmp_path: Path) -> Path:
    """The photos, which the test may change."""
    return Path(shutil.copytree(photos, tmp_path / "photos"))


def asked(base: Path, folder: Path, path: Path, **changes: dict) -> config.Experiment:
    return experiment(base, folder, path, **{"quantizer": FIXED, **changes})


def old_files(path: Path) -> dict[Path, tuple[int, bytes]]:
    files = [file for file in path.rglob("*") if file.is_file() and ("c" in file.parts or "_progress" in file.parts)]
    return {file: (file.stat().st_mtime_ns, file.read_bytes()) for file in files}


@pytest.mark.slow
def test_appended_rows_are_those_of_a_store_of_the_added_photos_alone(
    mine: Path, base: Path, folder: Path, tmp_path: Path
) -> None:
    before, record = old_files(mine), LatentCache.open(mine).record_json("tcq8")
    requantize(no_photos(base, mine, name="rdoq", group="rdoq"))
    before = old_files(mine)
    add(folder, range(20, 23), f"train/{LONG}")
    add(folder, range(23, 24), "valid")
    shutil.copy(folder / "train/0.png", folder / "train/copy.png")  # the same photo again
    report = build(asked(base, folder, mine), append=True)
    assert (report.samples, report.shards_built, report.shards, report.snapshot) == (36, 2, 5, 1)
    assert before.items() <= old_files(mine).items() and verify(mine) == []
    cache = LatentCache.open(mine)
    assert cache.record_json("tcq8") == record  # nothing was calibrated again
    assert cache.indices(held_out=True).tolist() == [*range(18, 24), *range(33, 36)]

    new = tmp_path / "new"
    add(new.mkdir() or new, range(20, 23), "train")
    (new / "train").rename(new / LONG)
    (new / "train").mkdir()
    (new / LONG).rename(new / "train" / LONG)
    add(new, range(23, 24), "valid")
    alone = tmp_path / "alone.zarr"
    (tmp_path / "alone.tcq8.json").write_text(record)
    build(asked(base, new, alone))
    (tmp_path / "alone.rdoq.json").write_text(cache.record_json("rdoq"))
    requantize(no_photos(base, alone, name="rdoq", group="rdoq"))
    other = LatentCache.open(alone)
    assert other.groups == cache.groups == ("rdoq", "tcq8")
    for name in other.names:
        assert np.array_equal(cache.load([name], slice(24, 36))[name], other.load([name])[name]), name
    for name, column in other.samples.items():
        assert np.array_equal(cache.samples[name][24:], column), name
    assert build(asked(base, folder, mine)).shards_built == 0  # the same job, done
    assert build(asked(base, folder, mine), append=True).snapshot == 1


@pytest.mark.slow
def test_changed_photos_are_refused_in_counts_and_appended_by_the_command(mine: Path, base: Path, folder: Path) -> None:
    file = write(
        mine.parent / "x.yaml",
        **asked(base, folder, mine).model_dump(mode="json", exclude_none=True, exclude={"sweep"}),
    )
    add(folder, range(20, 22))
    (folder / "train/1.png").unlink()
    Image.fromarray(picture(50, 150, 200)).save(folder / "train/2.png")
    (folder / "train/3.png").rename(folder / "train/moved.png")
    refused(lic_dist("cache", "build", file), 1, "3 added, 1 vanished, 1 changed, 1 moved", "cache append")
    assert LatentCache.open(mine).header.snapshot == 0
    done = lic_dist("cache", "append", file)
    assert done.returncode == 0, done.stderr
    assert "vanished: train/1.png" in done.stdout and "changed: train/2.png" in done.stdout
    assert "--mask leaves them out" in done.stdout and "snapshot 1" in done.stdout
    assert LatentCache.open(mine).masked.tolist() == []
    done = lic_dist("cache", "append", file, "--mask")
    assert done.returncode == 0 and "0 of 5 shards built now" in done.stdout, done.stderr
    cache = LatentCache.open(mine)
    sources = cache.samples["source"]
    assert sorted({*sources[cache.masked].tolist()}) == ["train/1.png", "train/2.png"] and len(cache.masked) == 6
    assert not {"train/1.png"} & {*sources[cache.indices(held_out=False)].tolist()}
    assert len(LatentCache.open(mine, snapshot=1).indices(held_out=False)) == 18 + 9
    assert len(cache.indices(held_out=False)) == 18 + 9 - 6
    done = lic_dist("cache", "snapshot", str(mine), "clean")
    assert done.returncode == 0 and "snapshot 2 is 'clean'" in done.stdout
    told = lic_dist("cache", "log", str(mine)).stdout
    assert "+9 samples (0 held out), 33 in all; groups: tcq8" in told and "6 masked, 33 in all, 'clean'" in told
    told = lic_dist("cache", "diff", str(mine), "0", "clean").stdout
    assert "9 samples more (0 held out) of 3 photos, 6 masked" in told and "- train/1.png" in told
    refused(lic_dist("cache", "diff", str(mine), "2", "1"), 2, "is later than")
    assert verify(mine) == []

    shutil.copy(folder / "train/2.png", folder / "train/again.png")
    Image.fromarray(picture(1, 148, 200)).save(folder / "train/1.png")  # masked, and back again
    assert lic_dist("cache", "append", file).returncode == 0
    cache = LatentCache.open(mine)
    assert cache.samples["source"][cache.indices(held_out=False)].tolist().count("train/1.png") == 3


@pytest.mark.slow
def test_an_append_of_another_count_of_workers_has_the_same_bytes(
    mine: Path, base: Path, folder: Path, tmp_path: Path, forked_workers: None
) -> None:
    twin = tmp_path / "twin.zarr"
    shutil.copytree(mine, twin)
    shutil.copy(tmp_path / "a.manifest.parquet", tmp_path / "twin.manifest.parquet")
    add(folder, range(20, 26))
    build(asked(base, folder, mine), append=True)
    build(asked(base, folder, twin, engine={"name": "local", "searchers": 2}), append=True)
    assert contents(twin) == contents(mine) and verify(twin) == []


@pytest.mark.slow
def test_a_killed_append_goes_on_and_one_with_more_photos_finishes_it_first(
    mine: Path, base: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    add(folder, range(20, 24))
    write_shard, count = store.write_shard, 0

    def killed(*arguments: object, **named: object) -> None:
        nonlocal count
        count += 1
        if count == 2:
            raise KeyboardInterrupt
        write_shard(*arguments, **named)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(store, "write_shard", killed)
        with pytest.raises(KeyboardInterrupt):
            build(asked(base, folder, mine), append=True)
    assert len(LatentCache.open(mine)) == 24 and len(store.pending(mine)) == 1
    assert history(mine)["snapshots"][1]["complete"] is False
    twin = Path(shutil.copytree(mine, mine.parent / "twin.zarr"))
    with pytest.raises(LicError, match="has 1 unfinished shard"):
        growth.finish(Folder(mine))
    assert build(asked(base, folder, twin)).shards_built == 1  # `build` goes on with it too
    add(folder, range(30, 31))
    with pytest.raises(LicError, match="1 added, 0 vanished, 0 changed"):
        build(asked(base, folder, mine))
    capsys.readouterr()
    report = build(asked(base, folder, mine), append=True)
    assert "append 1 of" in (told := capsys.readouterr().out) and "is unfinished (12 samples" in told
    assert (report.snapshot, report.samples, report.shards_built) == (2, 24 + 12 + 3, 2)
    first = LatentCache.open(mine, snapshot=1)
    assert first.header.digest == LatentCache.open(twin).header.digest
    names = first.names
    assert all(np.array_equal(first.load(names)[name], LatentCache.open(twin).load(names)[name]) for name in names)
    assert verify(mine) == []


@pytest.mark.slow
def test_damage_in_any_instalment_is_repaired(mine: Path, base: Path, folder: Path) -> None:
    add(folder, range(20, 24), LONG)
    build(asked(base, folder, mine), append=True)
    before = contents(mine)
    for file in ("pixels/c/1/0/0/0", "latents/y/c/3/0/0/0", "samples/source/c/4/1", "quantized/tcq8/bits/c/4"):
        damage(mine / file, "remove")
    findings = verify(mine)
    assert {(one.shard, one.array) for one in findings} == {
        (1, "pixels"), (3, "latents/y"), (4, "samples/source"), (4, "quantized/tcq8/bits")
    }  # fmt: skip
    assert repair(asked(base, folder, mine), findings) == 4
    assert contents(mine) == before and verify(mine) == []
    damage(mine / "pixels/c/3/0/0/0", "remove")
    (folder / LONG / "20.png").unlink()
    with pytest.raises(LicError, match="0 added, 1 vanished"):
        repair(asked(base, folder, mine), verify(mine))
    (mine / "zarr.json").unlink()
    add(folder, range(20, 21), LONG)
    assert build(asked(base, folder, mine)).shards_built == 1  # the root has a copy
    assert contents(mine) == before and LatentCache.open(mine).header.snapshot == 1


@pytest.mark.slow
def test_a_group_of_another_model_is_named_and_follows_by_requantizing(
    mine: Path, base: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    loaded = checkpoint.load(str(base))
    loaded.model.h_s[0].weight.data.mul_(1.01)
    checkpoint.save(loaded, other := mine.parent / "finetuned.pth.tar")
    requantize(no_photos(other, mine, group="after"))
    add(folder, range(20, 22))
    build(asked(base, folder, mine), append=True)
    assert "group 'after' of" in (told := capsys.readouterr().out) and "it does not follow" in told
    assert {(one.group, one.what) for one in verify(mine)} == {("after", "missing")}
    with pytest.raises(LicError, match="group 'after' of .*: 3 of 4 shards are written") as caught:
        check_cache(LatentCache.open(mine), loaded, "after")
    assert "finetune.snapshot takes an older snapshot" in (caught.value.hint or "")
    check_cache(LatentCache.open(mine, snapshot=0), loaded, "after")
    assert difference(mine, 0, 1)["groups_lost"] == ["after"]
    assert requantize(no_photos(other, mine, group="after")).shards_built == 1
    assert verify(mine) == [] and difference(mine, 0, 1)["groups_lost"] == []


@pytest.mark.slow
def test_rebuilding_a_grown_store_starts_anew_with_all_photos(mine: Path, base: Path, folder: Path) -> None:
    add(folder, range(20, 22))
    build(asked(base, folder, mine), append=True)
    assert build(asked(base, folder, mine), rebuild=True).shards_built == 4
    cache = LatentCache.open(mine)
    assert (cache.header.snapshot, cache.num_samples) == (0, 30) and not (mine / "_chain").exists()


def test_appending_without_a_store_is_one_line(base: Path, folder: Path, tmp_path: Path) -> None:
    made = asked(base, folder, tmp_path / "none.zarr").model_dump(mode="json", exclude_none=True, exclude={"sweep"})
    refused(lic_dist("cache", "append", write(tmp_path / "x.yaml", **made)), 1, "no cache at")
    assert not os.path.exists(tmp_path / "none.zarr")
