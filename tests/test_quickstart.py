from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import yaml

from lic_dist import config, quickstart
from lic_dist.errors import LicError
from lic_dist.manifest import scan


@pytest.fixture()
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quickstart, "VARIATIONS", 4)
    monkeypatch.setattr(quickstart, "STEPS", 4)


def test_the_embedded_photos_are_apart_and_the_stereo_pair_is_not() -> None:
    parts = {name: set(files) for name, files in quickstart.EMBEDDED.items()}
    assert len(set.union(*parts.values())) == sum(map(len, parts.values()))
    assert parts["test"] == {"chelsea.png"}
    assert any({"motorcycle_left.png", "motorcycle_right.png"} <= files for files in parts.values())


@pytest.mark.slow
def test_the_main_job_on_the_embedded_photos(short: None, tmp_path: Path) -> None:
    figures = quickstart.quickstart(tmp_path, None, "local")
    sq, tcq, retrained, plain = figures["rows"]
    assert figures["images"] == ["chelsea.png"]
    assert tcq["bpp"] == retrained["bpp"] != sq["bpp"] < plain["bpp"]
    assert sq["psnr"] == plain["psnr"] and tcq["L"] < plain["L"]
    assert all((tmp_path / name).stat().st_size > 10_000 for name in ("pictures.png", "training.png"))
    experiment = config.load(tmp_path / "experiment.yaml")
    assert experiment.finetune is not None and experiment.finetune.steps == 4
    again = quickstart.quickstart(tmp_path, None, "local")
    assert again["rows"] == figures["rows"]


def test_a_users_photos_are_split_by_digest(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quickstart, "CROP", 128)
    quickstart._lay_out(quickstart._split(photos), tmp_path)
    digests = {
        part: {photo.digest for photo in scan(tmp_path / part)} for part in ("test", "photos/train", "photos/held_out")
    }
    assert [len(found) for found in digests.values()] == [1, 6, 1]
    assert len(set.union(*digests.values())) == 8
    renamed = tmp_path / "renamed"
    renamed.mkdir()
    for number, file in enumerate(sorted(photos.rglob("*.png"), reverse=True)):
        shutil.copy(file, renamed / f"{number}.png")
    quickstart._lay_out(quickstart._split(renamed), tmp_path / "again")
    assert {photo.digest for photo in scan(tmp_path / "again" / "test")} == digests["test"]


def test_nothing_of_the_users_is_ever_removed(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quickstart, "CROP", 128)
    shutil.copytree(photos, tmp_path / "photos")
    before = sorted(tmp_path.rglob("*.png"))
    with pytest.raises(LicError, match="holds other photos"):
        quickstart.quickstart(tmp_path, tmp_path / "photos", "local")
    assert set(before) <= set(tmp_path.rglob("*.png"))


def test_too_few_photos_are_one_line(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quickstart, "CROP", 128)
    few = tmp_path / "few"
    few.mkdir()
    shutil.copy(photos / "train" / "0.png", few)
    with pytest.raises(LicError, match="1 usable photos"):
        quickstart.quickstart(tmp_path / "out", few, "local")


def test_the_saved_experiment_is_the_one_that_ran(tmp_path: Path) -> None:
    made = quickstart._experiment(tmp_path, "local")
    assert config.Experiment.model_validate(yaml.safe_load(made.model_dump_json())) == made
