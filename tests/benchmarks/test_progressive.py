"""`bench progressive`: what it makes of curves that are known."""

from __future__ import annotations

import pytest

from lic_dist.benchmarks.progressive import CUTS, SEPARATE, compared, curve_of
from lic_dist.evaluation.results import ImageResult


def rows(name: str, factor: float, places: int) -> list[ImageResult]:
    """A picture on a curve of 6 dB for each doubling of the rate, which `factor` multiplies."""
    figures = ((factor * 0.1 * 2 ** (one / 2), 30 + 3 * one, 1 - 0.1 * 0.7**one) for one in range(places))
    return [
        ImageResult(name, 512, 512, bpp, psnr, ms_ssim, bpp, float("nan"), 0.0, 0.0, 0.0)
        for bpp, psnr, ms_ssim in figures
    ]


def test_a_tenth_more_rate_is_ten_percent_at_every_quality() -> None:
    separate = curve_of("dead zone", list(zip(rows("a", 1, 8), rows("b", 3, 8), strict=True)), tuple(SEPARATE))
    cut = curve_of("progressive", list(zip(rows("a", 1.1, 6), rows("b", 3.3, 6), strict=True)), CUTS)
    found = compared(separate, cut)
    for quality in ("psnr", "ms-ssim"):
        assert found[quality]["images"] == pytest.approx(10) == found[quality]["bd_rate"]
        assert found["by_image"][quality] == pytest.approx({"a": 10, "b": 10})
    assert [one["change"] for one in found["change"]] == pytest.approx([10] * 101)
    assert [found["change"][end]["place"] for end in (0, -1)] == [0, 1]
    assert len(found["progressive"]) == len(CUTS) and len(found["dead zone"]) == len(SEPARATE)


def test_cuts_span_four_to_one() -> None:
    assert max(CUTS) / min(CUTS) == pytest.approx(4)
