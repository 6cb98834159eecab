"""Gains at one lambda: L = lmbda 255^2 MSE + bpp of every quantizer and arm, against what it has to beat.

That is the same quantizer on the base model, and SQ with adapted tables on the base model. MSE is that of the 8-bit
pictures. A point's base is the point of arm `base`, at its lambda and on its pictures, with its quantizer's name. That
is the name of the cache's group wherever a record comes from: the base takes the store's (`tcq8`, or
`runs/x.zarr/quantized/tcq8`), a finetuned checkpoint carries one calibrated anew under the same name. Where no name
fits, the base's point with the same record does: `tcq8-cached`, the bits that a decoder was trained on, has the base's
`tcq8`. Of two base models at one lambda neither is taken.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean

from lic_dist.evaluation.jobs import BASE
from lic_dist.evaluation.results import Point
from lic_dist.intervals import Interval, change_interval
from lic_dist.reporting.comparison import point_at
from lic_dist.reporting.curves import Curve

SQ_ADAPTED = "sq-adapted"
GAINS_SAY = (
    "L = lambda 255^2 MSE + bpp, the mean over images (8-bit pictures); less is better. Its change with a bootstrap "
    "interval over images: against the same quantizer, and against SQ with adapted tables (`sq-adapted`), both on the "
    "base model; empty where there is no such point, or several that differ."
)


@dataclass(frozen=True)
class Gain:
    """A point's L, and its change in percent against its own base and against SQ adapted; None where there is none."""

    point: Point
    arm: str  # the point's, told apart from those of the same quantizer and arm
    loss: float
    own: Interval | None
    sq_adapted: Interval | None


@dataclass(frozen=True)
class Gains:
    """The points of one lambda and set of images: by quantizer, the base first."""

    lmbda: float
    images: int
    rows: tuple[Gain, ...]


def image_losses(point: Point) -> dict[str, float]:
    """L of each image, by name. Raises ValueError for a point without lambda."""
    if point.lmbda is None:
        raise ValueError(f"{point.quantizer} has no lambda")
    return {row.image: point.lmbda * 255**2 * 10 ** (-row.psnr / 10) + row.bpp for row in point.images}


def change(point: Point, base: Point, of: Sequence[float] | None = None) -> Interval:
    """The change of L against a base on the same images, in percent of its L, or of the mean of `of`."""
    losses, others = image_losses(point), image_losses(base)
    return change_interval([losses[image] for image in others], list(others.values()), of)


def gains(points: Sequence[Point]) -> tuple[Gains, ...]:
    """L and its changes, for each lambda by rising lambda, and each set of images apart; equal points count once."""
    tables: dict[tuple[float, str, tuple[str, ...]], list[Point]] = {}
    for point in points:
        names = tuple(sorted(row.image for row in point.images))
        if point.lmbda is not None:
            tables.setdefault((point.lmbda, point.pictures, names), []).append(point)
    return tuple(
        Gains(lmbda, len(names), _rows(found))
        for (lmbda, _, names), found in sorted(tables.items(), key=lambda table: table[0][0])
    )


def lambda_changes(anchor: Curve, test: Curve) -> dict[float, Interval]:
    """The change of L in percent at each lambda that both curves have once, on the same images."""
    return {lmbda: change(*points) for lmbda, points in shared_points(anchor, test).items()}


def shared_points(anchor: Curve, test: Curve) -> dict[float, tuple[Point, Point]]:
    """The points of test and anchor at each lambda that both have once, on the same images."""
    found = {}
    for lmbda in lambdas(test.points):
        ours, theirs = point_at(test, lmbda), point_at(anchor, lmbda)
        if not ours or not theirs or ours.pictures != theirs.pictures:
            continue
        if image_losses(ours).keys() == image_losses(theirs).keys() and ours is not theirs:
            found[lmbda] = ours, theirs
    return found


def lambdas(points: Iterable[Point]) -> list[float]:
    """The lambdas of points, rising; classic codecs have none."""
    return sorted({point.lmbda for point in points if point.lmbda is not None})


def _rows(points: Sequence[Point]) -> tuple[Gain, ...]:
    once = list({(one.quantizer, one.arm, measured(one)): one for one in points}.values())
    quantizers = list(dict.fromkeys(one.quantizer for one in once))
    once.sort(key=lambda one: (quantizers.index(one.quantizer), one.arm != BASE))
    bases = [one for one in once if one.arm == BASE]
    if len({one.model for one in bases}) > 1:  # no point says whose it is
        bases = []
    sq_adapted = _only([one for one in bases if one.quantizer == SQ_ADAPTED])
    return tuple(
        Gain(
            point,
            _distinct_names(point, [one for one in once if (one.quantizer, one.arm) == (point.quantizer, point.arm)]),
            fmean(image_losses(point).values()),
            _change(point, _base_of(point, bases)),
            _change(point, sq_adapted),
        )
        for point in once
    )


def measured(point: Point) -> tuple[tuple[str, float, float], ...]:
    """What makes points equal: bpp and PSNR in dB of each image, by name."""
    return tuple(sorted((row.image, row.bpp, row.psnr) for row in point.images))


def _base_of(point: Point, bases: Sequence[Point]) -> Point | None:
    named = [one for one in bases if one.quantizer == point.quantizer]
    return _only(named or [one for one in bases if point.record and one.record == point.record])


def _only(points: Sequence[Point]) -> Point | None:
    """The point, where all of them measure the same."""
    return points[0] if len({measured(point) for point in points}) == 1 else None


def _change(point: Point, base: Point | None) -> Interval | None:
    return None if base is None or base is point else change(point, base)


def _distinct_names(point: Point, alike: Sequence[Point]) -> str:
    """The arm; the checkpoint and, where that too is the same, the record behind it."""
    if len(alike) == 1:
        return point.arm
    several = len({one.checkpoint for one in alike}) < len(alike)
    return f"{point.arm} ({point.checkpoint}{f', {point.record[:8]}' if several else ''})".strip()
