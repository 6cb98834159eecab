"""Calibration: find the strength, step and shift of least measured L on held-out crops.

The search weighs squared errors of the latents by S_c, and bits by lambda_q = g * 3 / (lmbda * 255^2). Errors that
rate-distortion optimization chooses are not independent, so g = 1 is not the optimum, and a coarser step with a milder
search can win. Each trial adapts its tables on the pilot, quantizes the held-out crops and
decodes them. Trials follow a pattern search in (log strength, log step, shift) whose moves are halved where no
neighbour is better. The strength is g for RDOQ and TCQ, and xi for the dead zone (quantization/kinds.py). The shift
moves the decoder's levels away from zero, which costs no bits.

Where means depend on y_hat, tables are adapted on the residuals that one walk with the analytic tables met, and every
trial is measured by a walk of its own. S_c knows what y_hat does to the picture, not what it does to later bits.

The record's notes keep what was measured: every trial, each round of adaptation at the chosen point, and the ratio of
the predicted change of the picture's MSE to the real one.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import torch

from lic_dist import config
from lic_dist.building.latents import Inputs, Latents, QuantizerInput, inputs_of, squared_error
from lic_dist.building.levels import fit_level_shifts
from lic_dist.building.records import analytic_record
from lic_dist.building.refined import aimed_inputs, asked_refinement, record_fields
from lic_dist.cache.trials import Row, Trials
from lic_dist.errors import LicError, UsageError
from lic_dist.models.checkpoint import Checkpoint
from lic_dist.models.parts import model_digest
from lic_dist.models.stages import to_input
from lic_dist.progress import Progress
from lic_dist.quantization.adaptation import adaptation_rounds
from lic_dist.quantization.kinds import KINDS
from lic_dist.quantization.quantize import Quantizer
from lic_dist.quantization.record import QuantizerRecord
from lic_dist.quantization.sensitivity import error_costs, sensitivities
from lic_dist.text import counted
from lic_dist.version import __version__

FITTED, FITTED_TRIAL = 96, 24  # samples that levels are fitted to, in the end and for a trial
PROBES, PROBED = 4, 16  # probe vectors a sample, and samples, for the sensitivities
ROUNDED = 48  # samples whose rounding tells what errors cost

Point = tuple[float, float, float, float]  # strength, step, shift, spread
Fixed = tuple[float | None, float | None, float | None, float | None]  # of a point; None: searched


@dataclass(frozen=True)
class SearchSpace:
    """The search space of a quantizer: the start, the bounds of strength and step, and the coarse and the fine moves.

    A move is a factor of the strength, a factor of the step, and summands of the shift and the spread.
    """

    start: Point
    strengths: tuple[float, float]
    steps: tuple[float, float]
    moves: tuple[Point, Point] = ((2.0, 1.15, 0.04, 0.08), (2**0.5, 1.07, 0.02, 0.04))


# A decoder trained on noise does best with levels beyond their cells' centroids, so the search starts there.
SEARCH_SPACES = {
    "sq": SearchSpace((1.0, 1.0, 0.0, 0.0), (1.0, 1.0), (0.25, 4.0)),
    "deadzone": SearchSpace(
        (0.45, 1.0, 0.0, 0.0), (0.1, 0.5), (0.25, 4.0), ((1.2, 1.15, 0.04, 0.08), (1.1, 1.07, 0.02, 0.04))
    ),
    "rdoq": SearchSpace((0.2, 1.0, 0.06, 0.0), (0.002, 2.0), (0.25, 4.0)),
    "tcq": SearchSpace((0.2, 0.66, 0.06, 0.0), (0.002, 2.0), (0.2, 2.4)),
}
LARGEST_SHIFT, LARGEST_SPREAD = 0.3, 0.5
FITTED_FROM = 0.0, 0.2  # shift and spread of the levels that fitted ones start from
LEAST_GAIN = 1e-4  # of L; a smaller gain is no better: the last hundredths of a percent are particular to the crops


@dataclass(frozen=True)
class Measurement:
    """Means over crops: L = lmbda * 255^2 * mse + bpp, with the bpp of y and z by the integer tables.

    `predicted` is the change of the mse against unquantized latents that the weights S_c predict.
    """

    L: float
    bpp: float
    mse: float
    predicted: float


def measure(checkpoint: Checkpoint, record: QuantizerRecord, samples: Latents, inputs: Inputs) -> Measurement:
    """Quantize samples, count their bits and decode them; return what the quantizer costs on them."""
    found = inputs.quantize(Quantizer(record))
    bits = float(found.bits.sum()) + z_bits(record, samples.z).sum()
    bpp = bits / (len(samples) * samples.pixels.shape[2] * samples.pixels.shape[3])
    mse = squared_error(checkpoint.model, found.y_hat, samples.pixels)
    weights = np.tile(record.weights.astype(np.float64), len(samples))
    predicted = float(found.error.ravel() @ weights) / samples.pixels.size
    return Measurement(checkpoint.spec.lmbda * 255**2 * mse + bpp, bpp, mse, predicted)


def z_bits(record: QuantizerRecord, z: np.ndarray) -> np.ndarray:
    """Return the estimated bits of z, float64 [n], from int16 [n, Nz, hz, wz]."""
    rows = np.broadcast_to(np.arange(z.shape[1], dtype=np.int32)[None, :, None, None], z.shape)
    return record.z_tables.bits(z.astype(np.int32), rows).sum(axis=(1, 2, 3))


def channel_weights(
    checkpoint: Checkpoint, section: config.Quantizer, inputs: Inputs, samples: Latents
) -> tuple[Any, dict[str, Any]]:
    """Return (weights float32 [M], notes with their standard error) of what `section.weights` names: S_c, W_c or ones,
    on the first of the samples, whose `inputs` these are.
    """
    g_s = checkpoint.codec.synthesise
    if section.weights == "uniform":
        return np.ones(checkpoint.codec.channels, np.float32), {}
    if section.weights == "rounding":
        y = torch.from_numpy(inputs.unquantized(samples.y)[:ROUNDED])
        x = to_input(torch.from_numpy(samples.pixels[:ROUNDED]), y.device)
        mean, error = error_costs(g_s, torch.from_numpy(inputs.rounded(ROUNDED)), y, x)
    else:
        y_hat = torch.from_numpy(inputs.rounded(PROBED))
        mean, error = sensitivities(g_s, y_hat, PROBES, torch.Generator().manual_seed(0))
    return mean.astype(np.float32), {"weights_standard_error": [float(value) for value in error]}


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute on one torch thread, because sums over several threads would not give the same bytes each time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def settings_of(section: config.Quantizer) -> dict[str, Any]:
    """Return the settings that a record's making depended on and that it has no field for: its note `settings`."""
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
    warm_start: QuantizerRecord | None = None,
    trials_file: Trials | None = None,
) -> QuantizerRecord:
    """Make the quantizer record of a checkpoint: sensitivities, adapted tables, and the settings that are `auto`.

    The settings are strength, step, shift and spread; where levels are `fitted`, strength and step, and each trial has
    levels of its own, fitted to the first of the pilot. `warm_start` is the record of a model that this one was made
    from: the search starts there, with the fine moves. `trials_file` keeps each trial, so that a calibration that is
    stopped resumes and makes the same record; the caller deletes the file once the record is saved.

    Notes: `calibration`, a list of {strength, step, shift, L, bpp, mse, predicted}, with the spread where it is not 0;
    `adaptation`, {L, bpp} from the analytic tables on; `mse_unquantized`; `weights_standard_error`; of fitted levels
    `fitted`, to how many samples.
    """
    prior = checkpoint.codec.prior
    for key in ("scale_offsets", "spread"):
        if prior is not None and getattr(section, key) not in (False, 0, "auto"):
            raise UsageError(f"quantizer.{key}: the model has a prior for each channel, no scales")
    pilot_inputs = inputs_of(checkpoint.model, pilot.y, pilot.z, batch)
    if section.spread == "fitted" and not isinstance(pilot_inputs, QuantizerInput):
        raise UsageError("quantizer.spread: fitted is for models that code y in one stage", hint="auto, or a number")
    held_inputs = inputs_of(checkpoint.model, held_out.y, held_out.z, batch)
    weights, notes = channel_weights(checkpoint, section, pilot_inputs, pilot)
    trials: dict[Point, Measurement] = {}
    fixed = _fixed(section) if prior is None else (*_fixed(section)[:3], 0.0)
    space = SEARCH_SPACES[section.name]
    cdf = prior.cdf if prior else None

    @cache
    def records(strength: float, step: float) -> list[QuantizerRecord]:
        """Return the record with the analytic tables, and then that of each round of adaptation."""
        first = analytic_record(checkpoint, section.name, section.states, step, strength, weights)
        rounds = section.adapt_rounds if section.rates == "adapted" else 0
        return [first, *adaptation_rounds(first, pilot_inputs.parts(first), rounds, cdf=cdf)] if rounds else [first]

    def record_at(one: Point, samples: int) -> QuantizerRecord:
        """Return the record of a point, whose levels, if they are fitted, are so to this number of samples."""
        record = replace(records(*one[:2])[-1], shift=one[2], spread=one[3])
        if section.spread != "fitted" or not isinstance(pilot_inputs, QuantizerInput):
            return record
        return replace(record, level_shifts=fit_level_shifts(checkpoint, record, pilot, pilot_inputs, samples))

    def trial(one: Point) -> float:
        strength, step, shift, _ = one
        if one not in trials:
            trials[one] = measure(checkpoint, record_at(one, FITTED_TRIAL), held_out, held_inputs)
            if trials_file is not None:
                trials_file.write(identity, expected, [_row(*item) for item in trials.items()])
            bar.advance(1, strength=strength, step=step, shift=shift, L=trials[one].L)
        return trials[one].L

    begin = space.start
    if warm_start is not None:
        begin = warm_start.strength, warm_start.step, warm_start.shift, warm_start.spread
    strength, step, shift, spread = (value if free is None else free for value, free in zip(begin, fixed, strict=True))
    start, moves = (strength, step, shift, spread), space.moves if warm_start is None else space.moves[1:]
    expected = (1, 8, 20, 30, 40)[fixed.count(None)]
    searched = {"start": start, "fixed": fixed, "axes": asdict(space), "moves": moves}
    asked = {"quantizer": section.identity({"group"}), **searched}
    identity = _identity(checkpoint, asked, weights, pilot_inputs, held_inputs, held_out)
    if trials_file is not None:
        trials |= map(_trial, trials_file.begin(identity, expected))
    with Progress(f"calibrating {section.name}", expected, "trial", done=len(trials)) as bar:
        _search(trial, start, space, fixed, moves)
        bar.complete()
    chosen = min(trials, key=lambda one: trials[one].L)
    last, measured = record_at(chosen, FITTED), trials[chosen]
    if last.level_shifts is not None:
        measured = measure(checkpoint, last, held_out, held_inputs)
        notes["fitted"] = min(FITTED, len(pilot))
    made = [replace(last, y_tables=one.y_tables, notes=one.notes) for one in records(*chosen[:2])]
    by_round = [measure(checkpoint, record, held_out, held_inputs) for record in made[:-1]] + [measured]
    refinement = asked_refinement(section, checkpoint.spec.lmbda)
    made[-1] = replace(made[-1], **record_fields(refinement), scale_offsets=section.scale_offsets)
    if refinement.steps:
        rounds = 1 if section.rates == "adapted" and section.adapt_rounds else 0
        aimed = aimed_inputs(checkpoint, made[-1], pilot, batch) if rounds else pilot_inputs
        made += adaptation_rounds(made[-1], aimed.parts(made[-1]), rounds, cdf=cdf)
        measured = measure(checkpoint, made[-1], held_out, aimed_inputs(checkpoint, made[-1], held_out, batch))
        by_round.append(measured)
    notes |= {
        "settings": settings_of(section),
        "calibration": [_row(*item) for item in sorted(trials.items())],
        "calibration_samples": len(held_out),
        "adaptation": [{"L": one.L, "bpp": one.bpp} for one in by_round],
        "mse_unquantized": squared_error(checkpoint.model, held_inputs.unquantized(held_out.y), held_out.pixels),
        "L": measured.L,
        "mse": measured.mse,
        "mse_predicted": measured.predicted,
    }
    return replace(made[-1], notes={**made[-1].notes, **notes})


def _row(storage: Point, measured: Measurement) -> Row:
    spread = {"spread": storage[3]} if storage[3] else {}
    return {"strength": storage[0], "step": storage[1], "shift": storage[2], **spread, **asdict(measured)}


def _trial(row: Row) -> tuple[Point, Measurement]:
    point = row["strength"], row["step"], row["shift"], row.get("spread", 0.0)
    return point, Measurement(row["L"], row["bpp"], row["mse"], row["predicted"])


def _identity(
    checkpoint: Checkpoint,
    asked: dict[str, Any],
    weights: np.ndarray,
    pilot: Inputs,
    held_inputs: Inputs,
    held_out: Latents,
) -> str:
    """Return a digest of all that decides which trials are made and what they measure."""
    total = hashlib.sha256(json.dumps(asked, sort_keys=True).encode())
    versions = __version__, torch.__version__, np.__version__
    total.update(f"{versions} {checkpoint.spec} {model_digest(checkpoint.model)}".encode())
    for array in (weights, *pilot.arrays, *held_inputs.arrays, *vars(held_out).values()):
        total.update(f"{array.dtype} {array.shape}".encode())
        total.update(np.ascontiguousarray(array).data)
    return total.hexdigest()


def describe(record: QuantizerRecord) -> list[str]:
    """Return lines about a calibrated record's notes: the chosen point, the gain of each round, the prediction."""
    notes = record.notes
    strength = f", {record.kind.symbol} {record.strength:.4g}" if record.kind.strength else ""
    states = f" with {record.states} states" if record.kind.trellis else ""
    shift = f", shift {record.shift:+.2g}" if record.shift else ""
    shift += f", spread {record.spread:.2g}" if record.spread else ""
    shift += ", levels fitted" if record.level_shifts is not None else ""
    lines = [
        f"{record.name}{states}: step {record.step:.4g}{strength}{shift}, L {notes['L']:.4f} on "
        f"{counted(notes['calibration_samples'], 'held-out crop')}, the least of "
        f"{counted(len(notes['calibration']), 'trial')}"
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


def is_fixed(section: config.Quantizer) -> bool:
    """Return whether a section fixes strength, step, shift and spread, so that nothing is left to search."""
    return None not in _fixed(section)


def _fixed(section: config.Quantizer) -> Fixed:
    """Return the values that the section fixes. SQ has no strength; its `auto` means CompressAI's step 1, unless it is
    for another lambda than the model's, and no shift. Fitted levels start from one shift and spread.
    """
    asked = section.step, section.shift, section.spread
    if asked[2] == "fitted":
        asked = asked[0], FITTED_FROM[0] if asked[1] == "auto" else asked[1], FITTED_FROM[1]
    step, shift, spread = (None if value == "auto" else float(value) for value in asked)
    kind = KINDS[section.name]
    if kind.strength is None:
        return 1.0, step or (None if section.lmbda else 1.0), shift or 0.0, spread or 0.0
    strength = getattr(section, kind.strength)
    return None if strength == "auto" else float(strength), step, shift, spread


def _search(
    trial: Callable[[Point], float],
    best: Point,
    space: SearchSpace,
    fixed: Fixed,
    moves: Sequence[Point],
) -> None:
    """Run a pattern search: move to the first better neighbour until none is better, with each size of moves in
    turn.
    """
    lowest = trial(best)
    for size in moves:
        moved = True
        while moved:
            moved = False
            for one in _neighbours(best, size, space, fixed):
                if (value := trial(one)) < lowest * (1 - LEAST_GAIN):
                    best, lowest, moved = one, value, True
                    break
    if not math.isfinite(lowest):
        raise LicError("the loss of the calibration is not finite", hint="is this the checkpoint of a trained model?")


def _neighbours(best: Point, size: Point, space: SearchSpace, fixed: Fixed) -> Iterator[Point]:
    """Yield the points one move away along each free axis, both ways, inside the bounds, rounded to six decimals."""
    bounds = space.strengths, space.steps, (-LARGEST_SHIFT, LARGEST_SHIFT), (0.0, LARGEST_SPREAD)
    for axis in (1, 2, 3, 0):
        if fixed[axis] is None:
            value, by = best[axis], size[axis]
            for moved in (value + by, value - by) if axis >= 2 else (value * by, value / by):
                if bounds[axis][0] <= moved <= bounds[axis][1]:
                    one = list(best)
                    one[axis] = round(moved, 6)
                    yield one[0], one[1], one[2], one[3]
