"""Metrics and result files."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from lic_dist.errors import LicError
from lic_dist.evaluation.metrics import ms_ssim8, psnr8
from lic_dist.evaluation.results import read_file, read_points, write_points
from lic_dist.reporting.curves import read_curves
from lic_dist.reporting.frames import read_results
from tests.points import measured

# metrics


def test_psnr_of_known_errors() -> None:
    a = np.full((4, 4, 3), 200, np.uint8)
    assert psnr8(a, a) == math.inf
    assert psnr8(a, a - 200) == pytest.approx(10 * math.log10(255**2 / 200**2), abs=1e-12)
    b = a.copy()
    b[0, 0, 0] = 203  # one of 48 values is off by 3
    assert psnr8(a, b) == psnr8(b, a) == pytest.approx(10 * math.log10(255**2 * 48 / 9), abs=1e-12)


def test_psnr_refuses_floats_and_other_shapes() -> None:
    a = np.zeros((4, 4, 3), np.uint8)
    with pytest.raises(ValueError, match="float"):
        psnr8(a, a.astype(np.float32))
    with pytest.raises(ValueError, match="shapes"):
        psnr8(a, a[:2])


def test_ms_ssim_has_a_smallest_picture() -> None:
    generator = np.random.default_rng(0)
    a = generator.integers(0, 256, (161, 170, 3), dtype=np.uint8)
    b = np.clip(a.astype(int) + generator.integers(-40, 41, a.shape), 0, 255).astype(np.uint8)
    assert ms_ssim8(a, a) == pytest.approx(1, abs=1e-6)
    worse = ms_ssim8(a, b)
    assert worse is not None and 0.8 < worse < 0.999
    assert ms_ssim8(a[:160], b[:160]) is None


# result files


def test_points_survive_the_file(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "results.json"
    points = measured("tcq8")
    small = replace(points[0].images[0], ms_ssim=None, psnr=math.inf, likelihood_bpp=math.nan)
    points[0] = replace(points[0], images=(small, *points[0].images[1:]))
    assert read_points(path) == ()
    write_points(path, "run", points, "a test")
    again = read_points(path)
    assert repr(again) == repr(tuple(points))  # nan differs from itself
    assert [found.name for found in path.parent.iterdir()] == ["results.json"]
    assert "NaN" not in path.read_text() and "Infinity" not in path.read_text()


def test_the_file_has_compressais_shape(tmp_path: Path) -> None:
    points = measured("sq")
    write_points(tmp_path / "a.json", "run", points)
    content = json.loads((tmp_path / "a.json").read_text())
    assert content["name"] == "run"
    assert content["results"]["bpp"] == pytest.approx([0.1 * 2**step * 2 for step in range(5)])
    assert content["results"]["psnr-rgb"] == pytest.approx([37 + 6 * math.log2(0.1 * 2**s) for s in range(5)])
    mean = sum(1 - 10 ** -((36 + n + 6 * math.log2(0.1)) / 20 - 0.5) for n in range(3)) / 3
    assert content["results"]["ms-ssim-rgb"][0] == pytest.approx(mean)
    del content["points"]  # what is left is a published file
    (tmp_path / "b.json").write_text(json.dumps(content))
    (published,), (ours,) = (read_curves([tmp_path / name]) for name in ("b.json", "a.json"))
    assert published.figures == ours.figures


def test_metrics_beside_the_standard_ones_are_in_the_file_and_a_published_one(tmp_path: Path) -> None:
    points = measured("sq", lambdas=1)
    write_points(tmp_path / "a.json", "run", points)
    plain = (tmp_path / "a.json").read_text()
    assert "metrics" not in plain and "vif" not in plain
    rows = [
        replace(row, metrics={"vif": 0.5 + n / 8, "iw-ssim": 0.9 if n else None})
        for n, row in enumerate(points[0].images)
    ]
    points = [replace(points[0], images=tuple(rows))]
    write_points(tmp_path / "a.json", "run", points)
    assert read_points(tmp_path / "a.json") == tuple(points)
    content = json.loads((tmp_path / "a.json").read_text())
    assert content["results"]["vif"] == [0.625] and content["results"]["iw-ssim"] == [None]
    del content["points"]
    (tmp_path / "b.json").write_text(json.dumps(content))
    assert read_file(tmp_path / "b.json").figures == (points[0].figures,)
    frame = read_results([tmp_path / "a.json"])
    assert list(frame["vif"]) == [0.5, 0.625, 0.75] and frame["iw_ssim"].isna().tolist() == [True, False, False]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        '{"results": {}}',
        '{"results": {"bpp": [1], "psnr-rgb": [1, 2]}}',
        '{"results": {"bpp": [1], "psnr-rgb": [null]}}',
        '{"results": {}, "points": [{"checkpoint": "q"}]}',
        '{"results": {}, "points": [{"checkpoint": "q", "quantizer": "sq", "lmbda": 1, "images": []}]}',
    ],
)
def test_other_files_are_one_clear_error(tmp_path: Path, text: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(LicError, match="a.json"):
        read_file(path)
    with pytest.raises(LicError, match="cannot read"):
        read_file(tmp_path / "absent.json")


def test_published_files_are_read(shared: Path) -> None:
    files = sorted((shared / "data/published").rglob("*.json"))
    curves = {path.stem: read_curves([path])[0] for path in files}
    assert len(curves) == 16
    assert {len(curve.figures) for curve in curves.values()} == {6, 8, 19}
    mean = curves[_MEAN]
    assert mean.name == "mbt2018-mean-8bit"
    assert [(round(one.bpp, 4), round(one.psnr, 3)) for one in mean.figures][:2] == [(0.1239, 27.696), (0.198, 29.354)]
    assert curves["paper-elic2022_mse"].figures[0].ms_ssim is None


_MEAN = "compressai-mbt2018-mean_mse_ans_cuda"
