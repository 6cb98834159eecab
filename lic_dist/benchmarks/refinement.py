"""`lic-dist bench refine`: what refining y gains over its passes, beside refinement that relaxes the quantizer.

    SQ, TCQ-8             searched again by the decoder's answer (codec/refine.py)
    descent of y; SGA     relaxations.py, then the same quantizers

A pass is one pass of g_s, forward and back. The centre of each picture is taken, CROP pixels a side; z stays. L is
lmbda 255^2 MSE + bpp of 8-bit pictures, rates are those of the coder's tables. The quantizers are those that the model
carries, and not calibrated for what they are given. Milliseconds are CPU time, refinement and search.

Then whole pictures of Kodak's size, mirrored or cut (whole.py), are encoded by TCQ-8 with every number of passes up to
MOST_PASSES and with none in turn, from pixels to bytes, one thread: ratios of CPU time within a round, medians.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from lic_dist.benchmarks import whole
from lic_dist.benchmarks.data import BASE, pictures
from lic_dist.benchmarks.relaxations import annealed, descended
from lic_dist.benchmarks.tables import machine, table
from lic_dist.building.calibrate import z_bits
from lic_dist.building.latents import inputs_of
from lic_dist.building.threads import one_thread
from lic_dist.codec.codec import ImageCodec
from lic_dist.codec.records import local_record
from lic_dist.codec.refine import answer_of, refine
from lic_dist.data import images
from lic_dist.errors import LicError
from lic_dist.evaluation.metrics import ms_ssim8, psnr8
from lic_dist.models import checkpoint as checkpoints
from lic_dist.models.checkpoint import Checkpoint
from lic_dist.models.refine import Refinement, weights_of
from lic_dist.models.stages import analyse, dequantize_z, to_input
from lic_dist.progress import Progress
from lic_dist.quantization.quantize import Quantizer
from lic_dist.quantization.record import QuantizerRecord

PASSES = (0, 4, 8, 32, 128)
CROP = 256
MOST_PASSES, PICTURES, ROUNDS = 16, 2, 3  # of whole pictures

Refines = Callable[[Refinement], Tensor]


def bench(name: str | None, folder: Path | None, passes: Sequence[int], distortion: str, quick: bool) -> dict[str, Any]:
    """Measure every arm at every number of passes on the pictures of a folder; print a table.

    Without a model it is the shipped one, without a folder scikit-image's pictures. `quick` takes two pictures, and 0
    and 4 passes. Raises UsageError for an unknown model, or one without `tcq8`; LicError where no picture is large
    enough.
    """
    loaded = checkpoints.load(name or BASE)
    found = pictures(folder)
    taken = crops(found)[: 2 if quick else None]
    figures: dict[str, Any] = {"machine": machine(), "quick": quick, "model": loaded.source, "pictures": len(taken)}
    figures["distortion"] = weights_of(distortion, loaded.spec.lmbda)
    passes = (passes or PASSES) if not quick else (0, 4)
    figures["curves"] = curves(loaded, taken, passes, figures["distortion"])
    largest = [whole.mirrored(images.read(path), *whole.KODAK) for path in found[: 1 if quick else PICTURES]]
    figures["encode"] = timed(loaded, largest, passes, figures["distortion"], 1 if quick else ROUNDS)
    console = Console()
    for shown in _tables(figures):
        console.print(shown)
    figures["load"] = os.getloadavg()
    console.print(f"machine: {figures['machine']}; load averages {', '.join(f'{one:.1f}' for one in figures['load'])}")
    return figures


@one_thread()
def timed(
    loaded: Checkpoint, taken: Sequence[np.ndarray], passes: Sequence[int], distortion: dict[str, float], rounds: int
) -> dict[str, dict[str, float]]:
    """Return by passes, without and with z: seconds to encode one of the pictures, uint8 [H, W, 3], and their ratio to
    those without passes.
    """
    plain = local_record(loaded, "tcq8")
    arms = {"0": plain}
    for steps in sorted({one for one in passes if 0 < one <= MOST_PASSES}):
        arms[str(steps)] = replace(plain, refine=steps, refine_distortion=distortion)
        arms[f"{steps}, z too"] = replace(arms[str(steps)], refine_z=True)
    codecs = {arm: ImageCodec(loaded.model, record) for arm, record in arms.items()}
    codecs["0"].encode(taken[0])  # compiles
    seconds: dict[str, list[float]] = {arm: [] for arm in arms}
    for picture in (one for _ in range(rounds) for one in taken):
        for arm, codec in codecs.items():
            started = time.process_time()
            codec.encode(picture)
            seconds[arm].append(time.process_time() - started)
    ratios = {arm: np.divide(values, seconds["0"]) for arm, values in seconds.items()}
    return {arm: {"s": float(np.median(seconds[arm])), "ratio": float(np.median(ratios[arm]))} for arm in arms}


def crops(paths: Sequence[Path]) -> np.ndarray:
    """Return the centres of pictures, uint8 [n, 3, CROP, CROP]; smaller pictures are left out."""
    found = []
    for path in paths:
        picture = images.read(path)
        top, left = ((side - CROP) // 2 for side in picture.shape[:2])
        if min(top, left) >= 0:
            found.append(picture[top : top + CROP, left : left + CROP].transpose(2, 0, 1))
    if not found:
        raise LicError(f"no picture is as large as {CROP}x{CROP} pixels")
    return np.stack(found)


@one_thread()
@torch.no_grad()
def curves(
    loaded: Checkpoint, taken: np.ndarray, passes: Sequence[int], distortion: dict[str, float]
) -> dict[str, dict[str, dict[str, float]]]:
    """Return by arm and passes: L, bpp, psnr and ms_ssim (dB), the means over crops, and ms, milliseconds a crop."""
    codec, device = loaded.codec, torch.device("cpu")
    sq, tcq = (
        local_record(loaded, one) for one in ("sq-adapted" if "sq-adapted" in loaded.quantizers else "sq", "tcq8")
    )
    x = to_input(torch.from_numpy(taken), device)
    y, z = analyse(loaded.model, x)
    sides_hat = (dequantize_z(loaded.model, z),)

    def searched(record: QuantizerRecord) -> Refines:
        return lambda one: refine(codec, sides_hat, y, Quantizer(record), answer_of(codec, x, one), one)

    ways: list[tuple[Refines, dict[str, QuantizerRecord]]] = [
        (searched(sq), {"SQ": sq}),
        (searched(tcq), {"TCQ-8": tcq}),
        (lambda one: descended(codec, x, y, sides_hat, one), {"descent, SQ": sq, "descent, TCQ-8": tcq}),
        (lambda one: annealed(codec, x, y, sides_hat, one), {"SGA, SQ": sq}),
    ]
    found: dict[str, dict[str, dict[str, float]]] = {arm: {} for _, arms in ways for arm in arms}
    _measured(loaded, taken, y, z, tcq)  # compiles
    torch.optim.Adam([y])  # imports
    with Progress("refining", max(len(ways) * sum(passes), 1), "step") as bar:
        for refines, arms in ways:
            for steps in passes:
                started = time.process_time()
                moved = refines(Refinement(steps, loaded.spec.lmbda, distortion))
                seconds = time.process_time() - started
                for arm, record in arms.items():
                    found[arm][str(steps)] = _measured(loaded, taken, moved, z, record, seconds)
                bar.advance(steps)
    return found


def _measured(
    loaded: Checkpoint, taken: np.ndarray, y: Tensor, z: Tensor, record: QuantizerRecord, seconds: float = 0.0
) -> dict[str, float]:
    """Quantize y float16 with z, count bits, decode and measure; the search's CPU time is added to `seconds`."""
    started = time.process_time()
    z_stored = z.numpy().astype(np.int16)
    made = inputs_of(loaded.model, y.numpy(), z_stored, len(taken)).quantize(Quantizer(record))
    seconds += time.process_time() - started
    bpp = (made.bits.sum(axis=1) + z_bits(record, z_stored)) / CROP**2
    decoded = loaded.codec.synthesise(torch.from_numpy(made.y_hat)).clamp(0, 1).mul(255).round().byte().numpy()
    pairs = [tuple(one.transpose(1, 2, 0) for one in pair) for pair in zip(decoded, taken, strict=True)]
    squared = np.square(decoded.astype(np.float64) - taken).mean(axis=(1, 2, 3))
    similar = np.array([ms_ssim8(*pair) for pair in pairs], np.float64)
    return {
        "L": float((loaded.spec.lmbda * squared + bpp).mean()),
        "bpp": float(bpp.mean()),
        "psnr": float(np.mean([psnr8(*pair) for pair in pairs])),
        "ms_ssim": float((-10 * np.log10(1 - similar)).mean()),
        "ms": 1000 * seconds / len(taken),
    }


def _tables(figures: dict[str, Any]) -> Iterator[Table]:
    rows = []
    for arm, curve in figures["curves"].items():
        first = next(iter(curve.values()))
        for steps, one in curve.items():
            change = f"{100 * (one['L'] / first['L'] - 1):+.2f} %"
            values = (f"{one['bpp']:.4f}", f"{one['psnr']:.2f}", f"{one['ms_ssim']:.2f}", f"{one['ms']:.0f}")
            rows.append((arm, steps, f"{one['L']:.4f}", change, *values))
    title = f"{figures['model']}: refining y of {figures['pictures']} crops of {CROP} pixels; dB, ms a crop"
    yield table(title, ("", "passes", "L", "change", "bpp", "PSNR", "MS-SSIM", "ms"), rows)
    whole = [(arm, f"{one['s']:.3f}", f"{one['ratio']:.1f}") for arm, one in figures["encode"].items()]
    yield table("encoding a picture of 768x512, TCQ-8", ("passes", "CPU s", "times as long"), whole)
