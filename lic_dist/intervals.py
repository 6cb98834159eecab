"""Bootstrap intervals of means over images, and of their changes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

DRAWS = 10_000  # of a bootstrap


@dataclass(frozen=True)
class Interval:
    """A mean over images and its bootstrap interval, in percent."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:+.2f} %" + (f" [{self.low:+.2f}, {self.high:+.2f}]" if self.low < self.high else "")


def mean_interval(*sets: ArrayLike) -> Interval:
    """The mean over images with its bootstrap interval, of figures [images].

    Of several sets of images it is the mean of the sets' means, and images are drawn anew within each set.
    """
    return _bootstrap([(values, np.ones_like(values)) for values in (np.asarray(one, np.float64) for one in sets)])


def change_interval(values: ArrayLike, bases: ArrayLike, of: ArrayLike | None = None) -> Interval:
    """By how many percent the mean over images differs from that of `bases`, the same images in the same order.

    In percent of the mean of `bases`, or of `of` where that is given; with its bootstrap interval.
    """
    return changes_interval([(values, bases, bases if of is None else of)])


def changes_interval(sets: Sequence[tuple[ArrayLike, ArrayLike, ArrayLike]]) -> Interval:
    """The mean over sets of images of the change of each, as `change_interval`, of values, bases and `of`."""
    return _bootstrap([(100 * np.subtract(values, bases), np.asarray(of, np.float64)) for values, bases, of in sets])


def _bootstrap(sets: Sequence[tuple[np.ndarray, np.ndarray]]) -> Interval:
    """The mean over sets of mean(numerators) / mean(denominators), both float64 [images].

    With its 95 % percentile interval (Efron) over images drawn anew in each set.
    """
    generator = np.random.default_rng(0)
    every, drawn = 0.0, np.zeros(DRAWS)
    for above, below in sets:
        images = generator.integers(0, len(above), (DRAWS, len(above)))
        every += above.mean() / below.mean() / len(sets)
        drawn += above[images].mean(axis=-1) / below[images].mean(axis=-1) / len(sets)
    low, high = np.quantile(drawn, [0.025, 0.975])
    return Interval(float(every), float(low), float(high))
