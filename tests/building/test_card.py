"""A store's card, photos that look alike, metrics of a build, and what a plan costs."""

from __future__ import annotations

import io
import shutil
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from lic_dist.app.commands import exports as commands
from lic_dist.building.card import card, find_alike
from lic_dist.building.estimate import Estimate, price
from lic_dist.building.metrics import BuildMetrics
from lic_dist.cache.reader import LatentCache
from lic_dist.data.likeness import BITS, NEAR, difference_hash, hashes, near_pairs
from lic_dist.data.sources.opening import open_source
from lic_dist.errors import UsageError
from tests.conftest import picture
from tests.stores import experiment


def test_a_picture_in_another_size_or_quality_is_near_and_another_is_not() -> None:
    pixels = [picture(seed, 144, 200) for seed in range(6)]
    bits = np.array([difference_hash(one) for one in pixels])
    assert bits.shape == (6, BITS) and bits.dtype == bool
    assert near_pairs(bits) == [] and near_pairs(bits, near=BITS)[0][2] > 2 * NEAR
    image, file = Image.fromarray(pixels[3]), io.BytesIO()
    image.resize((100, 72), Image.Resampling.LANCZOS).save(file, "JPEG", quality=50)
    smaller = difference_hash(np.asarray(Image.open(file)))
    assert [pair[:2] for pair in near_pairs(bits, smaller[None])] == [(3, 0)]
    grey = difference_hash(np.asarray(image.convert("L")))
    assert near_pairs(np.array([grey, grey]))[0] == (0, 1, 0)
    values = np.tile(np.arange(17, dtype=np.uint8), (16, 1))  # each less than its right neighbour
    assert difference_hash(values).all() and not difference_hash(values[:, ::-1].copy()).any()


def test_a_card_counts_names_and_lists_what_looks_alike(made: Path, photos: Path, tmp_path: Path) -> None:
    mine, test = tmp_path / "photos", tmp_path / "test"
    shutil.copytree(photos, mine)
    shutil.copy(mine / "train" / "0.png", mine / "valid" / "6.png")  # as if the folder held it twice
    test.mkdir()
    Image.open(photos / "train" / "2.png").resize((300, 230)).save(test / "a|<b>.jpg", quality=60)
    Image.fromarray(picture(77, 120, 120)).save(test / "other.png")
    cache = LatentCache.open(made)
    alike = find_alike(cache, open_source(mine), open_source(test))
    assert alike.read == 8 and alike.tested == 2
    assert alike.duplicates == [("train/0.png", "valid/6.png", 0)]
    assert [pair[:2] for pair in alike.leaks] == [("train/2.png", "a|<b>.jpg")]
    text = card(cache, ["cc0-1.0", "cc-by-4.0"], alike, "my photos")
    front, body = text.removeprefix("---\n").split("---\n", 1)
    told = yaml.safe_load(front)
    assert told["license"] == ["cc0-1.0", "cc-by-4.0"] and told["pretty_name"] == "my photos"
    assert told["size_categories"] == ["n<1K"] and "lic_dist" in told["tags"]
    for line in (
        "| samples that can be used | 24 of 24 |", "| of these, held out | 6 |", "| photos | 8 |",
        "| crops | 64x64 pixels |", "| train | 6 | 18 |", "| valid | 2 | 6 |", "| architecture | mbt2018-mean |",
        "| train/0.png | valid/6.png | 0 |", f"at most {NEAR} bits", "1 pair of 2 test pictures.",
        "| train/2.png | a\\|&lt;b>.jpg | ", f"`{cache.fingerprint}`",
    ):  # fmt: skip
        assert line in body, line
    assert "| tcq8 | tcq | 0.05 |" in body
    plain = card(cache)
    assert "license" not in plain and "no photos were at hand" in plain and "not told" in plain
    assert "Not looked for: no test folder" in card(cache, alike=find_alike(cache, open_source(mine)))
    with pytest.raises(UsageError, match="no photo of .* can be read in"):
        find_alike(cache, open_source(test))


def test_the_command_writes_a_card(made: Path, base: Path, photos: Path, tmp_path: Path, capsys) -> None:
    file = tmp_path / "x.yaml"
    asked = experiment(base, photos, made)
    file.write_text(yaml.safe_dump(asked.model_dump(mode="json", exclude_none=True, exclude={"sweep"})))
    commands.card(str(file), test=photos / "valid", licence=["cc0-1.0"], file=tmp_path / "new" / "README.md")
    said = capsys.readouterr().out
    assert "24 samples, 0 near-duplicate pairs, 2 leaks" in said
    assert (tmp_path / "new" / "README.md").read_text().startswith("---\nlicense: cc0-1.0\n")
    commands.card(str(made))
    assert capsys.readouterr().out.startswith("---\npretty_name:")
    with pytest.raises(UsageError, match="--test compares photos"):
        commands.card(str(made), test=photos)


def test_photos_that_cannot_be_read_are_left_out(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"no picture")
    shutil.copy(photos / "train" / "0.png", tmp_path / "b.png")
    names, bits = hashes(open_source(tmp_path), ["a.png", "b.png", "gone.png"])
    assert names == ["b.png"] and bits.shape == (1, BITS)
    assert hashes(open_source(tmp_path), [])[1].shape == (0, BITS)


def test_a_build_counts_for_prometheus_where_ray_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple] = []

    class Metric:
        def __init__(self, name: str, description: str, tag_keys: tuple[str, ...]) -> None:
            self.name, self.keys = name, set(tag_keys)

        def inc(self, value: float, tags: dict[str, str]) -> None:
            assert value > 0 and set(tags) == self.keys
            told.append((self.name, value, tags["work"]))

        set = inc

    ray, metrics = types.ModuleType("ray"), types.ModuleType("ray.util.metrics")
    ray.is_initialized = lambda: started  # type: ignore[attr-defined]
    metrics.Counter = metrics.Gauge = Metric  # type: ignore[attr-defined]
    for name, module in (("ray", ray), ("ray.util", types.ModuleType("ray.util")), ("ray.util.metrics", metrics)):
        monkeypatch.setitem(sys.modules, name, module)
    counted = BuildMetrics("a.zarr", "build")
    started = False
    counted.add(8, 3, 1)
    assert told == []
    started = True
    counted.add(8, 3, 0)
    assert told[:-1] == [
        (f"lic_dist_{name}", value, "build") for name, value in (("shards", 1), ("samples", 8), ("photos", 3))
    ]
    assert told[-1][0] == "lic_dist_samples_per_second"
    counted.add(8, 3, 2)
    assert ("lic_dist_set_aside", 2, "build") in told
    monkeypatch.delitem(sys.modules, "ray")
    counted.add(8, 3, 2)


def test_a_price_says_what_it_assumes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    sizes = {"path": "a", "fingerprint": "f", "samples": 1, "held_out": 0, "shards": 1, "bytes": {}, "free": None}
    here = Estimate(**sizes, seconds={"read": 3600.0, "search": 7200.0}, workers={"read": 1, "search": 2}, cores=3)
    assert here.machine_hours == 1.0
    assert price(here, 2.5).startswith("price, about 2.50: 1 machine hours at 2.5 (this machine until the build ends")
    afar = Estimate(**sizes, seconds={"read": 3600.0, "search": 10800.0}, workers={"read": 1, "search": 9}, cores=None)
    assert afar.machine_hours == 1.0 and "every core at work" in price(afar, 2)
