"""Photos in buckets, on web servers, in archives and tables: the same photos as in a folder, and what can be wrong."""

from __future__ import annotations

import pickle
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lic_dist.data import images
from lic_dist.data.crops import plan_crops
from lic_dist.data.manifest import Manifest, scan
from lic_dist.data.photo import FAULTS
from lic_dist.data.source import PhotoSource
from lic_dist.data.sources.opening import open_source
from lic_dist.errors import LicError
from tests.conftest import picture
from tests.data import packing
from tests.data.remote import Web, bucket, web

Put = Callable[[str, bytes | None], None]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nine photos in two folders, the last a copy of the first. Not to be changed."""
    folder = tmp_path_factory.mktemp("sources") / "photos"
    for part, numbers in (("train", range(6)), ("valid", range(6, 9))):
        (folder / part).mkdir(parents=True)
        for number in numbers:
            Image.fromarray(picture(number % 8, 70 + number, 90)).save(folder / part / f"{number}.png")
    (folder / "valid" / "8.png").write_bytes((folder / "train" / "0.png").read_bytes())
    return folder


@pytest.fixture(scope="module")
def s3() -> Iterator[tuple[dict[str, str], Put]]:
    pytest.importorskip("moto.server")
    pytest.importorskip("obstore")
    with bucket() as found:
        yield found


Made = tuple[PhotoSource, Callable[[str], str]]  # a source, and how it calls a photo of the folder


def one_tar(folder: Path, tmp_path: Path) -> PhotoSource:
    others = {"train/0.json": b"{}", "train/.hidden.png": b"", "notes": b"none"}
    return open_source(packing.tar(tmp_path / "photos.tar", packing.files_of(folder) | others))


def tars(folder: Path, tmp_path: Path) -> PhotoSource:
    files = list(packing.files_of(folder).items())
    for number in range(3):
        packing.tar(tmp_path / "set" / f"{number}.tar", files[number::3])
    return open_source(tmp_path / "set" / "*.tar")


def small_groups(folder: Path, tmp_path: Path) -> PhotoSource:
    return open_source(packing.parquet(tmp_path / "a.parquet", packing.files_of(folder)))


def uncompressed(folder: Path, tmp_path: Path) -> PhotoSource:
    return open_source(packing.parquet(tmp_path / "a.parquet", packing.files_of(folder), compression="none"))


def hugging_face(folder: Path, tmp_path: Path) -> PhotoSource:
    files = packing.files_of(folder)
    for part in ("train", "valid"):
        own = {name: data for name, data in files.items() if name.startswith(part)}
        packing.save_to_disk(tmp_path / "hf" / part, own)
    (tmp_path / "hf" / "dataset_dict.json").write_text('{"splits": ["train", "valid"]}')
    (tmp_path / "hf" / "train" / "cache-0123.arrow").write_bytes(b"of a map")
    return open_source(tmp_path / "hf")


LOCAL = (one_tar, tars, small_groups, uncompressed, hugging_face)


def same_photos(source: PhotoSource, folder: Path) -> Manifest:
    """Assert that a source has the photos of a folder, and gives the same crops."""
    found, expected = scan(source), scan(folder)
    assert sorted(photo.digest for photo in found) == sorted(photo.digest for photo in expected)
    assert len(found.duplicates) == 1
    sizes = {photo.digest: (photo.width, photo.height, photo.bytes) for photo in expected}
    assert all((photo.width, photo.height, photo.bytes) == sizes[photo.digest] for photo in found)
    theirs, ours = (plan_crops(one, 64, 2, 0, 0.3) for one in (expected, found))
    assert [crop.digest for crop in ours] == [crop.digest for crop in theirs]
    pixels, status = images.read_crops(open_source(folder), theirs, 64)
    reader = pickle.loads(pickle.dumps(source.absolute()))  # as a worker gets it
    again, of_source = images.read_crops(reader, ours, 64)
    assert not status.any() and not of_source.any() and np.array_equal(pixels, again)
    assert scan(source, found) == found and Manifest.from_bytes(found.to_bytes()) == found
    return found


@pytest.mark.parametrize("make", LOCAL)
def test_photos_in_files_are_those_of_a_folder(
    make: Callable[[Path, Path], PhotoSource], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    found = same_photos(make(folder, tmp_path), folder)
    if make is one_tar:
        assert found.digest == scan(folder).digest  # and so the identity of a store


@pytest.mark.parametrize("what", ["folder", "tar", "parquet", "arrow"])
def test_photos_in_a_bucket_are_those_of_a_folder(
    s3: tuple[dict[str, str], Put], folder: Path, tmp_path: Path, what: str
) -> None:
    options, put = s3
    if what == "folder":
        for name, data in packing.files_of(folder).items():
            put(f"places/{name}", data)
        source = open_source("s3://photos/places", options)
        assert same_photos(source, folder).digest == scan(folder).digest
        return
    files = packing.files_of(folder)
    made = {
        "tar": lambda: packing.tar(tmp_path / "0.tar", files),
        "parquet": lambda: packing.parquet(tmp_path / "0.parquet", files, compression="none"),
        "arrow": lambda: packing.save_to_disk(tmp_path / "hf", files) / "data-00000-of-00001.arrow",
    }[what]()
    put(f"{what}/0.{what}", made.read_bytes())
    for url in (f"s3://photos/{what}", f"s3://photos/{what}/*.{what}"):
        same_photos(open_source(url, options), folder)


@pytest.mark.slow
def test_photos_that_a_web_server_lists_are_those_of_a_folder(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "with space").symlink_to(folder)
    packing.tar(tmp_path / "photos.tar", packing.files_of(folder))
    (tmp_path / "list.txt").write_text("".join(f"with space/{name}\n" for name in packing.files_of(folder)))
    with web(tmp_path) as url:
        assert same_photos(open_source(f"{url}/with%20space/"), folder).digest == scan(folder).digest
        same_photos(open_source(f"{url}/list.txt"), folder)
        assert same_photos(open_source(f"{url}/photos.tar"), folder).digest == scan(folder).digest


def test_of_photos_in_a_bucket_only_those_with_another_etag_are_read_again(
    s3: tuple[dict[str, str], Put], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options, put = s3
    files = packing.files_of(folder)
    for name, data in files.items():
        put(f"again/{name}", data)
    found = scan(open_source("s3://photos/again", options))
    put("again/train/1.png", files["train/2.png"])
    put("again/train/3.png", files["train/3.png"])  # the same content: the same etag
    put("again/train/4.png", None)
    source, read = open_source("s3://photos/again", options), list[str]()
    there = source.read
    monkeypatch.setattr(source, "read", lambda name: read.append(name) or there(name))
    fresh = scan(source, found)
    assert read == ["train/1.png"] and len(fresh) == 8
    crops = plan_crops(found, 64, 1, 0, 0.0)
    status = images.read_crops(open_source("s3://photos/again", options), crops, 64)[1]
    assert {crop.source: FAULTS[code] for crop, code in zip(crops, status, strict=True) if code} == {
        "train/1.png": "changed", "train/4.png": "unreadable",
    }  # fmt: skip


def test_what_a_bucket_does_not_have_is_one_line(s3: tuple[dict[str, str], Put]) -> None:
    options, _ = s3
    for where, said in (
        ("s3://nowhere/photos", "does the bucket exist"),
        ("s3://nowhere/a.tar", "does the bucket exist|no file s3://nowhere/a.tar"),
        ("s3://photos/none", "no photos in s3://photos/none"),
        ("s3://photos/none/a.tar", "no file s3://photos/none/a.tar"),
        ("s3://photos/none/*.parquet", r"no file s3://photos/none/\*.parquet"),
    ):
        with pytest.raises(LicError, match=said) as caught:
            scan(open_source(where, options))
        assert "\n" not in caught.value.message


class Meeting(Web):
    """Answers when as many requests are there as are to meet."""

    meet: threading.Barrier | None = None

    def do_GET(self) -> None:
        if (meet := type(self).meet) is not None:
            meet.wait(60)
        super().do_GET()


@pytest.mark.slow
def test_photos_behind_a_network_are_read_at_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with web(folder, Meeting) as url:
        source = open_source(url)
        crops = plan_crops(scan(source), 64, 1, 0, 0.0)
        monkeypatch.setattr(Meeting, "meet", threading.Barrier(len(crops)))
        assert len(crops) == 8 and not images.read_crops(source, crops, 64)[1].any()
