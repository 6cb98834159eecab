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
from lic_dist.reporting.comparison import compare
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
