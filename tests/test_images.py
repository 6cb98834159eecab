from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from lic_dist import images
from lic_dist.crops import plan_crops
from lic_dist.images import FAULTS, PhotoError
from lic_dist.manifest import scan

from .conftest import picture


def encoded(array: np.ndarray, kind: str, **options: object) -> bytes:
    out = io.BytesIO()
    Image.fromarray(array).save(out, kind, **options)
    return out.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
def test_lossless_formats_decode_to_the_same_pixels(kind: str) -> None:
    pixels = picture(1, 40, 60)
    options = {"lossless": True, "exact": True} if kind == "WEBP" else {}
    assert np.array_equal(images.decode(encoded(pixels, kind, **options)), pixels)


def test_grey_palette_alpha_cmyk_and_16_bit_become_rgb() -> None:
    grey = picture(2, 30, 30)[:, :, 0]
    assert np.array_equal(images.decode(encoded(grey, "PNG")), np.repeat(grey[:, :, None], 3, 2))
    sixteen = grey.astype(np.uint16) * 257
    assert np.array_equal(images.decode(encoded(sixteen, "PNG")), np.repeat(grey[:, :, None], 3, 2))
    alpha = np.dstack([picture(3, 30, 30), np.full((30, 30), 128, np.uint8)])
    assert np.array_equal(images.decode(encoded(alpha, "PNG")), alpha[:, :, :3])
    for mode in ("P", "CMYK"):
        out = io.BytesIO()
        Image.fromarray(picture(3, 30, 30)).convert(mode).save(out, "PNG" if mode == "P" else "JPEG")
        assert images.decode(out.getvalue()).shape == (30, 30, 3)


def test_exif_orientation_is_applied() -> None:
    pixels = picture(4, 20, 50)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned by 90 degrees
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG", exif=exif)
    assert np.array_equal(images.decode(out.getvalue()), np.rot90(pixels, -1))


@pytest.mark.parametrize(
    ("data", "fault"),
    [
        (b"", "not an image"),
        (b"no picture at all", "not an image"),
        (encoded(picture(5, 64, 64), "PNG")[:-900], "truncated"),
        (encoded(picture(5, 64, 64), "JPEG")[:-300], "truncated"),
    ],
)
def test_a_broken_photo_has_its_reason(data: bytes, fault: str) -> None:
    with pytest.raises(PhotoError) as caught:
        images.decode(data)
    assert caught.value.fault == fault and fault in FAULTS


@given(st.integers(0, 2**32 - 1), st.sampled_from(["PNG", "JPEG", "TIFF", "WEBP"]))
@settings(max_examples=150, deadline=None)
def test_flipped_bytes_never_crash_the_scan(seed: int, kind: str) -> None:
    generator = np.random.default_rng(seed)
    exif = Image.Exif()
    exif[0x0112] = 6
    data = bytearray(encoded(picture(1, 24, 24), kind, exif=exif))
    for position in generator.integers(0, len(data), 6):
        data[position] = generator.integers(256)
    try:
        assert images.decode(bytes(data)).ndim == 3
    except PhotoError as error:
        assert error.fault in FAULTS


def test_an_animation_and_a_bomb_are_set_aside(monkeypatch: pytest.MonkeyPatch) -> None:
    frames = [Image.fromarray(picture(seed, 16, 16)) for seed in range(3)]
    out = io.BytesIO()
    frames[0].save(out, "WEBP", save_all=True, append_images=frames[1:])
    with pytest.raises(PhotoError, match="animated"):
        images.decode(out.getvalue())
    monkeypatch.setattr(images, "LARGEST", 100)
    with pytest.raises(PhotoError, match="too large"):
        images.decode(encoded(picture(1, 20, 20), "PNG"))


def test_read_crops_cuts_flips_and_notices_a_changed_photo(tmp_path: Path) -> None:
    pixels = picture(9, 80, 90)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    Image.fromarray(picture(10, 80, 90)).save(tmp_path / "b.png")
    crops = plan_crops(scan(tmp_path), 64, 4, 0, 0.0)
    Image.fromarray(picture(11, 80, 90)).save(tmp_path / "b.png")
    read, status = images.read_crops(tmp_path, crops, 64)
    for crop, window, code in zip(crops, read, status, strict=True):
        if crop.source == "b.png":
            assert FAULTS[code] == "changed" and not window.any()
            continue
        expected = pixels[crop.crop_y : crop.crop_y + 64, crop.crop_x : crop.crop_x + 64]
        expected = expected[:, ::-1] if crop.flip else expected
        assert code == 0 and np.array_equal(window, expected.transpose(2, 0, 1))
