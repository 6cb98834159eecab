"""The report as Markdown, its charts beside it."""

from __future__ import annotations

from collections.abc import Sequence

from lic_dist.reporting.tables import Section, Table, letter


def markdown(parts: Sequence[Section]) -> str:
    """The text of results.md."""
    lines: list[str] = []
    for part in parts:
        lines += [f"# {_escaped(part.title)}", ""]
        lines += [part.says, ""] if part.says else []
        for table in part.tables:
            lines += [f"## {_escaped(table.title)}", ""] if table.title else []
            lines += [*_table(table), ""]
            lines += [table.says, ""] if table.says else []
            lines += [f"- {letter(number)}: {_escaped(note)}" for number, note in enumerate(table.notes)]
            lines += [""] if table.notes else []
        lines += [line for chart in part.charts for line in (f"![{chart.title}]({chart.name}.png)", "")]
        lines += [line for note in part.notes for line in (_escaped(note), "")]
    return "\n".join(lines)


def _table(table: Table) -> list[str]:
    rule = ["---", *["---:"] * (len(table.columns) - 1)]
    body = ([cell.text.replace("\n", "; ") for cell in row] for row in table.rows)
    head, *rows = ([_escaped(cell) for cell in row] for row in (table.columns, *body))
    return [f"| {' | '.join(cells)} |" for cells in (head, rule, *rows)]


def _escaped(text: str) -> str:
    """Names from files: no HTML, no cell's end."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|")
