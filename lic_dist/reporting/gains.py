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
from operator import attrgetter
from statistics import fmean

import numpy as np

from lic_dist.evaluation.jobs import BASE
from lic_dist.evaluation.results import Point
from lic_dist.intervals import Interval, change_interval
from lic_dist.reporting.comparison import point_at
from lic_dist.reporting.curves import Curve
from lic_dist.reporting.seeds import Pairs, paired, paired_by, together
from lic_dist.reporting.signed_rank import SAYS, signed_rank

SQ_ADAPTED = "sq-adapted"
PointPair = tuple[Point, Point]  # a base, and what is compared with it
GAINS_SAY = (
    "L = lambda 255^2 MSE + bpp, the mean over images (8-bit pictures); less is better. Its change with a bootstrap "
    "interval over images: against the same quantizer, and against SQ with adapted tables (`sq-adapted`), both on the "
    "base model; empty where there is no such point, or several that differ. `p` is of the first of the two: " + SAYS
)


@dataclass(frozen=True)
class Gain:
    """A point's L, and its change in percent against its own base and against SQ adapted; None where there is none.

    Points that differ in the seed of their retraining alone are one, with their means.
    """

    points: tuple[Point, ...]
    arm: str  # the points', told apart from others of the same quantizer and arm
    own: Interval | None
    sq_adapted: Interval | None
    p: float | None = None  # of the signed-rank test against its own base

    @property
    def point(self) -> Point:
        """The only one, or that of the first seed."""
        return self.points[0]

    @property
    def losses(self) -> dict[str, float]:
        """L of each image, by name."""
        of_seeds = [image_losses(point) for point in self.points]
        return {image: fmean(one[image] for one in of_seeds) for image in of_seeds[0]}

    @property
    def loss(self) -> float:
        """L."""
        return fmean(self.losses.values())

    @property
    def bpp(self) -> float:
        """Bits per pixel."""
        return fmean(point.figures.bpp for point in self.points)

    @property
    def psnr(self) -> float:
        """In dB."""
        return fmean(point.figures.psnr for point in self.points)


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


def change(pairs: Sequence[PointPair], of: Sequence[float] | None = None) -> Interval:
    """The change of L of points against their bases on the same images, a pair a seed.

    In percent of the base's L, or of the mean of `of`.
    """
    losses, others = _losses(pairs)
    return change_interval(losses, others, of and [of] * len(pairs))


def change_p(pairs: Sequence[PointPair]) -> float:
    """The p of the signed-rank test of the images' changes of L, of which each is the mean over seeds."""
    losses, others = _losses(pairs)
    return signed_rank(np.subtract(losses, others).mean(axis=0))


def _losses(pairs: Sequence[PointPair]) -> tuple[list[list[float]], list[list[float]]]:
    """L of points and of their bases, [seeds, images] each."""
    bases = [image_losses(base) for base, _ in pairs]
    points = [image_losses(point) for _, point in pairs]
    return [[one[image] for image in bases[0]] for one in points], [[one[image] for image in bases[0]] for one in bases]


def seed_pairs(bases: Sequence[Point], points: Sequence[Point]) -> tuple[PointPair, ...]:
    """Each point with the base of its seed, or with the only one: see `paired`."""
    return paired_by(attrgetter("seed"), bases, points)


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
    """The change of L in percent at each lambda that both curves have once, on the same images; of all seeds."""
    return {lmbda: change(pairs) for lmbda, pairs in shared_by_seeds(paired(anchor.parts, test.parts)).items()}


def shared_by_seeds(pairs: Pairs) -> dict[float, list[PointPair]]:
    """The `shared_points` of each pair of curves, a pair a seed, at the lambdas that all have."""
    shared = [shared_points(*pair) for pair in pairs]
    common = [lmbda for lmbda in shared[0] if all(lmbda in one for one in shared)] if shared else []
    return {lmbda: [one[lmbda] for one in shared] for lmbda in common}


def shared_points(anchor: Curve, test: Curve) -> dict[float, PointPair]:
    """The points of anchor and test at each lambda that both have once, on the same images."""
    found = {}
    for lmbda in lambdas(test.points):
        ours, theirs = point_at(test, lmbda), point_at(anchor, lmbda)
        if not ours or not theirs or ours.pictures != theirs.pictures:
            continue
        if image_losses(ours).keys() == image_losses(theirs).keys() and ours is not theirs:
            found[lmbda] = theirs, ours
    return found


def lambdas(points: Iterable[Point]) -> list[float]:
    """The lambdas of points, rising; classic codecs have none."""
    return sorted({point.lmbda for point in points if point.lmbda is not None})


def _rows(points: Sequence[Point]) -> tuple[Gain, ...]:
    once = list({(one.quantizer, one.arm, one.seed, measured(one)): one for one in points}.values())
    quantizers = list(dict.fromkeys(one.quantizer for one in once))
    once.sort(key=lambda one: (quantizers.index(one.quantizer), one.arm != BASE))
    bases = [one for one in once if one.arm == BASE]
    if len({one.model for one in bases}) > 1:  # no point says whose it is
        bases = []
    sq_adapted = _only([one for one in bases if one.quantizer == SQ_ADAPTED])
    places: dict[tuple[str, str], list[Point]] = {}
    for point in once:
        places.setdefault((point.quantizer, point.arm), []).append(point)
    rows = []
    for alike in places.values():
        for seeds in together(attrgetter("seed"), alike):
            own = _pairs(_only([base for one in seeds if (base := _base_of(one, bases))]), seeds)
            of_sq = _pairs(sq_adapted, seeds)
            arm = seeds[0].arm if len(seeds) == len(alike) else _distinct_name(seeds[0], alike)
            changes = (change(own) if own else None), (change(of_sq) if of_sq else None)
            rows.append(Gain(seeds, arm, *changes, change_p(own) if own else None))
    return tuple(rows)


def measured(point: Point) -> tuple[tuple[str, float, float], ...]:
    """What makes points equal: bpp and PSNR in dB of each image, by name."""
    return tuple(sorted((row.image, row.bpp, row.psnr) for row in point.images))


def _base_of(point: Point, bases: Sequence[Point]) -> Point | None:
    named = [one for one in bases if one.quantizer == point.quantizer]
    return _only(named or [one for one in bases if point.record and one.record == point.record])


def _only(points: Sequence[Point]) -> Point | None:
    """The point, where all of them measure the same."""
    return points[0] if len({measured(point) for point in points}) == 1 else None


def _pairs(base: Point | None, points: Sequence[Point]) -> tuple[PointPair, ...]:
    return () if base is None else seed_pairs([base], points)


def _distinct_name(point: Point, alike: Sequence[Point]) -> str:
    """The arm, and behind it the checkpoint and, where that too is the same, the record."""
    several = len({one.checkpoint for one in alike}) < len(alike)
    return f"{point.arm} ({point.checkpoint}{f', {point.record[:8]}' if several else ''})".strip()
