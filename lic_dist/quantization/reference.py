"""The searches in plain numpy and python: the definition that every engine must reproduce bit for bit.

Costs are integers in 1/256 bit: the coder's rate table plus one rounded float32 distortion.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lic_dist.quantization.rates import CdfTables, SearchRates, search_rates
from lic_dist.quantization.trellis import Trellis

REDUCTION_INTERVAL = 64
SATURATION = np.float32(1 << 20)
_UNREACHED = 1 << 29

Candidate = tuple[int, int]  # cost, |k|


def search(
    r: NDArray[Any],
    level: NDArray[Any],
    weight: NDArray[Any],
    step: float,
    tables: CdfTables | SearchRates,
    trellis: Trellis,
) -> tuple[NDArray[Any], NDArray[Any]]:
    """Run a Viterbi search: indices int16 [lanes, steps], costs int64 [lanes]; arguments as `quantize.search`."""
    k = np.zeros(r.shape, np.int16)
    cost = np.zeros(len(r), np.int64)
    for lane, choices in enumerate(_choices(r, level, weight, step, tables)):
        magnitudes, cost[lane] = _search_lane(choices, trellis)
        k[lane] = np.where(r[lane] < 0, -magnitudes, magnitudes)
    return k, cost


def rdoq(
    r: NDArray[Any], level: NDArray[Any], weight: NDArray[Any], step: float, tables: CdfTables | SearchRates
) -> tuple[NDArray[Any], NDArray[Any]]:
    """Choose the cheapest of round(|r| / Delta), one less, and 0, the smallest on a tie; arguments as
    `quantize.rdoq`.
    """
    rates = _rates(tables)
    level, weights = rates.search_levels(r, level), by_element(weight, r.shape)
    k, cost = np.zeros(r.shape, np.int16), np.zeros(len(r), np.int64)
    for (lane, at), value in np.ndenumerate(r):
        position = np.abs(value) * inverse(step)
        nearest = int(np.rint(position))
        least, magnitude = min(
            (distortion(position, m, weights[lane, at]) + rates.cost(int(level[lane, at]), m), m)
            for m in {0, max(nearest - 1, 0), nearest}
        )
        k[lane, at] = -magnitude if value < 0 else magnitude
        cost[lane] += least
    return k, cost


def inverse(step: float) -> np.float32:
    """Return 1/D, rounded once to float32, by which the searches multiply."""
    return np.float32(1.0 / step)


def by_element(weight: NDArray[Any], shape: tuple[int, ...]) -> NDArray[Any]:
    """Return the weight of every element, [lanes, steps], from weights [lanes] or [1, steps]."""
    return np.broadcast_to(weight[:, None] if weight.ndim == 1 else weight, shape)


def _rates(tables: CdfTables | SearchRates) -> SearchRates:
    return tables if isinstance(tables, SearchRates) else search_rates(tables)


def _choices(
    r: NDArray[Any], level: NDArray[Any], weight: NDArray[Any], step: float, tables: CdfTables | SearchRates
) -> Iterator[list[list[list[list[Candidate]]]]]:
    """Yield the candidates of every step of a lane, for each lane."""
    rates = _rates(tables)
    level, weights = rates.search_levels(r, level), by_element(weight, r.shape)
    for lane in range(len(r)):
        yield [
            candidates(r[lane, at], int(level[lane, at]), weights[lane, at], inverse(step), rates)
            for at in range(r.shape[1])
        ]


def candidates(
    r: np.float32, level: int, weight: np.float32, inverse_step: np.float32, rates: SearchRates
) -> list[list[list[Candidate]]]:
    """Return candidates (cost, |k|) by [quantizer][parity] of one residual: 0, and union levels m0..m0+3."""
    position = np.abs(r) * inverse_step
    smallest = max(1, int(np.floor(position)) - 1)
    levels = len(rates.costs) // 2
    found: list[list[list[Candidate]]] = [[[], []], [[], []]]
    for quantizer in (0, 1):
        rate = rates.cost(quantizer * levels + level, 0)
        found[quantizer][0].append((distortion(position, 0, weight) + rate, 0))
    for m in range(smallest, smallest + 4):
        quantizer, magnitude = m & 1, (m + 1) >> 1
        rate = rates.cost(quantizer * levels + level, magnitude)
        found[quantizer][magnitude & 1].append((distortion(position, m, weight) + rate, magnitude))
    return found


def distortion(position: np.float32, m: int, weight: np.float32) -> int:
    """Return the rounded distortion of union level m for |r|/D = position: float32, no fused operation, saturated."""
    with np.errstate(over="ignore"):
        difference = position - np.float32(m)
        return int(np.rint(np.minimum(difference * difference * weight, SATURATION)))


def _search_lane(choices: list[list[list[list[Candidate]]]], trellis: Trellis) -> tuple[NDArray[Any], int]:
    """Return the indices |k| int64 [steps] and the cost of the cheapest path of one lane."""
    metric = [0] + [_UNREACHED] * (trellis.states - 1)
    decisions: list[list[tuple[int, int]]] = []  # per step and state: previous state, |k|
    subtracted = 0
    predecessors = trellis.predecessors()
    for position, choice in enumerate(choices):
        updated, decision = [], []
        for state in range(trellis.states):
            best, previous, magnitude = min(
                (metric[before] + candidate_cost, before, magnitude)  # ties: lower previous state, then zero
                for before, parity in predecessors[state]
                for candidate_cost, magnitude in choice[trellis.quantizer[before]][parity]
            )
            updated.append(best)
            decision.append((previous, magnitude))
        metric = updated
        decisions.append(decision)
        if (position + 1) % REDUCTION_INTERVAL == 0:
            least = min(metric)
            metric = [value - least for value in metric]
            subtracted += least
    state = metric.index(min(metric))
    total = subtracted + metric[state]
    magnitudes = np.zeros(len(choices), np.int64)
    for position in range(len(choices) - 1, -1, -1):
        state, magnitudes[position] = decisions[position][state]
    return magnitudes, total


def brute_force(
    r: NDArray[Any],
    level: NDArray[Any],
    weight: NDArray[Any],
    step: float,
    tables: CdfTables | SearchRates,
    trellis: Trellis,
) -> tuple[NDArray[Any], NDArray[Any]]:
    """Search as `search` does by enumerating every sequence of candidates: exponential, for short lanes only."""
    k = np.zeros(r.shape, np.int16)
    cost = np.zeros(len(r), np.int64)
    for lane, choices in enumerate(_choices(r, level, weight, step, tables)):
        alphabets = [sorted({m for q in choice for p in q for _, m in p}) for choice in choices]
        scored = [
            scored_path for path in product(*alphabets) if (scored_path := _score(path, choices, trellis)) is not None
        ]
        cost[lane], _, _, magnitudes = min(scored)
        k[lane] = np.where(r[lane] < 0, -np.array(magnitudes, np.int64), magnitudes)
    return k, cost


def _score(
    path: tuple[int, ...], choices: list[list[list[list[Candidate]]]], trellis: Trellis
) -> tuple[int, int, tuple[tuple[int, bool], ...], tuple[int, ...]] | None:
    """Return the cost of a path, then what decides ties, last step first; None where a magnitude is no candidate."""
    total, state = 0, 0
    trail: list[tuple[int, bool]] = []
    for magnitude, choice in zip(path, choices, strict=True):
        offered = {m: cost for cost, m in choice[trellis.quantizer[state]][magnitude & 1]}
        if magnitude not in offered:
            return None
        total += offered[magnitude]
        trail.append((state, magnitude != 0))
        state = trellis.next_state[state][magnitude & 1]
    return total, state, tuple(reversed(trail)), path
