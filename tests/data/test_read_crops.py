"""Crops as they are read: cut, flipped, and nothing of a photo that changed, lies or is too small."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lic_dist.data import images
from lic_dist.data.crops import plan_crops
from lic_dist.data.manifest import scan
from lic_dist.data.photo import FAULTS, Crop
from lic_dist.data.sources.opening import open_source
from lic_dist.errors import LicError
from tests.conftest import picture
from tests.data.files import HEIGHT, RGB, WIDTH, png, rows_of


def test_a_png_that_lies_under_right_checksums_is_found_by_its_crops(tmp_path: Path) -> None:
    data = png(WIDTH, HEIGHT, 8, 2, rows_of(RGB)[:-500])
    (tmp_path / "x.png").write_bytes(data)
    crops = plan_crops(scan(tmp_path), 32, 1, 0, 0.0)
    assert [FAULTS[code] for code in images.read_crops(open_source(tmp_path), crops, 32)[1]] == ["damaged"]


def test_a_photo_smaller_than_a_crop_gives_none(tmp_path: Path) -> None:
    Image.fromarray(RGB).save(tmp_path / "small.png")
    Image.fromarray(picture(2, 64, 64)).save(tmp_path / "large.png")
    scanned = scan(tmp_path)
    assert [crop.source for crop in plan_crops(scanned, 64, 2, 0, 0.0)] == ["large.png"] * 2
    crops = [Crop(photo.path, photo.digest, 0, 0, False, False) for photo in scanned]
    read, status = images.read_crops(open_source(tmp_path), crops, 64)
    assert [FAULTS[code] for code in status] == ["", "smaller than a crop"] and not read[1].any()


def test_a_file_that_cannot_be_read_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "x.png").mkdir()
    for name in ("x.png", "none.png", "n" * 300):
        with pytest.raises(LicError, match="unreadable"):
            images.read(tmp_path / name)
        crop = Crop(name, "", 0, 0, False, False)
        assert FAULTS[images.read_crops(open_source(tmp_path), [crop], 32)[1][0]] == "unreadable"


def test_read_crops_cuts_flips_and_notices_a_changed_photo(tmp_path: Path) -> None:
    pixels = picture(9, 80, 90)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    Image.fromarray(picture(10, 80, 90)).save(tmp_path / "b.png")
    crops = plan_crops(scan(tmp_path), 64, 4, 0, 0.0)
    Image.fromarray(picture(11, 80, 90)).save(tmp_path / "b.png")
    read, status = images.read_crops(open_source(tmp_path), crops, 64)
    for crop, window, code in zip(crops, read, status, strict=True):
        if crop.source == "b.png":
            assert FAULTS[code] == "changed" and not window.any()
            continue
        expected = pixels[crop.crop_y : crop.crop_y + 64, crop.crop_x : crop.crop_x + 64]
        expected = expected[:, ::-1] if crop.flip else expected
        assert code == 0 and np.array_equal(window, expected.transpose(2, 0, 1))


def test_samples_of_two_photos_at_one_path_are_not_taken_for_each_other(tmp_path: Path) -> None:
    Image.fromarray(pixels := picture(9, 64, 64)).save(tmp_path / "a.png")
    (good,) = plan_crops(scan(tmp_path), 64, 1, 0, 0.0)
    before = Crop("a.png", "ab" * 32, 0, 0, False, False)  # what lay there when it was planned
    for crops in ([good, before], [before, good]):
        read, status = images.read_crops(open_source(tmp_path), crops, 64)
        for crop, window, code in zip(crops, read, status, strict=True):
            assert FAULTS[code] == ("" if crop is good else "changed")
            assert window.any() == (crop is good) and (crop is before or window.sum() == pixels.sum())
