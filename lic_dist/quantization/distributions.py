"""P(k | sigma, Q), as a Gaussian and as counts of real indices give it, and P(k | channel, Q) of a factorized prior.

Those of sigma are by |k|, for one sign, with a row for each active quantizer and scale level. `rates.tables_from_pmf`
turns them into the coder's integers. Those of a channel are signed, by k = -K..K, with a row for each active quantizer
and channel; `rates.tables_from_signed_pmf` takes them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lic_dist.quantization import kernels
from lic_dist.quantization.rates import LEVELS, SCALES, WIDEST_REACH
from lic_dist.quantization.trellis import Trellis

# F(channel, value) of a factorized prior: P(r <= value) for the residuals r of a channel, float64 [M, n], from channels
# int64 [M, 1] and values float64 [M, n]
Cdf = Callable[[NDArray[Any], NDArray[Any]], NDArray[Any]]

_LEAST_PROBABILITY = 1e-12
_TAIL_SIGMAS = 6.2  # |r| beyond this many sigmas has a probability below 1e-9


def pmf_shape(step: float, trellis: Trellis, channels: int | None = None) -> tuple[int, int]:
    """Return the rows and columns of `analytic_pmf`, [Q * LEVELS, K+1], or with a number of channels those of
    `factorized_pmf`, [Q * channels, 2K+1]; counts share them.
    """
    spacing = step * trellis.quantizers
    largest = min(int(np.ceil(_TAIL_SIGMAS * float(SCALES[-1]) / spacing)) + 2, 2 * WIDEST_REACH)
    if channels is None:
        return trellis.quantizers * LEVELS, largest + 1
    return trellis.quantizers * channels, 2 * largest + 1


def analytic_pmf(step: float, trellis: Trellis, rounding: float = 0.5) -> NDArray[Any]:
    """Return P(k | sigma, Q) of a zero-mean Gaussian by |k|, for one sign: float64 [Q * LEVELS, K+1].

    A row's first entry plus twice the others is 1 (up to 1e-9). The density is integrated over the cell of the active
    quantizer.
    """
    sigmas = SCALES.astype(np.float64)[:, None]
    blocks = []
    for upper in upper_edges(step, trellis, rounding):
        tails = torch.erfc(torch.from_numpy(upper / (np.sqrt(2.0) * sigmas))).numpy()  # P(|r| > edge)
        blocks.append(np.hstack([1.0 - tails[:, :1], 0.5 * (tails[:, :-1] - tails[:, 1:])]))
    return np.concatenate(blocks)


def factorized_pmf(cdf: Cdf, channels: int, step: float, trellis: Trellis, rounding: float = 0.5) -> NDArray[Any]:
    """Return P(k | channel, Q) of a factorized prior by k = -K..K: float64 [Q * channels, 2K+1].

    The cells are those of `analytic_pmf`. What a row lacks to 1 lies beyond K.
    """
    channel = np.arange(channels)[:, None]
    blocks = []
    for upper in upper_edges(step, trellis, rounding):
        edges = np.concatenate((-upper[::-1], upper))
        below = np.asarray(cdf(channel, np.tile(edges, (channels, 1))), np.float64)
        blocks.append(np.diff(below))
    pmf: NDArray[Any] = np.clip(np.concatenate(blocks), 0.0, 1.0)
    return pmf


def upper_edges(step: float, trellis: Trellis, rounding: float) -> list[NDArray[Any]]:
    """Return for each quantizer the upper edges of the cells of |k| = 0..K, float64 [K+1].

    In steps: scalar |k| + 1 - xi (xi = `rounding`); Q0 2|k| + 1; Q1 1/2 for 0, else 2|k|. A cell begins where the one
    before it ends, that of 0 at its negative edge.
    """
    magnitude = np.arange(pmf_shape(step, trellis)[1], dtype=np.float64)
    if trellis.quantizers == 1:
        return [(magnitude + 1 - rounding) * step]
    return [(2 * magnitude + 1) * step, np.where(magnitude == 0, 0.5, 2 * magnitude) * step]


def count(
    k: NDArray[Any], level: NDArray[Any], trellis: Trellis, levels: int, width: int, signed: bool = False
) -> NDArray[Any]:
    """Count how often |k| occurred in each row Q * levels + level, both signs together: int64 [rows, width]; the last
    column is of all that are larger.

    `signed` counts k itself, 0 in the middle, and what lies beyond in the first and last columns. `k` int16 and
    `level`, uint8 or uint16, are [lanes, steps]; every lane starts in state 0. Counts of shards add up.
    """
    if k.shape != level.shape:
        raise ValueError(f"k has shape {k.shape}, level {level.shape}")
    if level.size and level.max() >= levels:
        raise ValueError(f"levels lie outside 0..{levels - 1}")
    quantizer, next_state = np.array(trellis.quantizer, np.uint8), np.array(trellis.next_state, np.int32)
    arrays = np.ascontiguousarray(k, np.int16), np.ascontiguousarray(level), quantizer, next_state
    counts: NDArray[Any] = kernels.count_indices(*arrays, levels, width, signed)
    return counts


def adapted_pmf(counts: NDArray[Any], prior: NDArray[Any], strength: float = 1.0, signed: bool = False) -> NDArray[Any]:
    """Return P by |k|, for one sign, or by k where `signed`, from counts shrunk towards a prior: float64 of the counts'
    shape, never zero.

    The prior row weighs as much as `strength` observations for each of its effective symbols (2 to the entropy): a wide
    row has more to learn from its counts than a narrow one.
    """
    if counts.shape != prior.shape:
        raise ValueError(f"counts have shape {counts.shape}, the prior {prior.shape}")
    both_signs = np.full(counts.shape[1], 1.0 if signed else 2.0)
    both_signs[0] = 1.0
    prior = np.maximum(prior, _LEAST_PROBABILITY)
    entropy = -(both_signs * prior * np.log2(prior)).sum(axis=1, keepdims=True)
    pseudo = strength * np.exp2(entropy)
    seen = counts.sum(axis=1, keepdims=True)
    adapted: NDArray[Any] = np.maximum((counts / both_signs + pseudo * prior) / (seen + pseudo), _LEAST_PROBABILITY)
    return adapted
