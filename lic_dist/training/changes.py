"""What retraining changes on each source: L before and after on the same held-out crops, with intervals over photos."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lic_dist.intervals import Interval, change_interval
from lic_dist.training.sources import THIRDS, Sources

ByPhoto = Mapping[tuple[str, str], float]  # mean L over the crops of (source, photo)


@dataclass(frozen=True)
class SourceChange:
    """Mean L over a source's crops before and after, and its change in percent, with a 95 % interval over photos."""

    source: str
    photos: int
    crops: int
    before: float
    after: float
    change: Interval


def source_changes(sources: Sources, before: ByPhoto, after: ByPhoto) -> list[SourceChange]:
    """Return the change on each source, in the order of their names."""
    crops: dict[tuple[str, str], int] = {}
    for key in zip(sources.of_sample, sources.photos, strict=True):
        crops[key] = crops.get(key, 0) + 1
    found = []
    for name in sources.names:
        keys = [key for key in crops if key[0] == name]
        old, new = ([L[key] * crops[key] for key in keys] for L in (before, after))
        count = sum(crops[key] for key in keys)
        found.append(
            SourceChange(name, len(keys), count, sum(old) / count, sum(new) / count, change_interval(new, old))
        )
    return found


def losers(changes: Sequence[SourceChange], tolerance: float) -> list[SourceChange]:
    """Return the sources that lose more than a part of their L."""
    return [one for one in changes if not one.after <= one.before * (1 + tolerance)]


def print_changes(changes: Sequence[SourceChange]) -> None:
    """Print a table of the changes."""
    table = Table(title="L by source of the held-out crops", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("source", overflow="fold")
    for column in ("photos", "crops", "before", "after", "change of L [95 %]"):
        table.add_column(column, justify="right", no_wrap=True)
    for one in changes:
        figures = f"{one.photos}", f"{one.crops}", f"{one.before:.4f}", f"{one.after:.4f}", str(one.change)
        table.add_row(escape(one.source), *figures)
    if tuple(one.source for one in changes) == THIRDS:
        table.caption = "one folder: thirds of the crops by the base model's bits"
    Console().print(table)


def told(refused: Mapping[str, Any], tolerance: float) -> str:
    """Return a sentence about an entry of `Choice.refused`."""
    kept = f"those of step {refused['kept_step']}"
    if refused["kept_step"] == 0:
        kept = "the old ones"
    elif refused["kept_share"] < 1:
        kept = f"the old ones and {refused['kept_share']:g} of the change to these"
    lost = worst(refused["change_percent"], tolerance)
    return f"Weights of step {refused['step']}: {lost}: kept are {kept}."


def worst(percent: Mapping[str, float], tolerance: float) -> str:
    """Return which source loses most, of the changes of L in percent."""
    source = max(percent, key=lambda name: percent[name])
    return f"{source} loses {percent[source]:.2f} % of L, more than {100 * tolerance:g} %"
