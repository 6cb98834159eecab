"""The report as Markdown, its plots beside it."""

from __future__ import annotations

from collections.abc import Sequence

from lic_dist.evaluation.charts import Chart
from lic_dist.evaluation.comparison import times
from lic_dist.evaluation.findings import Findings
from lic_dist.evaluation.gains import COLUMNS as GAIN_COLUMNS
from lic_dist.evaluation.gains import cells
from lic_dist.evaluation.grid import Grids
from lic_dist.evaluation.lead import COLUMNS as LEAD_COLUMNS
from lic_dist.evaluation.lead import LEAD_SAYS, lead_cells, lead_title, picture_rows
from lic_dist.evaluation.rows import (
    BD_SAYS,
    COMPARISON_COLUMNS,
    GAINS_SAY,
    GRID_SAYS,
    POINT_COLUMNS,
    POINTS_SAY,
    TIME_COLUMNS,
    TIMES_SAY,
    comparison_cells,
    gains_title,
    grid_heads,
    grid_rows,
    grid_title,
    lettered,
    point_rows,
    time_rows,
)


def markdown(found: Findings, drawn: Sequence[Chart]) -> str:
    """The text of results.md."""
    lines: list[str] = []
    for one in found.leads:
        heads, images = picture_rows(one)
        lines += [f"# {_escaped(lead_title(one))}", "", *_table(LEAD_COLUMNS, [lead_cells(row) for row in one.rows])]
        lines += ["", LEAD_SAYS, "", "## Picture by picture", "", *_table(heads, images), ""]
    for table in found.tables:
        rows = [comparison_cells(one, table.notes) for one in table.comparisons]
        notes = [f"- {key}: {_escaped(note)}" for key, note in lettered(table.notes)]
        lines += [f"# BD-rate against {_escaped(table.anchor.name)}", "", BD_SAYS, ""]
        lines += [*_table(COMPARISON_COLUMNS, rows), "", *notes, *([""] if notes else [])]
    lines += _grids(found.grids)
    lines += ["# Plots", ""]
    for chart in drawn:
        lines += [f"## {chart.title}", "", chart.says, "", f"![{chart.title}]({chart.name}.png)", ""]
    if found.gains:
        lines += ["# Gains at each lambda", "", GAINS_SAY, ""]
    for gains in found.gains:
        lines += [f"## {gains_title(gains)}", "", *_table(GAIN_COLUMNS, [cells(row) for row in gains.rows]), ""]
    lines += ["# Points", "", POINTS_SAY, "", *_table(POINT_COLUMNS, point_rows(found.curves)), ""]
    measured = times(found.curves)
    if measured:
        lines += ["# Times", "", TIMES_SAY, "", *_table(TIME_COLUMNS, time_rows(measured)), ""]
    return "\n".join(lines)


def _grids(found: Grids) -> list[str]:
    lines = ["# Quantizers and arms", ""] if found.grids or found.notes else []
    lines += [GRID_SAYS, ""] if found.grids else []
    for grid in found.grids:
        rows = [["; ".join(cell) for cell in row] for row in grid_rows(grid)]
        notes = [f"- {key}: {_escaped(note)}" for key, note in lettered(grid.notes)]
        lines += [f"## {_escaped(grid_title(grid))}", "", *_table(grid_heads(grid), rows), ""]
        lines += [*notes, *([""] if notes else [])]
    return [*lines, *(line for note in found.notes for line in (_escaped(note), ""))]


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    rule = ["---", *["---:"] * (len(heads) - 1)]
    head, *body = ([_escaped(cell) for cell in row] for row in (heads, *rows))
    return [f"| {' | '.join(cells)} |" for cells in (head, rule, *body)]


def _escaped(text: str) -> str:
    """Names from files: no HTML, no cell's end."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|")
