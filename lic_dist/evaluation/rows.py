"""The tables of a report as rows of text, for the terminal, Markdown and HTML alike."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean

from lic_dist.evaluation.comparison import Comparison, Times
from lic_dist.evaluation.gains import BASE, Gains
from lic_dist.evaluation.grid import Grid
from lic_dist.evaluation.results import Curve, Point
from lic_dist.text import counted

COMPARISON_COLUMNS = ("curve", "points", "PCHIP", "Akima", "mean of images [95 %]", "note")
POINT_COLUMNS = (
    "curve",
    "lmbda",
    "images",
    "bpp",
    "PSNR dB",
    "MS-SSIM",
    "container",
    "estimated",
    "likelihood",
    "z bpp",
)
TIME_COLUMNS = ("curve", "encode s", "decode s", "megapixels")

BD_SAYS = (
    "Change of rate at equal PSNR, in percent: negative is less rate. PCHIP and Akima interpolate the curves averaged "
    "over images; the mean of the images' own BD-rates (PCHIP) has a 95 % bootstrap interval over images."
)
GRID_SAYS = (
    "Change of rate at equal PSNR, in percent, of each quantizer (rows) on models retrained as the column says: "
    "negative is less rate. First the BD-rate of the curves averaged over images (PCHIP), then the mean of the images' "
    "own with its 95 % bootstrap interval. A curve's own base is the same quantizer without retraining. Empty where a "
    "curve or its anchor is not there."
)
GAINS_SAY = (
    "L = lambda 255^2 MSE + bpp, the mean over images (8-bit pictures); less is better. Its change with a bootstrap "
    "interval over images: against the same quantizer, and against SQ with adapted tables (`sq-adapted`), both on the "
    "base model; empty where there is no such point, or several that differ."
)
POINTS_SAY = (
    "Means over images. bpp counts the entropy-coded streams, `z bpp` the estimated part of z; `container` is what is "
    "around the streams, `estimated` the gap from the tables' own rate to the written bytes, `likelihood` the gap from "
    "the continuous model's rate."
)
TIMES_SAY = "Medians over images and lambdas of the seconds that an image took, on the machine that measured."


def comparison_cells(comparison: Comparison, notes: Sequence[str]) -> tuple[str, ...]:
    """A row of COMPARISON_COLUMNS; its notes by their letters."""
    letters = " ".join(letter(notes.index(note)) for note in comparison.notes)
    pchip, akima = (percent(value) for value in (comparison.pchip, comparison.akima))
    return comparison.name, str(comparison.points), pchip, akima, str(comparison.images or ""), letters


def grid_title(grid: Grid) -> str:
    return f"BD-rate against {'its own base' if grid.anchor is None else f'base {grid.anchor}'}"


def grid_heads(grid: Grid) -> tuple[str, ...]:
    return "quantizer", *("no retraining" if arm == BASE else arm for arm in grid.arms)


def grid_rows(grid: Grid) -> list[tuple[tuple[str, ...], ...]]:
    """Rows under `grid_heads`, each cell the lines that it has: PCHIP with the letters of notes, mean and interval."""
    notes = grid.notes
    return [
        ((quantizer,), *(_grid_cell(grid, arm, quantizer, notes) for arm in grid.arms)) for quantizer in grid.quantizers
    ]


def _grid_cell(grid: Grid, arm: str, quantizer: str, notes: Sequence[str]) -> tuple[str, ...]:
    if arm == BASE and quantizer == grid.anchor:
        return ("anchor",)
    cell = grid.cells.get((arm, quantizer))
    if cell is None:
        return ()
    value = "" if cell.pchip is None or not math.isfinite(cell.pchip) else f"{cell.pchip:+.2f}"
    first = " ".join([value, *(letter(notes.index(note)) for note in cell.notes)]).strip()
    return (first, str(cell.images).replace(" %", "")) if cell.images else (first,)


def lettered(notes: Sequence[str]) -> list[tuple[str, str]]:
    """The notes under a table, each with its letter."""
    return [(letter(number), note) for number, note in enumerate(notes)]


def letter(number: int) -> str:
    return (letter(number // 26 - 1) if number >= 26 else "") + chr(ord("a") + number % 26)


def gains_title(table: Gains) -> str:
    return f"L at lambda {table.lmbda:g}, {counted(table.images, 'image')}"


def point_rows(curves: Sequence[Curve]) -> list[tuple[str, ...]]:
    """Rows of POINT_COLUMNS; a published point has its figures only."""
    rows = []
    for curve in curves:
        for number, one in enumerate(curve.figures):
            point = curve.points[number] if curve.points else None
            known = (f"{point.lmbda:g}", str(len(point.images))) if point else ("", "")
            figures = f"{one.bpp:.4f}", f"{one.psnr:.3f}", "" if one.ms_ssim is None else f"{one.ms_ssim:.4f}"
            rows.append((curve.name, *known, *figures, *(_gap_cells(point) if point else ("", "", "", ""))))
    return rows


def time_rows(found: Sequence[Times]) -> list[tuple[str, ...]]:
    return [(one.name, f"{one.encode:.3f}", f"{one.decode:.3f}", f"{one.megapixels:.2f}") for one in found]


def percent(value: float | None) -> str:
    return "" if value is None or not math.isfinite(value) else f"{value:+.2f} %"


def _gap_cells(point: Point) -> tuple[str, ...]:
    bpp = fmean(row.bpp for row in point.images)
    estimated = fmean(row.estimated_bpp for row in point.images)
    likelihood = fmean(row.likelihood_bpp for row in point.images)
    container = f"{fmean(row.container_bpp for row in point.images):.4f}"
    z = "" if point.z_bpp is None else f"{point.z_bpp:.4f}"
    return container, percent(_gap(bpp, estimated)), percent(_gap(bpp, likelihood)), z


def _gap(bpp: float, rate: float) -> float | None:
    return 100 * (bpp / rate - 1) if rate > 0 else None
