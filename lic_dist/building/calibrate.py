"""Calibration: the step and the strength of least measured L on held-out training crops.

The search weighs squared errors of the latents by S_c and bits by lambda_q = g * 3 / (lmbda * 255^2). Errors chosen
by rate-distortion optimization are not independent, so that g = 1 is not the optimum, and a coarser step with a
milder search can win (METHOD.md section 1). Each trial adapts its tables on the pilot, quantizes the held-out crops
and runs the decoder on them: a pattern search in (log strength, log step) whose steps are halved where no neighbour
is better. The strength is g for RDOQ and TCQ, the rounding offset xi for the dead zone.

The record's notes keep what was measured: every trial, the rounds of adaptation at the chosen pair, and how the
change of the picture's MSE that the sensitivities predict compares with the real one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch

from lic_dist import config
from lic_dist.building.latents import Latents, View, squared_error, view
from lic_dist.building.records import analytic_record
from lic_dist.errors import LicError
from lic_dist.models.checkpoint import Checkpoint
from lic_dist.progress import Progress
from lic_dist.quantization.adaptation import adapted, centred
from lic_dist.quantization.quantize import Quantizer
from lic_dist.quantization.record import QuantizerRecord
from lic_dist.quantization.sensitivity import sensitivities

PROBES, PROBED = 4, 16  # probe vectors a sample, and samples, for the sensitivities


@dataclass(frozen=True)
class Axes:
    """Where the search of a quantizer starts, (strength, step), how far it may go, and the factors of its moves."""

    start: tuple[float, float]
    strengths: tuple[float, float]
    steps: tuple[float, float]
    factors: tuple[tuple[float, float], ...] = ((2.0, 1.15), (2**0.5, 1.07))  # of (strength, step): coarse, then fine


AXES = {
    "sq": Axes((1.0, 1.0), (1.0, 1.0), (0.5, 2.0)),
    "deadzone": Axes((0.45, 1.0), (0.1, 0.5), (0.5, 2.0), ((1.2, 1.15), (1.1, 1.07))),
    "rdoq": Axes((0.2, 1.0), (0.002, 2.0), (0.5, 2.0)),
    "tcq": Axes((0.2, 0.66), (0.002, 2.0), (0.4, 1.2)),
}


@dataclass(frozen=True)
class Measured:
    """Means over crops: L = lmbda * 255^2 * mse + bpp, bpp of y and z by the integer tables.

    `predicted` is the change of the mse against latents that are not quantized, as the weights S_c foresee it.
    """

    L: float
    bpp: float
    mse: float
    predicted: float


def measure(checkpoint: Checkpoint, record: QuantizerRecord, samples: Latents, seen: View) -> Measured:
    """Quantize, count bits, decode: what a quantizer costs on these samples."""
    quantizer = Quantizer(record)
    k = quantizer.quantize(seen.residual, seen.level)
    level = quantizer.dequantize(k)
    bits = float(quantizer.bits(k, seen.level).sum()) + z_bits(record, samples.z).sum()
    bpp = bits / (len(samples) * samples.pixels.shape[2] * samples.pixels.shape[3])
    mse = squared_error(checkpoint.model, seen.means + level.reshape(seen.means.shape), samples.pixels)
    error = np.square(seen.residual.astype(np.float64) - level).sum(axis=1)
    predicted = float(error @ np.tile(record.weights.astype(np.float64), len(samples))) / samples.pixels.size
    return Measured(checkpoint.spec.lmbda * 255**2 * mse + bpp, bpp, mse, predicted)


def z_bits(record: QuantizerRecord, z: np.ndarray) -> np.ndarray:
    """Estimated bits of z, float64 [n], from int16 [n, Nz, hz, wz]."""
    rows = np.broadcast_to(np.arange(z.shape[1], dtype=np.int32)[None, :, None, None], z.shape)
    return record.z_tables.bits(z.astype(np.int32), rows).sum(axis=(1, 2, 3))


def channel_weights(checkpoint: Checkpoint, section: config.Quantizer, seen: View) -> tuple[Any, dict[str, Any]]:
    """(S_c float32 [M], notes): the decoder's squared gain of each channel with its standard error, or ones."""
    if section.weights == "uniform":
        return np.ones(checkpoint.spec.M, np.float32), {}
    y_hat = torch.from_numpy((np.rint(seen.residual).reshape(seen.means.shape) + seen.means)[:PROBED])
    generator = torch.Generator().manual_seed(0)
    mean, error = sensitivities(checkpoint.model.g_s, y_hat, PROBES, generator)  # type: ignore[arg-type]
    return mean.astype(np.float32), {"weights_standard_error": [float(value) for value in error]}


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute on one torch thread: a record's bytes are to repeat, sums over several threads would not."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def settings_of(section: config.Quantizer) -> dict[str, Any]:
    """What a record's making depended on beside the fields that it has itself: kept in its notes as `settings`."""
    return {
        "weights": section.weights,
        "pilot": section.pilot,
        "calibration": section.calibration,
        "adapt_rounds": section.adapt_rounds,
    }


@one_thread()
def calibrate(
    checkpoint: Checkpoint,
    section: config.Quantizer,
    pilot: Latents,
    held_out: Latents,
    batch: int = 8,
    known: QuantizerRecord | None = None,
) -> QuantizerRecord:
    """Make the quantizer record of a checkpoint: sensitivities, step and strength where `auto`, adapted tables.

    `known` is the record of a model that this one was made from: its step and strength are tried too.

    Notes: `calibration`, a list of {strength, step, L, bpp, mse, predicted}; `adaptation`, {L, bpp} from the analytic
    tables on; `mse_unquantized`; `weights_standard_error`.
    """
    pilot_view = view(checkpoint.model, pilot.y, pilot.z, batch)
    held_view = view(checkpoint.model, held_out.y, held_out.z, batch)
    weights, notes = channel_weights(checkpoint, section, pilot_view)
    part = (pilot_view.residual, pilot_view.level)
    trials: dict[tuple[float, float], tuple[Measured, list[QuantizerRecord]]] = {}
    fixed = _fixed(section)

    def key_of(strength: float, step: float) -> tuple[float, float]:
        """What is fixed stays as it is; what is searched has six decimals."""
        return (
            round(strength, 6) if fixed[0] is None else strength,
            round(step, 6) if fixed[1] is None else step,
        )

    def with_rounds(record: QuantizerRecord) -> list[QuantizerRecord]:
        """The record, and the one after each round of adaptation."""
        rounds = section.adapt_rounds if section.rates == "adapted" else 0
        return [record, *adapted(record, [part], rounds)]

    def trial(strength: float, step: float) -> float:
        key = key_of(strength, step)
        if key not in trials:
            made = with_rounds(analytic_record(checkpoint, section.name, section.states, key[1], key[0], weights))
            trials[key] = measure(checkpoint, made[-1], held_out, held_view), made
            bar.advance(1, strength=key[0], step=key[1], L=trials[key][0].L)
        return trials[key][0].L

    with Progress(f"calibrating {section.name}", (1, 8, 16)[fixed.count(None)], "trial") as bar:
        strength, step = _pattern_search(trial, AXES[section.name], *fixed)
    if known is not None:
        pair = (_strength(known) if fixed[0] is None else fixed[0], known.step if fixed[1] is None else fixed[1])
        if trial(*pair) < trials[key_of(strength, step)][0].L:
            strength, step = pair
    measured, made = trials[key_of(strength, step)]
    if section.name == "deadzone":  # levels at the centroids: less error of the latents, not always of the picture
        moved = with_rounds(centred(made[0], [part]))
        if (other := measure(checkpoint, moved[-1], held_out, held_view)).L < measured.L:
            measured, made = other, moved
    course = [measure(checkpoint, record, held_out, held_view) for record in made[:-1]] + [measured]
    notes |= {
        "settings": settings_of(section),
        "calibration": [
            {"strength": key[0], "step": key[1], **asdict(one)} for key, (one, _) in sorted(trials.items())
        ],
        "calibration_samples": len(held_out),
        "adaptation": [{"L": one.L, "bpp": one.bpp} for one in course],
        "mse_unquantized": squared_error(checkpoint.model, held_out.y.astype(np.float32), held_out.pixels),
        "L": measured.L,
        "mse": measured.mse,
        "mse_predicted": measured.predicted,
    }
    return replace(made[-1], notes={**made[-1].notes, **notes})


def describe(record: QuantizerRecord) -> list[str]:
    """What a calibrated record's notes say, in plain lines: the pair chosen, the gain of each round, the prediction."""
    notes = record.notes
    strength = _strength(record)
    symbols = {"sq": "", "deadzone": f", xi {strength:.4g}"}.get(record.name, f", g {strength:.4g}")
    states = f" with {record.states} states" if record.name == "tcq" else ""
    lines = [
        f"{record.name}{states}: step {record.step:.4g}{symbols}, L {notes['L']:.4f} on {notes['calibration_samples']} "
        f"held-out crops, the least of {len(notes['calibration'])} trials"
    ]
    first, *later = notes["adaptation"]
    lines.append(f"tables: {'analytic':<19} bpp {first['bpp']:.4f} {'':10} L {first['L']:.4f}")
    for number, (before, one) in enumerate(zip(notes["adaptation"], later, strict=False), start=1):
        bits, loss = (100 * (one[key] / before[key] - 1) for key in ("bpp", "L"))
        title = f"adapted, round {number}"
        lines.append(f"        {title:<19} bpp {one['bpp']:.4f} ({bits:+.2f} %)   L {one['L']:.4f} ({loss:+.2f} %)")
    if errors := notes.get("weights_standard_error"):
        relative = np.median(np.array(errors) / np.maximum(record.weights, 1e-30))
        change = notes["mse"] - notes["mse_unquantized"]
        lines.append(
            f"change of the MSE by quantization: predicted {notes['mse_predicted']:.3e}, real {change:.3e} "
            f"(ratio {change / notes['mse_predicted']:.2f}); sensitivities +- {100 * relative:.1f} % (median)"
        )
    return lines


def _strength(record: QuantizerRecord) -> float:
    return record.rounding if record.name == "deadzone" else record.lambda_scale


def _fixed(section: config.Quantizer) -> tuple[float | None, float | None]:
    """What the section fixes of (strength, step). SQ's strength is none, and its `auto` step CompressAI's 1."""
    step = None if section.step == "auto" else section.step
    if section.name == "sq":
        return 1.0, step or 1.0
    strength = section.rounding if section.name == "deadzone" else section.lambda_scale
    return None if strength == "auto" else float(strength), step


def _pattern_search(
    trial: Callable[[float, float], float], axes: Axes, fixed_strength: float | None, fixed_step: float | None
) -> tuple[float, float]:
    best = (
        axes.start[0] if fixed_strength is None else fixed_strength,
        axes.start[1] if fixed_step is None else fixed_step,
    )
    lowest = trial(*best)
    for strength_factor, step_factor in axes.factors:
        moved = True
        while moved:
            moved = False
            strength, step = best
            neighbours = []
            if fixed_step is None:
                neighbours += [(strength, step * step_factor), (strength, step / step_factor)]
            if fixed_strength is None:
                neighbours += [(strength * strength_factor, step), (strength / strength_factor, step)]
            for one in neighbours:
                moves = zip(one, best, (axes.strengths, axes.steps), strict=True)
                inside = all(low <= value <= high for value, before, (low, high) in moves if value != before)
                if inside and (value := trial(*one)) < lowest - 1e-9:
                    best, lowest, moved = one, value, True
                    break
    if not math.isfinite(lowest):
        raise LicError("the loss of the calibration is not finite", hint="is this the checkpoint of a trained model?")
    return best
