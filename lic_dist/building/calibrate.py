"""Calibration: find the strength, step and shift of least measured L on held-out crops.

The search weighs squared errors of the latents by S_c, and bits by lambda_q = g * 3 / (lmbda * 255^2). Errors that
rate-distortion optimization chooses are not independent, so g = 1 is not the optimum, and a coarser step with a milder
search can win. Each trial adapts its tables on the pilot, quantizes a part of the held-out crops and decodes them, the
best and the last ones all of them. A model of the loss says which trial is next (surface.py). The strength is g for
RDOQ and TCQ, and xi for the dead zone (quantization/kinds.py). The shift moves the decoder's levels away from zero,
which costs no bits.

Where means depend on y_hat, tables are adapted on the residuals that one walk with the analytic tables met, and every
trial is measured by a walk of its own. S_c knows what y_hat does to the picture, not what it does to later bits.

The record's notes keep what was measured: every trial, each round of adaptation at the chosen point, and the ratio of
the predicted change of the picture's MSE to the real one.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, astuple, dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import torch

from lic_dist import config
from lic_dist.building import surface
from lic_dist.building.latents import Inputs, Latents, QuantizerInput, inputs_of, squared_error
from lic_dist.building.levels import NO_SHIFTS, LevelFit, fit_level_shifts, fit_points
from lic_dist.building.records import analytic_record
from lic_dist.building.refined import aimed_inputs, asked_refinement, record_fields
from lic_dist.building.surface import Fixed, Point, Search, SearchSpace, expected_trials
from lic_dist.building.threads import one_thread
from lic_dist.cache.trials import Row, Trials
from lic_dist.errors import UsageError
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
PART, LEAST_PART = 4, 12  # most trials are of one in so many of the held-out samples, but not of fewer than this

# A decoder trained on noise does best with levels beyond their cells' centroids, so the search starts there.
SEARCH_SPACES = {
    "sq": SearchSpace((1.0, 1.0, 0.0, 0.0), (1.0, 1.0), (0.25, 4.0)),
    "deadzone": SearchSpace((0.45, 1.0, 0.0, 0.0), (0.1, 0.5), (0.25, 4.0), (1.2, 1.15, 0.04, 0.08)),
    "rdoq": SearchSpace((0.2, 1.0, 0.06, 0.0), (0.002, 2.0), (0.25, 4.0)),
    "embedded": SearchSpace((1.0, 1.0, 0.0, 0.0), (1.0, 1.0), (1.0, 1.0)),
    "tcq": SearchSpace((0.2, 0.66, 0.06, 0.0), (0.002, 2.0), (0.2, 2.4)),
}
FITTED_FROM = 0.0, 0.2  # shift and spread of the levels that fitted ones start from

Trial = tuple[Point, bool]  # whether of all held-out crops


@dataclass(frozen=True)
class Measurement:
    """Means over crops: L = lmbda * 255^2 * mse + bpp, with the bpp of y and z by the integer tables.

    `predicted` is the change of the mse against unquantized latents that the weights S_c predict.
    """

    L: float
    bpp: float
    mse: float
    predicted: float

    def scaled(self, by: Measurement, to: Measurement) -> Measurement:
        """Return the figures of other crops, by those of one quantizer `by` these crops and `to` the others."""
        values = (one * (other / (own or 1.0)) for one, own, other in zip(*map(astuple, (self, by, to)), strict=True))
        return Measurement(*values)

    def mean_with(self, other: Measurement, share: float) -> Measurement:
        """Return the figures of these crops and others, which are this share of all."""
        pairs = zip(astuple(self), astuple(other), strict=True)
        return Measurement(*(one + share * (more - one) for one, more in pairs))


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
        kind = KINDS[section.name]
        probes = PROBES if kind.searched or kind.embedded else 1  # then nothing but a prediction depends on them
        mean, error = sensitivities(g_s, y_hat, probes, torch.Generator().manual_seed(0))
    return mean.astype(np.float32), {"weights_standard_error": [float(value) for value in error]}


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
    search: Search = surface.search,
) -> QuantizerRecord:
    """Make the quantizer record of a checkpoint: sensitivities, adapted tables, and the settings that are `auto`.

    The settings are strength, step, shift and spread; where levels are `fitted`, strength and step, and each trial has
    levels of its own, fitted to the first of the pilot. `warm_start` is the record of a model that this one was made
    from: the search starts there, with smaller moves. `trials_file` keeps each trial, so that a calibration that is
    stopped resumes and makes the same record; the caller deletes the file once the record is saved.

    Notes: `calibration`, a list of {strength, step, shift, L, bpp, mse, predicted}, with the spread where it is not 0,
    of `crops` held-out crops, where these are a part of them scaled by what another trial costs on all; `adaptation`,
    {L, bpp} from the analytic tables on, scaled likewise; `mse_unquantized`; `weights_standard_error`; of fitted levels
    `fitted`, to how many samples.
    """
    prior = checkpoint.codec.prior
    for key in ("scale_offsets", "spread"):
        if prior is not None and getattr(section, key) not in (False, 0, "auto"):
            raise UsageError(f"quantizer.{key}: the model has a prior for each channel, no scales")
    if KINDS[section.name].embedded:
        _require_planes(section, prior is not None)
    pilot_inputs = inputs_of(checkpoint.model, pilot.y, pilot.z, batch)
    fits_levels = section.spread == "fitted" and not KINDS[section.name].embedded
    if section.spread == "fitted" and not isinstance(pilot_inputs, QuantizerInput):
        raise UsageError("quantizer.spread: fitted is for models that code y in one stage", hint="auto, or a number")
    held_inputs = inputs_of(checkpoint.model, held_out.y, held_out.z, batch)
    part = min(max(LEAST_PART, len(held_out) // PART), len(held_out))
    in_parts, crops = part < len(held_out), (part, len(held_out))
    weights, notes = channel_weights(checkpoint, section, pilot_inputs, pilot)
    trials: dict[Trial, Measurement] = {}
    price = checkpoint.spec.lmbda * 255**2
    fixed = _fixed(section) if prior is None else (*_fixed(section)[:3], 0.0)
    space = SEARCH_SPACES[section.name]
    cdf = prior.cdf if prior else None

    @cache
    def records(strength: float, step: float) -> list[QuantizerRecord]:
        """Return the record with the analytic tables, and then that of each round of adaptation."""
        first = analytic_record(checkpoint, section.name, section.states, step, strength, weights)
        rounds = section.adapt_rounds if section.rates == "adapted" and not first.kind.embedded else 0
        return [first, *adaptation_rounds(first, pilot_inputs.parts(first), rounds, cdf=cdf)] if rounds else [first]

    def record_at(one: Point) -> QuantizerRecord:
        """Return the record of a point, without fitted levels."""
        return replace(records(*one[:2])[-1], shift=one[2], spread=one[3])

    @cache
    def levels_at(one: Point) -> LevelFit:
        """Return the levels of a trial: those of the start, or from them on in one pass."""
        assert isinstance(pilot_inputs, QuantizerInput)
        warm = (levels_at(start), 1) if one != start else (NO_SHIFTS, 2)
        return fit_level_shifts(checkpoint, record_at(one), pilot, pilot_inputs, FITTED_TRIAL, *warm)

    def measured(record: QuantizerRecord, whole: bool, before: Measurement | None = None) -> Measurement:
        """Measure a record on all held-out samples or on a part of them; what it costs on the part may be known."""
        chosen = slice(part if before else 0, len(held_out) if whole else part)
        found = measure(checkpoint, record, held_out.part(chosen), held_inputs.part(chosen))
        return found.mean_with(before, part / len(held_out)) if before else found

    def trial(one: Point, whole: bool) -> Measurement:
        if (one, whole) not in trials:
            record = record_at(one)
            if fits_levels:
                record = replace(record, level_shifts=levels_at(one).shifts)
            trials[one, whole] = measured(record, whole, trials.get((one, False)))
            if trials_file is not None:
                trials_file.write(identity, expected, [_row(*item, crops) for item in trials.items()])
            told = dict(zip(("strength", "step", "shift"), one, strict=False))
            bar.advance(1, **told, L=trials[one, whole].L)
        return trials[one, whole]

    begin = space.start
    if warm_start is not None:
        begin = warm_start.strength, warm_start.step, warm_start.shift, warm_start.spread
    strength, step, shift, spread = (value if free is None else free for value, free in zip(begin, fixed, strict=True))
    start, first = (strength, step, shift, spread), 1.0 if warm_start is None else 0.5
    expected = expected_trials(fixed, in_parts)
    searched = {"start": start, "fixed": fixed, "axes": asdict(space), "first": first}
    asked = {"quantizer": section.identity({"group"}), **searched}
    identity = _identity(checkpoint, asked, weights, pilot_inputs, held_inputs, held_out)
    if trials_file is not None:
        trials |= (_trial(row, crops) for row in trials_file.begin(identity, expected))
    with Progress(f"calibrating {section.name}", expected, "trial", done=len(trials)) as bar:
        chosen = search(trial, start, space, fixed, price, first, in_parts)
        bar.complete()
    last, found = record_at(chosen), trials[chosen, True]
    if section.spread == "fitted" and isinstance(pilot_inputs, QuantizerInput) and not fits_levels:
        points = fit_points(checkpoint, last, pilot, pilot_inputs, FITTED)
        last, notes["fitted"] = replace(last, points=points), min(FITTED, len(pilot))
        found = measured(last, True)
    elif fits_levels and isinstance(pilot_inputs, QuantizerInput):
        fit = fit_level_shifts(checkpoint, last, pilot, pilot_inputs, FITTED, levels_at(chosen))
        last, notes["fitted"] = replace(last, level_shifts=fit.shifts), min(FITTED, len(pilot))
        found = measured(last, True)
    made = [replace(last, y_tables=one.y_tables, notes=one.notes) for one in records(*chosen[:2])]
    *rounds, again = [measured(record, not in_parts) for record in made]
    by_round = [*(one.scaled(again, found) for one in rounds), found]
    refinement = asked_refinement(section, checkpoint.spec.lmbda)
    made[-1] = replace(made[-1], **record_fields(refinement), scale_offsets=section.scale_offsets)
    if refinement.steps:
        more = 1 if section.rates == "adapted" and section.adapt_rounds else 0
        aimed = aimed_inputs(checkpoint, made[-1], pilot, batch) if more else pilot_inputs
        made += adaptation_rounds(made[-1], aimed.parts(made[-1]), more, cdf=cdf)
        found = measure(checkpoint, made[-1], held_out, aimed_inputs(checkpoint, made[-1], held_out, batch))
        by_round.append(found)
    notes |= {
        "settings": settings_of(section),
        "calibration": _shown(trials, crops),
        "calibration_samples": len(held_out),
        "adaptation": [{"L": one.L, "bpp": one.bpp} for one in by_round],
        "mse_unquantized": squared_error(checkpoint.model, held_inputs.unquantized(held_out.y), held_out.pixels),
        "L": found.L,
        "mse": found.mse,
        "mse_predicted": found.predicted,
    }
    return replace(made[-1], notes={**made[-1].notes, **notes})


def _require_planes(section: config.Quantizer, by_channel: bool) -> None:
    """Raise UsageError where a section asks of bit planes what they do not have, or the model has no scales."""
    if by_channel:
        raise UsageError("quantizer.name: embedded is for models with scales, this one has a prior for each channel")
    allowed: dict[str, tuple[Any, ...]] = {
        "step": ("auto",), "shift": ("auto",), "spread": (0, "fitted"), "refine": (0,), "scale_offsets": (False,)
    }  # fmt: skip
    for key, free in allowed.items():
        if getattr(section, key) not in free:
            raise UsageError(
                f"quantizer.{key}: bit planes are the same everywhere", hint="lmbda says where they are cut"
            )


def _row(trial: Trial, measured: Measurement, crops: tuple[int, int]) -> Row:
    point, whole = trial
    spread = {"spread": point[3]} if point[3] else {}
    figures = {"strength": point[0], "step": point[1], "shift": point[2], **spread, **asdict(measured)}
    return {**figures, "crops": crops[whole]}


def _trial(row: Row, crops: tuple[int, int]) -> tuple[Trial, Measurement]:
    point = row["strength"], row["step"], row["shift"], row.get("spread", 0.0)
    return (point, row["crops"] == crops[1]), Measurement(row["L"], row["bpp"], row["mse"], row["predicted"])


def _shown(trials: dict[Trial, Measurement], crops: tuple[int, int]) -> list[Row]:
    """Return a row for each point, of all crops, or scaled as the first that was tried on a part of them and on all."""
    scale = next(((trials[one, False], trials[one, True]) for one, whole in trials if (one, not whole) in trials), None)
    rows = {}
    for (one, whole), measured in sorted(trials.items()):
        rows[one] = _row((one, whole), measured.scaled(*scale) if scale and not whole else measured, crops)
    return list(rows.values())


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
    if kind.embedded:
        return 1.0, 1.0, 0.0, 0.0
    if kind.strength is None:
        return 1.0, step or (None if section.lmbda else 1.0), shift or 0.0, spread or 0.0
    strength = getattr(section, kind.strength)
    return None if strength == "auto" else float(strength), step, shift, spread
