"""Another identity is refused by field; a rebuild starts anew and removes nothing but a store of ours."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch

from lic_dist import config
from lic_dist.building.build import build
from lic_dist.building.job import check_cache, group_identity, load_parent, open_cache, prepare
from lic_dist.building.pilot import record_location
from lic_dist.cache import store
from lic_dist.cache.plan import differences, fingerprint
from lic_dist.cache.reader import LatentCache
from lic_dist.cache.verify import verify
from lic_dist.errors import LicError
from lic_dist.models import checkpoint
from lic_dist.quantization.record import QuantizerRecord
from tests.app.test_cli import lic_dist, refused, write
from tests.stores import FIXED, contents, experiment


def test_every_field_of_the_identity_is_refused_by_its_name(
    mine: Path, base: Path, photos: Path, tmp_path: Path
) -> None:
    changes = {
        "images.crop": {"images": {"crop": 128}},
        "images.variations": {"images": {"variations": 2}},
        "images.seed": {"images": {"seed": 1}},
        "images.held_out": {"images": {"held_out": 0.5}},
        "shard": {"cache": {"shard": 4}},
        "batch": {"cache": {"batch": 2}},
        "store_y": {"cache": {"store_y": False}},
    }
    for field, change in changes.items():
        with pytest.raises(LicError, match=rf"{field}: store has .*, this job has"):
            build(experiment(base, photos, mine, quantizer=FIXED, **change))
    more = tmp_path / "more"
    shutil.copytree(photos, more)
    shutil.copy(photos / "train" / "0.png", more / "train" / "copy.png")
    build(experiment(base, more, mine, quantizer=FIXED))  # a copy is no other photo
    (more / "train" / "1.png").unlink()
    with pytest.raises(LicError, match="of other photos: since then 0 added, 1 vanished, 0 changed"):
        build(experiment(base, more, mine, quantizer=FIXED))
    loaded = checkpoint.load(str(base))
    with torch.no_grad():
        loaded.model.entropy_bottleneck.quantiles[0, 0, 1] += 0.01  # a median of z: on the encoder's side
    checkpoint.save(loaded, tmp_path / "moved.pth.tar")
    with pytest.raises(LicError, match=r"model\.encoder_sha256"):
        build(experiment(tmp_path / "moved.pth.tar", photos, mine, quantizer=FIXED))
    job = prepare(experiment(base, photos, mine, quantizer=FIXED))
    known = {"format", "model", "precision", "images", "shard", "batch", "store_y"}
    assert set(job.plan.identity) == known
    for field in ("format", "precision", "model.architecture", "model.N", "model.M"):
        identity = copy.deepcopy(job.plan.identity)
        *sections, last = field.split(".")
        target = identity[sections[0]] if sections else identity
        target[last] = "other"
        with pytest.raises(LicError, match=rf"{field}: store has .*, this job has other"):
            store.create(mine, type(job.plan)(job.plan.crops, job.plan.geometry, 8, 4, identity))


def test_a_store_of_a_retired_model_says_what_became_of_it(mine: Path, base: Path, photos: Path) -> None:
    document = json.loads((mine / "zarr.json").read_text())
    identity = document["attributes"]["identity"]
    identity["model"]["encoder_sha256"] = "4546a8781ed85d63" + 48 * "0"
    document["attributes"]["fingerprint"] = fingerprint(identity)
    (mine / "zarr.json").write_text(json.dumps(document))
    for command in (build, open_and_check):
        with pytest.raises(LicError, match=r"latents of the base-0\.013 of lic_dist 0\.1\.0") as caught:
            command(experiment(base, photos, mine, quantizer=FIXED))
        assert "another model is shipped as base-0.013 since" in caught.value.hint


def open_and_check(asked: config.Experiment) -> None:
    check_cache(open_cache(asked), load_parent(asked), "tcq8")


def test_every_field_of_a_groups_identity_is_refused_by_its_name(mine: Path, base: Path) -> None:
    loaded = checkpoint.load(str(base))
    cache = LatentCache.open(mine)
    identity = cache.group_attributes("tcq8")["identity"]
    assert set(identity) == {"group", "cache", "record_sha256", "entropy_sha256"}
    ours = group_identity(loaded, QuantizerRecord.from_json(cache.record_json("tcq8")), cache.header.geometry)
    assert differences({key: identity[key] for key in ours}, ours) == []
    for field in ours:
        with pytest.raises(LicError, match=rf"group 'tcq8' .*: {field}: store has"):
            store.create_group(mine, "tcq8", cache.record_json("tcq8"), {**ours, field: "0" * 64})
    with pytest.raises(LicError, match="another record.json"):
        shutil.rmtree(mine / "quantized/tcq8/k")
        (mine / "quantized/tcq8/zarr.json").unlink()
        store.create_group(mine, "tcq8", "{}", ours)


def test_settings_that_made_a_record_are_part_of_what_is_asked_for(mine: Path, base: Path, photos: Path) -> None:
    for change in ({"weights": "rounding"}, {"pilot": 9}, {"adapt_rounds": 1}, {"calibration": 5}):
        with pytest.raises(LicError, match=rf"another quantizer: {next(iter(change))}: store has"):
            build(experiment(base, photos, mine, quantizer={**FIXED, **change}))


@pytest.mark.slow
def test_rebuild_asks_and_then_starts_anew(mine: Path, base: Path, photos: Path) -> None:
    asked = experiment(base, photos, mine, quantizer={**FIXED, "step": 0.9}, images={"seed": 7})
    file = write(mine.parent / "x.yaml", **asked.model_dump(mode="json", exclude_none=True, exclude={"sweep"}))
    refused(lic_dist("cache", "build", file), 1, "images.seed")
    refused(lic_dist("cache", "build", file, "--rebuild"), 2, "--rebuild removes this store", "--yes")
    assert LatentCache.open(mine).identity["images"]["seed"] == 0
    done = lic_dist("cache", "build", file, "--rebuild", "--yes")
    assert done.returncode == 0 and "3 of 3 shards built now" in done.stdout, done.stderr
    assert LatentCache.open(mine).identity["images"]["seed"] == 7


def test_rebuild_removes_nothing_before_it_can_build(mine: Path, base: Path, photos: Path) -> None:
    around, key = record_location(prepare(experiment(base, photos, mine, quantizer=FIXED)).storage, "tcq8")
    around.put(key, LatentCache.open(mine).record_json("tcq8").encode())
    before = contents(mine)
    with pytest.raises(LicError, match="a.tcq8.json is another quantizer: step"):
        build(experiment(base, photos, mine, quantizer={**FIXED, "step": 0.9}), rebuild=True)
    assert contents(mine) == before


@pytest.mark.slow
def test_a_store_of_another_version_is_refused_and_can_be_rebuilt(mine: Path, base: Path, photos: Path) -> None:
    document = json.loads((mine / "zarr.json").read_text())
    del document["attributes"]["num_held_out"]
    (mine / "zarr.json").write_text(json.dumps(document))
    asked = experiment(base, photos, mine, quantizer=FIXED)
    with pytest.raises(LicError, match="num_held_out") as caught:
        build(asked)
    assert "--rebuild" in caught.value.hint
    assert build(asked, rebuild=True).shards_built == 3


@pytest.mark.slow
def test_a_rebuild_killed_while_it_removes_leaves_no_half_store(
    mine: Path, base: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = experiment(base, photos, mine, quantizer=FIXED)

    def die(path: Path) -> None:
        (path / "zarr.json").unlink()
        raise KeyboardInterrupt

    monkeypatch.setattr("shutil.rmtree", die)
    with pytest.raises(KeyboardInterrupt):
        build(asked, rebuild=True)
    monkeypatch.undo()
    assert not mine.exists()
    assert build(asked).shards_built == 3


@pytest.mark.slow
def test_a_linked_store_is_rebuilt_where_it_lies(mine: Path, base: Path, photos: Path, tmp_path: Path) -> None:
    link = tmp_path / "elsewhere" / "link.zarr"
    link.parent.mkdir()
    link.symlink_to(mine)
    assert build(experiment(base, photos, link, quantizer=FIXED), rebuild=True).shards_built == 3
    assert link.is_symlink() and verify(mine) == []
    link.unlink()
    link.symlink_to(tmp_path / "nowhere")
    with pytest.raises(LicError, match="link to nothing"):
        build(experiment(base, photos, link, quantizer=FIXED))
    (tmp_path / "file.zarr").write_text("mine")
    with pytest.raises(LicError, match="is a file"):
        build(experiment(base, photos, tmp_path / "file.zarr", quantizer=FIXED))


@pytest.mark.slow
def test_a_sweep_of_quantizers_and_learning_rates_rebuilds_one_store_once(
    base: Path, photos: Path, tmp_path: Path
) -> None:
    document = experiment(base, photos, tmp_path / "a.zarr", quantizer=FIXED).model_dump(mode="json", exclude_none=True)
    document["quantizer"] |= {"group": "tcq8-{quantizer.states}"}
    document["finetune"] = {"out": "{quantizer.group}-{finetune.lr}"}
    sweep = {"finetune.lr": [1e-3, 1e-4], "quantizer.states": [4, 8]}
    file = write(tmp_path / "x.yaml", **{**document, "sweep": sweep})
    for _ in range(2):
        done = lic_dist("cache", "build", file, "--rebuild", "--yes", "--json", tmp_path / "figures.json")
        assert done.returncode == 0, done.stderr
        built = [one["shards_built"] for one in json.loads((tmp_path / "figures.json").read_text())]
        assert built == [3, 3, 0, 0]
    cache = LatentCache.open(tmp_path / "a.zarr")
    assert [len(cache.written(f"tcq8-{states}")) for states in (4, 8)] == [cache.num_shards] * 2


def test_rebuild_removes_nothing_but_a_store_of_ours(base: Path, photos: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "precious.txt").write_text("mine")
    with pytest.raises(LicError, match="holds precious.txt"):
        build(experiment(base, photos, tmp_path / "mine", quantizer=FIXED), rebuild=True)
    (tmp_path / "mine" / "zarr.json").write_text('{"attributes": {}}')
    with pytest.raises(LicError, match="not a cache of lic_dist"):
        build(experiment(base, photos, tmp_path / "mine", quantizer=FIXED), rebuild=True)
    assert (tmp_path / "mine" / "precious.txt").read_text() == "mine"
