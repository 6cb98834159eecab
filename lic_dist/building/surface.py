"""Where the loss of a quantizer is least over strength, step, shift and spread, found in few trials by a model of it.

Bits and squared error change smoothly, nearly by a factor for each summand of strength or step. So the model is of
their logarithms, of second order in the settings; bits depend on strength and step alone. It is fitted to all trials,
the better the nearer they are to the best one, and its least point within reach of that is the next trial. Most trials
are of a part of the crops, which tells how the loss bends; a few of all crops tell how it slopes on these.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from lic_dist.errors import LicError

Point = tuple[float, float, float, float]  # strength, step, shift, spread
Fixed = tuple[float | None, float | None, float | None, float | None]  # of a point; None: searched

LARGEST_SHIFT, LARGEST_SPREAD = 0.3, 0.5
ORDER = (1, 2, 3, 0)  # of the axes, in which the first moves are made
REACH, NEAR = 1.5, 0.5  # moves on each axis from the best trial to the next: to a gain, and to learn of one
# trials of a part of the crops by the number of axes, unless the last one gained; new ones of all at last
MOST, LAST = (1, 5, 7, 9, 12), 2
CHANGED = 0.02  # about how much steeper bits and errors of all crops are than those of a part, for a move
BENT = 0.01  # about how large terms of second order are, for a move
CUP, CUPS = 0.003, 0.002  # that of shift, and of spread, and how far off that may be
EXACT, THIRD = 1e-4, 1e-3  # how far off the model is expected to be: anywhere, and by the third power of the moves
LEAST_GAIN = 1e-4  # of L; where less is expected of the next trial the search ends
SIDE, ZOOM, ZOOMS = 7, 0.4, 7  # of the grid, on each axis, on which the next trial is found


@dataclass(frozen=True)
class SearchSpace:
    """The search space of a quantizer: the start, the bounds of strength and step, and what a move on each axis is.

    A move is a factor of the strength, a factor of the step, and summands of the shift and the spread.
    """

    start: Point
    strengths: tuple[float, float]
    steps: tuple[float, float]
    move: Point = (2.0, 1.15, 0.04, 0.08)

    def moves(self, point: Point) -> NDArray[np.float64]:
        """Return the place of a point in moves, float64 [4]."""
        strength, step, shift, spread = self.move
        factors = math.log(point[0]) / math.log(strength), math.log(point[1]) / math.log(step)
        return np.array([*factors, point[2] / shift, point[3] / spread])

    def point(self, moves: NDArray[np.float64], fixed: Fixed) -> Point:
        """Return the point at a place in moves, rounded to six decimals, with what is fixed."""
        strength, step, shift, spread = self.move
        found = strength ** moves[0], step ** moves[1], shift * moves[2], spread * moves[3]
        rounded = (round(float(one), 6) if free is None else free for one, free in zip(found, fixed, strict=True))
        return next(rounded), next(rounded), next(rounded), next(rounded)

    def bounds(self) -> NDArray[np.float64]:
        """Return the least and the largest place on each axis, in moves: float64 [2, 4]."""
        low = self.strengths[0], self.steps[0], -LARGEST_SHIFT, 0.0
        high = self.strengths[1], self.steps[1], LARGEST_SHIFT, LARGEST_SPREAD
        return np.stack([self.moves(low), self.moves(high)])


class Measured(Protocol):
    """What a trial tells: L = price * mse + bpp."""

    @property
    def L(self) -> float: ...
    @property
    def bpp(self) -> float: ...
    @property
    def mse(self) -> float: ...


# trial, start, space, fixed, price, first, in_parts: as `search` takes them
Search = Callable[[Callable[[Point, bool], Measured], Point, SearchSpace, Fixed, float, float, bool], Point]


def expected_trials(fixed: Fixed, in_parts: bool) -> int:
    """Return about how many trials a search makes."""
    axes = fixed.count(None)
    return MOST[axes] + LAST * (axes > 0) + in_parts * (axes + 1)


def search(
    trial: Callable[[Point, bool], Measured],
    start: Point,
    space: SearchSpace,
    fixed: Fixed,
    price: float,
    first: float,
    in_parts: bool,
) -> Point:
    """Make trials until the model promises no gain, and return the best point of all crops: `start`; one `first` moves
    away along each free axis, or two of shift and spread, from the best so far; then where the model is least, or may
    be less. L = `price` * mse + bpp.

    trial(point, whole) is of all crops or of a part of them. Where there are parts, `in_parts`, these trials are of
    them, and the best are made again of all crops, before the last new ones, of which one may gain.

    Raises:
        LicError: the loss at the start is not finite.
    """
    made: dict[tuple[Point, bool], Measured] = {(start, not in_parts): trial(start, not in_parts)}
    if not math.isfinite(made[start, not in_parts].L):
        raise LicError("the loss of the calibration is not finite", hint="is this the checkpoint of a trained model?")
    axes, (low, high) = [axis for axis in ORDER if fixed[axis] is None], space.bounds()
    factors = [math.log(space.move[axis]) * (axis < 2) for axis in axes]

    def ordered(whole: bool) -> list[Point]:
        finite = [point for (point, all_crops), one in made.items() if all_crops == whole and math.isfinite(one.L)]
        return sorted(finite, key=lambda point: made[point, whole].L)

    def promising(whole: bool) -> Point | None:
        """Return the point of the next trial, None where no gain is to be expected."""
        best = ordered(whole)[0]
        centre, known = space.moves(best), [one for one in made if math.isfinite(made[one].L)]
        away = np.stack([space.moves(point) - centre for point, _ in known])[:, axes]
        other = np.array([all_crops != whole for _, all_crops in known])
        model = Model(away, other, [made[one] for one in known], factors, price, made[best, whole].L)
        for reach, gain in ((REACH, model.gain), (NEAR, model.expected_gain)):
            edges = np.maximum(low[axes] - centre[axes], -reach), np.minimum(high[axes] - centre[axes], reach)
            place, promised = largest(gain, *edges)
            moved = centre.copy()
            moved[axes] += place
            point = space.point(moved, fixed)
            if (point, whole) not in made and promised > LEAST_GAIN * made[best, whole].L:
                return point
        return None

    for axis in [one for one in axes for _ in range(1 + (one >= 2))]:  # along shift and spread tables stay as they are
        best = ordered(not in_parts)[0]
        strength, step, shift, spread = (None if axis == other else value for other, value in enumerate(best))
        for by in (first, -first, 2 * first):
            place = space.moves(best)
            place[axis] += by
            point = space.point(place, (strength, step, shift, spread))
            if (point, not in_parts) not in made and low[axis] <= place[axis] <= high[axis]:
                made[point, not in_parts] = trial(point, not in_parts)
                break
    new: list[Point] = []
    while axes and (len(made) < MOST[len(axes)] or ordered(not in_parts)[0] in new[-1:]):
        if (found := promising(not in_parts)) is None:
            break
        made[found, not in_parts] = trial(found, not in_parts)
        new.append(found)
    if in_parts:
        made |= {(point, True): trial(point, True) for point in ordered(False)[: len(axes) + 1]}
    best = ordered(True)[0]
    for _ in range(LAST if axes else 0):
        if ordered(True)[0] == best and (found := promising(True)):
            made[found, True] = trial(found, True)
    return ordered(True)[0]


def largest(
    function: Callable[[NDArray[np.float64]], NDArray[np.float64]], low: NDArray[np.float64], high: NDArray[np.float64]
) -> tuple[NDArray[np.float64], float]:
    """Return where between two corners a function of places, float64 [n, axes], is largest, and its value there, on
    grids that are finer and finer.
    """
    found, size = (low + high) / 2, (high - low) / 2
    grid = np.array(list(itertools.product(np.linspace(-1, 1, SIDE), repeat=len(low))))
    for _ in range(ZOOMS):
        places = np.clip(found + grid * size, low, high)
        values = function(places)
        found, size = places[values.argmax()], size * ZOOM
    return found, float(values.max())


class Model:
    """L at places that are some moves away from the best trial, of L `least`, float64 [n, axes], as trials tell it.

    `other` says which trials, bool [n], are of other crops: their logarithms differ by terms of first order. `factors`
    are the logarithms of the moves that are factors; bits do not depend on the other axes, which have 0.
    """

    def __init__(
        self,
        away: NDArray[np.float64],
        other: NDArray[np.bool_],
        trials: list[Measured],
        factors: list[float],
        price: float,
        least: float,
    ) -> None:
        self.factors, self.price, self.least = np.array(factors), price, least
        self.bpp = self._fitted(away, other, np.array([one.bpp for one in trials]), self.factors > 0)
        self.mse = self._fitted(away, other, np.array([one.mse for one in trials]), self.factors >= 0)

    def gain(self, away: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return how much less than the best trial's L the model says of places, float64 [n]."""
        return np.asarray(self.least - self._moments(away)[0])

    def expected_gain(self, away: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return how much less than the best trial's L is expected of trials at places, float64 [n], for what the model
        does not know: the mean of what they gain where they do.
        """
        mean, deviation = self._moments(away)
        gain = (self.least - mean) / deviation
        density = np.exp(-np.square(gain) / 2) / math.sqrt(2 * math.pi)
        return np.asarray(deviation * (gain * torch.special.ndtr(torch.from_numpy(gain)).numpy() + density))

    def _moments(self, away: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return the mean and the deviation of L, float64 [n] both."""
        terms, mean, variance = self._terms(away), np.zeros(len(away)), np.zeros(len(away))
        for (factors, root), by in ((self.bpp, 1.0), (self.mse, self.price)):
            value = by * np.exp(terms @ factors)
            mean += value
            variance += np.square(value) * np.square(terms @ root).sum(axis=1)
        return mean, np.sqrt(variance)

    def _terms(self, away: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the terms of a polynomial of second order, float64 [n, 1 + axes + (axes + 1) axes / 2]."""
        factors = np.where(self.factors > 0, self.factors, 1)
        moved = np.where(self.factors > 0, np.expm1(away * factors) / factors, away)
        pairs = [moved[:, a] * moved[:, b] for a, b in self._pairs()]
        return np.stack([np.ones(len(away)), *moved.T, *pairs], axis=1)

    def _pairs(self) -> Iterable[tuple[int, int]]:
        return itertools.combinations_with_replacement(range(len(self.factors)), 2)

    def _fitted(
        self, away: NDArray[np.float64], other: NDArray[np.bool_], values: NDArray[np.float64], on: NDArray[np.bool_]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return the factors of the terms whose sums are nearest to the values' logarithms, and a root of their
        covariance; terms of second order are expected to be small. `on` says which axes the values depend on.
        """
        cups = [CUP * (a == b and not self.factors[a] and on[a]) for a, b in self._pairs()]
        pairs = [(CUPS if cup else BENT) * (on[a] and on[b]) for cup, (a, b) in zip(cups, self._pairs(), strict=True)]
        terms, first = self._terms(away), slice(1 + len(on))
        expected = np.array([0.0] * (1 + len(on)) + cups)
        spread = np.array([1e3, *on.astype(np.float64), *pairs])
        changes = np.array([1e3, *CHANGED * on])
        off = (EXACT + THIRD * np.linalg.norm(away, axis=1) ** 3)[:, None]
        rows = np.concatenate([terms * spread, other[:, None] * terms[:, first] * changes], axis=1) / off
        logarithms = np.log(np.maximum(values, np.finfo(np.float64).tiny)) - terms @ expected
        inverse = np.linalg.pinv(np.concatenate([rows, np.eye(rows.shape[1])]))[: len(spread)]
        factors: NDArray[np.float64] = expected + spread * (inverse[:, : len(off)] @ (logarithms / off[:, 0]))
        return factors, np.asarray(spread[:, None] * inverse, np.float64)
