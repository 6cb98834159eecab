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
from numpy.typing import NDArray

from lic_dist.quantization.candidates import bypass_cost, distortion, rint
from lic_dist.quantization.jit import kernel


def uniform(r: Any, step: float) -> Any:
    """Return SQ's int16 indices of r float32, array or tensor, any shape; the caller has checked the range."""
    if isinstance(r, torch.Tensor):
        return torch.round(r / _divisor(step, r.device)).to(torch.int16)
    return np.rint(r / np.float32(step)).astype(np.int16)


def dead_zone(r: Any, step: float, rounding: float) -> Any:
    """Return int16 indices of dead-zone SQ with rounding offset xi, for r float32, array or tensor, any shape."""
    offset = float(np.float32(rounding))
    if isinstance(r, torch.Tensor):
        magnitude = torch.floor(r.abs() / _divisor(step, r.device) + offset)
        return (torch.sign(r) * magnitude).to(torch.int16)
    magnitude = np.floor(np.abs(r) / np.float32(step) + np.float32(rounding))
    return (np.sign(r) * magnitude).astype(np.int16)


def _divisor(step: float, device: torch.device) -> torch.Tensor:
    """Return the step as a tensor on the device: dividing by a Python number there multiplies by its inverse
    instead.
    """
    return torch.tensor(step, dtype=torch.float32, device=device)


@kernel
def rdoq(
    r: NDArray[Any],
    level: NDArray[Any],
    weight: NDArray[Any],
    inverse_step: np.float32,
    costs: NDArray[Any],
    reach: NDArray[Any],
    flag: NDArray[Any],
    k: NDArray[Any],
    cost: NDArray[Any],
) -> None:
    """Fill k int16 [lanes, steps] and cost int64 [lanes] by RDOQ of r [lanes, steps]; arguments as
    `viterbi.search_lanes` and `SearchRates`.
    """
    last = costs.shape[1] - 1
    for lane in range(len(r)):
        total = np.int64(0)
        for step in range(r.shape[1]):
            position = abs(r[lane, step]) * inverse_step
            row = level[lane, step]
            price = weight[lane] if weight.ndim == 1 else weight[0, step]
            nearest = int(rint(position))
            best = 0
            least = distortion(position, price) + costs[row, 0]
            for magnitude in range(max(nearest - 1, 1), nearest + 1):
                if magnitude <= last:
                    rate = costs[row, magnitude]
                else:
                    rate = flag[row] + bypass_cost(magnitude - reach[row] - 1)
                candidate = distortion(position - np.float32(magnitude), price) + rate
                if candidate < least:
                    best, least = magnitude, candidate
            k[lane, step] = -best if r[lane, step] < 0 else best
            total += least
        cost[lane] = total
