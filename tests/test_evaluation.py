"""Metrics, result files, BD-rates, plots and the report."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import bjontegaard
import numpy as np
import pytest
from PIL import Image

from lic_dist.errors import LicError
from lic_dist.evaluation import bd, plots
from lic_dist.evaluation.comparison import compare
from lic_dist.evaluation.metrics import ms_ssim8, psnr8
from lic_dist.evaluation.results import (
    Curve,
    Figures,
    ImageResult,
    Point,
    curve_of,
    read_curve,
    read_curves,
    read_points,
    write_points,
)


def image_result(name: str, bpp: float, psnr: float) -> ImageResult:
    return ImageResult(name, 512, 768, bpp, psnr, 0.98, 0.999 * bpp, 0.99 * bpp, 0.0005, 0.5, 0.25)


def measured(quantizer: str, factor: float = 1.0, lambdas: int = 5, images: int = 3) -> list[Point]:
    """Points on PSNR = 6 log2(bpp) + 36 + image, with rates times `factor` (more for later images)."""
    points = []
    for step in range(lambdas):
        base = 0.1 * 2.0**step
        rows = tuple(
            image_result(f"{n}.png", base * (n + 1) * factor ** (n + 1), 36 + n + 6 * math.log2(base))
            for n in range(images)
        )
        points.append(Point(f"q{step}.pth.tar", quantizer, 0.0018 * 2**step, rows, record=quantizer))
    return points


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
    assert content["results"]["ms-ssim-rgb"] == pytest.approx([0.98] * 5)
    del content["points"]  # what is left is a published file
    (tmp_path / "b.json").write_text(json.dumps(content))
    assert read_curve(tmp_path / "b.json").figures == read_curve(tmp_path / "a.json").figures


def test_a_file_of_two_quantizers_is_two_curves(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_points(path, "run", [*measured("sq")[::-1], *measured("tcq8", 0.9)])
    curves = read_curves(path)
    assert [curve.name for curve in curves] == ["run sq", "run tcq8"]
    assert [one.bpp for one in curves[0].figures] == sorted(one.bpp for one in curves[0].figures)
    with pytest.raises(LicError, match="2 curves"):
        read_curve(path)


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
        read_curves(path)
    with pytest.raises(LicError, match="cannot read"):
        read_curves(tmp_path / "absent.json")


def test_published_files_are_read(shared: Path) -> None:
    files = sorted((shared / "data/published").rglob("*.json"))
    curves = {path.stem: read_curve(path) for path in files}
    assert len(curves) == 16
    assert {len(curve.figures) for curve in curves.values()} == {6, 8, 19}
    mean = curves[_MEAN]
    assert mean.name == "mbt2018-mean-8bit"
    assert [(round(one.bpp, 4), round(one.psnr, 3)) for one in mean.figures][:2] == [(0.1239, 27.696), (0.198, 29.354)]
    assert curves["paper-elic2022_mse"].figures[0].ms_ssim is None
    raw = [json.loads(path.read_text())["results"] for path in files if path.stem in (_MEAN, "vtm")]
    arrays = [raw[n][key] for n in (0, 1) for key in ("bpp", "psnr-rgb")]
    assert bd.bd_rate(mean, curves["vtm"]) == bjontegaard.bd_rate(*arrays, "pchip", min_overlap=0)


_MEAN = "compressai-mbt2018-mean_mse_ans_cuda"


# BD-rate


def parallel(name: str, factor: float, points: int = 6, first: float = 0.1) -> Curve:
    """A curve on PSNR = 36 + 6 log2(bpp / factor): BD-rate against factor 1 is exactly factor - 1."""
    rates = [first * 1.6**step for step in range(points)]
    return Curve(name, tuple(Figures(factor * bpp, 36 + 6 * math.log2(bpp), None) for bpp in rates))


@pytest.mark.parametrize("method", bd.METHODS)
@pytest.mark.parametrize("factor", [0.9, 0.99, 1.0, 1.3])
def test_bd_rate_of_parallel_curves_is_their_ratio(method: str, factor: float) -> None:
    assert bd.bd_rate(parallel("a", 1.0), parallel("b", factor), method) == pytest.approx(100 * (factor - 1), abs=1e-9)


def test_the_change_of_rate_over_psnr_has_the_bd_rate_as_its_mean() -> None:
    anchor, test = parallel("a", 1.0), parallel("b", 0.9, points=4, first=0.2)
    psnr, change = bd.rate_change(anchor, test)
    ends = max(anchor.figures[0].psnr, test.figures[0].psnr), min(anchor.figures[-1].psnr, test.figures[-1].psnr)
    assert (psnr[0], psnr[-1]) == pytest.approx(ends) and change == pytest.approx(-10, abs=0.05)
    bent = Curve("b", tuple(replace(one, bpp=one.bpp * (0.8 + 0.1 * n)) for n, one in enumerate(anchor.figures)))
    _, change = bd.rate_change(anchor, bent, 2001)
    assert (change[0], change[-1]) == pytest.approx((-20, 30), abs=1e-9)
    assert 100 * math.expm1(np.log1p(change / 100).mean()) == pytest.approx(bd.bd_rate(anchor, bent), abs=0.02)


def test_bd_rate_counts_the_common_range_only() -> None:
    anchor, test = parallel("a", 1.0), parallel("b", 0.9, points=4, first=0.2)
    assert bd.bd_rate(anchor, test) == pytest.approx(-10, abs=0.05)
    assert bd.overlap(anchor, anchor) == 1
    assert 0.4 < bd.overlap(anchor, test) < 0.75
    assert bd.overlap(anchor, parallel("c", 1.0, first=100)) == 0


def test_bd_rate_says_why_there_is_none() -> None:
    anchor = parallel("a", 1.0)
    with pytest.raises(LicError, match="the curve has 3 points"):
        bd.bd_rate(anchor, parallel("b", 1.0, points=3))
    with pytest.raises(LicError, match="the anchor has 3 points"):
        bd.bd_rate(parallel("b", 1.0, points=3), anchor)
    with pytest.raises(LicError, match="in common"):
        bd.bd_rate(anchor, parallel("b", 1.0, first=100))
    bent = Curve("b", (*anchor.figures[:-1], replace(anchor.figures[-1], psnr=20.0)))
    with pytest.raises(LicError, match="does not rise"):
        bd.bd_rate(anchor, bent)


def test_bd_rate_per_image() -> None:
    anchor, test = curve_of("a", measured("sq")), curve_of("b", measured("tcq8", 0.9))
    rates = bd.image_bd_rates(anchor, test)
    assert list(rates) == ["0.png", "1.png", "2.png"]
    assert list(rates.values()) == pytest.approx([100 * (0.9**n - 1) for n in (1, 2, 3)], abs=1e-9)
    with pytest.raises(LicError, match="different images"):
        bd.image_bd_rates(anchor, curve_of("b", measured("tcq8", images=2)))
    with pytest.raises(LicError, match="no figures per image"):
        bd.image_bd_rates(anchor, parallel("b", 1.0))


def test_bootstrap_interval() -> None:
    rates = np.random.default_rng(1).normal(-5, 2, 400)
    interval = bd.mean_interval(list(rates))
    assert interval == bd.mean_interval(list(rates))  # seeded
    assert interval.mean == pytest.approx(rates.mean())
    half = 1.96 * rates.std() / math.sqrt(len(rates))  # the normal approximation
    assert interval.high - interval.mean == pytest.approx(half, rel=0.1)
    assert interval.mean - interval.low == pytest.approx(half, rel=0.1)
    assert bd.mean_interval([-3.0, -3.0]) == bd.Interval(-3, -3, -3)


# plots


def test_the_zoom_is_where_the_pictures_differ(tmp_path: Path) -> None:
    original = np.full((90, 120, 3), 100, np.uint8)
    coded = original.copy()
    coded[50:60, 80:95] = 180
    top, left = plots.busiest_window([original, coded], 20, 20)
    assert 40 <= top <= 50 and 75 <= left <= 80
    assert plots.busiest_window([original, coded], 90, 30)[0] == 0
    path = tmp_path / "sheet.png"
    plots.comparison_sheet([plots.Picture("original", "", original), plots.Picture("SQ", "0.5 bpp", coded)], path)
    width, height = Image.open(path).size
    assert width > 900 and height > 600
    with pytest.raises(ValueError, match="one shape"):
        plots.comparison_sheet([plots.Picture("", "", original), plots.Picture("", "", coded[:80])], path)


def test_training_plot(tmp_path: Path) -> None:
    rows = [{"step": 10 * n, "held_out_L": 1.0 - 0.01 * n, "held_out_psnr": 30 + 0.1 * n} for n in range(5)]
    plots.training_plot([*rows, {"step": 50, "loss": 1.0}], tmp_path / "log.png")
    assert Image.open(tmp_path / "log.png").size[0] > 1000


def test_points_of_one_arm_and_quantizer_are_a_curve(tmp_path: Path) -> None:
    row = ImageResult("a.png", 8, 8, 1.0, 30.0, None, 1.0, math.nan, 0.1, 0.1, 0.1)
    points = [
        Point("a", "sq", 0.01, (row,), arm="base"),
        Point("b", "sq", 0.02, (replace(row, bpp=0.5),), arm="base"),
        Point("c", "sq", 0.01, (row,), arm="decoder"),
    ]
    write_points(tmp_path / "r.json", "x", points)
    curves = read_curves(tmp_path / "r.json")
    assert [(curve.name, [one.bpp for one in curve.figures]) for curve in curves] == [
        ("x base sq", [0.5, 1.0]),
        ("x decoder sq", [1.0]),
    ]


def test_curves_that_are_not_comparable_say_so() -> None:
    def curve(name: str, factor: float, pictures: str, lambdas: tuple[float, ...] = (1, 2, 3, 4)) -> Curve:
        def image(lmbda: float, number: int) -> ImageResult:
            return ImageResult(
                f"{number}.png", 8, 8, factor * lmbda, 30.0 + lmbda + number, None, 1.0, math.nan, 0.1, 0.1, 0.1
            )

        rows = [(lmbda, tuple(image(lmbda, number) for number in range(3))) for lmbda in lambdas]
        return curve_of(name, [Point("c", "q", lmbda, images, pictures=pictures) for lmbda, images in rows])

    found = compare(curve("a", 1, "kodak"), curve("b", 0.9, "kodak"))
    assert found.pchip == pytest.approx(-10) and str(found.images) == "-10.00 %" and not found.notes
    other = compare(curve("a", 1, "kodak"), curve("b", 0.9, "clic"))
    assert other.images is None and "different images" in " ".join(other.notes)
    mixed = compare(curve("a", 1, "kodak"), curve("b", 0.9, "kodak", (1, 2, 3, 4, 4)))
    assert mixed.pchip is None and "several points at one lambda" in " ".join(mixed.notes)
    assert str(bd.Interval(-1, -2, 0.5)) == "-1.00 % [-2.00, +0.50]"
