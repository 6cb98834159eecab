"""The report on curves: BD-rates, gains at each lambda, every point, a plot; on the terminal and in files."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from lic_dist.errors import LicError, UsageError
from lic_dist.evaluation.bd import Interval, bd_rate, image_bd_rates, mean_interval, overlap
from lic_dist.evaluation.gains import COLUMNS as GAIN_COLUMNS
from lic_dist.evaluation.gains import Gains, cells, gains
from lic_dist.evaluation.plots import rd_plot
from lic_dist.evaluation.results import Curve, Point, read_curves

LEAST_OVERLAP = 0.75  # of the PSNR ranges; the package `bjontegaard` warns below it


@dataclass(frozen=True)
class Comparison:
    """A curve against the anchor: BD-rates in percent, None where there is none, and why in `notes`."""

    name: str
    points: int
    pchip: float | None
    akima: float | None
    images: Interval | None
    notes: tuple[str, ...] = ()


def compare(anchor: Curve, test: Curve) -> Comparison:
    """BD-rate of the averaged curve (PCHIP, Akima) and the mean over images with its 95 % interval (PCHIP)."""
    try:
        pchip, akima = bd_rate(anchor, test, "pchip"), bd_rate(anchor, test, "akima")
    except LicError as error:
        return Comparison(test.name, len(test.figures), None, None, None, (error.message,))
    shared = overlap(anchor, test)
    notes = (
        [f"less than {LEAST_OVERLAP:.0%} of the PSNR ranges in common: distrust the figure"]
        if shared < LEAST_OVERLAP
        else []
    )
    interval = None
    try:
        interval = mean_interval(list(image_bd_rates(anchor, test).values()))
    except LicError as error:
        notes.append(error.message)
    return Comparison(test.name, len(test.figures), pchip, akima, interval, tuple(notes))


def report(files: Sequence[Path], anchor: str, out: Path) -> list[Comparison]:
    """Compare all curves of result files with the one named `anchor`; print, write results.md and rd.png in `out`.

    Raises:
        LicError: a file that is no result file.
        UsageError: no curve of that name.
    """
    curves = _named_apart([(path, curve) for path in files for curve in read_curves(path)])
    chosen = {curve.name: curve for curve in curves}.get(anchor)
    if chosen is None:
        raise UsageError(f"no curve is named {anchor!r}", hint=f"there are {', '.join(one.name for one in curves)}")
    comparisons = [compare(chosen, curve) for curve in curves if curve is not chosen]
    found = gains([point for curve in curves for point in curve.points])
    console = Console()
    _show(comparisons, chosen, console)
    _show_gains(found, console)
    rd_plot(curves, out / "rd.png", anchor)
    (out / "results.md").write_text(_page(comparisons, found, chosen, curves))
    return comparisons


def _named_apart(found: Sequence[tuple[Path, Curve]]) -> list[Curve]:
    """Curves of one name get their file's stem behind it."""
    names = [curve.name for _, curve in found]
    return [
        replace(curve, name=f"{curve.name} ({path.stem})") if names.count(curve.name) > 1 else curve
        for path, curve in found
    ]


_COLUMNS = ("curve", "points", "PCHIP", "Akima", "mean of images [95 %]", "note")


def _cells(comparison: Comparison, notes: Sequence[str]) -> tuple[str, ...]:
    """A row of _COLUMNS; its notes by their letters."""
    images = comparison.images
    interval = f"{images.mean:+.2f} % [{images.low:+.2f}, {images.high:+.2f}]" if images else ""
    letters = " ".join(_letter(notes.index(note)) for note in comparison.notes)
    pchip, akima = (_percent(value) for value in (comparison.pchip, comparison.akima))
    return comparison.name, str(comparison.points), pchip, akima, interval, letters


def _notes(comparisons: Sequence[Comparison]) -> list[str]:
    """Every note once, in order."""
    return list(dict.fromkeys(note for comparison in comparisons for note in comparison.notes))


def _letter(number: int) -> str:
    return (_letter(number // 26 - 1) if number >= 26 else "") + chr(ord("a") + number % 26)


def _show(comparisons: Sequence[Comparison], anchor: Curve, console: Console) -> None:
    notes = _notes(comparisons)
    title = f"BD-rate against {anchor.name} ({len(anchor.figures)} points)"
    table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD)
    for number, column in enumerate(_COLUMNS):
        numeric = 0 < number < 5
        table.add_column(column, justify="right" if numeric else "left", no_wrap=numeric, overflow="fold")
    for comparison in comparisons:
        table.add_row(*_cells(comparison, notes))
    console.print(table)
    for number, note in enumerate(notes):
        console.print(f"{_letter(number)}  {note}", markup=False, highlight=False)


def _show_gains(found: Sequence[Gains], console: Console) -> None:
    for table in found:
        shown = Table(title=_title(table), title_justify="left", title_style="bold", box=SIMPLE_HEAD)
        shown.padding = (0, 1, 0, 0)  # 80 columns are few
        for number, column in enumerate(GAIN_COLUMNS):
            numeric = number > 1
            head = column.replace("against ", "against\n").replace(" [", "\n[")
            shown.add_column(head, justify="right" if numeric else "left", no_wrap=number != 1, overflow="fold")
        for row in table.rows:
            shown.add_row(*(cell.replace(" [", "\n[") for cell in cells(row)))
        console.print(shown)


def _title(table: Gains) -> str:
    return f"L at lambda {table.lmbda:g}, {table.images} image{'s' if table.images > 1 else ''}"


def _page(comparisons: Sequence[Comparison], found: Sequence[Gains], anchor: Curve, curves: Sequence[Curve]) -> str:
    notes = _notes(comparisons)
    lines = [
        f"# BD-rate against {anchor.name}",
        "",
        "Rate at equal PSNR, in percent; negative is less rate. Averaged curves by PCHIP and Akima; the mean of the",
        "images' own BD-rates (PCHIP) with a bootstrap interval over images.",
        "",
        *_markdown(_COLUMNS, [_cells(comparison, notes) for comparison in comparisons]),
        "",
        *(f"- {_letter(number)}: {note}" for number, note in enumerate(notes)),
        "",
        "![Rate-distortion curves](rd.png)",
        "",
        *_gains_page(found),
        "# Points",
        "",
        "Means over images. bpp counts the entropy-coded streams; `container` is what is around them, `estimated` the",
        "gap from the tables' own rate to the written bytes, `likelihood` the gap from the continuous model's rate.",
        "",
    ]
    heads = ("curve", "lmbda", "images", "bpp", "PSNR dB", "MS-SSIM", "container", "estimated", "likelihood")
    rows = [
        (curve.name, *(_point_cells(curve.points[number]) if curve.points else ("", "")), f"{one.bpp:.4f}")
        + (f"{one.psnr:.3f}", "" if one.ms_ssim is None else f"{one.ms_ssim:.4f}")
        + (_gap_cells(curve.points[number]) if curve.points else ("", "", ""))
        for curve in curves
        for number, one in enumerate(curve.figures)
    ]
    return "\n".join([*lines, *_markdown(heads, rows)]) + "\n"


def _gains_page(found: Sequence[Gains]) -> list[str]:
    if not found:
        return []
    tables = [
        line
        for table in found
        for line in (f"## {_title(table)}", "", *_markdown(GAIN_COLUMNS, [cells(row) for row in table.rows]), "")
    ]
    return [
        "# Gains at each lambda",
        "",
        "L = lambda 255^2 MSE + bpp, the mean over images (8-bit pictures); less is better. Its change with a",
        "bootstrap interval over images: against the same quantizer, and against SQ with adapted tables",
        "(`sq-adapted`), both on the base model; empty where there is no such point, or several that differ.",
        "",
        *tables,
    ]


def _point_cells(point: Point) -> tuple[str, str]:
    return f"{point.lmbda:g}", str(len(point.images))


def _gap_cells(point: Point) -> tuple[str, str, str]:
    bpp = fmean(row.bpp for row in point.images)
    estimated = fmean(row.estimated_bpp for row in point.images)
    likelihood = fmean(row.likelihood_bpp for row in point.images)
    container = f"{fmean(row.container_bpp for row in point.images):.4f}"
    return container, _percent(100 * (bpp / estimated - 1)), _percent(100 * (bpp / likelihood - 1))


def _percent(value: float | None) -> str:
    return "" if value is None or not math.isfinite(value) else f"{value:+.2f} %"


def _markdown(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    rule = ["---", *["---:"] * (len(heads) - 1)]
    return [f"| {' | '.join(cells)} |" for cells in (heads, rule, *rows)]
