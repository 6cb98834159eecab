"""Reading: what was written comes back, by sample, shard and mask, and is counted."""

from __future__ import annotations

import json
import pickle

import numpy as np
import pytest

from lic_dist.cache.inspect import describe, inspect, pace
from lic_dist.cache.reader import LatentCache
from lic_dist.errors import LicError
from tests.stores import (
    GEOMETRY,
    IDENTITY,
    RECORD,
    make_plan,
    synthetic,
)


def test_reading_gives_what_was_written(built):
    cache = pickle.loads(pickle.dumps(LatentCache.open(built)))
    assert len(cache) == cache.num_samples == 10 and cache.num_shards == 3
    expected = {
        name: np.concatenate([synthetic((4, 4, 2)[shard], shard)[name] for shard in range(3)])
        for name in ("pixels", "latents/z", "quantized/tcq8/k")
    }
    for array in expected.values():
        array[5] = 0
    loaded = cache.load(list(expected))
    for name, array in expected.items():
        np.testing.assert_array_equal(loaded[name], array)
        assert loaded[name].dtype == array.dtype
    picked = cache.load(["latents/z"], [9, 0, 5, 4, 0, -1])["latents/z"]
    np.testing.assert_array_equal(picked, expected["latents/z"][[9, 0, 5, 4, 0, 9]])
    np.testing.assert_array_equal(cache.load(["pixels"], slice(2, 9, 3))["pixels"], expected["pixels"][2:9:3])
    assert cache.load(["pixels"], [])["pixels"].shape == (0, 3, 32, 32)
    assert cache.shard(2)["pixels"].shape == (2, 3, 32, 32)
    np.testing.assert_array_equal(cache[-3]["quantized/tcq8/k"], expected["quantized/tcq8/k"][7])
    for bad in (lambda: cache[10], lambda: cache.load(["pixels"], [10]), lambda: cache.shard(3)):
        with pytest.raises(IndexError):
            bad()
    with pytest.raises(LicError, match="no array 'latents/w'"):
        cache.load(["latents/w"])


def test_load_takes_masks_and_refuses_what_are_no_numbers(built):
    cache = LatentCache.open(built)
    mask = cache.usable
    np.testing.assert_array_equal(
        cache.load(["latents/z"], mask)["latents/z"], cache.load(["latents/z"], np.flatnonzero(mask))["latents/z"]
    )
    with pytest.raises(IndexError):
        cache.load(["latents/z"], mask[:4])
    for wrong in ([1.9, 2.5], ["1"], np.array([0.0])):
        with pytest.raises(TypeError, match="samples have numbers"):
            cache.load(["latents/z"], wrong)
    with pytest.raises(TypeError, match="a sample has a number"):
        cache[1:3]


def test_samples_come_back_as_planned(built):
    cache = LatentCache.open(built)
    assert cache.samples["source"][3] == "ordner/ä3.png"
    assert cache.samples["digest"][3] == make_plan().crops[3].digest
    assert cache.samples["crop_x"].tolist() == list(range(0, 20, 2))
    assert cache.usable.tolist() == [n != 5 for n in range(10)]
    assert cache.indices(held_out=True).tolist() == [8, 9]
    assert cache.indices(held_out=False).tolist() == [0, 1, 2, 3, 4, 6, 7]
    assert cache.record_json("tcq8") == RECORD
    assert cache.identity == IDENTITY and cache.geometry == GEOMETRY
    with pytest.raises(LicError, match="it has: tcq8"):
        cache.record_json("sq")


def test_inspect_counts(built):
    report = inspect(built)
    json.dumps(report)
    counts = {name: report[name] for name in ("num_samples", "usable", "held_out", "shards_written")}
    assert counts == {"num_samples": 10, "usable": 9, "held_out": 2, "shards_written": 3}
    assert {name: count for name, count in report["faults"].items() if count} == {"truncated": 1}
    group = report["groups"]["tcq8"]
    assert group["bits_per_pixel"] == 1.0 and group["distortion"] == 0.5 and group["shards_written"] == 3
    assert group["identity"] == {"group": "tcq8", "cache": make_plan().fingerprint, "record": "cd" * 32}
    assert report["identity"] == IDENTITY and report["fingerprint"] == make_plan().fingerprint
    assert report["arrays"]["pixels"]["raw_bytes"] == 10 * 3 * 32 * 32
    on_disk = sum(file.stat().st_size for file in built.rglob("*") if file.is_file())
    assert report["bytes"] == on_disk > report["arrays"]["pixels"]["bytes"] > 0.9 * 30720
    assert group["histogram_samples"] == sum(group["bits_per_pixel_histogram"]["counts"]) == 9
    text = "\n".join(describe(report))
    for shown in ("10 samples", "3 of 3 shards", "1 truncated", "1.0000 bpp", "median 0.5", "mbt2018-mean"):
        assert shown in text


def test_inspect_tells_pace_and_eta_of_the_running_build():
    steady = [100.0 + 10 * n for n in range(6)]
    told = pace(steady, now=154.0, left=320, shard=32)
    assert told == {"samples_per_second": 3.2, "eta_seconds": pytest.approx(96.0), "idle_seconds": 4.0}
    resumed = [0.0, 1.0, *(5000.0 + 10 * n for n in range(3))]  # the pause of the night is no work
    assert pace(resumed, 5020.0, 32, 32)["samples_per_second"] == 3.2
    assert pace(steady, 1000.0, 320, 32)["eta_seconds"] is None  # stopped
    assert pace(steady, 151.0, 0, 32)["eta_seconds"] is None  # done
    for few in ([], [3.0], [3.0, 3.0]):
        assert pace(few, 5.0, 32, 32)["samples_per_second"] is None


def test_a_column_that_does_not_decode_names_its_shard(built):
    name = "quantized/tcq8/bits"
    cache = LatentCache.open(built)
    assert np.array_equal(cache.column(name, [2, 0]), np.concatenate([cache.shard(n, [name])[name] for n in (2, 0)]))
    file = built / name / "c/1"
    file.write_bytes(bytes(len(file.read_bytes())))
    with pytest.raises(LicError, match=f"shard 1 of .*, array {name}, does not decode"):
        LatentCache.open(built).column(name, [0, 1, 2])
