"""Finetuning from a store that grows, and from its export: a job reads one snapshot from beginning to end."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from lic_dist import config
from lic_dist.building.build import build
from lic_dist.cache.folder import Folder
from lic_dist.cache.reader import LatentCache
from lic_dist.errors import LicError, UsageError
from lic_dist.models import checkpoint
from lic_dist.training import loop
from lic_dist.training.distributed import Ranks
from tests.conftest import dying_at, picture
from tests.training.test_finetune import document, run


def grown(base: Path, photos: Path, store: Path, folder: Path, first: int = 20) -> tuple[Path, Path]:
    """A copy of the store and of its photos, with four photos more, of which one is held out, taken up or not."""
    folder.mkdir(parents=True, exist_ok=True)
    path, more = folder / "a.zarr", folder / "photos"
    if not path.exists():
        shutil.copytree(store, path)
        shutil.copytree(photos, more)
    for seed in range(first, first + 4):
        part = "valid" if seed == first else "train"
        Image.fromarray(picture(seed, 140, 200)).save(more / part / f"{seed}.png")
    build(config.Experiment.model_validate(document(base, more, path, folder / "out")), append=True)
    return path, more


@pytest.mark.slow
@pytest.mark.parametrize("streams", ["auto", 2])
def test_a_job_that_goes_on_after_an_append_reads_the_snapshot_it_began_with(
    streams: object, base: Path, photos: Path, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {"latents": "noise", "streams": streams}
    whole = run(base, photos, store, tmp_path / "whole", **changes)
    mine = Path(shutil.copytree(store, tmp_path / "grown" / "a.zarr"))
    shutil.copytree(photos, tmp_path / "grown" / "photos")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(loop, "take_step", dying_at(7))
        run(base, photos, mine, tmp_path / "cut", **changes)
    grown(base, photos, store, tmp_path / "grown")
    resumed = run(base, photos, mine, tmp_path / "cut", **changes)
    assert checkpoint.digest(resumed.model.state_dict()) == checkpoint.digest(whole.model.state_dict())
    entry, fingerprint = resumed.history[-1], LatentCache.open(store).fingerprint
    assert "snapshot" not in entry and entry["cache"] == fingerprint

    entry = run(base, photos, mine, tmp_path / "fresh", **changes).history[-1]
    assert (entry["snapshot"], entry["cache"]) == (1, LatentCache.open(mine).header.digest)
    assert entry["samples"] == 18 + 9 and entry["cache"] != fingerprint
    assert json.loads((tmp_path / "fresh" / "snapshot.json").read_text()) == {"snapshot": 1, "digest": entry["cache"]}
    grown(base, photos, store, tmp_path / "grown", first=30)
    assert run(base, photos, mine, tmp_path / "fresh", **changes).history[-1] == entry  # done already
    asked = run(base, photos, mine, tmp_path / "asked", **changes, snapshot=0)
    assert checkpoint.digest(asked.model.state_dict()) == checkpoint.digest(whole.model.state_dict())
    with pytest.raises(UsageError, match="is of another job: cache"):
        run(base, photos, mine, tmp_path / "asked", **changes, snapshot=2)
    with pytest.raises(LicError, match="has no snapshot release"):
        run(base, photos, mine, tmp_path / "named", **changes, snapshot="release")


@pytest.mark.slow
def test_a_store_read_from_its_icechunk_repository_gives_the_same_weights(
    base: Path, photos: Path, store: Path, tmp_path: Path
) -> None:
    pytest.importorskip("icechunk")
    from lic_dist.cache.icechunk_export import export

    export(Folder(store), tmp_path / "repository")
    url = f"icechunk://{tmp_path / 'repository'}"
    assert LatentCache.open(url).record_json("tcq8") == LatentCache.open(store).record_json("tcq8")
    for number, where in enumerate((str(store), url)):
        # streamed, and named as one that is mixed
        trained = run(base, photos, store, tmp_path / str(number), streams=1, cache=[{"path": where, "snapshot": 0}])
        if not number:
            whole = checkpoint.digest(trained.model.state_dict())
    assert checkpoint.digest(trained.model.state_dict()) == whole
    with pytest.raises(UsageError, match="rounds add groups, and icechunk://.* is an export"):
        run(base, photos, store, tmp_path / "rounds", rounds=2, cache=[{"path": url}])
    for change in ({}, {"append": True}, {"rebuild": True}):
        with pytest.raises(LicError, match="is an export, which is read and nothing else"):
            build(config.Experiment.model_validate(document(base, photos, url, tmp_path)), **change)  # type: ignore[arg-type]


def test_a_job_begun_before_there_were_snapshots_reads_the_first(store: Path, tmp_path: Path) -> None:
    from lic_dist.training.snapshots import read_snapshots

    alone = Ranks(0, 1, torch.device("cpu"))
    (tmp_path / "out" / "states").mkdir(parents=True)
    (read,) = read_snapshots([LatentCache.open(store)], config.Finetune(out=tmp_path / "out"), alone).stores
    assert read.header.snapshot == 0 and len(read) == 24
    assert read.fingerprint == json.loads((tmp_path / "out" / "snapshot.json").read_text())["digest"]
