"""Which files of a folder are photos, and what is said of the others."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from lic_dist.data import images, photo_files
from lic_dist.data.manifest import scan
from lic_dist.data.sources.opening import open_source
from lic_dist.errors import LicError
from tests.conftest import picture

OTHERS = {  # suffixes of Pillow's that are no photos
    ".bufr", ".emf", ".eps", ".fit", ".fits", ".flc", ".fli", ".grib", ".h5", ".hdf", ".iim", ".mpeg", ".mpg",
    ".palm", ".pdf", ".ps", ".wmf",
}  # fmt: skip
HIDDEN = (
    "._0.png", ".hidden.png", ".ipynb_checkpoints/0-checkpoint.png", "__MACOSX/._0.png", "__MACOSX/0.png", "Thumbs.db",
    "a/@eaDir/0.png/thumb.jpg", ".DS_Store", "a/.thumbnails/0.png", "$RECYCLE.BIN/0.png",
)  # fmt: skip


@pytest.fixture()
def folder(tmp_path: Path) -> Path:
    """Three photos, two of them the same."""
    folder = tmp_path / "photos"
    (folder / "a").mkdir(parents=True)
    for number in range(2):
        Image.fromarray(picture(number, 70, 80)).save(folder / f"{number}.png")
    shutil.copy(folder / "0.png", folder / "a" / "copy.png")
    photo_files.tell.cache_clear()
    return folder


def add(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"\0\5\x16\7no picture")


def test_every_suffix_of_a_still_picture_that_pillow_reads_is_one() -> None:
    Image.init()
    readable = {suffix for suffix, format in Image.registered_extensions().items() if format in Image.OPEN}
    readable -= photo_files.HEIF_SUFFIXES | {".heifs", ".heics", ".fits", ".fit", ".hif"}
    taken = photo_files.SIGNED_SUFFIXES | photo_files.UNSIGNED_SUFFIXES.keys()
    assert readable - OTHERS - {".xvthumb"} == taken - {".mpo"}
    formats = {Image.registered_extensions()[suffix] for suffix in photo_files.SIGNED_SUFFIXES - {".mpo"}}
    assert formats == set(images.FORMATS)


def test_hidden_and_system_files_are_no_photos(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    add(folder, *HIDDEN)
    found = photo_files.search(folder)
    assert found.names == ["0.png", "1.png", "a/copy.png"]
    assert found.passed_over == Counter({photo_files.HIDDEN: 9})  # a folder counts once
    assert scan(folder).faults == Counter()
    assert "passed over 9 hidden or system" in capfd.readouterr().err
    scan(folder)
    assert "passed over" not in capfd.readouterr().err  # said once


def test_photos_in_a_hidden_folder_that_is_named_are_photos(folder: Path) -> None:
    folder.rename(folder.parent / ".photos")
    assert photo_files.find(folder.parent / ".photos") == ["0.png", "1.png", "a/copy.png"]


def test_what_is_passed_over_is_counted_by_kind_with_what_to_do(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(photo_files, "reads_heif", lambda: False)
    add(folder, *(f"{number}.HEIC" for number in range(10)), "b.CR2", "c.txt", "d.txt", "e.mp4", "README")
    found = photo_files.search(folder)
    assert found.passed_over == Counter({".heic": 10, ".txt": 2, ".cr2": 1, ".mp4": 1, "without a suffix": 1})
    assert found.describe() == (
        "10 .heic (pip install pillow-heif), 1 .cr2 (camera raw, develop it to PNG or TIFF), 1 .mp4 (a film), 2 .txt, "
        "1 without a suffix"
    )
    scan(folder)
    err = capfd.readouterr().err
    assert "3 photos; passed over 10 .heic (pip install pillow-heif)" in err
    assert "1 of the photos is a duplicate, as a/copy.png of 0.png" in err
    add(folder, *(f"x.{number}" for number in range(9)))
    assert photo_files.search(folder).describe().endswith(", 6 others")


def test_a_folder_of_heic_alone_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(photo_files, "reads_heif", lambda: False)
    add(tmp_path, "a.heic")
    with pytest.raises(LicError, match=r"no photos in .*1 \.heic \(pip install pillow-heif\)"):
        photo_files.search(tmp_path)
    monkeypatch.undo()
    if photo_files.reads_heif():
        assert photo_files.find(tmp_path) == ["a.heic"]


def test_a_file_where_a_folder_is_asked_for_is_named_as_one(folder: Path) -> None:
    with pytest.raises(LicError, match=r"0\.png is no folder"):
        photo_files.search(folder / "0.png")


def test_every_fault_and_duplicate_of_an_evaluation_is_named_before_it_begins(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    names = photo_files.find(folder)
    assert images.files_digest(open_source(folder), names) == images.files_digest(open_source(folder), names)
    assert "a/copy.png is a duplicate of 0.png; both are measured" in capfd.readouterr().err
    (folder / "1.png").write_bytes(b"no picture")
    (folder / "0.png").write_bytes((folder / "0.png").read_bytes()[:-900])
    os.symlink("nowhere.png", folder / "z.png")
    with pytest.raises(
        LicError, match="3 of 4 images cannot be used: 0.png: truncated; 1.png: not an image; z.png: unr"
    ):
        images.files_digest(open_source(folder), photo_files.find(folder))


def test_the_manifest_knows_duplicates(folder: Path) -> None:
    shutil.copy(folder / "1.png", folder / "a" / "1.png")
    shutil.copy(folder / "1.png", folder / "a" / "2.png")
    add(folder, "bad.png", "worse.png")
    assert scan(folder).duplicates == {"a/1.png": "1.png", "a/2.png": "1.png", "a/copy.png": "0.png"}
