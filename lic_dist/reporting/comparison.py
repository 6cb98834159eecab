"""What a report says of each curve against an anchor: figures, without form."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from operator import attrgetter

from lic_dist.errors import LicError
from lic_dist.evaluation.jobs import is_control
from lic_dist.evaluation.metrics import METRICS
from lic_dist.evaluation.results import Point
from lic_dist.intervals import Interval, mean_interval
from lic_dist.reporting.bd import bd_rate, image_bd_rates, known, overlap
from lic_dist.reporting.curves import Curve
from lic_dist.reporting.signed_rank import signed_rank

LEAST_OVERLAP = 0.75  # of the ranges of quality; the package `bjontegaard` warns below it


@dataclass(frozen=True)
class Rates:
    """BD-rates by one quality in percent (PCHIP): of the averaged curves, and of the images; None where there is none.

    `rates` has those of the images by name, those that have this quality, `images` the mean of all with its interval.
    Where all this is the mean over several seeds, `seeds` has the rates of each.
    """

    pchip: float | None = None
    images: Interval | None = None
    rates: Mapping[str, float] = field(default_factory=dict)
    seeds: tuple[Mapping[str, float], ...] = ()


@dataclass(frozen=True)
class Comparison:
    """A curve against the anchor: BD-rates by each metric, and in `notes` why there are none.

    There are none by MS-SSIM, and no note of it, where points or images have no MS-SSIM; so with the others. `akima` is
    by PSNR.
    """

    name: str
    points: int
    by: Mapping[str, Rates]
    akima: float | None = None
    notes: tuple[str, ...] = ()
    trusted: bool = True  # enough of the PSNR ranges in common

    @property
    def pchip(self) -> float | None:
        """Of the averaged curves, by PSNR."""
        return self.by["psnr"].pchip

    @property
    def images(self) -> Interval | None:
        """The mean of the images by PSNR."""
        return self.by["psnr"].images

    @property
    def rates(self) -> Mapping[str, float]:
        """Of each image, by PSNR."""
        return self.by["psnr"].rates

    @property
    def p(self) -> float | None:
        """Of the paired test of the images' BD-rates by PSNR; None where not all have one."""
        return signed_rank(list(self.rates.values())) if self.images else None

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
    def others(self) -> list[str]:
        """The metrics beside PSNR by which any curve has a BD-rate."""
        return [name for name in METRICS if name != "psnr" and has_rates(self.comparisons, name)]

    @property
    def notes(self) -> list[str]:
        """Every note once, in order."""
        return distinct_notes(self.comparisons)


def compare(anchor: Curve, test: Curve) -> Comparison:
    """BD-rate of the averaged curve (PCHIP, Akima) and the mean over images with its 95 % interval (PCHIP)."""
    by = {name: Rates() for name in METRICS}
    by["psnr"], notes = _rates(anchor, test, "psnr")
    found = Comparison(test.name, len(test.figures), by, notes=notes)
    if found.pchip is None:
        return found
    for name in METRICS:
        if name != "psnr" and _has(anchor, name) and _has(test, name):
            by[name], more = _rates(anchor, test, name)
            notes = *notes, *more
    return replace(
        found,
        akima=bd_rate(anchor, test, "akima"),
        notes=tuple(dict.fromkeys(notes)),
        trusted=overlap(anchor, test) >= LEAST_OVERLAP,
    )


def _has(curve: Curve, quality: str) -> bool:
    """Whether any point or image has this metric."""
    known = [one.quality for one in curve.figures] + [row.quality for point in curve.points for row in point.images]
    return any(one.get(quality) is not None for one in known)


def _rates(anchor: Curve, test: Curve, quality: str) -> tuple[Rates, tuple[str, ...]]:
    """The BD-rates by one quality, and notes."""
    pchip, rates, notes = None, {}, []
    try:
        if known(anchor, quality) and known(test, quality):
            pchip = bd_rate(anchor, test, quality=quality)
            if overlap(anchor, test, quality) < LEAST_OVERLAP:
                what = f"{LEAST_OVERLAP:.0%} of the {METRICS[quality].title} ranges in common"
                notes.append(f"less than {what}: distrust the figure")
        rates = image_bd_rates(anchor, test, quality=quality)
    except LicError as error:
        notes.append(error.message)
    whole = bool(rates) and len(rates) == len(test.points[0].images)
    return Rates(pchip, mean_interval(list(rates.values())) if whole else None, rates), tuple(notes)


Compare = Callable[[Curve, Curve], Comparison]  # of an anchor and a curve


def against(anchor: Curve, curves: Sequence[Curve], of: Compare = compare) -> AnchorTable:
    """All curves but the anchor, compared with it."""
    others = (curve for curve in curves if curve is not anchor and curve.parts != (anchor,))
    return AnchorTable(anchor, tuple(of(anchor, curve) for curve in others))


def distinct_notes(comparisons: Sequence[Comparison]) -> list[str]:
    """Every note once, in order."""
    return list(dict.fromkeys(note for one in comparisons for note in one.notes))


def has_rates(comparisons: Iterable[Comparison], quality: str) -> bool:
    """Whether there is any BD-rate by this quality."""
    return any(one.by[quality].pchip is not None or one.by[quality].images for one in comparisons)


def best(found: AnchorTable, measured: Sequence[str]) -> Comparison | None:
    """The curve of least rate, of the figures to trust: of those of these names, without controls, else of all."""
    rated = [one for one in found.comparisons if one.pchip is not None and one.trusted]
    own = [one for one in rated if one.name in measured and not is_control(one.name)]
    return min(own or rated, key=attrgetter("rate"), default=None)


def point_at(curve: Curve, lmbda: float) -> Point | None:
    """The curve's point at this lambda; None where there is none, or several."""
    found = [point for point in curve.points if point.lmbda == lmbda]
    return found[0] if len(found) == 1 else None


def detailed_lambda(curves: Sequence[Curve], field: str) -> float | None:
    """The lambda at which most curves have this field of `Point`; of several the middle one."""
    points = [point for curve in curves for point in curve.points if getattr(point, field)]
    having = [point.lmbda for point in points if point.lmbda is not None]
    most = sorted({one for one in having if having.count(one) == max(map(having.count, having))})
    return most[len(most) // 2] if most else None
