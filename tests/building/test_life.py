"""A store's whole life against a model, and what that has found: see lifelong.py."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import settings, stateful
from hypothesis.internal.conjecture import engine

from lic_dist.building import build as building
from lic_dist.cache.reader import LatentCache
from lic_dist.cache.verify import verify
from lic_dist.errors import LicError
from tests.building.jobs_in_memory import PHOTOS, URL, experiment, in_memory
from tests.building.lifelong import Life
from tests.memory import WORLD, Killed

NIGHTLY = settings.get_current_profile_name() == "nightly"
LIVES, STEPS = (1000, 500) if NIGHTLY else (5, 40)
if NIGHTLY:  # else a life ends after some 300 steps, and the simplest one is refused as too long
    engine.BUFFER_SIZE = stateful.BUFFER_SIZE = 64 * 1024

TestLife = Life.TestCase
TestLife.settings = settings(
    max_examples=LIVES, stateful_step_count=STEPS, deadline=None, derandomize=not NIGHTLY, print_blob=NIGHTLY
)
TestLife.pytestmark = [pytest.mark.slow, pytest.mark.timeout(0 if NIGHTLY else 300)]


@pytest.fixture()
def three_photos() -> Iterator[None]:
    """A store of three photos in memory."""
    with in_memory():
        WORLD.reset(0)
        PHOTOS.there.clear()
        PHOTOS.there.update({f"p{number}.png": number for number in range(3)})
        building.build(experiment("plain"))
        yield


def test_photos_that_moved_are_read_where_they_lie_now(three_photos: None) -> None:
    PHOTOS.there |= {"p5.png": 5, "p6.png": 6}
    WORLD.left = 14
    with pytest.raises(Killed):
        building.build(experiment("plain"), append=True)
    WORLD.left = None
    PHOTOS.there |= {"new/p5.png": PHOTOS.there.pop("p5.png"), "p6.png": 7, "new/p6.png": 6}  # a new photo in its place
    assert building.build(experiment("plain"), append=True).faults == {}
    cache = LatentCache.open(URL)
    assert cache.indices(held_out=False).size + cache.indices(held_out=True).size == 6
    assert {"p5.png", "p6.png"} <= {*cache.samples["source"].tolist()}  # the names of the plan

    read = cache.load(["pixels"])["pixels"]
    PHOTOS.there["elsewhere.png"] = PHOTOS.there.pop("p0.png")
    for key in [key for key in WORLD.objects if "/pixels/c/" in key]:
        del WORLD.objects[key]
    assert building.repair(experiment("plain"), verify(URL)) == 4 and verify(URL) == []
    assert np.array_equal(LatentCache.open(URL).load(["pixels"])["pixels"], read)


@pytest.mark.parametrize("scanned", [False, True])
def test_a_photo_that_is_gone_at_the_first_append_keeps_its_crop(three_photos: None, scanned: bool) -> None:
    """Its size is of the manifest, or where a later scan took its place follows from its samples."""
    before = LatentCache.open(URL).samples
    gone, kept = PHOTOS.there.pop("p1.png"), dict(WORLD.objects)
    PHOTOS.there["p5.png"] = 5
    if scanned:
        with pytest.raises(LicError, match="1 added, 1 vanished"):
            building.build(experiment("plain"))
    building.build(experiment("plain"), append=True)
    PHOTOS.there["p1.png"] = gone
    for key in [key for key in WORLD.objects if "/c/" in key and key in kept]:
        del WORLD.objects[key]
    building.repair(experiment("plain"), verify(URL))
    assert {key: WORLD.objects[key] for key in kept if "/c/" in key} == {key: kept[key] for key in kept if "/c/" in key}
    after = LatentCache.open(URL).samples
    for name in ("crop_y", "crop_x"):
        assert after[name][: len(before[name])].tolist() == before[name].tolist() and before[name].any()


def test_a_group_that_lost_its_identity_is_not_taken_for_another_models(three_photos: None) -> None:
    building.requantize(experiment("after"))
    plain, before = experiment("plain"), dict(WORLD.objects)
    renamed = plain.model_copy(update={"quantizer": plain.quantizer.model_copy(update={"group": "after"})})
    WORLD.objects[f"{URL}/quantized/after/zarr.json"] = b"{"
    for job in (
        lambda: building.repair(plain, verify(URL)),  # of the same record, by another model
        lambda: building.requantize(renamed),
    ):
        with pytest.raises(LicError, match="'after' of .* has lost its zarr.json, and its shards are of another model"):
            job()
    building.repair(experiment("after"), verify(URL))
    assert WORLD.objects == before


def test_a_group_whose_making_was_killed_is_not_given_to_another_model_by_a_repair(three_photos: None) -> None:
    WORLD.left = 2
    with pytest.raises(Killed):
        building.requantize(experiment("after"))
    WORLD.left = None
    building.repair(experiment("plain"), verify(URL))
    assert LatentCache.open(URL).groups == ("plain",)
    assert building.requantize(experiment("after")).shards_built == 2 and verify(URL) == []
