"""Bootstrap intervals of means over images, and of their changes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

DRAWS = 10_000  # of a bootstrap


@dataclass(frozen=True)
class Interval:
    """A mean over images and its bootstrap interval, in percent; of several seeds their mean.

    `spread` is the sample standard deviation of the seeds' means, without which an interval over images says nothing of
    another training.
    """

    mean: float
    low: float
    high: float
    seeds: int = 1
    spread: float = 0.0

    def __str__(self) -> str:
        over_images = f" [{self.low:+.2f}, {self.high:+.2f}]" if self.low < self.high else ""
        return f"{self.mean:+.2f} %{over_images}" + (f"\n{self.of_seeds}" if self.seeds > 1 else "")

    @property
    def of_seeds(self) -> str:
        """How many seeds, and their spread."""
        return f"{self.seeds} seeds, ± {self.spread:.2f}"


def mean_interval(*sets: ArrayLike) -> Interval:
    """The mean over images with its bootstrap interval, of figures [images] or [seeds, images].

    Of several sets of images it is the mean of the sets' means, and images are drawn anew within each set.
    """
    return _bootstrap([(values, np.ones_like(values)) for values in (np.asarray(one, np.float64) for one in sets)])


def change_interval(values: ArrayLike, bases: ArrayLike, of: ArrayLike | None = None) -> Interval:
    """By how many percent the mean over images differs from that of `bases`, the same images in the same order.

    In percent of the mean of `bases`, or of `of` where that is given; with its bootstrap interval. All are [images] or
    [seeds, images].
    """
    return changes_interval([(values, bases, bases if of is None else of)])


def changes_interval(sets: Sequence[tuple[ArrayLike, ArrayLike, ArrayLike]]) -> Interval:
    """The mean over sets of images of the change of each, as `change_interval`, of values, bases and `of`."""
    return _bootstrap([(100 * np.subtract(values, bases), np.asarray(of, np.float64)) for values, bases, of in sets])


def _bootstrap(sets: Sequence[tuple[np.ndarray, np.ndarray]]) -> Interval:
    """The mean over sets and seeds of mean(numerators) / mean(denominators), float64 [images] or [seeds, images].

    With its 95 % percentile interval (Efron) over images drawn anew in each set, the same for all seeds.
    """
    generator = np.random.default_rng(0)
    parts = [np.atleast_2d(above, below) for above, below in sets]
    of_seeds = np.mean([above.mean(axis=1) / below.mean(axis=1) for above, below in parts], axis=0)
    drawn = np.zeros(DRAWS)
    for above, below in parts:
        images = generator.integers(0, above.shape[1], (DRAWS, above.shape[1]))
        for over, under in zip(above, below, strict=True):
            drawn += over[images].mean(axis=-1) / under[images].mean(axis=-1) / (len(above) * len(parts))
    low, high = np.quantile(drawn, [0.025, 0.975])
    spread = float(of_seeds.std(ddof=1)) if len(of_seeds) > 1 else 0.0
    return Interval(float(of_seeds.mean()), float(low), float(high), len(of_seeds), spread)
