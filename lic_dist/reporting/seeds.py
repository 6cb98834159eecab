"""Curves that differ in the seed of their retraining alone: which they are, and what they say together."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import fields, replace
from operator import attrgetter
from statistics import fmean
from typing import Any, TypeVar

from lic_dist.evaluation.metrics import METRICS
from lic_dist.evaluation.results import ImageResult, Point
from lic_dist.intervals import mean_interval
from lic_dist.reporting.comparison import Compare, Comparison, Rates, distinct_notes
from lic_dist.reporting.curves import Curve, curve_of

Pairs = tuple[tuple[Curve, Curve], ...]  # anchor and curve, of each seed
T = TypeVar("T")


def by_seeds(curves: Sequence[Curve]) -> list[tuple[Curve, ...]]:
    """The curves in their order, together those of one arm, quantizer, lambdas and pictures and of a seed each."""
    groups: dict[Hashable, list[Curve]] = {}
    for curve in curves:
        groups.setdefault(_kind(curve), []).append(curve)
    found: list[tuple[Curve, ...]] = []
    for group in groups.values():
        found += together(_seed, group)
    return found


def together(seed: Callable[[T], int | None], alike: Sequence[T]) -> list[tuple[T, ...]]:
    """What is alike, all together where each has a seed of its own, else each alone."""
    seeds = {seed(one) for one in alike}
    return [tuple(alike)] if None not in seeds and len(seeds) == len(alike) else [(one,) for one in alike]


def joined(curves: Sequence[Curve]) -> list[Curve]:
    """The curves in their order, those of several seeds as one: at each lambda the mean of each image's figures.

    What is compared or tested of such a curve is that of its `parts`; its points serve to draw it.
    """
    groups = by_seeds(curves)
    single = {group[0].name for group in groups if len(group) == 1}
    return [group[0] if len(group) == 1 else _joined(group, single) for group in groups]


def _joined(curves: Sequence[Curve], taken: set[str]) -> Curve:
    ordered = [sorted(curve.points, key=attrgetter("lmbda", "pictures")) for curve in curves]
    name = name_of(curves)
    whole = curve_of(
        f"{name} (mean of seeds)" if name in taken else name, [*map(_mean_point, zip(*ordered, strict=True))]
    )
    first = curves[0]
    return replace(whole, label=first.label, run=first.run, file=first.file, seeds=tuple(curves))


def _mean_point(points: Sequence[Point]) -> Point:
    rows = [{row.image: row for row in point.images} for point in points]
    return replace(
        points[0],
        images=tuple(_mean_row([of_seed[name] for of_seed in rows]) for name in rows[0]),
        channel_bits=tuple(fmean(bits) for bits in zip(*(one.channel_bits for one in points), strict=True)),
        k_counts=tuple(map(sum, zip(*(one.k_counts for one in points), strict=True))),
        z_bpp=_mean_of([point.z_bpp for point in points]),
        seed=None,
        shown={},
    )


def _mean_row(rows: Sequence[ImageResult]) -> ImageResult:
    numbers = [one.name for one in fields(ImageResult) if one.name not in ("image", "height", "width", "metrics")]
    means: dict[str, Any] = {name: _mean_of([getattr(row, name) for row in rows]) for name in numbers}
    metrics = {name: _mean_of([row.metrics.get(name) for row in rows]) for name in rows[0].metrics}
    return replace(rows[0], metrics=metrics, **means)


def name_of(curves: Sequence[Curve]) -> str:
    """The curve's name; of several seeds their arm and quantizer."""
    point = curves[0].points[0] if curves[0].points else None
    return f"{point.arm} {point.quantizer}" if point and len(curves) > 1 else curves[0].name


def paired(anchors: Sequence[Curve], curves: Sequence[Curve]) -> Pairs:
    """Each curve with the anchor of its seed, or with the only one; a curve whose seed no anchor has is left out."""
    return paired_by(_seed, anchors, curves)


def paired_by(seed: Callable[[T], int | None], anchors: Sequence[T], others: Sequence[T]) -> tuple[tuple[T, T], ...]:
    """`paired` of whatever has a seed; nothing is paired with itself."""
    if len(anchors) == 1:
        return tuple((anchors[0], one) for one in others if one is not anchors[0])
    of_seed = {seed(anchor): anchor for anchor in anchors}
    found = ((of_seed[seed(one)], one) for one in others if seed(one) in of_seed)
    return tuple((anchor, one) for anchor, one in found if anchor is not one)


def comparing(of: Compare) -> Compare:
    """Compare curves as `of` does, those of several seeds by their parts; a name without comparison where none fit."""

    def compare(anchor: Curve, curve: Curve) -> Comparison:
        pairs = paired(anchor.parts, curve.parts)
        if not pairs:
            return Comparison(
                curve.name, len(curve.figures), {name: Rates() for name in METRICS}, notes=("no seed in common",)
            )
        return replace(compare_seeds(pairs, of), name=curve.name)

    return compare


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
