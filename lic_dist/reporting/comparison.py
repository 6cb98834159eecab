"""What a report says of each curve against an anchor, and of times: figures, without form."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from operator import attrgetter
from statistics import fmean, median

from lic_dist.errors import LicError
from lic_dist.evaluation.results import Point
from lic_dist.intervals import Interval, mean_interval
from lic_dist.reporting.bd import METHODS, bd_rate, image_bd_rates, overlap
from lic_dist.reporting.curves import Curve

LEAST_OVERLAP = 0.75  # of the PSNR ranges; the package `bjontegaard` warns below it


@dataclass(frozen=True)
class Comparison:
    """A curve against the anchor: BD-rates in percent, None where there is none, and why in `notes`.

    `rates` has those of the images by name (empty where there are none), `images` their mean with its interval.
    """

    name: str
    points: int
    pchip: float | None
    akima: float | None
    images: Interval | None
    notes: tuple[str, ...] = ()
    rates: Mapping[str, float] = field(default_factory=dict)
    trusted: bool = True  # enough of the PSNR ranges in common

    @property
    def rate(self) -> float | None:
        """The mean over images where there is one, else that of the averaged curves."""
        return self.images.mean if self.images else self.pchip


@dataclass(frozen=True)
class AnchorTable:
    """All other curves against one anchor."""

    anchor: Curve
    comparisons: tuple[Comparison, ...]

    @property
    def rated(self) -> bool:
        """Whether any curve has a BD-rate."""
        return any(one.pchip is not None for one in self.comparisons)

    @property
    def notes(self) -> list[str]:
        """Every note once, in order."""
        return distinct_notes(self.comparisons)


@dataclass(frozen=True)
class Times:
    """Medians over all images and points of a curve, seconds an image."""

    name: str
    encode: float
    decode: float
    megapixels: float  # of an image, the mean


def compare(anchor: Curve, test: Curve) -> Comparison:
    """BD-rate of the averaged curve (PCHIP, Akima) and the mean over images with its 95 % interval (PCHIP)."""
    found = Comparison(test.name, len(test.figures), None, None, None)
    try:
        pchip, akima = (bd_rate(anchor, test, method) for method in METHODS)
    except LicError as error:
        return replace(found, notes=(error.message,))
    trusted = overlap(anchor, test) >= LEAST_OVERLAP
    notes = () if trusted else (f"less than {LEAST_OVERLAP:.0%} of the PSNR ranges in common: distrust the figure",)
    found = replace(found, pchip=pchip, akima=akima, notes=notes, trusted=trusted)
    try:
        rates = image_bd_rates(anchor, test)
    except LicError as error:
        return replace(found, notes=(*notes, error.message))
    return replace(found, images=mean_interval(list(rates.values())), rates=rates)


Compare = Callable[[Curve, Curve], Comparison]  # of an anchor and a curve


def against(anchor: Curve, curves: Sequence[Curve], of: Compare = compare) -> AnchorTable:
    """All curves but the anchor, compared with it."""
    return AnchorTable(anchor, tuple(of(anchor, curve) for curve in curves if curve is not anchor))


def distinct_notes(comparisons: Sequence[Comparison]) -> list[str]:
    """Every note once, in order."""
    return list(dict.fromkeys(note for one in comparisons for note in one.notes))


def best(found: AnchorTable, measured: Sequence[str]) -> Comparison | None:
    """The curve of least rate, of the figures to trust: of those of these names where one has such, else of all."""
    rated = [one for one in found.comparisons if one.pchip is not None and one.trusted]
    own = [one for one in rated if one.name in measured]
    return min(own or rated, key=attrgetter("rate"), default=None)


def times(curves: Sequence[Curve]) -> tuple[Times, ...]:
    """Of each measured curve."""
    found = []
    for curve in curves:
        rows = [row for point in curve.points for row in point.images]
        if rows:
            found.append(
                Times(
                    curve.name,
                    median(row.encode_seconds for row in rows),
                    median(row.decode_seconds for row in rows),
                    fmean(row.height * row.width for row in rows) / 1e6,
                )
            )
    return tuple(found)


def point_at(curve: Curve, lmbda: float) -> Point | None:
    """The curve's point at this lambda; None where there is none, or several."""
    found = [point for point in curve.points if point.lmbda == lmbda]
    return found[0] if len(found) == 1 else None


def detailed_lambda(curves: Sequence[Curve], field: str) -> float | None:
    """The lambda at which most curves have this field of `Point`; of several the middle one."""
    having = [point.lmbda for curve in curves for point in curve.points if getattr(point, field)]
    most = sorted({one for one in having if having.count(one) == max(map(having.count, having))})
    return most[len(most) // 2] if most else None
