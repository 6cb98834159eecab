"""Every kind of photo is converted rightly or recorded with its reason, by the scan and by the crops alike."""

from __future__ import annotations

import hashlib
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from lic_dist.data import images
from lic_dist.data.manifest import scan
from lic_dist.data.photo import FAULTS, Crop
from lic_dist.data.sources.opening import open_source
from tests.data.files import RGB, heic
from tests.data.kinds import KINDS, decoded_size, outcome


@pytest.mark.parametrize("name", KINDS)
def test_a_photo_is_converted_or_recorded(name: str, tmp_path: Path) -> None:
    kind = KINDS[name]
    (tmp_path / f"x.{kind.suffix}").write_bytes(kind.data)
    Image.fromarray(RGB).save(tmp_path / "good.png")
    row = next(photo for photo in scan(tmp_path) if photo.path != "good.png")
    crop = Crop(row.path, hashlib.sha256(kind.data).hexdigest(), 3, 4, False, False)
    (window,), (status,) = images.read_crops(open_source(tmp_path), [crop], 32)
    assert (row.fault, FAULTS[status], row.digest) == (kind.fault, kind.fault, crop.digest)
    if kind.pixels is None:
        assert (row.width, row.height) == (0, 0) and not window.any()
        return
    assert (row.height, row.width) == kind.pixels.shape[:2]
    pixels = images.read(tmp_path / row.path)
    assert pixels.dtype == np.uint8 and pixels.shape == kind.pixels.shape
    assert np.abs(pixels - kind.pixels.astype(float)).max() <= kind.bound
    assert np.array_equal(window, pixels[3:35, 4:36].transpose(2, 0, 1))
    kept = images.read(tmp_path / row.path, keep_grey=True)
    assert (kept.ndim == 2) == ("grey" in name or name == "one bit")
    assert np.array_equal(np.repeat(kept[:, :, None], 3, 2) if kept.ndim == 2 else kept, pixels)


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_the_cheap_look_sees_what_decoding_sees(name: str) -> None:
    suffix, data = KINDS[name][:2]
    assert outcome(images.measure, data, suffix) == outcome(decoded_size, data, suffix)
    for cut in random.Random(name).sample(range(len(data)), min(len(data), 3 if name == "80 MB of text" else 25)):
        assert outcome(images.measure, data[:cut], suffix) == outcome(decoded_size, data[:cut], suffix)


@given(st.sampled_from([name for name in KINDS if "bomb" not in name]), st.integers(0, 2**32 - 1), st.integers(1, 6))
@settings(max_examples=300, deadline=None)
def test_damage_never_crashes_and_the_cheap_look_sees_it_too(name: str, seed: int, count: int) -> None:
    generator, data, suffix = np.random.default_rng(seed), bytearray(KINDS[name].data), KINDS[name].suffix
    for position in generator.integers(0, len(data), count) if data else ():
        data[position] = generator.integers(256)
    found = outcome(images.measure, bytes(data), suffix)
    assert found == outcome(decoded_size, bytes(data), suffix)
    assert not isinstance(found, str) or found in FAULTS


def test_what_a_reader_says_of_metadata_is_not_shown(tmp_path: Path) -> None:
    for number, kind in enumerate(KINDS.values()):
        (tmp_path / f"{number}.{kind.suffix}").write_bytes(kind.data)
    script = """
import pathlib, sys
from lic_dist.data import images
for path in pathlib.Path(sys.argv[1]).iterdir():
    try:
        images.read(path)
    except images.PhotoError:
        pass
"""
    ended = subprocess.run([sys.executable, "-c", script, tmp_path], capture_output=True, text=True)
    assert (ended.stderr, ended.returncode) == ("", 0)


def test_heic_is_read_with_pillow_heif_and_named_without(monkeypatch: pytest.MonkeyPatch) -> None:
    data = heic()
    for one in (data, data.replace(b"MM\0*", b"zzzz")):
        for name in ("x.heic", "x.jpg"):
            assert np.abs(images.decode(one, name) - RGB.astype(float)).max() <= 12
    assert outcome(images.measure, data[:-300]) == outcome(decoded_size, data[:-300]) == "truncated"
    monkeypatch.setattr(images, "reads_heif", lambda: False)
    assert outcome(images.measure, data) == outcome(decoded_size, data) == "HEIC: needs pillow-heif"
