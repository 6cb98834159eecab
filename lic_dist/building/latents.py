"""Latents in memory, and the residuals and scale levels in lanes that a quantizer works on."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from lic_dist.models.architectures import adapt
from lic_dist.models.refine import Refinement, refine_latents, squared_error_gradient
from lic_dist.models.stages import analyse, dequantize_z, only_side, only_stage, to_input
from lic_dist.quantization.rates import level_index


@dataclass(frozen=True)
class Latents:
    """Samples as a cache stores them: pixels uint8 [n, 3, s, s], y float16 [n, M, h, w], z int16 [n, Nz, hz, wz]."""

    pixels: NDArray[np.uint8]
    y: NDArray[np.float16]
    z: NDArray[np.int16]

    def __len__(self) -> int:
        return len(self.y)


@dataclass(frozen=True)
class QuantizerInput:
    """What a quantizer takes: residuals and scale levels of latents, and the means that the residuals are about.

    residual float32 and level uint8, both [n*M, h*w] (lanes are image-major); means float32 [n, M, h, w].
    """

    residual: NDArray[np.float32]
    level: NDArray[np.uint8]
    means: NDArray[np.float32]


@torch.no_grad()
def encode(
    model: nn.Module, pixels: NDArray[np.uint8], batch: int, refinement: Refinement | None = None
) -> tuple[Latents, NDArray[np.bool_]]:
    """Run the frozen encoder over uint8 [n, 3, s, s] in batches of a fixed size, the last one padded with zeros.

    A `refinement` then moves y, for models of one stage. Returns the latents and which samples overflowed their types
    (float16 y, int16 z); those are stored as zeros.
    """
    device = next(model.parameters()).device
    ys, zs = [], []
    for first in range(0, len(pixels), batch):
        part = pixels[first : first + batch]
        padded = np.zeros((batch, *pixels.shape[1:]), np.uint8)
        padded[: len(part)] = part
        x = to_input(torch.from_numpy(padded), device)
        y, z = analyse(model, x)
        if refinement is not None and refinement.steps:
            codec = adapt(model)
            stage = only_stage(codec, (dequantize_z(model, z),))
            y = refine_latents(codec, y, stage, partial(squared_error_gradient, codec, x), refinement)
        ys.append(y[: len(part)].cpu().numpy())
        zs.append(z[: len(part)].cpu().numpy())
    y_all, z_all = np.concatenate(ys), np.concatenate(zs)
    axes = (1, 2, 3)
    overflow = ~np.isfinite(y_all).all(axis=axes) | (np.abs(z_all.astype(np.int64)) > 32767).any(axis=axes)
    y_all[overflow], z_all[overflow] = 0, 0
    return Latents(pixels, y_all, z_all.astype(np.int16)), overflow


@torch.no_grad()
def quantizer_input(model: nn.Module, y: NDArray[np.float16], z: NDArray[np.int16], batch: int) -> QuantizerInput:
    """Compute means and scales of cached latents in batches of a fixed size, and the residuals about the means."""
    device = next(model.parameters()).device
    codec = adapt(model)
    side, residuals, levels, means = only_side(codec), [], [], []
    for first in range(0, len(y), batch):
        part_y, part_z = (np.zeros((batch, *a.shape[1:]), a.dtype) for a in (y, z))
        count = len(y[first : first + batch])
        part_y[:count], part_z[:count] = y[first : first + batch], z[first : first + batch]
        values = torch.from_numpy(part_y).float().to(device)
        stage = only_stage(codec, (side.dequantize(torch.from_numpy(part_z).to(device)),))
        lanes = count * codec.channels
        residuals.append(stage.to_lanes(values - stage.means)[:lanes])
        levels.append(level_index(stage.to_lanes(stage.scales))[:lanes])
        means.append(stage.means[:count].cpu().numpy())
    return QuantizerInput(np.concatenate(residuals), np.concatenate(levels), np.concatenate(means))


@torch.no_grad()
def squared_error(model: nn.Module, y_hat: NDArray[np.float32], pixels: NDArray[np.uint8], batch: int = 8) -> float:
    """Return the mean squared error of g_s(y_hat), clamped to [0, 1], against pixels/255."""
    device = next(model.parameters()).device
    codec, total = adapt(model), 0.0
    for first in range(0, len(pixels), batch):
        x = to_input(torch.from_numpy(pixels[first : first + batch]), device)
        x_hat = codec.synthesise(torch.from_numpy(y_hat[first : first + batch]).to(device)).clamp(0, 1)
        total += float((x_hat - x).double().square().sum())
    return total / pixels.size
