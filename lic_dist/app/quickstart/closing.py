"""The closing table of a quick start: what a better search and a retrained decoder gain over SQ, with intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from lic_dist.evaluation.jobs import BASE
from lic_dist.evaluation.results import Point, read_points
from lic_dist.models import checkpoint as checkpoints
from lic_dist.reporting.gains import SQ_ADAPTED, lambdas
from lic_dist.reporting.lead import LeadRow, lead
from lic_dist.text import counted

FEW_TESTED, FEW_TRAINED = 8, 40  # photos; with fewer, `words` says that they prove little
RETRAINED, CONTROL = "decoder", "decoder straight-through"  # arms
REFINED = "-refined"  # of a quantizer's name: searched again by the decoder's answer
Rows = dict[str, LeadRow]  # by the name of the row


def closing(results: Path, retrained: Path, trained: int, console: Console) -> dict[str, Any]:
    """Print the table of a result file and its conclusions in sentences; return the figures."""
    points = read_points(results)
    rows = rows_of(points)
    tested = len(points[0].images)
    _print_table(rows, tested, lambdas(points)[0], console)
    content = checkpoints.read(retrained)
    best_step = content["history"][-1]["best_step"]
    for line in words(rows, tested, trained, best_step):
        console.print(line)
    return {
        "rows": [_plain(name, row) for name, row in rows.items()],
        "images": [row.image for row in points[0].images],
        "best_step": best_step,
    }


def rows_of(points: Sequence[Point]) -> Rows:
    """Return the rows SQ, TCQ, TCQ refined, TCQ with the retrained decoder, and the control."""
    anchor = next(point for point in points if (point.arm, point.quantizer) == (BASE, SQ_ADAPTED))
    found = {(row.gain.arm, row.gain.point.quantizer): row for row in lead(points, anchor).rows}
    group = next(quantizer for arm, quantizer in found if arm == RETRAINED)
    name = group.replace("tcq", "TCQ-")
    return {
        "SQ": found[BASE, SQ_ADAPTED],
        name: found[BASE, group],
        f"{name}, refined": found[BASE, group + REFINED],
        f"{name}, retrained": found[RETRAINED, group],
        "control": found[CONTROL, group],
    }


def words(rows: Rows, tested: int, trained: int, best_step: int) -> list[str]:
    """Return the table's conclusions in sentences: the gains over SQ, retraining's part in it, what is not proven."""
    *_, (refined_name, refined), (name, retrained), (_, control) = rows.items()
    gain, control_gain, rate = retrained.own, control.own, retrained.rate
    assert gain is not None and control_gain is not None and rate is not None
    lines = [
        "L = lambda 255^2 MSE + bpp, the codec's loss; SQ has its best step; intervals are of 95 %, over photos.",
        f"From SQ to {name}: L {retrained.change}, worth {-rate.mean:.1f} % of the rate at equal quality.",
        f"{refined_name}: L {refined.change}. The encoder searches again by the decoder's answer and takes several "
        "times as long; the decoder is the same. It gains most where a decoder serves a lambda that is not its own.",
        f"Retraining alone, against TCQ without: L {gain}; the control ({CONTROL!r} in the report), "
        f"as many steps on SQ's latents: L {control_gain}.",
    ]
    if best_step == 0 or gain.high >= 0:
        why = "the best weights were those it began with" if best_step == 0 else "the interval does not exclude 0"
        photos = "few" if trained < FEW_TRAINED else "perhaps too much like those that the base knows"
        advice = (
            f"{trained} photos to retrain on are {photos}: give {FEW_TRAINED} or more, and more steps: --set "
            "finetune.steps=1000 with lic-dist finetune, then evaluate."
        )
        lines.append(f"Retraining proves nothing here: {why}. {advice}")
    if tested < FEW_TESTED:
        few = counted(tested, "test photo")
        lines.append(f"{few} {'proves' if tested == 1 else 'prove'} little: give {5 * FEW_TESTED} photos or more.")
    return lines


def _plain(name: str, row: LeadRow) -> dict[str, Any]:
    """Return a row as plain data: means over the test photos; changes in percent, with their intervals."""
    changes = {"change": row.change, "rate": row.rate, "retraining": row.own}
    figures = row.gain.point.figures
    plain = {key: change and asdict(change) for key, change in changes.items()}
    return {"name": name, "bpp": figures.bpp, "psnr": figures.psnr, "L": row.gain.loss, **plain}


def _print_table(rows: Rows, tested: int, lmbda: float, console: Console) -> None:
    table = Table(title=f"{counted(tested, 'test photo')}, real bits, lambda {lmbda}", box=SIMPLE_HEAD)
    table.add_column("")
    for column in ("bpp", "PSNR dB", "L", "change of L [95 %]"):
        table.add_column(column, justify="right", no_wrap=True)
    for name, row in rows.items():
        figures = row.gain.point.figures
        table.add_row(name, f"{figures.bpp:.4f}", f"{figures.psnr:.3f}", f"{row.gain.loss:.4f}", str(row.change or ""))
    console.print(table)
