"""Levels of reconstruction that are fitted: how much further out, at each scale level, the picture wants them.

A shift of s steps moves every latent of its scale level with k != 0. The gradient of the picture's squared error says
how much that helps, the weights of errors how fast it stops helping, and two gradients by which factor the weights are
wrong. That is Newton's method with a diagonal; the indices stay as they are.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from lic_dist.building.latents import DECODED, Latents, QuantizerInput, squared_error, to_decode
from lic_dist.models.checkpoint import Checkpoint
from lic_dist.models.stages import to_input
from lic_dist.quantization.embedded import Embedded, point_of
from lic_dist.quantization.quantize import Quantizer
from lic_dist.quantization.rates import LEVELS
from lic_dist.quantization.record import POINTS, QuantizerRecord

LARGEST = 0.5  # steps, of what is fitted
RIDGE = 0.02  # of the mean curvature, added to each: scales that are hardly seen stay where they are
CUTS = 2.0, 5.0, 10.0, 20.0  # prices of a bit, in those of the record, at which bit planes are cut for a fit


@dataclass(frozen=True)
class LevelFit:
    """Fitted `level_shifts`, float32 [levels], and by which factor the weights of errors were wrong."""

    shifts: NDArray[np.float32]
    factor: float = 1.0


NO_SHIFTS = LevelFit(np.zeros(LEVELS, np.float32))


def fit_level_shifts(
    checkpoint: Checkpoint,
    record: QuantizerRecord,
    samples: Latents,
    inputs: QuantizerInput,
    most: int,
    start: LevelFit = NO_SHIFTS,
    passes: int = 2,
) -> LevelFit:
    """Fit levels of reconstruction for a record that has none to the first samples, from `start` on. Each pass is a
    gradient; the factor is known better from the second on.
    """
    count = min(most, len(samples))
    lanes = count * checkpoint.codec.channels
    quantizer, shape = Quantizer(record), (count, *inputs.means.shape[1:])
    level = inputs.level[:lanes]
    k = quantizer.quantize(inputs.residual[:lanes], level)
    y_hat = inputs.means[:count] + quantizer.dequantize(k, level).reshape(shape)
    level, moves = level.reshape(shape), np.sign(k).astype(np.float32).reshape(shape) * np.float32(record.step)
    weights = 2 * record.weights.astype(np.float64)[None, :, None, None] * np.square(moves)
    curvature = np.bincount(level.ravel(), weights.ravel(), LEVELS)
    curvature += RIDGE * curvature.mean()
    if not curvature.all():  # every index is 0, or no error counts
        return NO_SHIFTS
    shifts, factor = start.shifts.astype(np.float64), start.factor
    move, before = np.zeros(LEVELS), np.zeros(LEVELS)
    for number in range(passes):
        moved = y_hat + moves * shifts.astype(np.float32)[level]
        of_y_hat = _error_gradient(checkpoint, moved, samples.pixels[:count])
        gradient = np.bincount(level.ravel(), (of_y_hat * moves).ravel(), LEVELS).astype(np.float64)
        if number:
            factor = max(float(move @ (gradient - before)) / float(move * curvature @ move or 1.0), 0.5)
        then = np.clip(shifts - gradient / (factor * curvature), -LARGEST, LARGEST)
        shifts, move, before = then, then - shifts, gradient
    return LevelFit(shifts.astype(np.float32), factor)


def fit_points(
    checkpoint: Checkpoint, record: QuantizerRecord, samples: Latents, inputs: QuantizerInput, most: int
) -> NDArray[np.float32]:
    """Fit the points of bit planes that have none to the first samples, cut at the prices of all CUTS: the share by
    which the values of each class of nodes lie further out, float32 as a record's `points`.

    Each cut's squared error counts by its logarithm, since a cut file is judged by dB at its rate. That is Newton's
    method as for levels, with a gradient a cut and pass.
    """
    count = min(most, len(samples))
    lanes = count * checkpoint.codec.channels
    shape = (count, *inputs.means.shape[1:])
    means, level = inputs.means[:count], inputs.level[:lanes]
    r, of_level = (torch.from_numpy(np.ascontiguousarray(one)) for one in (inputs.residual[:lanes], level))
    cuts = []
    for price in CUTS:
        embedded = Embedded(replace(record, lambda_scale=price, points=None))
        k = embedded.quantize(r, of_level)
        plane, magnitude = embedded.known(k, of_level)
        place = point_of(of_level.long(), plane, magnitude).numpy().reshape(shape)
        cuts.append((place, embedded.values(k, of_level).numpy().reshape(shape)))
    points, factor, classes = np.zeros(POINTS).ravel(), 1.0, int(np.prod(POINTS))
    move, before = np.zeros(classes), np.zeros(classes)
    weights = 2 * record.weights.astype(np.float64)[None, :, None, None]
    scales: list[float] = []
    for number in range(2):
        gradient, curvature = np.zeros(classes), np.zeros(classes)
        for at, (place, values) in enumerate(cuts):
            moved = means + values * (1 + points.astype(np.float32))[place]
            if not number:
                scales.append(1 / squared_error(checkpoint.model, moved, samples.pixels[:count]))
            of_y_hat = _error_gradient(checkpoint, moved, samples.pixels[:count])
            gradient += scales[at] * np.bincount(place.ravel(), (of_y_hat * values).ravel(), classes)
            curvature += scales[at] * np.bincount(place.ravel(), (weights * np.square(values)).ravel(), classes)
        curvature += RIDGE * curvature.mean()
        if not curvature.all():
            break
        if number:
            factor = max(float(move @ (gradient - before)) / float(move * curvature @ move or 1.0), 0.5)
        then = np.clip(points - gradient / (factor * curvature), -LARGEST, LARGEST)
        points, move, before = then, then - points, gradient
    return points.astype(np.float32).reshape(POINTS)


def _error_gradient(
    checkpoint: Checkpoint, y_hat: NDArray[np.float32], pixels: NDArray[np.uint8]
) -> NDArray[np.float32]:
    """Return the gradient by y_hat of the squared error of g_s(y_hat), clamped to [0, 1], float32 as y_hat."""
    device, found = next(checkpoint.model.parameters()).device, []
    for first in range(0, len(y_hat), DECODED):
        part = to_decode(y_hat[first : first + DECODED], device).requires_grad_(True)
        x = to_input(torch.from_numpy(pixels[first : first + DECODED]), device)
        with torch.enable_grad():
            error = (checkpoint.codec.synthesise(part).clamp(0, 1) - x).square().sum()
            (gradient,) = torch.autograd.grad(error, part)
        found.append(gradient.cpu().numpy())
    return np.concatenate(found)
