"""Quantizers at work: search, the state machine walked, levels, bits; and the adaptation of rate tables.

    r = y - means --quantize--> k --dequantize--> level, y_hat = means + level
                                 \\--rows--> table rows --> bits, or the entropy coder

Layout everywhere: [lanes, steps]. A lane is one channel of one image (image-major), its steps are the
positions in raster order, and every lane starts in state 0.
"""

from __future__ import annotations

import numpy as np

from lic_dist.errors import LicError
from lic_dist.quantization import kernels
from lic_dist.quantization.rates import (
    LEVELS,
    CdfTables,
    SearchRates,
    adapted_pmf,
    analytic_pmf,
    count,
    search_rates,
    tables_from_pmf,
)
from lic_dist.quantization.record import QuantizerRecord
from lic_dist.quantization.reference import inverse
from lic_dist.quantization.trellis import Trellis, levels

_LARGEST_INDEX = 32767  # indices are int16


def search(
    r: np.ndarray,
    level: np.ndarray,
    weight: np.ndarray,
    step: float,
    tables: CdfTables | SearchRates,
    trellis: Trellis,
) -> tuple[np.ndarray, np.ndarray]:
    """The indices of least cost, int16 [lanes, steps], and their cost, int64 [lanes], in 1/256 bit.

    r float32 [lanes, steps]; level uint8 [lanes, steps], the scale level; weight float32 [lanes], the cost
    in 1/256 bit of a squared error of one step D (`QuantizerRecord.lane_weights`); step D. Bit-identical to
    `reference.search`. LicError where r is not finite or an index would not fit; ValueError for a machine
    with one state.
    """
    if trellis.quantizers != 2:
        raise ValueError(f"{trellis.name} has no trellis to search")
    rates = tables if isinstance(tables, SearchRates) else search_rates(tables)
    r = np.ascontiguousarray(r, np.float32)
    level = _checked_levels(level, r.shape)
    weight = np.ascontiguousarray(weight, np.float32)
    if weight.shape != r.shape[:1] or not (np.isfinite(weight) & (weight >= 0)).all():
        raise ValueError("weight is one finite number >= 0 a lane")
    if len(rates.costs) != 2 * LEVELS:
        raise ValueError(f"the tables have {len(rates.costs)} rows, not {2 * LEVELS}")
    inverse_step = inverse(step)
    _check_range(r, inverse_step, 2 * _LARGEST_INDEX - 2)
    predecessors = np.array(trellis.predecessors(), np.int32)
    residue = _class_residues(trellis)[predecessors[..., 0], predecessors[..., 1]]
    k = np.empty(r.shape, np.int16)
    cost = np.empty(len(r), np.int64)
    kernels.search_lanes(
        r,
        level,
        weight,
        inverse_step,
        rates.union_costs,
        rates.costs[:LEVELS, 0] | (rates.costs[LEVELS:, 0] << 16),
        rates.reach,
        rates.flag,
        np.ascontiguousarray(predecessors[..., 0]),
        residue,
        k,
        cost,
    )
    return k, cost


def _class_residues(trellis: Trellis) -> np.ndarray:
    """Int32 [states, parity]: the residue modulo 4 of the union levels that a state's branch takes."""
    by_class = np.array([[0, 2], [3, 1]], np.int32)  # [Q, parity]: Q0 has m = 2k, Q1 has m = 2k - 1
    return by_class[list(trellis.quantizer)]


def _checked_levels(level: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    level = np.ascontiguousarray(level, np.uint8)
    if level.shape != shape or len(shape) != 2:
        raise ValueError(f"level has shape {level.shape}, not the [lanes, steps] {shape}")
    if level.size and level.max() >= LEVELS:
        raise ValueError(f"scale levels are below {LEVELS}")
    return level


def _check_range(r: np.ndarray, inverse_step: np.float32, limit: int) -> None:
    """LicError unless |r| / step is finite and at most `limit`."""
    peak = np.abs(r).max(initial=np.float32(0))
    if not np.isfinite(peak):
        raise LicError("a latent is not finite", hint="check the checkpoint of the encoder")
    if float(peak) * float(inverse_step) > limit:
        step = 1.0 / float(inverse_step)
        raise LicError(
            f"a latent of {float(peak):.6g} does not fit 16-bit indices at step {step:.6g}",
            hint="take a larger step, or check the encoder",
        )


class Quantizer:
    """A quantizer record put to work: stateless, safe to share between threads, cheap to pickle."""

    def __init__(self, record: QuantizerRecord) -> None:
        self.record = record
        self.trellis = record.trellis
        self._rates = search_rates(record.y_tables) if self.trellis.quantizers == 2 else None

    def quantize(self, r: np.ndarray, level: np.ndarray) -> np.ndarray:
        """Indices int16 of residuals r = y - means, float32 [lanes, steps]; level uint8, the same shape.

        SQ rounds r / step half to even; TCQ searches. The lanes are whole images of the record's M
        channels. LicError where r is not finite or an index does not fit 16 bits.
        """
        r = np.ascontiguousarray(r, np.float32)
        if self._rates is None:
            _checked_levels(level, r.shape)
            _check_range(r, inverse(self.record.step), _LARGEST_INDEX)
            return np.rint(r / np.float32(self.record.step)).astype(np.int16)
        channels = len(self.record.weights)
        if len(r) % channels:
            raise ValueError(f"{len(r)} lanes are not whole images of {channels} channels")
        weight = self.record.lane_weights(len(r) // channels)
        return search(r, level, weight, self.record.step, self._rates, self.trellis)[0]

    def active(self, k: np.ndarray) -> np.ndarray:
        """The active quantizer of each index, uint8 [lanes, steps]."""
        return active(k, self.trellis)

    def rows(self, k: np.ndarray, level: np.ndarray) -> np.ndarray:
        """The table row of each index, int32 [lanes, steps]: Q * 64 + level."""
        level = _checked_levels(level, k.shape)
        return self.active(k).astype(np.int32) * LEVELS + level

    def dequantize(self, k: np.ndarray) -> np.ndarray:
        """Reconstruction levels, float32 [lanes, steps]: y_hat = means + level."""
        return levels(k, self.active(k), self.record.step, self.trellis)

    def bits(self, k: np.ndarray, level: np.ndarray) -> np.ndarray:
        """Estimated bits of each lane, float64 [lanes], escapes included."""
        return self.record.y_tables.bits(k, self.rows(k, level)).sum(axis=1)


def active(k: np.ndarray, trellis: Trellis) -> np.ndarray:
    """The active quantizer of each index k int16 [lanes, steps]: uint8, same shape."""
    if trellis.states == 1:
        return np.zeros(k.shape, np.uint8)
    quantizer = np.array(trellis.quantizer, np.uint8)
    next_state = np.array(trellis.next_state, np.int32)
    return kernels.active_quantizers(np.ascontiguousarray(k, np.int16), quantizer, next_state)


def adapted_tables(
    r: np.ndarray, level: np.ndarray, weight: np.ndarray, step: float, trellis: Trellis, passes: int = 3
) -> CdfTables:
    """Tables re-estimated from what a search over real data chooses, starting from the analytic ones.

    Arguments as `search`. Each pass searches with the tables so far and counts; for SQ, whose indices do
    not depend on the tables, one pass is enough. Watch the rate-distortion cost, not the bits: every
    adaptation makes zeros cheaper.
    """
    prior = analytic_pmf(step, trellis)
    tables = tables_from_pmf(prior)
    for _ in range(passes if trellis.quantizers == 2 else 1):
        if trellis.quantizers == 2:
            k, _ = search(r, level, weight, step, tables, trellis)
        else:
            _check_range(np.asarray(r, np.float32), inverse(step), _LARGEST_INDEX)
            k = np.rint(r / np.float32(step)).astype(np.int16)
        rows = active(k, trellis).astype(np.int32) * LEVELS + _checked_levels(level, k.shape)
        tables = tables_from_pmf(adapted_pmf(count(k, rows, (len(prior), prior.shape[1])), prior))
    return tables
