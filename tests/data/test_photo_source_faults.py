"""What can be wrong with photos in buckets, on web servers, in archives and tables: one line, or a counted photo."""

from __future__ import annotations

import http.server
import os
from collections import Counter
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from lic_dist import remote
from lic_dist.data import images, manifest, photo_files
from lic_dist.data.crops import plan_crops
from lic_dist.data.manifest import Manifest, scan
from lic_dist.data.photo import FAULTS
from lic_dist.data.source import PhotoSource
from lic_dist.data.sources.opening import open_source
from lic_dist.errors import LicError, UsageError
from tests.conftest import picture
from tests.data import packing
from tests.data.remote import Web, web


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Six photos."""
    folder = tmp_path_factory.mktemp("faults")
    for number in range(6):
        Image.fromarray(picture(number, 64, 80)).save(folder / f"{number}.png")
    return packing.files_of(folder)


def faults(found: Manifest) -> dict[str, str]:
    return {photo.path: photo.fault for photo in found if photo.fault}


def statuses(found: Manifest, source: PhotoSource) -> Counter[str]:
    """The faults that crops of what was scanned have now."""
    return Counter(FAULTS[code] for code in images.read_crops(source, plan_crops(found, 64, 1, 0, 0.0), 64)[1])


@pytest.mark.parametrize(
    ("cut", "there", "fault"),
    [(5000, 0, "truncated"), (-10240, 6, "truncated"), (0, 0, "not an archive")],
    ids=["in a member", "between members", "empty"],
)
def test_an_archive_that_ends_early_is_counted_beside_its_whole_photos(
    files: dict[str, bytes], tmp_path: Path, cut: int, there: int, fault: str
) -> None:
    whole = packing.tar(tmp_path / "0.tar", files).read_bytes()
    members = 512 * sum(1 + -(-len(data) // 512) for data in files.values())
    packing.tar(tmp_path / "1.tar", {"x.png": files["0.png"]})
    (tmp_path / "0.tar").write_bytes(whole[: members if cut < 0 else cut])
    source = open_source(tmp_path / "*.tar")
    found = scan(source)
    assert faults(found) == {"0.tar": fault} and len(found) == there + 2
    assert scan(source, found) == found  # nothing is read again
    with pytest.raises(LicError, match=rf"0\.tar: {fault}"):
        scan(source, strict=True)
    os.truncate(tmp_path / "1.tar", 700)
    assert set(faults(scan(source, found)).values()) == {fault, "truncated"} if there else True


def test_a_hopeless_archive_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(b"no archive " * 999)
    with pytest.raises(LicError, match=r"none of the 1 photos in .*a\.tar can be used \(not an archive\)"):
        scan(tmp_path / "a.tar")
    packing.tar(tmp_path / "a.tar", {"notes.txt": b"none", "a.json": b"{}"})
    with pytest.raises(LicError, match=r"passed over 1 \.(txt|json), 1 \.(json|txt)"):
        scan(tmp_path / "a.tar")


def test_members_that_are_no_photos_are_counted_or_passed_over(
    files: dict[str, bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photo_files.tell.cache_clear()
    members = {"./a/0.png": files["0.png"], "/b/1.png": files["1.png"], "2.png": b"text", "2.cls": b"7", "3.jpg": b""}
    path = packing.tar(tmp_path / "a.tar", members)
    found = scan(path)
    assert [photo.path for photo in found] == ["2.png", "3.jpg", "a/0.png", "b/1.png"]
    assert faults(found) == {"2.png": "not an image", "3.jpg": "not an image"}
    assert "a.tar: 4 photos; passed over 1 .cls" in capsys.readouterr().err


def test_of_several_members_of_a_name_the_last_counts(files: dict[str, bytes], tmp_path: Path) -> None:
    members = [("a.png", files["0.png"]), ("b.png", files["1.png"]), ("a.png", files["2.png"])]
    path = packing.tar(tmp_path / "a.tar", members)
    found = scan(path)
    again = Counter(photo.fault for photo in found)
    assert again == {"": 2, "its name comes again": 1} and scan(path, found) == found
    unpacked = tmp_path / "unpacked"
    unpacked.mkdir()
    for name, data in members:
        (unpacked / name).write_bytes(data)
    assert scan(unpacked).digest == found.digest


@pytest.mark.parametrize("ending", ["tar.gz", "tgz", "tar.zst"])
def test_compressed_archives_and_wrong_texts_are_refused(tmp_path: Path, ending: str) -> None:
    with pytest.raises(UsageError, match="is compressed"):
        open_source(tmp_path / f"a.{ending}")
    for text, said in (
        (f"{tmp_path}/*.png", "a pattern is of .tar, .parquet, .arrow files"),
        ("ftp://host/photos", "no photos are read from ftp://"),
        ("file:///photos", "given as a plain path"),
    ):
        with pytest.raises(UsageError, match=said):
            open_source(text)
    for name in ("none.tar", "*.parquet", "none/*.tar"):
        with pytest.raises(LicError, match="no such folder" if "/" in name else "no file "):
            scan(tmp_path / name)
    with pytest.raises(LicError, match="no such folder of images"):
        scan(tmp_path / "none")


def test_a_folder_of_photos_and_tables_is_one_of_photos(files: dict[str, bytes], tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "0.png").write_bytes(files["0.png"])
    packing.parquet(tmp_path / "metadata.parquet", files)
    assert [photo.path for photo in scan(tmp_path)] == ["train/0.png"]
    (tmp_path / "train" / "0.png").unlink()
    with pytest.raises(LicError, match=r"no photos in .*\*\*/\*\.parquet, as the path"):
        scan(tmp_path)
    (tmp_path / "train").rmdir()
    assert len(scan(tmp_path)) == 6


def test_a_table_without_a_column_of_bytes_or_with_several_is_refused(files: dict[str, bytes], tmp_path: Path) -> None:
    path, photos = tmp_path / "a.parquet", packing.table(files)
    pq.write_table(photos.select(["label"]), path)
    with pytest.raises(UsageError, match=r"no column of bytes \(columns: label\)"):
        scan(path)
    raw = pa.array(files.values(), pa.large_binary())
    pq.write_table(photos.append_column("raw", raw), path)
    with pytest.raises(UsageError, match=r"several columns of bytes: image, raw \(set images.column\)"):
        scan(path)
    found = [scan(open_source(path, column=column)) for column in ("image", "raw")]
    assert [photo.path for photo in found[0]] == [f"{n:06d}-{n}.png" for n in range(6)]
    assert [photo.path for photo in found[1]] == [f"{n:06d}" for n in range(6)]
    assert [photo.digest for photo in found[0]] == [photo.digest for photo in found[1]]
    with pytest.raises(UsageError, match=r"no column 'label' of bytes \(columns of bytes: image, raw\)"):
        scan(open_source(path, column="label"))


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_rows_without_bytes_and_broken_tables_are_counted(files: dict[str, bytes], tmp_path: Path, kind: str) -> None:
    rows = {**files, "1.png": None, "2.png": b"", "3.png": b"text"}
    if kind == "parquet":
        path = packing.parquet(tmp_path / "a.parquet", rows)
    else:
        path = packing.save_to_disk(tmp_path / "hf", rows) / "data-00000-of-00001.arrow"
    found = scan(path)
    assert faults(found) == {
        "000001-1.png": "no bytes", "000002-2.png": "no bytes", "000003-3.png": "not an image",
    }  # fmt: skip
    assert scan(path, found) == found
    (path.parent / f"b.{kind}").write_bytes(b"no table" * 99)
    cut = path.read_bytes()
    (path.parent / f"c.{kind}").write_bytes(cut[: len(cut) // 2])
    found = scan(path.parent / f"*.{kind}")
    broken = {name: fault for name, fault in faults(found).items() if "/" not in name}
    assert broken == {f"b.{kind}": "not a table", f"c.{kind}": "truncated" if kind == "arrow" else "not a table"}


def test_compressed_arrow_is_refused(files: dict[str, bytes], tmp_path: Path) -> None:
    table, path = packing.table(files), tmp_path / "a.arrow"
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    assert len(scan(path)) == 6  # the file format is read as the stream is
    options = pa.ipc.IpcWriteOptions(compression="zstd")
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema, options=options) as writer:
        writer.write_table(table)
    with pytest.raises(UsageError, match="a.arrow is compressed"):
        scan(path)


def replace_tar(path: Path, files: dict[str, bytes]) -> Path:
    return packing.tar(path, files)


def replace_parquet(path: Path, files: dict[str, bytes]) -> Path:
    return packing.parquet(path, files)


@pytest.mark.parametrize(("write", "name"), [(replace_tar, "a.tar"), (replace_parquet, "a.parquet")])
def test_a_file_of_photos_that_was_replaced_after_the_scan_has_changed_photos(
    files: dict[str, bytes], tmp_path: Path, write: Callable[[Path, dict[str, bytes]], Path], name: str
) -> None:
    path = write(tmp_path / name, files)
    found, source = scan(path), open_source(path)
    assert statuses(found, source) == {"": 6}
    write(path, dict(reversed(files.items())))
    assert statuses(found, open_source(path)) == {"changed": 6}
    fresh = scan(path, found)
    assert statuses(fresh, open_source(path)) == {"": 6} and {p.digest for p in fresh} == {p.digest for p in found}
    crops = plan_crops(found, 64, 1, 0, 0.0).located(fresh)  # a store's samples, at the places of now
    assert not images.read_crops(open_source(path), crops, 64)[1].any()
    write(path, {"0.png": files["0.png"]})
    os.truncate(path, 3000)
    assert statuses(found, open_source(path)) == {"changed": 6}
    path.unlink()
    assert set(statuses(found, open_source(path))) <= {"changed", "unreadable"}


def test_a_stopped_scan_of_archives_goes_on_with_those_that_it_has_not_finished(
    files: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(4):
        packing.tar(tmp_path / f"{number}.tar", files)
    whole = scan(tmp_path / "*.tar")
    monkeypatch.setattr(manifest, "SAVE_SECONDS", 0.0)
    monkeypatch.setattr(manifest, "SAVE_SHARE", 1e9)
    saved: list[Manifest] = []

    def save(so_far: Manifest) -> None:
        saved.append(Manifest.from_bytes(so_far.to_bytes()))
        if len(saved) == 15:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        scan(tmp_path / "*.tar", save=save)
    assert {photo.path.partition("/")[0] for photo in saved[-1]} == {"0.tar", "1.tar"} and len(saved[-1]) == 12
    walked: list[str] = []
    source = open_source(tmp_path / "*.tar")
    walk = source.walk
    monkeypatch.setattr(source, "walk", lambda name, passed: walked.append(name) or walk(name, passed))
    assert scan(source, saved[-1]) == whole and walked == ["2.tar", "3.tar"]


def test_a_photo_set_aside_in_an_archive_is_read_again_and_no_other(
    files: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = packing.tar(tmp_path / "a.tar", files)
    with monkeypatch.context() as patch:  # as if its reader were not installed yet
        measure = images.measure

        def refuse(data: bytes, name: str) -> tuple[int, int]:
            if name == "2.png":
                raise images.PhotoError(name, "HEIC: needs pillow-heif")
            return measure(data, name)

        patch.setattr(images, "measure", refuse)
        found = scan(path)
    assert faults(found) == {"2.png": "HEIC: needs pillow-heif"}
    source, read = open_source(path), list[str]()
    monkeypatch.setattr(source, "walk", lambda *_: pytest.fail("read whole"))
    there = source.read
    monkeypatch.setattr(source, "read", lambda name, place: read.append(name) or there(name, place))
    assert faults(scan(source, found)) == {} and read == ["2.png"]


class NoRanges(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


class Refusing(Web):
    """Refuses all that is no page, once it is told to."""

    how = 200

    def do_GET(self) -> None:
        if type(self).how == 200 or self.path.endswith("/"):
            super().do_GET()
        else:
            self.send_error(type(self).how)


def test_web_servers_that_do_not_list_or_serve_parts_are_one_line(files: dict[str, bytes], tmp_path: Path) -> None:
    packing.tar(tmp_path / "a.tar", files)
    with web(tmp_path, NoRanges) as url:
        with pytest.raises(LicError, match="put them where ranges are served"):
            scan(f"{url}/a.tar")
        with pytest.raises(LicError, match="give a folder that the server lists"):
            scan(f"{url}/none/")
        with pytest.raises(LicError, match="no file .*none.tar"):
            scan(f"{url}/none.tar")


def test_a_source_that_stays_away_ends_the_work_and_marks_no_photo(
    files: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(remote.RETRY, "max_retries", 1)
    remote.object_store.cache_clear()
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    with web(tmp_path, Refusing) as url:
        source = open_source(url)
        found = scan(source)
        crops = plan_crops(found, 64, 1, 0, 0.0)
        for code, said in ((503, "503"), (403, "do the credentials allow it")):
            monkeypatch.setattr(Refusing, "how", code)
            with pytest.raises(LicError, match=said) as caught:
                images.read_crops(source, crops, 64)
            assert "\n" not in caught.value.message
            with pytest.raises(LicError, match=said):
                scan(source)
        monkeypatch.setattr(Refusing, "how", 200)
        (tmp_path / "0.png").unlink()
        (tmp_path / "1.png").write_bytes(files["2.png"])
        assert statuses(found, source) == {"": 4, "unreadable": 1, "changed": 1}
    remote.object_store.cache_clear()


class BadDay(Web):
    """Fails at first, breaks off, and then serves."""

    count = 0

    def do_GET(self) -> None:
        cls = type(self)
        cls.count += 1
        if self.path.endswith("/") or cls.count % 3 == 0:
            super().do_GET()
        elif cls.count % 3 == 1:
            self.send_error(503)
        else:
            self.send_response(200)
            self.send_header("Content-Length", "10000")
            self.end_headers()
            self.wfile.write(b"a part")
            self.close_connection = True


def test_requests_that_fail_or_break_off_on_a_bad_day_are_repeated(
    files: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    soon = {"init_backoff": timedelta(milliseconds=2), "max_backoff": timedelta(milliseconds=20), "base": 2}
    monkeypatch.setitem(remote.RETRY, "backoff", soon)
    remote.object_store.cache_clear()
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    with web(tmp_path, BadDay) as url:
        found = scan(url)
        assert found.digest == scan(tmp_path).digest and BadDay.count >= 18
        assert statuses(found, open_source(url)) == {"": 6}
    remote.object_store.cache_clear()
