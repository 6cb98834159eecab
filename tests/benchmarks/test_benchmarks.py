"""The benchmarks: facts of theory that they must find, and the command."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from lic_dist.app.cli import app
from lic_dist.benchmarks import (
    building,
    data,
    engines,
    exhaustive,
    quantization,
    reading,
    search_parts,
    speed,
    theory,
    training,
    whole,
)
from lic_dist.benchmarks import cache as cache_bench
from lic_dist.benchmarks.untrained import untrained
from lic_dist.errors import LicError, UsageError
from lic_dist.quantization.adaptation import adaptation_rounds
from lic_dist.quantization.quantize import search
from lic_dist.quantization.trellis import CODE16, ECM8, SCALAR, VVC4, Trellis


@pytest.mark.slow
def test_the_gap_of_rounding_at_a_high_rate_is_that_of_theory() -> None:
    """pi e / 6 (1 + Delta^2 / 12): 1.53 dB in the limit. Trellises close part of it, more with more states."""
    sources = data.gaussian(64, 1024)
    steps = np.geomspace(0.2, 0.4, 6)
    curve = [
        theory._entropy_point(data.record_at_price("sq", theory.SCALAR, float(step), 1.0), sources) for step in steps
    ]
    step = np.sqrt(2 * np.pi * np.e) / 2**3.5
    expected = 10 * np.log10(np.pi * np.e / 6 * (1 + step**2 / 12))
    assert theory._gap_at(curve, 3.5) == pytest.approx(expected, abs=0.015)
    assert theory._gap_at(curve, 1.0) == float("inf")
    found = []
    for machine in (VVC4, ECM8, CODE16):
        points = [
            theory._entropy_point(data.record_at_price("tcq", machine, float(step), 0.5), sources)
            for step in np.geomspace(0.22, 0.34, 5)
        ]
        found.append(theory._gap_at(points, 3.0))
    assert 0.68 > found[0] > found[1] > found[2] > 0.4


def test_hull_between_two_points_is_their_mixture() -> None:
    points = [theory.Point(1.0, 0.1), theory.Point(0.5, 0.2), theory.Point(0.9, 0.2)]
    assert theory._hull_rate(points, 0.15) == pytest.approx(0.75, abs=1e-3)
    assert theory._hull_rate(points[:1], 0.3) == 1.0


@pytest.mark.slow
@pytest.mark.parametrize("machine", [VVC4, ECM8])
@pytest.mark.parametrize("price", [0.25, 1.0])
def test_the_candidates_lose_nothing_at_matched_statistics(machine: Trellis, price: float) -> None:
    sources, _ = data.mixture(12, 96)
    record = data.record_at_price("tcq", machine, 0.56, price)
    weight = record.lane_weights(12)
    k, cost = search(sources.r, sources.level, weight, record.step, record.y_tables, machine)
    for every in (False, True):
        plain = exhaustive.search(sources.r, sources.level, weight, record.step, record.y_tables, machine, every)
        assert np.array_equal(plain[1], cost)
        assert every or np.array_equal(plain[0], k)


def test_lanes_lose_cost_against_a_long_trellis_and_more_when_they_are_short() -> None:
    mixed, _ = data.mixture(24, 512)
    figures = theory.lanes(data.LatentSamples(mixed.r, mixed.level, np.full(12, 0.02, np.float32)))
    assert list(figures) == ["512", "256", "64"]
    assert 0 < figures["512"]["cost"] < figures["256"]["cost"] < figures["64"]["cost"] < 0.1


def test_cut_keeps_channels_together() -> None:
    values = np.arange(2 * 3 * 8, dtype=np.float32).reshape(6, 8)  # two pictures of three channels
    cut = data.LatentSamples(values, values.astype(np.uint8), np.ones(3, np.float32)).cut(4)
    assert cut.r[:, 0].tolist() == [0, 8, 16, 4, 12, 20, 24, 32, 40, 28, 36, 44]


@pytest.mark.slow
def test_every_arm_is_timed_beside_its_baselines() -> None:
    sources, _ = data.mixture(32, 128)
    made = speed.arms(sources, 0.56, 0.6)
    names = [arm.name for arm in made]
    assert names[:8] == ["sq", "deadzone", "rdoq", "tcq4", "tcq8", "tcq16", "tcq32", "tcq64"]
    assert [name for name in names if "baseline" in name][:2] == names[8:10]
    figures = speed.timed(made[4:5] + made[8:10], rounds=1, title="test")
    assert figures["tcq8"]["times_tcq8"] == 1 and all(row["ns"] > 0 for row in figures.values())
    reference = made[9].run()
    *_, record = adaptation_rounds(data.record_at_price("tcq", ECM8, 0.56, 0.6), [(sources.r, sources.level)], 2)
    assert reference[0].shape == (32, 128) and record.states == 8


def test_each_part_of_the_search_is_found_in_its_text() -> None:
    """A part that the search calls by another name would be timed as nothing."""
    whole = search_parts.text_without(set())
    for names in search_parts.PARTS.values():
        for name in names:
            assert len(search_parts.text_without({name})) < len(whole), name


@pytest.mark.slow
@pytest.mark.nightly
def test_the_command_prints_tables_and_writes_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(theory, "ROUNDS", 1)
    monkeypatch.setattr(theory, "QUANTIZERS", [one for one in theory.QUANTIZERS if one[1] in (SCALAR, ECM8)])
    out = tmp_path / "figures.json"
    parts = ["--part", "candidates", "--part", "lanes", "--part", "mixture", "--part", "speed"]
    result = CliRunner().invoke(app, ["bench", "quantization", *parts, "--quick", "--rounds", "1", "--json", str(out)])
    assert result.exit_code == 0, result.output
    figures = json.loads(out.read_text())
    assert set(figures) == {"machine", "quick", "candidates", "lanes", "mixture", "speed"}
    assert figures["mixture"]["tcq8"]["against_sq"] < -0.11 and "tcq32" in result.output
    assert figures["speed"]["memory_bits"] == {"4": 8, "8": 12, "16": 20, "32": 36, "64": 68}


def test_unknown_parts_and_small_pictures_are_one_line(photos: Path) -> None:
    with pytest.raises(UsageError, match="no part 'warp'"):
        quantization.bench(["warp"], None, 1, True)
    with pytest.raises(UsageError, match="no part 'warp'"):
        training.bench(["warp"], None, 1, True)
    with pytest.raises(LicError, match="no picture of 512x384"):
        data.real_latents(photos)


@pytest.fixture(scope="module")
def built_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Has the cache of 28 crops that several benchmarks build built once."""
    build_cache = reading.build_cache
    path = build_cache(None, tmp_path_factory.mktemp("bench"), 28)

    def copied(images: Path | None, folder: Path, crops: int, *model: str) -> Path:
        if model not in ((), (data.BASE,)):
            return build_cache(images, folder, crops, *model)
        assert images is None and crops == 28
        return Path(shutil.copytree(path, folder / path.name))

    with pytest.MonkeyPatch.context() as patch:
        for module in (reading, training):
            patch.setattr(module, "build_cache", copied)
        yield


@pytest.mark.slow
@pytest.mark.nightly
def test_a_cache_is_measured_on_disk_and_as_it_is_read(built_once: None) -> None:
    found = reading.size(None, 28)
    assert 1 < found["group_to_entropy_coded"] < 1.8 and 1 < found["z_to_entropy_coded"] < 1.6
    k = found["codecs"]["quantized/tcq8/k"]
    assert k["zstd, shuffled bits"]["part_of_raw"] < 0.8 * k["zstd, level 1"]["part_of_raw"]
    assert found["codecs"]["pixels"]["lossless WebP"]["part_of_raw"] < 0.5
    read = reading.loading(None, 28)
    assert read["amplification"] == 1.0 and read["whole_shards"]["pixels, zarr"] > 0
    for tables in (cache_bench._size_tables(found), cache_bench._loader_tables(read)):
        assert all(table.row_count for table in tables)


@pytest.mark.slow
@pytest.mark.nightly
def test_training_from_a_cache_is_measured_against_memory_and_against_the_loop(
    built_once: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(building, "N", 8)
    monkeypatch.setattr(building, "M", 12)
    monkeypatch.setattr(training, "QUICK", training.Extent(28, 1, 1))
    monkeypatch.setattr(training, "RECIPES", dict.fromkeys(("decoder", "decoder+hyper")))
    out = tmp_path / "figures.json"
    result = CliRunner().invoke(app, ["bench", "training", "--quick", "--rounds", "1", "--json", str(out)])
    assert result.exit_code == 0, result.output
    figures = json.loads(out.read_text())
    assert set(figures) == {"machine", "quick", "feeding", "in-loop"}
    assert list(figures["feeding"]["recipes"]) == ["decoder", "decoder+hyper"]
    for arms in figures["feeding"]["recipes"].values():
        assert set(arms) == {"tensors in memory", "samples in RAM", "stream of shards"}
        assert arms["tensors in memory"]["ratio"] == 1 and all(one["ratio"] > 0 for one in arms.values())
    models = figures["in-loop"]["models"]
    assert list(models) == ["the shipped model, N = 96, M = 192", "untrained mbt2018-mean, N = 8, M = 12"]
    for one in models.values():
        assert set(one) == {"encode", "search", "step", "in_loop", "cache", "speedup", "bound", "of_bound"}
        assert one["bound"] > 1 and min(one.values()) > 0 and one["in_loop"] > one["encode"] + one["search"]


@pytest.mark.slow
def test_a_plan_is_measured_in_a_process_of_its_own() -> None:
    found = building.planning(20_000)
    assert found["photos"] == 20_000 and 100 < found["bytes_a_photo"] < 20_000 and found["seconds_a_shard"] < 0.1
    with pytest.raises(UsageError, match="there are build, loader, size, memory, plan, append"):
        cache_bench.bench(["speed"], None, 64, True)


@pytest.mark.slow
def test_the_codec_is_timed_beside_compressais(base: Path, photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "b.json"
    command = ["bench", "codec", "--model", str(base), "--images", str(photos / "valid"), "--rounds", "1"]
    assert CliRunner().invoke(app, [*command, "--megapixels", "1.3", "--json", str(out)]).exit_code == 0
    found = json.loads(out.read_text())
    (of_size,) = found["whole"].values()
    assert list(of_size) == ["768x512", "1396x931"]
    for size in of_size.values():
        for way in ("encode", "decode"):
            one = size[way]
            assert one["range"][0] <= one["ratio"] <= one["range"][1] and min(one["bare"], one["two_threads"]) > 0
    (figures,), (coders,) = found["models"].values(), found["coder"].values()
    theirs, networks, sq, tcq8, integers = figures.values()
    assert theirs["encode_ratio"] == theirs["decode_ratio"] == networks["encode_of_networks"] == 1
    for one in (theirs, networks, sq, tcq8):
        assert 0 < one["decode_rest"] < one["decode_seconds"] and 0 < one["encode_rest"] < one["encode_seconds"]
    assert networks["payload_bytes"] == 0 and theirs["flush_bytes"] == sq["flush_bytes"]
    assert sq["payload_bytes"] == pytest.approx(theirs["payload_bytes"], rel=0.005)
    assert integers["bpp"] == pytest.approx(tcq8["bpp"], rel=0.01)
    one, interleaved, compressais, *_ = coders["arms"].values()
    assert one["bytes"] == compressais["bytes"] < interleaved["bytes"]
    assert all(arm[way] > 0 for arm in coders["arms"].values() for way in ("encode", "decode"))


def test_pictures_are_mirrored_to_a_size_and_put_side_by_side() -> None:
    some = [np.full((40, 30, 3), value, np.uint8) for value in (1, 2, 3)]
    some[0][0, 0] = 9
    large = whole.mirrored(some[0], 100, 70)
    assert large.shape == (100, 70, 3) and (large == 9).all(2).sum() >= 2
    assert np.array_equal(whole.mirrored(large, 50, 20), large[25:75, 25:45])
    made = whole.mosaic(some[1:], 50, 61)
    assert made.shape == (50, 61, 3) and made[::17, ::21, 0].tolist() == [[2, 3, 2], [3, 2, 3], [2, 3, 2]]


def test_random_weights_of_a_size_give_plausible_latents() -> None:
    made = untrained("mbt2018:8:16")
    with torch.no_grad():
        y = made.codec.analyse(torch.rand(1, 3, 256, 256))
    assert y.shape[1] == made.spec.M == 16
    assert y.std((0, 2, 3)) == pytest.approx(0.3, rel=0.15) and y.mean((0, 2, 3)).abs().max() < 0.1
    with pytest.raises(UsageError, match="NAME:N:M"):
        untrained("mbt2018")


@pytest.mark.slow
def test_an_append_is_measured_beside_its_build() -> None:
    found = building.growing(70, 7, 2)
    assert found["build"]["shards"] == 2 and [one["shards"] for one in found["appends"]] == [1, 1]
    assert found["least"] == 0.1 and found["wall"] > 0 and found["cpu"] > 0
    (table,) = cache_bench._append_tables(found)
    assert table.row_count == 3


def test_engines_are_told_beside_each_other_and_one_that_hangs_is_infinite() -> None:
    handed = dict.fromkeys(engines.ENGINES, {"start": 4.0, "rate": 30.0, "mb": 900.0})
    lost = {name: {"rate_before": 8.0, "seconds": taken, "share": 30.0}
            for name, taken in zip(engines.ENGINES, (33.0, float("inf")), strict=True)}  # fmt: skip
    tables = cache_bench._engine_tables({"handing": handed, "losing": lost})
    assert [table.row_count for table in tables] == [2, 2]
    assert list(tables[1].columns[-1].cells) == ["1.10", "inf"]


@pytest.mark.slow
def test_calibration_beside_the_pattern_search_is_one_table(tmp_path: Path) -> None:
    out = tmp_path / "figures.json"
    ran = CliRunner().invoke(app, ["bench", "calibration", "--quick", "--json", str(out)])
    assert ran.exit_code == 0, ran.output
    (found,) = json.loads(out.read_text())["quantizers"].values()
    assert found["search"]["trials"] < found["pattern_search"]["trials"] and found["search"]["seconds"] > 0
