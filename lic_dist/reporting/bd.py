"""Bjøntegaard-Delta rate: how much less rate a curve needs than an anchor at equal quality, in percent.

The quality is PSNR, or another metric on its scale (`evaluation.metrics`), such as MS-SSIM in dB, -10 log10(1 -
MS-SSIM); of an averaged curve that of the mean MS-SSIM. The package `bjontegaard` (Herglotz et al. 2022) integrates;
PCHIP as JVET does (JVET-H0030), Akima as a check.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence

import numpy as np
from scipy.interpolate import PchipInterpolator

from lic_dist.errors import LicError
from lic_dist.evaluation.metrics import METRICS
from lic_dist.evaluation.results import Figures
from lic_dist.reporting.curves import Curve

logging.getLogger("matplotlib").setLevel(logging.ERROR)  # bjontegaard loads it; without a home it warns of its folders
import bjontegaard  # noqa: E402

FEWEST_POINTS = 4
METHODS = ("pchip", "akima")
_Samples = tuple[np.ndarray, np.ndarray]  # bpp and quality, both rising


def rising(figures: Figures, quality: str = "psnr") -> float:
    """A metric on its scale, which grows with quality: dB of PSNR and MS-SSIM; nan where there is none.

    It is inf for a picture that equals its original.
    """
    value = figures.quality.get(quality)
    return math.nan if value is None else METRICS[quality].rising(value)


def known(curve: Curve, quality: str) -> bool:
    """Whether all points of the averaged curve have this quality."""
    return not any(math.isnan(rising(figures, quality)) for figures in curve.figures)


def bd_rate(anchor: Curve, test: Curve, method: str = "pchip", quality: str = "psnr") -> float:
    """BD-rate of the averaged curves in percent; negative: `test` needs less rate.

    Raises:
        LicError: fewer than four points, two at one lambda, a quality that does not rise with the rate or that a curve
            does not have, or no overlap.
    """
    return _bd_rate(_means(anchor), _means(test), method, quality)


def rate_change(anchor: Curve, test: Curve, samples: int = 101) -> tuple[np.ndarray, np.ndarray]:
    """PSNR in dB over the range that both have, and the change of rate there in percent, float64 [samples] each.

    Both log rates are interpolated over PSNR by PCHIP, as for the BD-rate, which is their mean change.

    Raises:
        LicError: as `bd_rate`.
    """
    both = _in_common(_means(anchor), _means(test), "psnr")
    psnr = np.linspace(max(own[0] for _, own in both), min(own[-1] for _, own in both), samples)
    before, after = (PchipInterpolator(own, np.log(bpp))(psnr) for bpp, own in both)
    return psnr, 100 * np.expm1(after - before)


def overlap(anchor: Curve, test: Curve, quality: str = "psnr") -> float:
    """The share of both curves' range of quality that they have in common, 0..1: below .75 distrust the BD-rate.

    Of a classic codec and another curve the other's range counts, since a classic codec has any.
    """
    one, other = ([rising(figures, quality) for figures in curve.figures] for curve in (anchor, test))
    shared = min(max(one), max(other)) - max(min(one), min(other))
    classic = {curve.classic for curve in (anchor, test)}
    counted = [*one, *other] if len(classic) == 1 else other if anchor.classic else one
    whole = max(counted) - min(counted)
    return max(0.0, shared) / whole if whole > 0 else 0.0


def image_bd_rates(anchor: Curve, test: Curve, method: str = "pchip", quality: str = "psnr") -> dict[str, float]:
    """BD-rate in percent of each image that has this quality, by name.

    Raises:
        LicError: a curve without rows per image, other images, or an image whose curve gives no BD-rate.
    """
    anchors, tests = _image_figures(anchor), _image_figures(test)
    pictures = {point.pictures for curve in (anchor, test) for point in curve.points} - {""}
    if anchors.keys() != tests.keys() or len(pictures) > 1:
        raise LicError(f"{anchor.name} and {test.name} were measured on different images")
    rates = {}
    for image, figures in tests.items():
        if any(math.isnan(rising(one, quality)) for one in (*anchors[image], *figures)):
            continue
        try:
            rates[image] = _bd_rate(anchors[image], figures, method, quality)
        except LicError as error:
            raise LicError(f"{image}: {error.message}") from None
    return rates


def _means(curve: Curve) -> Sequence[Figures]:
    """The averaged curve, if it is one: two checkpoints at one lambda lie on two."""
    if len({point.place for point in curve.points}) < len(curve.points):
        hint = "evaluate its checkpoints into files of their own"
        raise LicError(f"{curve.name} has several points at one lambda: {hint}")
    return curve.figures


def _image_figures(curve: Curve) -> dict[str, list[Figures]]:
    if not curve.points:
        raise LicError(f"{curve.name} has no figures per image")
    by_image: dict[str, list[Figures]] = {}
    for point in curve.points:
        for row in point.images:
            by_image.setdefault(row.image, []).append(Figures(row.bpp, row.psnr, row.ms_ssim, row.metrics))
    if any(len(figures) != len(curve.points) for figures in by_image.values()):
        raise LicError(f"the points of {curve.name} were measured on different images")
    return by_image


def _bd_rate(anchor: Sequence[Figures], test: Sequence[Figures], method: str, quality: str) -> float:
    if method not in METHODS:
        raise ValueError(f"no method {method!r}: there are {', '.join(METHODS)}")
    of_anchor, of_test = _in_common(anchor, test, quality)
    rate = bjontegaard.bd_rate(*of_anchor, *of_test, method, require_matching_points=False, min_overlap=0)
    return float(rate)


def _in_common(anchor: Sequence[Figures], test: Sequence[Figures], quality: str) -> tuple[_Samples, _Samples]:
    of_anchor, of_test = _rising(anchor, "the anchor", quality), _rising(test, "the curve", quality)
    if min(of_anchor[1][-1], of_test[1][-1]) <= max(of_anchor[1][0], of_test[1][0]):
        raise LicError(f"the curve has no {METRICS[quality].title} in common with the anchor")
    return of_anchor, of_test


def _rising(figures: Sequence[Figures], who: str, quality: str) -> _Samples:
    if len(figures) < FEWEST_POINTS:
        raise LicError(f"{who} has {len(figures)} points, a BD-rate needs {FEWEST_POINTS}")
    ordered = sorted(figures, key=lambda one: one.bpp)
    bpp, values = np.array([one.bpp for one in ordered]), np.array([rising(one, quality) for one in ordered])
    if np.isnan(values).any():
        raise LicError(f"{who} has points without {METRICS[quality].title}")
    if not (np.isfinite(values).all() and bpp[0] > 0 and (np.diff(bpp) > 0).all() and (np.diff(values) > 0).all()):
        raise LicError(f"the {METRICS[quality].title} of {who} does not rise with its rate")
    return bpp, values
