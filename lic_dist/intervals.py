"""Bootstrap intervals of means over images, and of their changes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

DRAWS = 10_000  # of a bootstrap


@dataclass(frozen=True)
class Interval:
    """A mean over images and its bootstrap interval, in percent."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:+.2f} %" + (f" [{self.low:+.2f}, {self.high:+.2f}]" if self.low < self.high else "")


def mean_interval(rates: Sequence[float]) -> Interval:
    """The mean over images with its bootstrap interval."""
    values = np.asarray(rates, np.float64)
    return _bootstrap(lambda images: values[images].mean(axis=-1), len(values))


def change_interval(values: Sequence[float], bases: Sequence[float], of: Sequence[float] | None = None) -> Interval:
    """By how many percent the mean over images differs from that of `bases`, the same images in the same order.

    In percent of the mean of `bases`, or of `of` where that is given; with its bootstrap interval.
    """
    more, whole = np.subtract(values, bases), np.asarray(bases if of is None else of, np.float64)
    return _bootstrap(lambda images: 100 * more[images].mean(axis=-1) / whole[images].mean(axis=-1), len(more))


def _bootstrap(statistic: Callable[[np.ndarray], np.ndarray], images: int) -> Interval:
    """A statistic of image numbers [..., images], with its 95 % percentile interval (Efron) over images drawn anew."""
    drawn = np.random.default_rng(0).integers(0, images, (DRAWS, images))
    low, high = np.quantile(statistic(drawn), [0.025, 0.975])
    return Interval(float(statistic(np.arange(images))), float(low), float(high))
