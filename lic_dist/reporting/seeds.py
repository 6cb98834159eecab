"""Curves that differ in the seed of their retraining alone: which they are, and what they say together."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from statistics import fmean

from lic_dist.evaluation.metrics import METRICS
from lic_dist.intervals import mean_interval
from lic_dist.reporting.comparison import Compare, Comparison, Rates, distinct_notes
from lic_dist.reporting.curves import Curve

Pairs = tuple[tuple[Curve, Curve], ...]  # anchor and curve, of each seed


def by_seeds(curves: Sequence[Curve]) -> list[tuple[Curve, ...]]:
    """The curves in their order, together those of one arm, quantizer, lambdas and pictures and of a seed each."""
    groups: dict[Hashable, list[Curve]] = {}
    for curve in curves:
        groups.setdefault(_kind(curve), []).append(curve)
    found: list[tuple[Curve, ...]] = []
    for group in groups.values():
        distinct = len({_seed(curve) for curve in group}) == len(group)
        found += [tuple(group)] if distinct else [(curve,) for curve in group]
    return found


def name_of(curves: Sequence[Curve]) -> str:
    """The curve's name; of several seeds their arm and quantizer."""
    point = curves[0].points[0] if curves[0].points else None
    return f"{point.arm} {point.quantizer}" if point and len(curves) > 1 else curves[0].name


def paired(anchors: Sequence[Curve], curves: Sequence[Curve]) -> Pairs:
    """Each curve with the anchor of its seed, or with the only one; a curve whose seed no anchor has is left out."""
    if len(anchors) == 1:
        return tuple((anchors[0], curve) for curve in curves)
    of_seed = {_seed(anchor): anchor for anchor in anchors}
    return tuple((of_seed[_seed(curve)], curve) for curve in curves if _seed(curve) in of_seed)


def compare_seeds(pairs: Pairs, of: Compare) -> Comparison:
    """The comparison of a pair; of several seeds the means over them.

    An image's BD-rate is then the mean of its seeds', of which the mean over images has its interval; None where a seed
    has none.
    """
    found = [of(anchor, curve) for anchor, curve in pairs]
    if len(found) == 1:
        return found[0]
    return Comparison(
        name_of([curve for _, curve in pairs]),
        found[0].points,
        {quality: _mean([one.by[quality] for one in found]) for quality in METRICS},
        _mean_of([one.akima for one in found]),
        tuple(distinct_notes(found)),
        all(one.trusted for one in found),
    )


def _kind(curve: Curve) -> Hashable:
    """What curves of several seeds have in common; the curve itself where it has no seed, or several."""
    places = {(point.arm, point.quantizer, point.seed) for point in curve.points}
    if len(places) != 1 or _seed(curve) is None:
        return curve
    of_points = ((one.lmbda, one.pictures, tuple(sorted(row.image for row in one.images))) for one in curve.points)
    return (*next(iter(places))[:2], *sorted(of_points))


def _seed(curve: Curve) -> int | None:
    return curve.points[0].seed if curve.points else None


def _mean(rates: Sequence[Rates]) -> Rates:
    pchip = _mean_of([one.pchip for one in rates])
    every = [one.rates for one in rates]
    if any(one.keys() != every[0].keys() for one in every):
        return Rates(pchip)
    means = {image: fmean(one[image] for one in every) for image in every[0]}
    whole = all(one.images for one in rates)
    images = mean_interval([list(map(one.__getitem__, means)) for one in every]) if whole else None
    return Rates(pchip, images, means, tuple(every))


def _mean_of(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if len(known) == len(values) else None
