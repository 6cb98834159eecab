"""BD-rates, their intervals, and what cannot be compared."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import bjontegaard
import numpy as np
import pytest

from lic_dist import intervals
from lic_dist.errors import LicError
from lic_dist.evaluation.results import Figures, ImageResult, Point
from lic_dist.reporting import bd
from lic_dist.reporting.comparison import Rates, against, compare
from lic_dist.reporting.curves import Curve, curve_of, read_curves
from tests.points import measured


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
    interval = intervals.mean_interval(list(rates))
    assert interval == intervals.mean_interval(list(rates))  # seeded
    assert interval.mean == pytest.approx(rates.mean())
    half = 1.96 * rates.std() / math.sqrt(len(rates))  # the normal approximation
    assert interval.high - interval.mean == pytest.approx(half, rel=0.1)
    assert interval.mean - interval.low == pytest.approx(half, rel=0.1)
    assert intervals.mean_interval([-3.0, -3.0]) == intervals.Interval(-3, -3, -3)


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
    assert str(intervals.Interval(-1, -2, 0.5)) == "-1.00 % [-2.00, +0.50]"


def test_published_curves_give_the_packages_figure(shared: Path) -> None:
    names = ("compressai-mbt2018-mean_mse_ans_cuda", "vtm")
    files = {path.stem: path for path in (shared / "data/published").rglob("*.json")}
    arrays = [json.loads(files[name].read_text())["results"][key] for name in names for key in ("bpp", "psnr-rgb")]
    anchor, test = (read_curves([files[name]])[0] for name in names)
    assert bd.bd_rate(anchor, test) == bjontegaard.bd_rate(*arrays, "pchip", min_overlap=0)


# by MS-SSIM


def similar(points: list[Point], *without: str, bend: float = 1.5) -> list[Point]:
    """Points whose MS-SSIM bends over PSNR, with some images that have none."""

    def image(row: ImageResult) -> ImageResult:
        ms_ssim = 1 - 10 ** -(row.psnr**bend / 30)
        return replace(row, ms_ssim=None if row.image in without else ms_ssim)

    return [replace(point, images=tuple(map(image, point.images))) for point in points]


def test_bd_rates_by_ms_ssim_are_the_packages_over_its_decibels() -> None:
    curves = [curve_of("a", similar(measured("sq"))), curve_of("b", similar(measured("tcq8", 0.9), bend=1.51))]
    found = compare(*curves)

    def packages(rows: list[list[Figures | ImageResult]]) -> float:
        values = [([one.bpp for one in row], [-10 * np.log10(1 - one.ms_ssim) for one in row]) for row in rows]
        return float(bjontegaard.bd_rate(*values[0], *values[1], "pchip", False, min_overlap=0))

    by_image = [[[point.images[n] for point in curve.points] for curve in curves] for n in range(3)]
    rates = dict(zip(("0.png", "1.png", "2.png"), map(packages, by_image), strict=True))
    assert found.by["ms-ssim"].pchip == pytest.approx(packages([list(curve.figures) for curve in curves]), abs=1e-12)
    assert found.by["ms-ssim"].rates == pytest.approx(rates, abs=1e-12)
    assert found.by["ms-ssim"].images == intervals.mean_interval(list(found.by["ms-ssim"].rates.values()))
    assert found.by["ms-ssim"].pchip != pytest.approx(found.pchip, abs=0.1) and found.notes == ()
    assert bd.bd_rate(*curves, "akima", "ms-ssim") == pytest.approx(found.by["ms-ssim"].pchip, abs=1)


def test_without_ms_ssim_there_is_no_bd_rate_by_it_and_no_word_of_it() -> None:
    sq, tcq = similar(measured("sq")), similar(measured("tcq8", 0.9))
    whole = compare(curve_of("a", sq), curve_of("b", tcq))
    small = compare(curve_of("a", sq), curve_of("b", similar(tcq, "1.png")))
    assert small.by["ms-ssim"].pchip is None and small.by["ms-ssim"].images is None and small.notes == ()
    assert small.by["ms-ssim"].rates == {name: whole.by["ms-ssim"].rates[name] for name in ("0.png", "2.png")}
    assert (small.by["psnr"], small.akima) == (whole.by["psnr"], whole.akima)
    with pytest.raises(LicError, match="the curve has points without MS-SSIM"):
        bd.bd_rate(curve_of("a", sq), curve_of("b", similar(tcq, "1.png")), quality="ms-ssim")
    flat = [replace(one, images=tuple(replace(row, ms_ssim=0.9) for row in one.images)) for one in tcq]
    notes = compare(curve_of("a", sq), curve_of("b", flat)).notes
    assert notes == ("the MS-SSIM of the curve does not rise with its rate",)
    published = compare(*(Curve(name, curve_of(name, points).figures) for name, points in (("a", sq), ("b", tcq))))
    assert published.by["ms-ssim"].pchip == whole.by["ms-ssim"].pchip and published.by["ms-ssim"].images is None
    assert published.notes == ("a has no figures per image",)


def test_every_metric_has_bd_rates_on_its_scale() -> None:
    def with_metrics(points: list[Point], bend: float) -> list[Point]:
        def image(row: ImageResult) -> ImageResult:
            error = 10 ** -(row.psnr**bend / 30)
            return replace(row, metrics={"vif": row.psnr**bend / 300, "gmsd": error, "fsim": 1 - error, "ssim": None})

        return [replace(point, images=tuple(map(image, point.images))) for point in points]

    curves = [
        curve_of("a", with_metrics(measured("sq"), 1.5)),
        curve_of("b", with_metrics(measured("tcq8", 0.9), 1.51)),
    ]
    found = compare(*curves)
    scales = {
        "vif": lambda vif: vif,
        "gmsd": lambda gmsd: -10 * np.log10(gmsd),
        "fsim": lambda x: -10 * np.log10(1 - x),
    }
    for name, scale in scales.items():
        values = [
            ([one.bpp for one in curve.figures], [scale(one.metrics[name]) for one in curve.figures])
            for curve in curves
        ]
        expected = float(bjontegaard.bd_rate(*values[0], *values[1], "pchip", False, min_overlap=0))
        assert found.by[name].pchip == pytest.approx(expected, abs=1e-9)
        assert found.by[name].rates == pytest.approx(found.by["vif"].rates, abs=0.2)  # of one image all bend alike
    assert found.by["ssim"] == found.by["vmaf"] == Rates() and found.notes == ()
    assert against(curves[0], curves).others == ["ms-ssim", "vif", "fsim", "gmsd"]
