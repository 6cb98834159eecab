"""Scalar quantizers of residuals r, arrays or tensors: rounding, rounding with a dead zone, and RDOQ.

    SQ          k = round(r / Delta), half to even              CompressAI's inference
    dead zone   k = sgn r floor(|r| / Delta + xi)               xi <= 1/2; Delta-delta reconstruction in `levels`
    RDOQ        k in {round, one towards zero, 0} of least cost  w (r - k Delta)^2 + lambda_q bits(k)

RDOQ counts as the trellis search does: integers in 1/256 bit, one rounded and saturated float32 distortion, the
coder's own rates. On a tie the smaller |k| is kept.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numba import njit
from numpy.typing import NDArray

from lic_dist.quantization.candidates import distortion, escape_cost, rint
from lic_dist.quantization.jit import float_of_bits, kernel, search_inputs

RUN = 256  # steps of a lane at a time; their costs, below 2^21 each, sum in 32 bits
_I = np.int32  # as in `candidates`


def uniform(r: Any, step: float) -> Any:
    """Return SQ's int16 indices of r float32, array or tensor, any shape; the caller has checked the range."""
    if isinstance(r, torch.Tensor):
        return torch.round(r / _divisor(step, r.device)).to(torch.int16)
    scaled = r / np.float32(step)
    return np.rint(scaled, out=scaled).astype(np.int16)


def dead_zone(r: Any, step: float, rounding: float) -> Any:
    """Return int16 indices of dead-zone SQ with rounding offset xi, for r float32, array or tensor, any shape."""
    offset = float(np.float32(rounding))
    if isinstance(r, torch.Tensor):
        magnitude = torch.floor(r.abs() / _divisor(step, r.device) + offset)
        return (torch.sign(r) * magnitude).to(torch.int16)
    magnitude = np.abs(r)
    magnitude /= np.float32(step)
    magnitude += np.float32(rounding)
    return np.copysign(np.floor(magnitude, out=magnitude), r, out=magnitude).astype(np.int16)


def _divisor(step: float, device: torch.device) -> torch.Tensor:
    """Return the step as a tensor on the device: dividing by a Python number there multiplies by its inverse
    instead.
    """
    return torch.tensor(step, dtype=torch.float32, device=device)


def rdoq(
    r: NDArray[Any],
    level: NDArray[Any],
    weight: NDArray[Any],
    inverse_step: np.float32,
    triples: NDArray[Any],
    reach: NDArray[Any],
    flag: NDArray[Any],
    k: NDArray[Any],
    cost: NDArray[Any],
) -> float:
    """Fill k int16 [lanes, steps] and cost int64 [lanes] by RDOQ of r [lanes, steps]; arguments and result as
    `viterbi.search_lanes` and `SearchRates`.
    """
    tables = (triples.ravel(), triples.shape[1], reach, flag)
    return float_of_bits(_rdoq(*search_inputs(r, level, weight), inverse_step, *tables, k, cost))


@kernel
def _rdoq(
    r: NDArray[Any],
    level: NDArray[Any],
    wide_level: NDArray[Any],
    weight: NDArray[Any],
    by_step: bool,
    inverse_step: np.float32,
    flat: NDArray[Any],
    columns: int,
    reach: NDArray[Any],
    flag: NDArray[Any],
    k: NDArray[Any],
    cost: NDArray[Any],
) -> np.int32:
    position, index, prices = np.zeros(RUN, np.float32), np.zeros(RUN, np.int32), np.zeros(RUN, np.float32)
    low, high = np.zeros(RUN, np.int32), np.zeros(RUN, np.int32)
    peak, run_peak = _I(0), np.zeros(1, np.int32)
    for lane in range(len(r)):
        cost[lane] = 0
        if not by_step:
            for at in range(RUN):
                prices[at] = weight[lane]
        for start in range(0, r.shape[1], RUN):
            end = min(start + RUN, r.shape[1])
            size, run = end - start, r[lane, start:end]
            if len(wide_level):  # loops, because numba takes seconds to compile an assignment of slices
                for at in range(size):
                    index[at] = wide_level[lane, np.uint64(start + at)]
            else:
                for at in range(size):
                    index[at] = level[lane, np.uint64(start + at)]
            if by_step:
                for at in range(size):
                    prices[at] = weight[np.uint64(start + at)]
            run_peak[0] = _nearest(run, inverse_step, columns, position, index)
            peak = max(peak, run_peak[0])
            for at in range(size):
                triple = flat[np.uint32(index[at])]
                low[at], high[at] = _I(triple), _I(triple >> 32)
            if not run_peak.view(np.float32)[0] < columns - 1:
                _escapes(position[:size], index, columns, reach, flag, low, high)
            cost[lane] += _cheapest(run, position, prices, low, high, k[lane, start:end])
    return peak


@njit(nogil=True)
def _nearest(
    r: NDArray[Any], inverse_step: np.float32, columns: int, position: NDArray[Any], index: NDArray[Any]
) -> np.int32:
    """Fill in |r| / Delta, and in the place of levels where the nearest index's costs lie; return the largest |r| /
    Delta as its bits.
    """
    bits, last = position.view(np.int32), _I(columns - 1)
    largest = _I(0)
    for at in range(len(r)):
        value = abs(r[at]) * inverse_step
        position[at] = value
        index[at] = _I(_I(index[at] * _I(columns)) + max(min(_I(rint(value)), last), _I(0)))
    for at in range(len(r)):
        largest = max(largest, bits[at])
    return largest


@njit(nogil=True)
def _escapes(
    position: NDArray[Any],
    index: NDArray[Any],
    columns: int,
    reach: NDArray[Any],
    flag: NDArray[Any],
    low: NDArray[Any],
    high: NDArray[Any],
) -> None:
    """Correct the costs where the nearest index lies beyond the table: it and the next smaller one are escapes."""
    for at in range(len(position)):
        row, nearest = index[at] // columns, _I(rint(position[at]))
        if nearest >= columns:
            low[at] = (low[at] & 0xFFFF) | escape_cost(row, nearest - 1, reach, flag) << 16
            high[at] = escape_cost(row, nearest, reach, flag)


@njit(nogil=True)
def _cheapest(
    r: NDArray[Any],
    position: NDArray[Any],
    price: NDArray[Any],
    low: NDArray[Any],
    high: NDArray[Any],
    k: NDArray[Any],
) -> np.int32:
    """Fill in the cheapest index of each element, the smallest on a tie; return the sum of their costs."""
    total = _I(0)
    for at in range(len(r)):
        nearest = _I(rint(position[at]))
        below = max(_I(nearest - _I(1)), _I(0))
        zero_cost = _I(distortion(position[at], price[at]) + _I(low[at] & _I(0xFFFF)))
        below_cost = _I(distortion(position[at] - np.float32(below), price[at]) + _I(low[at] >> _I(16)))
        cost = _I(distortion(position[at] - np.float32(nearest), price[at]) + high[at])
        best = below if below_cost < zero_cost else _I(0)
        least = min(zero_cost, below_cost)
        best = nearest if cost < least else best
        k[at] = -best if r[at] < 0 else best
        total = _I(total + min(least, cost))
    return total
