"""The search over strength, step, shift and spread: it finds the least point of a known loss, in few trials."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pytest

from lic_dist.benchmarks.calibration import pattern_search
from lic_dist.building.surface import MOST, Fixed, Point, SearchSpace, expected_trials, search
from lic_dist.errors import LicError

SPACE = SearchSpace((0.2, 0.66, 0.06, 0.0), (0.002, 2.0), (0.2, 2.4))
PRICE = 845.0


@dataclass(frozen=True)
class Loss:
    L: float
    bpp: float
    mse: float


def loss(point: Point, slope: float = 0.0) -> Loss:
    """About as a base of lambda = .013 has it; `slope` is of other crops, along step and strength."""
    g, d, shift, _ = point
    bpp = 1.21 * math.exp(-0.8 * g - (0.85 + slope) * d)
    best = 0.17 - 0.1 * (g - 0.2)
    mse = 4e-4 * math.exp(0.6 * g + 0.2 * d + 0.6 * d * d + 0.5 * g * g + 1.9 * (shift - best) ** 2)
    return Loss(PRICE * mse + bpp, bpp, mse)


def grid(slope: float = 0.0) -> float:
    """The least L by brute force, at the best shift of each strength."""
    pairs = ((g, d) for g in np.geomspace(0.002, 2, 300) for d in np.geomspace(0.2, 2.4, 300))
    return min(loss((g, d, 0.17 - 0.1 * (g - 0.2), 0.0), slope).L for g, d in pairs)


@pytest.mark.parametrize("in_parts", [False, True])
def test_few_trials_find_the_least_loss(in_parts: bool) -> None:
    made: list[tuple[Point, bool]] = []

    def trial(point: Point, whole: bool) -> Loss:
        made.append((point, whole))
        return loss(point, 0.06 if whole else 0.0)

    free: Fixed = (None, None, None, 0.0)
    found = search(trial, SPACE.start, SPACE, free, PRICE, 1.0, in_parts)
    least = grid(0.06)
    assert least - 1e-6 < loss(found, 0.06).L < least * 1.0002 and (found, True) in made
    assert len(set(made)) == len(made) <= expected_trials(free, in_parts) + 4
    assert sum(whole for _, whole in made) <= (6 if in_parts else MOST[3] + 6)
    assert all(len(str(value)) <= 8 for point, _ in made for value in point)


def test_a_start_far_away_is_left_behind() -> None:
    far = search(
        lambda point, whole: loss(point), (0.9, 1.2, -0.1, 0.0), SPACE, (None,) * 3 + (0.0,), PRICE, 1.0, False
    )
    least = grid()
    assert least - 1e-6 < loss(far).L < least * 1.002


def test_the_pattern_search_of_the_benchmark_ends_where_no_neighbour_is_better() -> None:
    found = pattern_search(
        lambda point, whole: loss(point), SPACE.start, SPACE, (None, None, None, 0.0), PRICE, 1.0, True
    )
    assert grid() < loss(found).L < grid() * 1.002


def test_what_is_fixed_stays_and_bounds_hold() -> None:
    made: list[Point] = []

    def trial(point: Point, whole: bool) -> Loss:
        made.append(point)
        return Loss(1 - point[2], 1 - point[2], 0)  # the more shift the better, without end

    search(trial, (5.0, 9.0, 0.06, 0.1), SPACE, (5.0, 9.0, None, 0.1), PRICE, 1.0, False)
    assert {(one[0], one[1], one[3]) for one in made} == {(5.0, 9.0, 0.1)} and max(one[2] for one in made) <= 0.3
    made.clear()
    assert search(trial, SPACE.start, SPACE, SPACE.start, PRICE, 1.0, False) == SPACE.start and len(made) == 1


def test_losses_that_are_not_finite_are_passed_over_unless_it_is_the_start() -> None:
    def trial(point: Point, whole: bool) -> Loss:
        return loss(point) if point[1] < 0.7 else Loss(math.nan, math.nan, math.nan)

    found = search(trial, SPACE.start, SPACE, (None, None, 0.15, 0.0), PRICE, 1.0, False)
    assert loss(found).L < loss(SPACE.start).L and found[1] < 0.7
    with pytest.raises(LicError, match="not finite"):
        search(trial, (0.2, 0.8, 0.06, 0.0), SPACE, (None, None, None, 0.0), PRICE, 1.0, False)
