"""A plain scalar Viterbi search, compiled: one lane after another, no packing, no SIMD.

With the candidates of the method it is the baseline "scalar reference"; with every union level as a candidate it
measures what the choice of candidates costs.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from lic_dist.quantization.candidates import SATURATION, TILE
from lic_dist.quantization.jit import kernel
from lic_dist.quantization.rates import LEVELS, CdfTables, search_rates
from lic_dist.quantization.reference import inverse
from lic_dist.quantization.trellis import Trellis
from lic_dist.quantization.viterbi import UNREACHED


def search(
    r: np.ndarray, level: np.ndarray, weight: np.ndarray, step: float, tables: CdfTables, trellis: Trellis, every: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Search as `quantize.search` does; `every` takes all union levels of the cost tables as candidates."""
    rates = search_rates(tables)
    if r.size and not np.abs(r).max() * inverse(step) <= 2 * rates.largest - 8:
        raise ValueError("the plain search has no escapes: its latents lie within the tables")
    entering_branches = np.array(trellis.entering_branches(), np.int64)
    k, cost = np.empty(r.shape, np.int16), np.zeros(len(r), np.int64)
    costs = rates.costs.reshape(2, LEVELS, -1)
    _search(
        r, level, weight, inverse(step), costs, entering_branches[..., 0], entering_branches[..., 1], every, k, cost
    )
    return k, cost


@kernel
def _search(
    r: np.ndarray,
    level: np.ndarray,
    weight: np.ndarray,
    inverse_step: np.float32,
    costs: np.ndarray,
    previous: np.ndarray,
    number: np.ndarray,
    every: bool,
    k: np.ndarray,
    cost: np.ndarray,
) -> None:
    lanes, steps = r.shape
    states = len(previous)
    chosen = np.empty((steps, states), np.uint8)
    magnitude = np.empty((steps, 4), np.int32)
    metric, updated = np.empty(states, np.int32), np.empty(states, np.int32)
    branch = np.empty(4, np.int32)
    for lane in range(lanes):
        metric[:] = UNREACHED
        metric[0] = 0
        total = 0
        for step in range(steps):
            position = abs(r[lane, step]) * inverse_step
            row = level[lane, step]
            zero = _rounded(position, weight[lane])
            branch[:] = 1 << 30
            branch[0], branch[3] = zero + costs[0, row, 0], zero + costs[1, row, 0]
            magnitude[step] = 0
            first, last = max(1, int(position) - 1), max(1, int(position) - 1) + 3
            if every:
                first, last = 1, 2 * costs.shape[2] - 2
            for m in range(first, last + 1):
                candidate = _rounded(position - np.float32(m), weight[lane]) + costs[m & 1, row, (m + 1) >> 1]
                if candidate < branch[m & 3]:
                    branch[m & 3], magnitude[step, m & 3] = candidate, (m + 1) >> 1
            for state in range(states):
                lower = metric[previous[state, 0]] + branch[number[state, 0]]
                upper = metric[previous[state, 1]] + branch[number[state, 1]]
                chosen[step, state] = upper < lower
                updated[state] = min(lower, upper)
            metric, updated = updated, metric
            if (step + 1) % TILE == 0:
                least = metric.min()
                metric -= least
                total += least
        state = int(metric.argmin())
        cost[lane] = total + metric[state]
        for step in range(steps - 1, -1, -1):
            entered = chosen[step, state]
            found = magnitude[step, number[state, entered]]
            k[lane, step] = -found if r[lane, step] < 0 else found
            state = previous[state, entered]


@njit(nogil=True)
def _rounded(difference: np.float32, weight: np.float32) -> int:
    return int(np.rint(min(difference * difference * weight, SATURATION)))
