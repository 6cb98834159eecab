"""The plan of a manifest against a plain copy of what it has to give, and its columns against tuples."""

from __future__ import annotations

import dataclasses
import hashlib
import pickle
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lic_dist.cache.plan import Geometry, Plan
from lic_dist.data.crops import is_held_out, plan_crops, uniform
from lic_dist.data.manifest import Manifest, scan
from lic_dist.data.photo import Crop, Photo


def reference(photos: Iterable[Photo], crop: int, variations: int, seed: int, held_out: float | str) -> list[Crop]:
    usable = (photo for photo in photos if not photo.fault and min(photo.width, photo.height) >= crop)
    unique: dict[str, Photo] = {}
    for photo in usable:
        unique.setdefault(photo.digest, photo)
    keyed = []
    for photo in unique.values():
        for variation in range(variations):
            key = (seed, photo.digest, variation)
            sample = Crop(
                photo.path,
                photo.digest,
                int(uniform("y", *key) * (photo.height - crop + 1)),
                int(uniform("x", *key) * (photo.width - crop + 1)),
                uniform("flip", *key) < 0.5,
                is_held_out(photo, held_out),
            )
            keyed.append((sample.held_out, uniform("order", *key), sample))
    keyed.sort(key=lambda row: row[:2])
    return [sample for _, _, sample in keyed]


digests = st.integers(0, 12).map(lambda number: hashlib.sha256(bytes([number])).hexdigest())
paths = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=12)
sizes = st.one_of(st.integers(1, 40), st.integers(1, 100_000))
photo_rows = st.builds(
    Photo,
    st.one_of(paths, paths.map("valid/{}".format), paths.map("valid2/{}".format)),
    digests,
    sizes,
    sizes,
    st.integers(0, 2**40),
    st.integers(-(2**62), 2**62),
    st.sampled_from(["", "", "", "truncated"]),
)


@pytest.mark.slow
@given(
    st.lists(photo_rows, max_size=30),
    st.integers(1, 40),
    st.integers(1, 3),
    st.integers(-3, 2**70),
    st.one_of(st.sampled_from(["valid", "valid/", "valid//", "none"]), st.floats(0, 1)),
)
@settings(max_examples=300, deadline=None)
def test_the_plan_is_the_reference(
    photos: list[Photo], crop: int, variations: int, seed: int, held_out: float | str
) -> None:
    expected = reference(photos, crop, variations, seed, held_out)
    found = plan_crops(Manifest.of(photos), crop, variations, seed, held_out)
    assert list(found) == expected and len(found) == len(expected) and found == expected
    assert [dataclasses.astuple(one) for one in found[1:5]] == [dataclasses.astuple(one) for one in expected[1:5]]
    assert found[::-2] == tuple(expected[::-2]) and [found[row] for row in range(len(found))] == expected
    assert found.num_held_out == sum(one.held_out for one in expected)
    assert found.longest_source == max((len(one.source.encode()) for one in expected), default=0)
    for one in found[:1]:
        assert [type(value) for value in dataclasses.astuple(one)] == [str, str, int, int, bool, bool, str]


def test_crops_are_pure_functions_of_seed_digest_and_variation(photos: Path) -> None:
    scanned = scan(photos)
    crops = plan_crops(scanned, 64, 3, 7, "valid")
    assert crops == plan_crops(Manifest.of(reversed(list(scanned))), 64, 3, 7, "valid")
    assert len(crops) == 24 and len(set(crops)) == 24
    assert [crop.held_out for crop in crops] == [False] * 18 + [True] * 6
    assert crops != plan_crops(scanned, 64, 3, 8, "valid")
    sizes = {photo.path: (photo.height, photo.width) for photo in scanned}
    assert all(c.crop_y + 64 <= sizes[c.source][0] and c.crop_x + 64 <= sizes[c.source][1] for c in crops)


def test_photos_are_held_out_by_digest_and_copies_count_once(photos: Path) -> None:
    scanned = list(scan(photos))
    crops = plan_crops(Manifest.of([*scanned, *scanned]), 64, 2, 0, 0.4)
    assert len(crops) == 16
    by_photo: dict[str, set[bool]] = {}
    for crop in crops:
        by_photo.setdefault(crop.digest, set()).add(crop.held_out)
    assert all(len(parts) == 1 for parts in by_photo.values())


def test_a_plan_of_columns_is_that_of_a_tuple(photos: Path) -> None:
    crops = plan_crops(scan(photos), 64, 2, 0, "valid")
    columns, objects = (Plan(some, Geometry(64, 4, 4, 4, 1), 5, 1, {"a": 1}) for some in (crops, tuple(crops)))
    assert columns == objects and objects == columns and columns.source_bytes == objects.source_bytes == 11
    assert [tuple(columns.crops_of(shard)) for shard in range(4)] == [objects.crops_of(shard) for shard in range(4)]
    assert pickle.loads(pickle.dumps(columns)) == columns
    assert dataclasses.replace(columns, crops=plan_crops(scan(photos), 64, 2, 1, "valid")) != objects
    assert crops != 5 and crops[-1] == tuple(crops)[-1] and crops[np.int64(3)] == crops[3]
    with pytest.raises(IndexError):
        crops[len(crops)]
    assert crops.index(crops[5]) == 5 and crops[5] in crops


def test_crops_in_squares_are_neighbours() -> None:
    photos = [Photo(f"{one}.png", hashlib.sha256(bytes([one])).hexdigest(), 70 + one, 64 + 9 * one) for one in range(9)]
    crops = plan_crops(Manifest.of(photos), 32, 8, 5, 0.3, squares=True)
    assert len(crops) == 8 * 9 and len(plan_crops(Manifest.of(photos), 33, 8, 5, 0.3, squares=True)) == 8 * 8
    places = set()
    for first in range(0, len(crops), 4):
        four = crops[first : first + 4]
        assert len({(one.digest, one.flip, one.held_out) for one in four}) == 1
        y, x = four[0].crop_y, four[0].crop_x
        assert [(one.crop_y - y, one.crop_x - x) for one in four] == [(0, 0), (0, 32), (32, 0), (32, 32)]
        number = int(four[0].source.removesuffix(".png"))
        assert 0 <= y <= 9 * number and 0 <= x <= 6 + number
        places.add((four[0].digest, y, x))
    assert len(places) > 12 and len({one.flip for one in crops}) == 2
