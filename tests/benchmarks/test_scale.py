"""The benchmark of growth: exponents of known laws, stores and photos by plan, and the command."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from lic_dist.app.cli import app
from lic_dist.benchmarks import growth, planned, scale
from lic_dist.benchmarks.growth import Cost, exponent
from lic_dist.cache import store
from lic_dist.cache.reader import LatentCache
from lic_dist.cache.verify import verify
from lic_dist.errors import UsageError

SIZES = [float(round(10**one)) for one in np.arange(3, 6.1, 0.5)]


def noisy(law: Any, deviation: float = 0.05) -> dict[float, list[float]]:
    generator = np.random.default_rng(0)
    return {n: (law(n) * np.exp(deviation * generator.standard_normal(3))).tolist() for n in SIZES}


@pytest.mark.slow
def test_a_fixed_cost_does_not_hide_growth() -> None:
    """From the first to the last size a line has slope 1.1; the growing part is quadratic."""
    found = exponent(noisy(lambda n: 0.5 + 1e-9 * n**2))
    assert found is not None and 1.95 < found.low <= found.a <= found.high < 2.1
    assert found.word == "superlinear" and str(found).startswith(f"{found.a:.2f} [")


@pytest.mark.parametrize("a", [0.5, 1.0])
def test_sublinear_and_linear_costs_are_not_called_superlinear(a: float) -> None:
    found = exponent(noisy(lambda n: 1e-6 * n**a))
    assert found is not None and found.low <= a <= found.high < a + 0.1 and found.word == ""


def test_a_constant_has_exponent_zero_and_few_sizes_no_interval() -> None:
    assert exponent(noisy(lambda n: 3.0)) == growth.Exponent(0, 0, 0)
    assert exponent({1.0: [4.0], 2.0: [2.0]}) == growth.Exponent(*[pytest.approx(-1)] * 3)
    assert str(exponent({1.0: [1.0], 10.0: [1e3]})) == "3.00" and exponent({1.0: [1.0]}) is None
    assert exponent({1.0: [1.0], 10.0: [1e3]}).word == "superlinear"  # type: ignore[union-attr]
    assert growth.Exponent(1.3, 0.8, 1.9).word == "superlinear, or noise"


def test_a_call_costs_the_memory_that_it_touches() -> None:
    ticks = iter(range(100))
    found = growth.cost(lambda: np.ones(64 << 20, np.uint8), 3, lambda: float(next(ticks)))
    assert found.seconds == (1.0,) and found.bytes == pytest.approx(64 << 20, rel=0.1)  # a second: not repeated


def test_what_would_take_too_long_is_left_out() -> None:
    assert scale._affordable({1e3: Cost((1.0,), 1)}, 1e3, 3e3, 10.0)
    assert not scale._affordable({1e3: Cost((1.0,), 1)}, 1e3, 1e4, 10.0)
    assert not scale._affordable({1e3: Cost((1e-9,), 1)}, 3e3, 1e4, 10.0)  # left out at the size before


def test_the_linked_store_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.zarr"
    before = planned.build(path, 3)
    assert verify(path) == [] and store.pending(path, planned.GROUP) == []
    assert LatentCache.open(path).usable.sum() == len(LatentCache.open(path)) == 3 * planned.SHARD
    files = {file: file.stat().st_mtime_ns for file in path.rglob("*") if file.is_file()}
    before()
    assert files == {file: file.stat().st_mtime_ns for file in path.rglob("*") if file.is_file()}


@pytest.mark.slow
@pytest.mark.nightly
def test_the_command_shows_every_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = {"megapixels": [0.01, 0.02], "photos": [300.0, 600.0], "shards": [2.0, 4.0], "searchers": [1.0]}
    monkeypatch.setattr(scale, "sizes_of", lambda part, largest, fast: small[part])
    out = tmp_path / "figures.json"
    result = CliRunner().invoke(app, ["bench", "scale", "--fast", "--rounds", "1", "--json", str(out)])
    assert result.exit_code == 0, result.output
    rows = json.loads(out.read_text())["rows"]
    assert Counter(row["of"] for row in rows) == {"megapixels": 2, "photos": 9, "shards": 6, "searchers": 1}
    for row in rows:
        assert row["sizes"] == small[row["of"]] and len(row["bytes"]) == len(row["seconds"]) == len(row["sizes"])
        assert min(row["seconds"]) > 0 and (row["exponent"] is None) == (row["of"] == "searchers")
    with pytest.raises(UsageError, match="no part 'warp'"):
        scale.bench(["warp"], None, 1.0, 1, True)


def test_sizes_reach_a_million_photos_and_the_largest_picture() -> None:
    assert scale.sizes_of("photos", 6.0, False)[::6] == [1e3, 1e6]
    assert scale.sizes_of("shards", 6.0, False) == [32, 100, 316, 1000, 3162]
    assert scale.sizes_of("megapixels", 3.0, False)[-2:] == [2, 3.0]
    assert max(scale.sizes_of("megapixels", 6.0, True)) < 1 and len(scale.sizes_of("photos", 6.0, True)) == 5
