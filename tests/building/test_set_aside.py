"""Photos set aside are named with their reasons by whatever tells of a store."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from lic_dist.app.cli import app
from lic_dist.building.build import build
from lic_dist.cache.folder import Folder
from lic_dist.cache.inspect import describe, inspect
from lic_dist.cache.set_aside import photo_lines, read_manifest, set_aside
from lic_dist.config import Experiment
from lic_dist.data import photo_files
from lic_dist.data.manifest import Manifest, scan
from tests import stores
from tests.conftest import picture

EXPECTED = {
    "bad.png": "not an image",
    "cut.png": "truncated",
    "small\n.png": "40x30, smaller than a crop of 64",
    "train/1.png": "changed",
}


@pytest.fixture()
def folder(photos: Path, tmp_path: Path) -> Path:
    """The eight photos, one of them twice, three that cannot be used, a hidden one and a text."""
    folder = Path(shutil.copytree(photos, tmp_path / "photos"))
    shutil.copy(folder / "train" / "2.png", folder / "train" / "copy.png")
    (folder / "bad.png").write_bytes(b"no picture")
    (folder / "cut.png").write_bytes((folder / "train" / "0.png").read_bytes()[:-900])
    Image.fromarray(picture(9, 30, 40)).save(folder / "small\n.png")
    (folder / "._x.png").write_bytes(b"\0\5\x16\7")
    (folder / "notes.txt").write_text("no photo")
    photo_files.tell.cache_clear()
    return folder


@pytest.fixture()
def experiment(base: Path, folder: Path, tmp_path: Path) -> Experiment:
    return stores.experiment(base, folder, tmp_path / "a.zarr", quantizer=stores.FIXED)


@pytest.mark.slow
def test_build_inspect_and_faults_name_photos_and_reasons(
    experiment: Experiment, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lic_dist.building import job

    def scan_then_change(*arguments: object, **options: object) -> Manifest:
        found = scan(*arguments, **options)
        shutil.copy(folder / "train" / "3.png", folder / "train" / "1.png")
        return found

    monkeypatch.setattr(job, "scan", scan_then_change)
    report = build(experiment)
    assert report.photos == EXPECTED
    store = Folder(tmp_path / "a.zarr")
    assert set_aside(store, read_manifest(store)) == EXPECTED
    assert set_aside(store, None) == {"train/1.png": "changed"}
    found = inspect(store)
    assert found["set_aside"] == EXPECTED
    text = "\n".join(describe(found))
    assert "  set aside: cut.png: truncated" in text and "small\\n.png" in text and "small\n" not in text
    (tmp_path / "a.manifest.parquet").write_bytes(b"damaged")
    assert inspect(store)["set_aside"] == {"train/1.png": "changed"}


def test_faults_names_every_photo_duplicate_and_kind_of_file(base: Path, folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "e.yaml"
    file.write_text(
        json.dumps(
            {
                "model": {"checkpoint": str(base)},
                "images": {"path": str(folder), "crop": 64, "held_out": "valid"},
                "quantizer": {"name": "tcq"},
                "cache": {"path": str(tmp_path / "a.zarr")},
            }
        )
    )
    runner = CliRunner()
    early = runner.invoke(app, ["cache", "faults", str(file)])
    assert early.exit_code == 1 and "nothing is known yet" in str(early.exception)
    assert runner.invoke(app, ["cache", "scan", str(file)]).exit_code == 0
    told = runner.invoke(app, ["cache", "faults", str(file), "--json", str(tmp_path / "faults.json")])
    assert told.stdout.splitlines() == [
        "bad.png: not an image",
        "cut.png: truncated",
        "small\\n.png: 40x30, smaller than a crop of 64",
        "train/copy.png: the same as train/2.png",
        f"{tmp_path}/a.zarr: 3 photos set aside: 1 not an image, 1 smaller than a crop of 64, 1 truncated; 1 duplicate"
        "; passed over 1 .txt, 1 hidden or system",
    ]
    kept = json.loads((tmp_path / "faults.json").read_text())
    assert kept["duplicates"] == {"train/copy.png": "train/2.png"} and kept["passed_over"][".txt"] == 1
    assert kept["set_aside"] == {name: why for name, why in EXPECTED.items() if why != "changed"}


def test_of_many_photos_set_aside_the_first_are_named_and_the_others_counted() -> None:
    found = {f"{number}.png": "truncated" for number in range(10, 40)}
    assert photo_lines(found, 2) == [
        "10.png: truncated",
        "11.png: truncated",
        "and 28 more: `lic-dist cache faults` names all",
    ]
    assert len(photo_lines(found)) == len(photo_lines(found, 30)) == 30
