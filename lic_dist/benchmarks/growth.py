"""How a cost grows with a size: seconds and bytes of a call, and the exponent of a power law with a fixed cost.

Values t of sizes n are fitted by c + b n^a with c >= 0, since a fixed cost c at small sizes would hide growth from a
line through log t over log n. The fit is least squares of log t over all sizes and repeats, on a grid of a and c / b;
c is 0 unless it makes the fit better by more than F's 95 % quantile allows to chance. The interval holds every a whose
best fit is not worse than the best of all by as much. Where no size's median is half as much again as another's, the
cost is constant and a is 0. Fewer than four sizes have a line through their logarithms, and no interval.
"""

from __future__ import annotations

import ctypes
import gc
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

SUPERLINEAR = 1.1  # an exponent beyond it
CONSTANT = 1.5  # largest value over the smallest, below which a cost does not grow
EXPONENTS = np.round(np.arange(-2.0, 4.001, 0.01), 2)
FIXED = np.concatenate([[0.0], np.geomspace(1e-5, 1e3, 81)])  # c over the growing part at the largest size
ENOUGH = 0.5  # seconds, after which a call is not repeated
STEP = 1 << 20  # bytes; less than that is memory that was there before, or noise


@dataclass(frozen=True)
class Exponent:
    """The exponent a of t = c + b n^a with its 95 % interval; without one both ends are a."""

    a: float
    low: float
    high: float

    @property
    def word(self) -> str:
        """What the exponent says of growth, where it says something bad."""
        if self.a <= SUPERLINEAR:
            return ""
        return "superlinear" if self.low > 1 or self.low == self.high else "superlinear, or noise"

    def __str__(self) -> str:
        interval = f" [{self.low:.2f}, {self.high:.2f}]" if self.low < self.high else ""
        return f"{self.a:.2f}{interval}"


def exponent(values: Mapping[float, Sequence[float]]) -> Exponent | None:
    """Return the exponent of the positive values at each size, as the module says; None of fewer than two sizes."""
    if len(values) < 2:
        return None
    middles = [median(some) for some in values.values()]
    if max(middles) < CONSTANT * min(middles):
        return Exponent(0.0, 0.0, 0.0)
    n = np.repeat(np.array(list(values)), [len(some) for some in values.values()])
    log_t = np.log(np.concatenate([np.asarray(some, np.float64) for some in values.values()]))
    if len(values) < 4:
        a = float(np.polyfit(np.log(n), log_t, 1)[0])
        return Exponent(a, a, a)
    growing = (n / n.max()) ** EXPONENTS[:, None]  # [a, n]
    left = log_t - np.log(FIXED[:, None, None] + growing)  # [c, a, n]
    squares = np.square(left - left.mean(axis=2, keepdims=True)).sum(axis=2)  # [c, a]
    from scipy.stats import f

    points_left = len(n) - 3
    chance = 1 + float(f.ppf(0.95, 1, points_left)) / points_left
    of_a = squares[0] if squares[0].min() <= chance * squares.min() else squares.min(axis=0)
    inside = EXPONENTS[of_a <= chance * of_a.min()]
    return Exponent(float(EXPONENTS[of_a.argmin()]), float(inside.min()), float(inside.max()))


@dataclass(frozen=True)
class Cost:
    """What a call takes: its seconds, each time, and its peak of memory in bytes beyond what was there before."""

    seconds: tuple[float, ...]
    bytes: int


def cost(work: Callable[[], Any], rounds: int, clock: Callable[[], float]) -> Cost:
    """Measure a call, up to `rounds` times while that is quick; its peak is that of the first, by Linux's VmHWM."""
    seconds: list[float] = []
    settle()
    reset_peak()
    before = peak(os.getpid())
    while len(seconds) < rounds and (not seconds or sum(seconds) < ENOUGH):
        started = clock()
        result = work()
        seconds.append(clock() - started)
        if len(seconds) == 1:
            taken = peak(os.getpid()) - before
        del result
    return Cost(tuple(seconds), max(STEP, taken))


def settle() -> None:
    """Give back to the system what was freed, so that the next peak shows."""
    gc.collect()
    import pyarrow as pa

    pa.default_memory_pool().release_unused()
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):  # of glibc
        trim(0)


def reset_peak() -> None:
    """Let this process's peak of memory begin anew at what it holds now."""
    Path("/proc/self/clear_refs").write_text("5")


def peak(process: int) -> int:
    """Return the peak resident bytes of a process by Linux's VmHWM; 0 for one that has ended."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:")), 0)
