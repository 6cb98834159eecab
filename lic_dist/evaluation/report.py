"""The report on curves: BD-rates, gains at each lambda, every point, plots; on the terminal, in Markdown, as a page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from shlex import quote
from textwrap import fill

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lic_dist.building.job import provenance
from lic_dist.errors import LicError
from lic_dist.evaluation.charts import charts, write_png
from lic_dist.evaluation.comparison import AnchorTable
from lic_dist.evaluation.curves import collect, plain
from lic_dist.evaluation.findings import Findings
from lic_dist.evaluation.gains import COLUMNS as GAIN_COLUMNS
from lic_dist.evaluation.gains import Gains, cells
from lic_dist.evaluation.grid import Grid
from lic_dist.evaluation.lead import COLUMNS as LEAD_COLUMNS
from lic_dist.evaluation.lead import LEAD_SAYS, Lead, lead_cells, lead_title
from lic_dist.evaluation.markdown import markdown
from lic_dist.evaluation.page import page
from lic_dist.evaluation.results import read_file, write_whole
from lic_dist.evaluation.rows import (
    COMPARISON_COLUMNS,
    GAINS_SAY,
    comparison_cells,
    gains_title,
    grid_heads,
    grid_rows,
    grid_title,
    lettered,
)
from lic_dist.evaluation.shown import collect_pictures, write_sheets
from lic_dist.evaluation.styles import styles
from lic_dist.text import counted
from lic_dist.version import __version__

DEFAULT_ANCHOR = "base sq"


def report(
    files: Sequence[Path], anchors: Sequence[str], out: Path, only: Sequence[str] = (), console: Console | None = None
) -> Findings:
    """Compare all curves of result files with each anchor: tables on the terminal, report.html, results.md and plots.

    Where models were retrained, the grids of quantizers and arms besides; where pictures were kept, sheets of the first
    anchor and the best curves beside the original.
    Where all is of one lambda, L leads, and there are no BD-rates.
    `anchors` are names of curves, whole or as short as the report has them, or an arm and quantizer; without any, the
    base with SQ ("base sq"). The first is black in the plots. `only` are
    patterns of short names: curves that match none are left out, unless they are anchors. `console` is the terminal's,
    or a quiet one.

    Raises:
        LicError: a file that is no result file, or a folder that cannot be written.
        UsageError: no curve of that name or pattern.
    """
    collection = collect(files)
    chosen = list(dict.fromkeys(collection.named(name).name for name in anchors or (DEFAULT_ANCHOR,)))
    if only:
        collection = collection.only(only, chosen)
    found = Findings.of(collection.curves, [collection.named(name) for name in chosen])
    looks = styles(found.curves, chosen[0])
    drawn = charts(found, looks)
    leading = [chosen[0], *found.best]
    shown = collect_pictures(collection, looks, leading)
    _tell(found, console := console or Console())
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LicError(f"cannot write {out}: {error.strerror}") from None
    for chart in drawn:
        write_png(chart, looks, out / f"{chart.name}.png")
    write_sheets(collection, leading, out)
    write_whole(out / "results.md", markdown(found, drawn).encode())
    names = list(dict.fromkeys(plain(one.name) for one in map(read_file, files) if one.points))
    text = page(found, drawn, looks, shown, names, _made()).encode()
    write_whole(out / "report.html", text)
    if shown and shown.note:
        console.print(shown.note, markup=False, highlight=False)
    console.print(f"{out / 'report.html'}: {len(text) / 1e6:.1f} MB", markup=False, highlight=False, soft_wrap=True)
    return found


def _tell(found: Findings, console: Console) -> None:
    for one in found.leads:
        _show_lead(one, console)
    for table in found.tables:
        _show(table, console)
    if not found.leads:
        _show_gains(found.gains, console)
    for grid in found.grids.grids:
        _show_grid(grid, console)
    for note in found.grids.notes:
        console.print(note, markup=False, highlight=False)


def _made() -> str:
    """When, by which command and by what the report is made."""
    by = provenance()
    command = " ".join(["lic-dist", *(quote(word) for word in by["argv"][1:])])
    commit = f", commit {by['commit'][:10]}" if by["commit"] else ""
    return f"Made on {by['time'][:10]} by {command}; lic-dist {__version__}{commit}"


def _show_lead(found: Lead, console: Console) -> None:
    """The table on a terminal of 80 columns, and what L is."""
    table = _table(lead_title(found))
    table.padding = (0, 1, 0, 0)
    for number, column in enumerate(LEAD_COLUMNS):
        table.add_column(
            escape(column.replace("as rate [95 %]", "as rate").replace(" own", "\nown").replace(" [", "\n[")),
            justify="right" if number else "left",
            no_wrap=number > 0,
            overflow="fold",
        )
    for row in found.rows:
        name, *cells_, rate, own = (cell.replace(" [", "\n[") for cell in lead_cells(row))
        name = fill(name, 11, break_long_words=False)  # 80 columns are few
        table.add_row(*map(escape, (name, *cells_, rate.split("\n")[0], own)))
    console.print(table)
    console.print(LEAD_SAYS.replace("`", ""), markup=False, highlight=False)


def _show(found: AnchorTable, console: Console) -> None:
    title = f"BD-rate against {found.anchor.name} ({counted(len(found.anchor.figures), 'point')})"
    table = _table(title)
    for number, column in enumerate(COMPARISON_COLUMNS):
        numeric = 0 < number < 5
        table.add_column(escape(column), justify="right" if numeric else "left", no_wrap=numeric, overflow="fold")
    for comparison in found.comparisons:
        table.add_row(*(escape(cell) for cell in comparison_cells(comparison, found.notes)))
    console.print(table)
    for letter, note in lettered(found.notes):
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
    if found:
        console.print(GAINS_SAY.replace("`", ""), markup=False, highlight=False)


def _show_grid(grid: Grid, console: Console) -> None:
    """As one table, or several of the same rows where the arms do not fit beside each other."""
    heads = [fill(head, 15, break_long_words=False, break_on_hyphens=False) for head in grid_heads(grid)]
    rows = [["\n".join(cell).replace(" [", "\n[") for cell in row] for row in grid_rows(grid)]
    quantizers, *arms = zip(heads, *rows, strict=True)
    for number, block in enumerate(_blocks(arms, console.width - _width(quantizers) - 1)):
        table = _table("" if number else f"{grid_title(grid)} [%]: PCHIP, mean of images, 95 % interval")
        table.padding = (0, 1, 0, 0)
        for column, (head, *_) in enumerate((quantizers, *block)):
            table.add_column(escape(head), justify="right" if column else "left", overflow="fold")
        for row in list(zip(quantizers, *block, strict=True))[1:]:
            table.add_row(*map(escape, row))
        console.print(table)
    for letter, note in lettered(grid.notes):
        console.print(f"{letter}  {note}", markup=False, highlight=False)


def _blocks(columns: Sequence[Sequence[str]], width: int) -> list[list[Sequence[str]]]:
    """The columns in order, as many together as the width holds, one at least."""
    blocks: list[list[Sequence[str]]] = []
    for column in columns:
        if blocks and sum(map(_width, (*blocks[-1], column))) <= width:
            blocks[-1].append(column)
        else:
            blocks.append([column])
    return blocks


def _width(column: Sequence[str]) -> int:
    """Of its longest line, with what stands between columns."""
    return 2 + max(len(line) for cell in column for line in cell.split("\n"))


def _table(title: str) -> Table:
    return Table(title=escape(title), title_justify="left", title_style="bold", box=SIMPLE_HEAD)
