"""The report on curves: BD-rates, gains at each lambda, every point, plots; on the terminal, in Markdown, as a page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lic_dist.errors import LicError
from lic_dist.evaluation.charts import charts, styles, write_png
from lic_dist.evaluation.comparison import Against, against, best
from lic_dist.evaluation.curves import collect
from lic_dist.evaluation.gains import COLUMNS as GAIN_COLUMNS
from lic_dist.evaluation.gains import Gains, cells, gains
from lic_dist.evaluation.markdown import markdown
from lic_dist.evaluation.page import page
from lic_dist.evaluation.results import write_whole
from lic_dist.evaluation.rows import COMPARISON_COLUMNS, comparison_cells, gains_title, lettered
from lic_dist.evaluation.shown import collect_pictures


def report(files: Sequence[Path], anchors: Sequence[str], out: Path) -> list[Against]:
    """Compare all curves of result files with each anchor: tables on the terminal, report.html, results.md and plots.

    `anchors` are names of curves, whole or as short as the report has them; the first is black in the plots.

    Raises:
        LicError: a file that is no result file, or a folder that cannot be written.
        UsageError: no curve of that name.
    """
    collection = collect(files)
    curves = collection.curves
    chosen = list(dict.fromkeys(collection.named(name).name for name in anchors))
    tables = [against(collection.named(name), curves) for name in chosen]
    found = gains([point for curve in curves for point in curve.points])
    looks = styles(curves, chosen[0])
    drawn = charts(curves, tables, found, looks)
    measured = [curve.name for curve in curves if curve.points]
    leading = [one.name for one in (best(table, measured) for table in tables) if one]
    shown = collect_pictures(collection, looks, [chosen[0], *leading])
    console = Console()
    for table in tables:
        _show(table, console)
    _show_gains(found, console)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LicError(f"cannot write {out}: {error.strerror}") from None
    for chart in drawn:
        write_png(chart, looks, out / f"{chart.name}.png")
    write_whole(out / "results.md", markdown(tables, found, drawn, curves).encode())
    text = page(tables, found, drawn, curves, looks, shown).encode()
    write_whole(out / "report.html", text)
    if shown and shown.note:
        console.print(shown.note, markup=False, highlight=False)
    console.print(f"{out / 'report.html'}: {len(text) / 1e6:.1f} MB", markup=False, highlight=False, soft_wrap=True)
    return tables


def _show(found: Against, console: Console) -> None:
    title = f"BD-rate against {found.anchor.name} ({len(found.anchor.figures)} points)"
    table = _table(title)
    for number, column in enumerate(COMPARISON_COLUMNS):
        numeric = 0 < number < 5
        table.add_column(escape(column), justify="right" if numeric else "left", no_wrap=numeric, overflow="fold")
    for comparison in found.comparisons:
        table.add_row(*(escape(cell) for cell in comparison_cells(comparison, found.notes)))
    console.print(table)
    for letter, note in lettered(found):
        console.print(f"{letter}  {note}", markup=False, highlight=False)


def _show_gains(found: Sequence[Gains], console: Console) -> None:
    for gain in found:
        table = _table(gains_title(gain))
        table.padding = (0, 1, 0, 0)  # 80 columns are few
        for number, column in enumerate(GAIN_COLUMNS):
            numeric = number > 1
            head = column.replace("against ", "against\n").replace(" [", "\n[")
            table.add_column(escape(head), justify="right" if numeric else "left", no_wrap=number != 1, overflow="fold")
        for row in gain.rows:
            table.add_row(*(escape(cell.replace(" [", "\n[")) for cell in cells(row)))
        console.print(table)


def _table(title: str) -> Table:
    return Table(title=escape(title), title_justify="left", title_style="bold", box=SIMPLE_HEAD)
