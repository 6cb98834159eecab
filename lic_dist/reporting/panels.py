"""What the charts of a report are made of: panels of lines, points and intervals over each other, each curve alike.

A panel's parameter `picked`, names of curves, fades all others. Dragging moves a panel, shift and the wheel zoom.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zlib import crc32

import altair as alt
import pandas as pd

from lic_dist import drawing
from lic_dist.drawing import INK
from lic_dist.intervals import Interval
from lic_dist.reporting.styles import Styles

Rows = list[dict[str, Any]]
NOTHING = pd.DataFrame({"nothing": [0]})  # of marks at a fixed place
_PICKED = "length(picked) == 0 || indexof(picked, datum.curve) >= 0"
_DRAG = "[pointerdown[event.pointerType == 'mouse'], window:pointerup] > window:pointermove!"


@dataclass(frozen=True)
class Panel:
    """A plot and its title."""

    title: str
    plot: drawing.Plot


@dataclass(frozen=True)
class Chart:
    """Panels that make one picture `name`.png; what they show, in a sentence or two."""

    name: str
    title: str
    says: str
    panels: tuple[Panel, ...]


def write_chart(chart: Chart, folder: Path) -> None:
    """The panels in rows of two with one legend, as `name`.png and `name`.svg."""
    panels = drawing.beside(*(drawing.panel(one.plot, one.title) for one in chart.panels))
    drawing.write(panels, folder / f"{chart.name}.png", folder / f"{chart.name}.svg")


def page_spec(panel: Panel) -> dict[str, Any]:
    """The panel for a page: as wide as its place, without title and legend, which the page has."""
    spec = drawing.spec(panel.plot.properties(width="container", height=250, background="transparent"))
    del spec["$schema"]  # an address, which a page without a network need not name
    spec["config"]["legend"] = {"disable": True}
    for layer in spec["layer"]:
        layer["mark"]["clip"] = True  # when zoomed; in a picture it costs seconds
    return spec


def marks(rows: Rows, looks: Styles, tooltip: Sequence[alt.Tooltip]) -> alt.Chart:
    """Rows of one `curve` each in its colour, faded where others are picked."""
    return alt.Chart(pd.DataFrame(rows)).encode(
        color=by_curve(alt.Color, looks, "colour"),
        opacity=alt.condition(_PICKED, alt.value(1.0), alt.value(0.13)),
        tooltip=[alt.Tooltip("curve:N"), *tooltip],
    )


def plot(
    rows: Rows,
    looks: Styles,
    x: alt.X,
    y: alt.Y,
    tooltip: Sequence[alt.Tooltip],
    points: bool = True,
    width: float = 1.6,
    clip: bool = False,
) -> list[alt.Chart]:
    """Lines through rows of one `curve` each, and their points; those without a figure break the line."""
    base = marks(rows, looks, tooltip).encode(x=x, y=y)
    line = base.mark_line(clip=clip, strokeWidth=width).encode(strokeDash=by_curve(alt.StrokeDash, looks, "dash"))
    point = base.mark_point(clip=clip, filled=True, size=45 if points else 0, opacity=1)  # none: for the legend alone
    return [line, point.encode(shape=by_curve(alt.Shape, looks, "shape"))]


def intervals(
    rows: Rows, looks: Styles, x: Mapping[str, Any], tooltip: Sequence[alt.Tooltip], clip: bool = False
) -> list[alt.Chart]:
    """Means over the lines of their intervals: rows with curve, mean, low and high at places `x`."""
    shown = [alt.Tooltip(f"{name}:Q", format="+.2f") for name in ("mean", "low", "high")]
    base = marks(rows, looks, [*tooltip, *shown]).encode(**x)
    bar = base.mark_rule(clip=clip, strokeWidth=1.6).encode(y=alt.Y("low:Q", title=None), y2="high:Q")
    point = base.mark_point(clip=clip, filled=True, size=55, opacity=1).encode(y=alt.Y("mean:Q", title=None))
    return [bar, point.encode(shape=by_curve(alt.Shape, looks, "shape"))]


def interval_row(curve: str, found: Interval, **more: Any) -> dict[str, Any]:
    return {"curve": curve, "mean": found.mean, "low": found.low, "high": found.high, **more}


def zero() -> alt.Chart:
    return alt.Chart(NOTHING).mark_rule(color=INK, strokeWidth=1).encode(y=alt.datum(0))


def panel(title: str, *layers: alt.Chart, zooms: bool = True) -> Panel:
    """Layers over each other, with the parameter `picked`; only a panel of numbers on both axes zooms."""
    first, *others = layers
    if zooms:
        first = first.add_params(
            alt.selection_interval(
                name=f"zoom_{crc32(title.encode())}",  # distinct among the panels of a picture
                bind="scales",
                translate=_DRAG,
                zoom="wheel![event.shiftKey]",
            )
        )
    return Panel(title, alt.layer(first, *others).add_params(alt.param(name="picked", value=[])))


def by_curve(channel: Callable[..., Any], looks: Styles, part: str) -> Any:
    """A channel that shows a part of the curves' styles: of all, so that the panels of a chart share one legend."""
    values = [list(value) if isinstance(value := getattr(one, part), tuple) else value for one in looks.values()]
    return channel("curve:N", title=None, scale=alt.Scale(domain=list(looks), range=values))


def finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
