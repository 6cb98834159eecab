"""The closing table of a quick start: from SQ to a retrained decoder, what each step brings, with its interval."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from lic_dist.evaluation.bd import Interval, change_interval
from lic_dist.evaluation.gains import BASE, SQ_ADAPTED, image_losses
from lic_dist.evaluation.results import Point, read_points
from lic_dist.models import checkpoint as checkpoints

FEW_TESTED, FEW_TRAINED = 8, 40  # photos, below which a word says that they prove little


@dataclass(frozen=True)
class Row:
    """A quantizer and its decoder: means over the test photos of real bits and 8-bit PSNR; L = lambda 255^2 MSE + bpp.

    Changes of L are in percent, with 95 % bootstrap intervals over photos; `rate` is that against SQ as a part of SQ's
    bits: what the same quality would cost less, since at the optimum of L a gain in distortion is worth as many bits.
    """

    name: str
    bpp: float
    psnr: float
    L: float
    against_sq: Interval | None
    against_unretrained: Interval | None
    rate: float | None


def closing(results: Path, retrained: Path, trained: int, console: Console) -> dict[str, Any]:
    """Print the table of a result file, and in plain words what it says; returns the figures."""
    points = read_points(results)
    rows = rows_of(points)
    tested = len(points[0].images)
    _show(rows, tested, points[0].lmbda, console)
    best_step = checkpoints.read(retrained)["history"][-1]["best_step"]
    for line in words(rows, tested, trained, best_step):
        console.print(line)
    return {
        "rows": [asdict(row) for row in rows],
        "images": [one.image for one in points[0].images],
        "best_step": best_step,
    }


def rows_of(points: Sequence[Point]) -> list[Row]:
    """SQ with CompressAI's tables, SQ with adapted ones, TCQ, TCQ with the retrained decoder, and the control."""
    bases = {one.quantizer: one for one in points if one.arm == BASE}
    sq, adapted = bases.pop("sq"), bases.pop(SQ_ADAPTED)
    (tcq,) = bases.values()
    (retrained,), (control,) = (
        [one for one in points if one.arm == arm] for arm in ("decoder", "decoder straight-through")
    )
    name = tcq.quantizer.replace("tcq", "TCQ-")
    return [
        _row("SQ", sq, sq),
        _row("SQ, tables adapted", adapted, sq),
        _row(name, tcq, sq),
        _row(f"{name}, retrained", retrained, sq, tcq),
        _row("control", control, sq, tcq),
    ]


def words(rows: Sequence[Row], tested: int, trained: int, best_step: int) -> list[str]:
    """What the table says, in plain sentences: the way from SQ, the part of retraining, and what is not proven."""
    *_, retrained, control = rows
    gain, other = retrained.against_unretrained, control.against_unretrained
    assert gain is not None and other is not None and retrained.against_sq is not None and retrained.rate is not None
    whole = f"L {retrained.against_sq}, worth {-retrained.rate:.1f} % of the rate at equal quality"
    lines = [
        "L = lambda 255^2 MSE + bpp, the loss that the model was trained for; intervals are of 95 %, over photos.",
        f"From SQ to {retrained.name}: {whole}.",
        f"Of that, retraining the decoder: L {gain}; the control, as many steps on SQ's latents: L {other}.",
    ]
    if best_step == 0 or gain.high >= 0:
        why = "the best weights were those it began with" if best_step == 0 else "the interval does not exclude 0"
        lines.append(
            f"Retraining proves nothing here: {why}. {trained} photos to retrain on are "
            f"{'few' if trained < FEW_TRAINED else 'perhaps too much like those of the base'}: take {FEW_TRAINED} or "
            "more, finetune.steps: 1000 and finetune.lr: 2.0e-5 in experiment.yaml, then lic-dist run."
        )
    if tested < FEW_TESTED:
        lines.append(f"{tested} test photo{'s' * (tested > 1)} prove little: give {5 * FEW_TESTED} photos or more.")
    return lines


def _row(name: str, point: Point, sq: Point, unretrained: Point | None = None) -> Row:
    loss, loss_of_sq = (fmean(image_losses(one).values()) for one in (point, sq))
    rate = 100 * (loss - loss_of_sq) / sq.figures.bpp
    figures = point.figures
    return Row(
        name,
        figures.bpp,
        figures.psnr,
        loss,
        None if point is sq else _change(point, sq),
        None if unretrained is None else _change(point, unretrained),
        None if point is sq else rate,
    )


def _change(point: Point, base: Point) -> Interval:
    losses, others = image_losses(point), image_losses(base)
    return change_interval([losses[image] for image in others], list(others.values()))


def _show(rows: Sequence[Row], tested: int, lmbda: float, console: Console) -> None:
    table = Table(title=f"{tested} test photo{'s' * (tested > 1)}, real bits, lambda {lmbda}", box=SIMPLE_HEAD)
    table.add_column("")
    for column in ("bpp", "PSNR dB", "L", "change of L [95 %]"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(row.name, f"{row.bpp:.4f}", f"{row.psnr:.3f}", f"{row.L:.4f}", str(row.against_sq or ""))
    console.print(table)
