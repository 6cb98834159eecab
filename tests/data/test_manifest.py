"""The scan: what it reads, takes over, records and refuses; the manifest as a file."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from lic_dist.data import images, manifest, photo_files
from lic_dist.data.manifest import Manifest, scan
from lic_dist.data.photo import FAULTS, Photo
from lic_dist.errors import LicError
from tests.conftest import picture
from tests.data.test_crops import photo_rows


def faults(found: Manifest) -> dict[str, str]:
    return {photo.path: photo.fault for photo in found}


@pytest.fixture()
def folder(tmp_path: Path) -> Path:
    """Three photos, none of them new."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(3):
        Image.fromarray(picture(number, 30, 40)).save(folder / f"{number}.png")
    return folder


@pytest.fixture()
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the photos that are read, as they are."""
    names: list[str] = []
    contents = images.contents

    def noted(path: Path, name: str) -> bytes:
        names.append(name)
        return contents(path, name)

    monkeypatch.setattr(images, "contents", noted)
    return names


def test_scan_finds_photos_in_subfolders_and_records_faults(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    Image.fromarray(picture(1, 30, 40)).save(tmp_path / "a" / "b" / "x.PNG")
    Image.fromarray(picture(2, 30, 40)).save(tmp_path / "y.jpeg")
    (tmp_path / "z.png").write_bytes(b"")
    os.mkfifo(tmp_path / "zz.png")
    (tmp_path / "notes.txt").write_text("no photo")
    os.symlink(tmp_path, tmp_path / "a" / "loop")
    found = scan(tmp_path)
    assert [(p.path, p.width, p.height, p.fault) for p in found] == [
        ("a/b/x.PNG", 40, 30, ""),
        ("y.jpeg", 40, 30, ""),
        ("z.png", 0, 0, "not an image"),
        ("zz.png", 0, 0, "unreadable"),
    ]
    assert found.faults == Counter({"not an image": 1, "unreadable": 1})
    assert found.set_aside(31) == Counter({"not an image": 1, "unreadable": 1, "smaller than a crop": 2})
    status = (tmp_path / "y.jpeg").stat()
    digest = hashlib.sha256((tmp_path / "y.jpeg").read_bytes()).hexdigest()
    assert found[1] == found[-3] == Photo("y.jpeg", digest, 40, 30, status.st_size, status.st_mtime_ns)
    with pytest.raises(IndexError):
        found[4]


def test_odd_names_are_read_or_counted(folder: Path) -> None:
    data = (folder / "0.png").read_bytes()
    long = "/".join(["d" * 250] * 3)
    (folder / long).mkdir(parents=True)
    for name in (os.fsdecode(b"\xff.png"), "\\xff.png", "two\nlines.png", "ä ö.png", f"{long}/{'n' * 251}.png"):
        (folder / name).write_bytes(data)
    found = scan(folder)
    assert len(found) == 8 and [photo.path for photo in found] == photo_files.find(folder)
    assert found.faults == Counter({"name is not UTF-8": 1})
    assert sorted(photo.fault for photo in found if photo.path == "\\xff.png") == ["", "name is not UTF-8"]
    assert Manifest.from_bytes(found.to_bytes()) == found == scan(folder, found)


def test_a_folder_too_deep_to_be_listed_is_counted(folder: Path) -> None:
    at = os.open(folder, os.O_RDONLY)
    for _ in range(18):  # 18 * 251 is more than the 4096 bytes of a path
        os.mkdir("d" * 250, dir_fd=at)
        inner = os.open("d" * 250, os.O_RDONLY, dir_fd=at)
        os.close(at)
        at = inner
    os.close(at)
    try:
        assert list(scan(folder).faults.items()) == [("unreadable", 1)]
    finally:
        shutil.rmtree(folder)


def test_links_directories_and_forbidden_files_never_stop_a_scan(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.symlink("b.png", folder / "a.png")
    os.symlink("a.png", folder / "b.png")
    os.symlink("nothing.png", folder / "dangling.png")
    os.symlink("0.png", folder / "link.png")
    os.symlink("loop", folder / "loop")
    (folder / "folder.png").mkdir()
    os.symlink("..", folder / "folder.png" / "up")
    shutil.copy(folder / "0.png", folder / "forbidden.png")
    read_bytes = Path.read_bytes

    def forbid(path: Path) -> bytes:
        if path.name == "forbidden.png":
            raise PermissionError(13, "Permission denied")
        return read_bytes(path)

    monkeypatch.setattr(Path, "read_bytes", forbid)
    bad = dict.fromkeys(["a.png", "b.png", "dangling.png", "forbidden.png"], "unreadable")
    assert faults(scan(folder)) == {"0.png": "", "1.png": "", "2.png": "", "link.png": "", **bad}


def test_which_of_two_links_to_a_folder_is_followed_is_the_first_by_name(tmp_path: Path) -> None:
    for names in (("z", "a", "k"), ("a", "k", "z")):
        base = tmp_path / "-".join(names)
        (tmp_path / "real").mkdir(exist_ok=True)
        Image.fromarray(picture(1, 30, 40)).save(tmp_path / "real" / "x.png")
        base.mkdir()
        for name in names:
            os.symlink(tmp_path / "real", base / name)
        assert photo_files.find(base) == ["a/x.png"]


@pytest.mark.parametrize("fate", [Path.unlink, lambda path: path.write_bytes(b"other")])
def test_a_photo_that_vanishes_or_changes_while_it_is_read_is_recorded(
    folder: Path, monkeypatch: pytest.MonkeyPatch, fate: Callable[[Path], object]
) -> None:
    contents = images.contents

    def unsteady(path: Path, name: str) -> bytes:
        data = contents(path, name)
        if name == "1.png":
            fate(path)
        return data

    monkeypatch.setattr(images, "contents", unsteady)
    found = scan(folder)
    assert faults(found) == {"0.png": "", "1.png": "changed", "2.png": ""}
    monkeypatch.undo()
    Image.fromarray(picture(1, 30, 40)).save(folder / "1.png")
    os.utime(folder / "1.png", ns=(found[1].mtime_ns, found[1].mtime_ns))
    assert scan(folder, found).faults == Counter()


def test_a_photo_that_vanishes_before_it_is_read_is_recorded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there = photo_files.PhotoFiles(folder, [*photo_files.search(folder).names, "gone.png"])
    monkeypatch.setattr(photo_files, "search", lambda _: there)
    assert scan(folder)[3] == Photo("gone.png", "", 0, 0, 0, 0, "unreadable")


def test_only_new_and_changed_photos_are_read(folder: Path, read: list[str]) -> None:
    (folder / "bad.png").write_bytes(b"no photo")
    first = scan(folder)
    assert sorted(read) == ["0.png", "1.png", "2.png", "bad.png"]
    read.clear()
    saved: list[Manifest] = []
    assert scan(folder, first, saved.append) == first
    assert read == ["bad.png"] and saved == []
    (folder / "bad.png").unlink()
    read.clear()
    shutil.copy(folder / "0.png", folder / "1.png")  # another size
    os.utime(folder / "2.png", ns=(5, 5))
    (folder / "0.png").rename(folder / "00.png")
    second = scan(folder, first, saved.append)
    assert sorted(read) == ["00.png", "1.png", "2.png"] and saved == [second]
    assert second == scan(folder) and second.digest != first.digest


@pytest.mark.parametrize("stop", [0, 1, 5, 9])
def test_a_stopped_scan_goes_on_where_it_was_saved(
    tmp_path: Path, read: list[str], monkeypatch: pytest.MonkeyPatch, stop: int
) -> None:
    for number in range(12):
        (tmp_path / f"{number:02}.png").write_bytes(b"")
        if number % 3:
            Image.fromarray(picture(number, 20, 30)).save(tmp_path / f"{number:02}.png")
    whole = scan(tmp_path)
    monkeypatch.setattr(manifest, "SAVE_SECONDS", 0.0)
    monkeypatch.setattr(manifest, "SAVE_SHARE", 1e9)
    files: list[bytes] = []

    def save(so_far: Manifest) -> None:
        files.append(so_far.to_bytes())
        if len(files) == stop + 1:
            raise KeyboardInterrupt

    known = Manifest.of(list(whole)[4:6])  # what an earlier scan knows is kept by every save
    with pytest.raises(KeyboardInterrupt):
        scan(tmp_path, known, save)
    saved = Manifest.from_bytes(files[-1])
    assert len(saved) == stop + 3 and set(known) <= set(saved) <= set(whole)
    read.clear()
    assert scan(tmp_path, saved) == whole
    assert set(read) == {photo.path for photo in whole if photo.fault or photo not in set(saved)}


def test_a_strict_scan_names_the_first_bad_photo(folder: Path) -> None:
    scan(folder, strict=True)
    (folder / "11.png").write_bytes(b"")
    (folder / "20.png").write_bytes(b"")
    for known in (None, scan(folder)):
        with pytest.raises(LicError, match=r"11\.png: not an image"):
            scan(folder, known, strict=True)


@pytest.mark.parametrize("threads", [1, 3])
def test_the_threads_change_nothing(photos: Path, threads: int) -> None:
    assert scan(photos, threads=threads) == scan(photos)


def test_a_missing_an_empty_and_a_hopeless_folder(tmp_path: Path) -> None:
    for folder, text in ((tmp_path / "none", "no such folder"), (tmp_path, "no photos in")):
        with pytest.raises(LicError, match=text):
            scan(folder)
    (tmp_path / "x.png").write_bytes(b"")
    with pytest.raises(LicError, match="none of the 1 photos"):
        scan(tmp_path)


@given(st.lists(photo_rows, max_size=20))
@settings(max_examples=100, deadline=None)
@pytest.mark.slow
def test_a_manifest_keeps_its_rows_and_the_digest_that_stores_hold(photos: list[Photo]) -> None:
    made = Manifest.of(photos)
    assert list(made) == photos == [made[row] for row in range(len(made))]
    assert list(Manifest.from_bytes(made.to_bytes())) == photos
    lines = sorted(f"{photo.digest} {photo.path}" for photo in photos if not photo.fault)
    assert made.digest == hashlib.sha256("\n".join(lines).encode()).hexdigest()


def test_the_digest_of_many_photos_is_that_of_all_their_lines() -> None:
    photos = [Photo(f"{number}", hashlib.sha256(bytes([number % 256])).hexdigest(), 1, 1) for number in range(9000)]
    lines = sorted(f"{photo.digest} {photo.path}" for photo in photos)
    assert Manifest.of(photos).digest == hashlib.sha256("\n".join(lines).encode()).hexdigest()


def test_bytes_that_are_no_manifest_are_one_line(folder: Path) -> None:
    data = scan(folder).to_bytes()
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"path": ["a"], "digest": ["b"], "width": [1], "height": [1], "fault": [""]}), sink)
    old = sink.getvalue().to_pybytes()
    for wrong in (b"", b"PAR1", data[:-5], data[100:], old):
        with pytest.raises(LicError, match="cache scan"):
            Manifest.from_bytes(wrong)


def test_reading_a_manifest_starts_no_threads(folder: Path, tmp_path: Path) -> None:
    """Arrow's own, alive when a command ends at once with an error, now and then aborted it: exit code 134."""
    (tmp_path / "m.parquet").write_bytes(Manifest.of(list(scan(folder)) * 2000).to_bytes())
    script = """
import os, pathlib, sys
from lic_dist.data.manifest import Manifest
before = len(os.listdir("/proc/self/task"))
assert len(Manifest.from_bytes(pathlib.Path(sys.argv[1]).read_bytes())) == 6000
print(len(os.listdir("/proc/self/task")) - before)
"""
    ended = subprocess.run([sys.executable, "-c", script, tmp_path / "m.parquet"], capture_output=True, text=True)
    assert (ended.stdout, ended.returncode) == ("0\n", 0)


@pytest.mark.parametrize("flip", [1, 128])
def test_a_damaged_byte_is_refused_or_harmless(flip: int) -> None:
    made = Manifest.of(Photo(f"{number}.png", "ab" * 32, 5, 6, 7, 8, "truncated" * (number % 2)) for number in range(9))
    data = bytearray(made.to_bytes())
    for position in range(len(data)):
        data[position] ^= flip
        with contextlib.suppress(LicError):
            assert Manifest.from_bytes(bytes(data)) == made
        data[position] ^= flip


def test_every_fault_of_a_scan_has_a_number() -> None:
    assert FAULTS[:11] == (
        "", "unreadable", "not an image", "truncated", "animated", "too large", "smaller than a crop", "changed",
        "latents overflow", "unsupported pixels", "name is not UTF-8",
    )  # fmt: skip
