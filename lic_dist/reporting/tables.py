"""What a report is made of, as plain values: sections of tables, whose cells are text and the changes that it shows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lic_dist.intervals import Interval
from lic_dist.reporting.panels import Chart


@dataclass(frozen=True)
class Cell:
    """A cell: text of one line or several, and the change that it shows, if any, which decides its colour."""

    text: str
    change: Interval | None = None

    @classmethod
    def of(cls, value: Value) -> Cell:
        """A cell of what a table's maker gives: text, an interval, None for an empty one, or a cell."""
        if isinstance(value, Cell):
            return value
        return cls(str(value), value) if isinstance(value, Interval) else cls(value or "")

    @property
    def sense(self) -> str:
        """ "less" or "more" for a change whose interval leaves zero out, else ""."""
        change = self.change
        clear = change is not None and change.low < change.high and change.low * change.high > 0
        return "" if change is None or not clear else "less" if change.mean < 0 else "more"


Value = str | Interval | Cell | None


@dataclass(frozen=True)
class Table:
    """Columns and rows under a title ("": that of its section); `says` explains it, `notes` are referred to by letters.

    The first columns, as many as `names`, say what a row is of. On the terminal, columns of `brief` show no interval:
    80 characters are few.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    says: str = ""
    notes: tuple[str, ...] = ()
    names: int = 1
    brief: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Section:
    """A part of the report. One of `detail` is not on the terminal."""

    title: str
    says: str = ""
    tables: tuple[Table, ...] = ()
    charts: tuple[Chart, ...] = ()
    notes: tuple[str, ...] = ()
    detail: bool = False


def table(
    title: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[Value]],
    names: int = 1,
    brief: Sequence[int] = (),
    **more: Any,
) -> Table:
    """A table without those columns, behind its names, that are empty in all rows."""
    cells = [tuple(map(Cell.of, row)) for row in rows]
    kept = [number for number in range(len(columns)) if number < names or any(row[number].text for row in cells)]
    return Table(
        title,
        tuple(columns[number] for number in kept),
        tuple(tuple(row[number] for number in kept) for row in cells),
        names=names,
        brief=frozenset(place for place, number in enumerate(kept) if number in brief),
        **more,
    )


def letter(number: int) -> str:
    """a, b, .., z, aa, ab, .. for 0, 1, .."""
    return (letter(number // 26 - 1) if number >= 26 else "") + chr(ord("a") + number % 26)


def percent(value: float | None) -> str:
    return "" if value is None or not math.isfinite(value) else f"{value:+.2f} %"
