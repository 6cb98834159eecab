"""How charts look and become files: colours, shapes and dashes; Vega-Lite to PNG and SVG without a browser."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import altair as alt
import vl_convert
from altair.utils import schemapi

# Okabe and Ito's colours: apart for the colour-blind too.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F5539", "#6A4C93")
INK, GRID = "#111111", "#E4E4E4"
SAW = "M-1,-.6L-.6,-1L0,-.4L.6,-1L1,-.6L.4,0L1,.6L.6,1L0,.4L-.6,1L-1,.6L-.4,0Z"
SHAPES = ("circle", "square", "triangle-up", "diamond", "triangle-down", "cross", SAW)
PIXELS = 2.0  # of a PNG, to a unit of a chart
WIDTH, HEIGHT = 420, 300

schemapi.disable_debug_mode()  # what we build is tested; checking each part against the schema takes seconds
Plot = alt.Chart | alt.LayerChart | alt.FacetChart  # what alt.layer may give
AnyChart = Plot | alt.ConcatChart


def beside(*panels: Plot, columns: int = 2) -> alt.ConcatChart:
    """Panels in rows, each with its own title and size, under one legend for those of equal scales."""
    return alt.concat(*panels, columns=columns)


def panel(chart: Plot, title: str) -> Any:
    """A chart of the usual size under a title."""
    return chart.properties(title=alt.TitleParams(title, anchor="start", limit=1.2 * WIDTH), width=WIDTH, height=HEIGHT)


def spec(chart: AnyChart) -> dict[str, Any]:
    """The chart as a Vega-Lite specification in our look."""
    looked = (
        chart.configure_view(stroke=None)
        .configure_axis(gridColor=GRID, domainColor=GRID, tickColor=GRID, labelColor=INK, titleColor=INK)
        .configure_axis(labelFontSize=11, titleFontSize=11, titleFontWeight="normal", labelLimit=300)
        .configure_axisX(labelOverlap="greedy")
        .configure_legend(labelLimit=400, labelFontSize=11, symbolStrokeWidth=2, labelColor=INK, titleColor=INK)
        .configure_title(fontSize=12, color=INK)
        .configure_concat(spacing=30)
    )
    return dict(looked.to_dict(validate=False))


def write(chart: AnyChart, *paths: Path) -> None:
    """Write the chart into files, PNG or SVG by their endings; their folders are made."""
    svg = vl_convert.vegalite_to_svg(json.dumps(spec(chart)))
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".svg":
            path.write_text(svg)
        else:
            path.write_bytes(vl_convert.svg_to_png(svg, scale=PIXELS))
