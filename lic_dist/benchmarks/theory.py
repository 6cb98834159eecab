"""How good the quantizers are: against Shannon's bound, on a mixture like latents, by lanes, by candidates.

    gap         unit Gaussian, ideal entropy coding (the conditional entropy of the indices), every number of states
    mixture     tables adapted on one half and charged on the other, the lower hull over (D, c) against SQ at step 1
    lanes       one trellis a channel and picture against one long trellis over everything
    candidates  four union levels and zero against every level of the tables

c is the price of a bit in squared steps: w = 1, lambda_q = c D^2.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lic_dist.benchmarks import exhaustive
from lic_dist.benchmarks.data import LMBDA, LatentSamples, gaussian, label, mixture, record_at_price
from lic_dist.benchmarks.speed import SEARCHES
from lic_dist.codec.records import coder_tables
from lic_dist.models.compat import import_compressai
from lic_dist.progress import Progress
from lic_dist.quantization.adaptation import adaptation_rounds, gaussian_record
from lic_dist.quantization.quantize import Quantizer, search
from lic_dist.quantization.rates import SCALES, level_index
from lic_dist.quantization.record import QuantizerRecord
from lic_dist.quantization.trellis import ECM8, SCALAR, Trellis

RATES = (0.25, 0.5, 1.0, 2.0, 3.0)
ROUNDS = 3  # of adaptation
QUANTIZERS: tuple[tuple[str, Trellis], ...] = (
    ("sq", SCALAR),
    ("rdoq", SCALAR),
    *(("tcq", machine) for machine in SEARCHES),
)


@dataclass(frozen=True)
class Point:
    """A point of a rate-distortion curve: bits a sample, mean squared error."""

    rate: float
    mse: float


def gap(size: tuple[int, int]) -> dict[str, list[float]]:
    """Return by quantizer the dB above R(D) at each of RATES: the least over c, interpolated between steps."""
    samples = gaussian(*size)
    prices = {"sq": (1.0,), "rdoq": (0.05, 0.1, 0.2, 0.3, 0.4), "tcq": (0.25, 0.4, 0.5, 0.6, 0.75, 1.0)}
    widest = {"sq": (0.4, 7.0), "rdoq": (0.4, 3.0), "tcq": (0.22, 2.2)}
    found: dict[str, list[float]] = {}
    with Progress("gap to R(D)", len(QUANTIZERS), "quantizer") as bar:
        for name, machine in QUANTIZERS:
            curves = [
                [
                    _entropy_point(record_at_price(name, machine, float(step), price), samples)
                    for step in np.geomspace(*widest[name], 16)
                ]
                for price in prices[name]
            ]
            found[label(name, machine)] = [min(_gap_at(curve, rate) for curve in curves) for rate in RATES]
            bar.advance()
    return found


def _entropy_point(record: QuantizerRecord, samples: LatentSamples) -> Point:
    """Adapt to the samples; return the point of the empirical entropy of k given the active quantizer."""
    *_, record = adaptation_rounds(record, [(samples.r, samples.level)], ROUNDS)
    quantizer = Quantizer(record)
    k = quantizer.quantize(samples.r, samples.level)
    q = quantizer.active(k)
    bits = 0.0
    for active in range(record.trellis.quantizers):
        counts = np.unique(k[q == active], return_counts=True)[1].astype(np.float64)
        bits += float((counts * np.log2(counts.sum() / counts)).sum())
    return Point(bits / k.size, _mse(quantizer, k, samples))


def _mse(quantizer: Quantizer, k: NDArray[np.int16], samples: LatentSamples) -> float:
    return float(np.square(quantizer.dequantize(k, samples.level) - samples.r, dtype=np.float64).mean())


def _gap_at(curve: Sequence[Point], rate: float) -> float:
    """Return the dB above the bound 2^(-2R) where the curve has this rate; infinite where it does not reach it."""
    ordered = sorted(curve, key=lambda point: point.rate)
    rates = [point.rate for point in ordered]
    if not rates[0] <= rate <= rates[-1]:
        return float("inf")
    above = [10 * np.log10(point.mse) + 20 * np.log10(2) * point.rate for point in ordered]
    return float(np.interp(rate, rates, above))


def mixture_rates(size: tuple[int, int]) -> dict[str, Any]:
    """Return by quantizer the rate at the error of SQ with step 1 and CompressAI's tables and levels, against its
    rate.
    """
    samples, sigma = mixture(*size)
    half = size[0] // 2
    pilot, rest = (
        LatentSamples(samples.r[part], samples.level[part], samples.weights)
        for part in (slice(half), slice(half, None))
    )
    plain = _compressai_point(rest, sigma[half:])
    prices = {"sq": (1.0,), "rdoq": (0.05, 0.1, 0.15, 0.2, 0.3), "tcq": (0.3, 0.5, 0.8, 1.2, 2.0)}
    steps = {"sq": (1.0,), "rdoq": (0.75, 0.8, 0.85, 0.9, 0.95, 1.0), "tcq": (0.45, 0.5, 0.56, 0.63, 0.7)}
    found: dict[str, Any] = {"sq with compressai's tables": {"bits": plain.rate, "mse": plain.mse}}
    with Progress("mixture", len(QUANTIZERS), "quantizer") as bar:
        for name, machine in QUANTIZERS:
            points = []
            for step in steps[name]:
                for price in prices[name]:
                    *_, record = adaptation_rounds(
                        record_at_price(name, machine, step, price), [(pilot.r, pilot.level)], ROUNDS
                    )
                    quantizer = Quantizer(record)
                    k = quantizer.quantize(rest.r, rest.level)
                    points.append(Point(float(quantizer.bits(k, rest.level).sum()) / k.size, _mse(quantizer, k, rest)))
            rate = _hull_rate(points, plain.mse)
            found[label(name, machine)] = {"bits": rate, "against_sq": rate / plain.rate - 1}
            bar.advance()
    return found


def _compressai_point(samples: LatentSamples, sigma: NDArray[np.float32]) -> Point:
    gaussian_conditional = import_compressai().entropy_models.GaussianConditional(SCALES.tolist())
    gaussian_conditional.update()
    tables = coder_tables(gaussian_conditional)
    k = np.rint(samples.r).astype(np.int16)
    bits = tables.bits(k, level_index(sigma, "above").astype(np.int32))
    return Point(float(bits.mean()), float(np.square(k - samples.r, dtype=np.float64).mean()))


def _hull_rate(points: Sequence[Point], mse: float) -> float:
    """Return the rate of the points' lower convex hull at a mean squared error (a mixture of two points has it)."""
    if len(points) == 1:
        return points[0].rate
    slopes = np.geomspace(0.05, 500, 4000)
    lines = np.array([[point.rate + slope * point.mse for slope in slopes] for point in points]).min(axis=0)
    return float((lines - slopes * mse).max())


def lanes(real: LatentSamples) -> dict[str, dict[str, float]]:
    """Return by steps of a lane the cost J = D + lambda_q R of TCQ-8 by lanes over that of one long trellis, less 1.

    Real latents, with one weight for all channels, so that a long lane may cross them. `bits` is the same for the rate
    alone.
    """
    found = {}
    for steps in (real.r.shape[1], 256, 64):
        samples = real.cut(steps)
        record = gaussian_record("tcq", 0.7, np.full(1, float(real.weights.mean())), LMBDA, 0.15, ECM8)
        *_, record = adaptation_rounds(record, [(samples.r, samples.level)], ROUNDS)
        long_r, long_level = samples.r.reshape(1, -1), samples.level.reshape(1, -1)
        figures = []
        for r, level in ((samples.r, samples.level), (long_r, long_level)):
            k, cost = search(r, level, record.lane_weights(len(r)), record.step, record.y_tables, ECM8)
            figures.append((float(cost.sum()), float(Quantizer(record).bits(k, level).sum())))
        (cost, bits), (long_cost, long_bits) = figures
        found[str(steps)] = {"cost": cost / long_cost - 1, "bits": bits / long_bits - 1}
    return found


def candidates(size: tuple[int, int]) -> dict[str, dict[str, float]]:
    """Return by c the cost of TCQ-8's search over that of a search of every union level, less 1; mixture, D = .56.

    The tables are those of the Gaussians that the samples come from, and adapted ones.
    """
    samples, _ = mixture(*size)
    found = {}
    for price in (0.5, 1.0, 2.0, 4.0):
        matched = record_at_price("tcq", ECM8, 0.56, price)
        *_, last = adaptation_rounds(matched, [(samples.r, samples.level)], ROUNDS)
        found[str(price)] = {"matched": _excess(matched, samples), "adapted": _excess(last, samples)}
    return found


def _excess(record: QuantizerRecord, samples: LatentSamples) -> float:
    weight = record.lane_weights(len(samples.r))
    _, cost = search(samples.r, samples.level, weight, record.step, record.y_tables, ECM8)
    _, least = exhaustive.search(samples.r, samples.level, weight, record.step, record.y_tables, ECM8, every=True)
    return float(cost.sum() / least.sum() - 1)
