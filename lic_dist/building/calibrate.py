"""Calibration of (g, D): the pair of lowest measured L on held-out training crops.

The search weighs squared errors of the latents by S_c and bits by lambda_q = g * 3 / (lmbda * 255^2). Errors chosen
by rate-distortion optimization are not independent, so that g = 1 is not the optimum, and a coarser step with a
milder search can win (METHOD.md section 1). Each trial adapts its tables on the pilot, searches the held-out crops
and runs the decoder on them: a pattern search in (log g, log D) whose steps are halved where no neighbour is better.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from lic_dist import config
from lic_dist.building.latents import Latents, View, squared_error, view
from lic_dist.building.records import adapt, analytic_record
from lic_dist.models.checkpoint import Checkpoint
from lic_dist.progress import Progress
from lic_dist.quantization.quantize import Quantizer
from lic_dist.quantization.record import QuantizerRecord
from lic_dist.quantization.sensitivity import sensitivities

START = (0.2, 0.66)  # (g, D)
G_RANGE, D_RANGE = (0.02, 2.0), (0.4, 1.2)
FACTORS = ((2.0, 1.15), (2**0.5, 1.07))  # of one step in g and in D, coarse then fine
PROBES, PROBED = 4, 16  # probe vectors a sample, and samples, for the sensitivities


@dataclass(frozen=True)
class Measured:
    """Means over crops: L = lmbda * 255^2 * mse + bpp, bpp of y and z by the integer tables."""

    L: float
    bpp: float
    mse: float


def measure(checkpoint: Checkpoint, record: QuantizerRecord, samples: Latents, seen: View) -> Measured:
    """Quantize, count bits, decode: what a quantizer costs on these samples."""
    quantizer = Quantizer(record)
    k = quantizer.quantize(seen.residual, seen.level)
    y_hat = seen.means + quantizer.dequantize(k).reshape(seen.means.shape)
    bits = float(quantizer.bits(k, seen.level).sum()) + z_bits(record, samples.z).sum()
    bpp = bits / (len(samples) * samples.pixels.shape[2] * samples.pixels.shape[3])
    mse = squared_error(checkpoint.model, y_hat, samples.pixels)
    return Measured(checkpoint.spec.lmbda * 255**2 * mse + bpp, bpp, mse)


def z_bits(record: QuantizerRecord, z: np.ndarray) -> np.ndarray:
    """Estimated bits of z, float64 [n], from int16 [n, Nz, hz, wz]."""
    rows = np.broadcast_to(np.arange(z.shape[1], dtype=np.int32)[None, :, None, None], z.shape)
    return record.z_tables.bits(z.astype(np.int32), rows).sum(axis=(1, 2, 3))


def channel_weights(checkpoint: Checkpoint, section: config.Quantizer, pilot: Latents, seen: View) -> Any:
    """(S_c float32 [M], notes): the decoder's squared gain of each channel with its standard error, or ones."""
    if section.name == "sq" or section.weights == "uniform":
        return np.ones(checkpoint.spec.M, np.float32), {}
    y_hat = torch.from_numpy((np.rint(seen.residual).reshape(seen.means.shape) + seen.means)[:PROBED])
    generator = torch.Generator().manual_seed(0)
    mean, error = sensitivities(checkpoint.model.g_s, y_hat, PROBES, generator)  # type: ignore[arg-type]
    return mean.astype(np.float32), {"weights_standard_error": [float(value) for value in error]}


@contextmanager
def _one_thread() -> Iterator[None]:
    """A record's bytes are to repeat: sums over several threads would not."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@_one_thread()
def calibrate(
    checkpoint: Checkpoint, section: config.Quantizer, pilot: Latents, held_out: Latents, batch: int = 8
) -> QuantizerRecord:
    """Make the quantizer record of a checkpoint: sensitivities, (g, D) where they are `auto`, adapted tables.

    The notes carry every trial of the search: [g, D, L, bpp, mse].
    """
    model = checkpoint.model
    pilot_view = view(model, pilot.y, pilot.z, batch)
    held_view = view(model, held_out.y, held_out.z, batch)
    weights, notes = channel_weights(checkpoint, section, pilot, pilot_view)
    fixed_g = _fixed(section.lambda_scale if section.name == "tcq" else 1.0)
    fixed_step = _fixed(1.0 if section.name == "sq" and section.step == "auto" else section.step)
    trials: dict[tuple[float, float], tuple[Measured, QuantizerRecord]] = {}

    def trial(g: float, step: float) -> float:
        key = (round(g, 6), round(step, 6))
        if key not in trials:
            record = analytic_record(checkpoint, section.name, section.states, key[1], key[0], weights)
            if section.rates == "adapted":
                record = adapt(record, pilot_view, section.adapt_rounds)
            trials[key] = measure(checkpoint, record, held_out, held_view), record
            bar.advance(1, g=key[0], D=key[1], L=trials[key][0].L)
        return trials[key][0].L

    expected = 16 if fixed_g is None and fixed_step is None else 8 if None in (fixed_g, fixed_step) else 1
    with Progress(f"calibrating {section.name}", expected, "trial") as bar:
        best = _pattern_search(trial, fixed_g, fixed_step)
    measured, record = trials[(round(best[0], 6), round(best[1], 6))]
    table = [[*key, one.L, one.bpp, one.mse] for key, (one, _) in sorted(trials.items())]
    notes |= {"calibration": table, "calibration_samples": len(held_out), "L": measured.L}
    return replace(record, notes={**record.notes, **notes})


def _fixed(value: float | str) -> float | None:
    return None if value == "auto" else float(value)


def _pattern_search(trial: Any, fixed_g: float | None, fixed_step: float | None) -> tuple[float, float]:
    best = (START[0] if fixed_g is None else fixed_g, START[1] if fixed_step is None else fixed_step)
    lowest = trial(*best)
    for g_factor, step_factor in FACTORS:
        moved = True
        while moved:
            moved = False
            g, step = best
            neighbours = []
            if fixed_step is None:
                neighbours += [(g, step * step_factor), (g, step / step_factor)]
            if fixed_g is None:
                neighbours += [(g * g_factor, step), (g / g_factor, step)]
            for one in neighbours:
                inside = G_RANGE[0] <= one[0] <= G_RANGE[1] and D_RANGE[0] <= one[1] <= D_RANGE[1]
                if inside and (value := trial(*one)) < lowest - 1e-9:
                    best, lowest, moved = one, value, True
                    break
    assert math.isfinite(lowest)
    return best
