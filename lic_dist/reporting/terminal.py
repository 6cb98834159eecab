"""The report on a terminal: tables of at most its width, names folded, intervals under their means."""

from __future__ import annotations

from collections.abc import Sequence
from textwrap import fill
from typing import Literal

from rich import table as rich_table
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape

from lic_dist.reporting.tables import Section, Table, letter

NAME_WIDTH, HEAD_WIDTH = 9, 13  # characters, to which names shrink and at which headings break
Column = list[str]  # heading and cells


def show(parts: Sequence[Section], console: Console) -> None:
    """Print all sections but details."""
    for part in parts:
        if part.detail:
            continue
        for table in part.tables:
            _show(table, table.title or part.title, console)
        says = [part.says, *(table.says for table in part.tables)]
        for line in (*(one.replace("`", "") for one in says if one), *part.notes):
            console.print(line, markup=False, highlight=False)


def _show(table: Table, title: str, console: Console) -> None:
    """As one table, or several of the same rows where the columns do not fit beside each other."""
    columns = [_column(table, number) for number in range(len(table.columns))]
    names, others = columns[: table.names], columns[table.names :]
    taken = sum(min(NAME_WIDTH + 2, _width(column)) for column in names)
    for number, block in enumerate(_blocks(others, console.width - taken)):
        shown = rich_table.Table(
            title=None if number else escape(title),
            title_justify="left",
            title_style="bold",
            box=SIMPLE_HEAD,
            padding=(0, 1, 0, 0),
        )
        for index, column in enumerate((*names, *block)):
            figures = index >= len(names)
            justify: Literal["left", "right"] = "right" if figures else "left"
            shown.add_column(escape(column[0]), justify=justify, no_wrap=figures, overflow="fold")
        for row in list(zip(*names, *block, strict=True))[1:]:
            shown.add_row(*map(escape, row))
        console.print(shown)
    for index, note in enumerate(table.notes):
        console.print(f"{letter(index)}  {note}", markup=False, highlight=False)


def _column(table: Table, number: int) -> Column:
    head = table.columns[number].replace(" [95 %]", "" if number in table.brief else "\n[95 %]")
    head = "\n".join(fill(line, HEAD_WIDTH, break_long_words=False) for line in head.split("\n"))
    texts = [row[number].text for row in table.rows]
    if number in table.brief:
        return [head, *(text.split(" [")[0] for text in texts)]
    return [head, *(text if number < table.names else text.replace(" [", "\n[") for text in texts)]


def _blocks(columns: Sequence[Column], width: int) -> list[list[Column]]:
    """The columns in order, as many together as the width holds, one at least."""
    blocks: list[list[Column]] = [[]]
    for column in columns:
        if blocks[-1] and sum(map(_width, (*blocks[-1], column))) > width:
            blocks.append([])
        blocks[-1].append(column)
    return blocks


def _width(column: Column) -> int:
    """Of its longest line, with what stands between columns."""
    return 2 + max(len(line) for cell in column for line in cell.split("\n"))
