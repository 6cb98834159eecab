"""The charts of a report, as Vega-Lite by Vega-Altair: each has panels, alike in a page, a PNG and an SVG.

A chart's parameter `picked`, names of curves, fades all others. Dragging moves a panel, shift and the wheel zoom.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any
from zlib import crc32

import altair as alt
import numpy as np
import pandas as pd

from lic_dist import drawing
from lic_dist.drawing import GRID, INK
from lic_dist.evaluation.metrics import METRICS
from lic_dist.evaluation.results import LARGEST_COUNTED as LARGEST
from lic_dist.evaluation.results import Point
from lic_dist.intervals import Interval
from lic_dist.reporting.bd import known, rate_change, rising
from lic_dist.reporting.comparison import AnchorTable, Comparison, detailed_lambda, point_at
from lic_dist.reporting.curves import Curve, place_of
from lic_dist.reporting.findings import Findings
from lic_dist.reporting.gains import Gains, lambda_changes
from lic_dist.reporting.styles import Styles

FEWEST_BITS = 1e-6  # a pixel, of a channel on a logarithmic axis
Rows = list[dict[str, Any]]
_NOTHING = pd.DataFrame({"nothing": [0]})  # of marks at a fixed place
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


def charts(found: Findings, looks: Styles) -> list[Chart]:
    """All that these results can show."""
    curves, anchors = found.curves, found.anchors
    learned = {curve.name for curve in curves if curve.learned}
    drawn = (
        _rd(curves, anchors[0], looks),
        _tradeoff(curves, looks),
        _saving(curves, found.tables, looks),
        _images(found.tables, learned, looks),
        _gains(curves, anchors, found.gains, looks),
        _latents(curves, anchors[0], looks),
    )
    return [chart for chart in drawn if chart.panels]


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


# what panels are made of


def _marks(rows: Rows, looks: Styles, tooltip: Sequence[alt.Tooltip]) -> alt.Chart:
    """Rows of one `curve` each in its colour, faded where others are picked."""
    return alt.Chart(pd.DataFrame(rows)).encode(
        color=_by_curve(alt.Color, looks, "colour"),
        opacity=alt.condition(_PICKED, alt.value(1.0), alt.value(0.13)),
        tooltip=[alt.Tooltip("curve:N"), *tooltip],
    )


def _plot(
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
    base = _marks(rows, looks, tooltip).encode(x=x, y=y)
    line = base.mark_line(clip=clip, strokeWidth=width).encode(strokeDash=_by_curve(alt.StrokeDash, looks, "dash"))
    point = base.mark_point(clip=clip, filled=True, size=45 if points else 0, opacity=1)  # none: for the legend alone
    return [line, point.encode(shape=_by_curve(alt.Shape, looks, "shape"))]


def _intervals(
    rows: Rows, looks: Styles, x: Mapping[str, Any], tooltip: Sequence[alt.Tooltip], clip: bool = False
) -> list[alt.Chart]:
    """Means over the lines of their intervals: rows with curve, mean, low and high at places `x`."""
    shown = [alt.Tooltip(f"{name}:Q", format="+.2f") for name in ("mean", "low", "high")]
    base = _marks(rows, looks, [*tooltip, *shown]).encode(**x)
    bar = base.mark_rule(clip=clip, strokeWidth=1.6).encode(y=alt.Y("low:Q", title=None), y2="high:Q")
    point = base.mark_point(clip=clip, filled=True, size=55, opacity=1).encode(y=alt.Y("mean:Q", title=None))
    return [bar, point.encode(shape=_by_curve(alt.Shape, looks, "shape"))]


def _interval_row(curve: str, found: Interval, **more: Any) -> dict[str, Any]:
    return {"curve": curve, "mean": found.mean, "low": found.low, "high": found.high, **more}


def _zero() -> alt.Chart:
    return alt.Chart(_NOTHING).mark_rule(color=INK, strokeWidth=1).encode(y=alt.datum(0))


def _panel(title: str, *layers: alt.Chart, zooms: bool = True) -> Panel:
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


def _by_curve(channel: Callable[..., Any], looks: Styles, part: str) -> Any:
    """A channel that shows a part of the curves' styles: of all, so that the panels of a chart share one legend."""
    values = [list(value) if isinstance(value := getattr(one, part), tuple) else value for one in looks.values()]
    return channel("curve:N", title=None, scale=alt.Scale(domain=list(looks), range=values))


def _number(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


# rate and distortion


def _rd(curves: Sequence[Curve], anchor: Curve, looks: Styles) -> Chart:
    having = {name: [curve for curve in curves if known(curve, name)] for name in METRICS}
    panels = [_rd_panel(METRICS[name].axis, found, anchor, looks, name) for name, found in having.items() if found]
    says = "Means over the images: quality over rate. Up and to the left is better."
    return Chart("rd", "Rate and distortion", says, tuple(panels))


def _rd_panel(title: str, curves: Sequence[Curve], anchor: Curve, looks: Styles, quality: str) -> Panel:
    limit = _rate_limit(curves, anchor)
    rows: Rows = []
    shown: list[float] = []
    for curve in curves:
        bpp, values = [one.bpp for one in curve.figures], [rising(one, quality) for one in curve.figures]
        places = [place_of(point) for point in curve.points] or [""] * len(bpp)
        figures = zip(bpp, values, places, strict=True)
        rows += [{"curve": curve.name, "bpp": a, "quality": _number(b), "lambda": c} for a, b, c in figures]
        within = [b for a, b in zip(bpp, values, strict=True) if a <= limit]
        shown += [one for one in (*within, float(np.interp(limit, bpp, values))) if math.isfinite(one)]
    rates = [one.bpp for curve in curves for one in curve.figures]
    single = all(len(curve.figures) == 1 for curve in curves)  # points, not curves: their distances are what counts
    margin = 0.04 * (max(shown) - min(shown)) or 1.0 if shown else 1.0
    low, high = (min(shown) - margin, max(shown) + margin) if shown else (0.0, 1.0)
    x = alt.X("bpp:Q", title="rate [bit per pixel]", axis=alt.Axis(tickCount=6)).scale(
        domain=[1.1 * min(rates) - 0.1 * limit if single else 0, limit], nice=False
    )
    y = alt.Y("quality:Q", title=None).scale(domain=[low, high], nice=False)
    tooltip = [
        alt.Tooltip("lambda:N"),
        alt.Tooltip("bpp:Q", format=".4f"),
        alt.Tooltip("quality:Q", title=title.split(" ")[0], format=".3f"),
    ]
    return _panel(title, *_plot(rows, looks, x, y, tooltip, clip=max(rates) > limit))


def _rate_limit(curves: Sequence[Curve], anchor: Curve) -> float:
    """Rates shown: a quarter more than the anchor reaches, so that a curve of far higher rates hides nothing."""
    most = max(curve.figures[-1].bpp for curve in curves)
    reach = anchor.figures[-1].bpp if any(curve is anchor for curve in curves) else most
    return min(1.25 * reach, 1.05 * most) or 1.0


# distortion and perception


def _tradeoff(curves: Sequence[Curve], looks: Styles) -> Chart:
    """Every other metric over PSNR, of points that have equal bits for each image: decoders of the same indices."""
    alike: dict[Any, list[tuple[str, Point]]] = {}
    for curve in curves:
        for point in curve.points if curve.learned else ():
            alike.setdefault(frozenset((row.image, row.bpp) for row in point.images), []).append((curve.name, point))
    found = [one for group in alike.values() if len({point.model for _, point in group}) > 2 for one in group]
    panels = []
    for name, metric in METRICS.items():
        rows: Rows = [
            {"curve": curve, "lambda": place_of(point), "psnr": point.figures.psnr, "quality": _number(value)}
            for curve, point in found
            if math.isfinite(value := rising(point.figures, name))
        ]
        if rows and name != "psnr":
            x = alt.X("psnr:Q", title="PSNR [dB]").scale(zero=False)
            y = alt.Y("quality:Q", title=None).scale(zero=False)
            shown = [alt.Tooltip("lambda:N"), *(alt.Tooltip(f"{one}:Q", format=".3f") for one in ("psnr", "quality"))]
            panels.append(_panel(metric.axis, *_plot(rows, looks, x, y, shown)))
    says = "Decoders of the same bits: another quality over PSNR. Right is more faithful, up is better by that metric."
    return Chart("tradeoff", "Distortion and perception at equal bits", says, tuple(panels))


# rate saved


def _saving(curves: Sequence[Curve], tables: Sequence[AnchorTable], looks: Styles) -> Chart:
    named = {curve.name: curve for curve in curves}
    learned = {name for name, curve in named.items() if curve.learned}
    panels = []
    for table in tables:
        rated = [one.name for one in table.comparisons if one.pchip is not None]
        if rated:
            lines = {name: rate_change(table.anchor, named[name]) for name in rated}
            panels.append(_saving_panel(f"against {table.anchor.name} [%]", lines, learned, looks))
    says = (
        "The change of rate at equal PSNR, in percent, over PSNR (averaged curves, PCHIP): below zero is less rate. "
        "The BD-rate is its mean. Published curves and classic codecs do not widen the axes."
    )
    return Chart("saving", "Rate saved at equal PSNR", says, tuple(panels))


def _saving_panel(
    title: str, lines: Mapping[str, tuple[np.ndarray, np.ndarray]], learned: set[str], looks: Styles
) -> Panel:
    """Axes as the learned curves need them, so that fractions of a percent show beside a far published curve."""
    rows = [
        {"curve": name, "psnr": float(a), "change": float(b)}
        for name, (psnr, change) in lines.items()
        for a, b in zip(psnr, change, strict=True)
    ]
    own = [line for name, line in lines.items() if name in learned] or list(lines.values())
    low, high = min(0.0, *(one.min() for _, one in own)), max(0.0, *(one.max() for _, one in own))
    margin = 0.05 * (high - low) or 1.0
    reach = [min(psnr[0] for psnr, _ in own), max(psnr[-1] for psnr, _ in own)]
    x = alt.X("psnr:Q", title="PSNR [dB]", axis=alt.Axis(tickCount=6)).scale(
        domain=[float(one) for one in reach], nice=False
    )
    y = alt.Y("change:Q", title=None).scale(domain=[float(low - margin), float(high + margin)], nice=False)
    tooltip = [alt.Tooltip("psnr:Q", title="PSNR", format=".2f"), alt.Tooltip("change:Q", format="+.2f")]
    return _panel(title, *_plot(rows, looks, x, y, tooltip, points=False, clip=len(own) < len(lines)), _zero())


def _images(tables: Sequence[AnchorTable], learned: set[str], looks: Styles) -> Chart:
    panels = []
    for table in tables:
        known = [one for one in table.comparisons if len(one.rates) > 1]
        if known:
            panels.append(_images_panel(f"against {table.anchor.name} [%]", known, learned, looks))
    says = (
        "The BD-rate of each image, sorted; at the right the mean over images with its 95 % bootstrap interval. "
        "Classic codecs do not widen the axes."
    )
    return Chart("images", "BD-rate image by image", says, tuple(panels))


def _images_panel(title: str, comparisons: Sequence[Comparison], learned: set[str], looks: Styles) -> Panel:
    count = max(len(one.rates) for one in comparisons)
    rows: Rows = []
    means: Rows = []
    for number, one in enumerate(comparisons):
        ordered = sorted(one.rates.items(), key=itemgetter(1))
        rows += [
            {"curve": one.name, "place": float(place), "image": image, "rate": rate}
            for place, (image, rate) in zip(np.linspace(1, count, len(ordered)), ordered, strict=True)
        ]
        assert one.images is not None
        means.append(_interval_row(one.name, one.images, place=count * 1.06 + 0.04 * count * number + 0.1))
    end = means[-1]["place"] + 0.03 * count
    x = alt.X("place:Q", title="image, by its BD-rate", axis=alt.Axis(tickMinStep=1, values=_ticks(count)))
    x = x.scale(domain=[1 - 0.02 * count, end], nice=False)
    border = alt.Chart(_NOTHING).mark_rule(color=GRID).encode(x=alt.datum(count * 1.03 + 0.05))
    tooltip = [alt.Tooltip("image:N"), alt.Tooltip("rate:Q", title="BD-rate", format="+.2f")]
    y = alt.Y("rate:Q", title=None)
    own = [row["rate"] for row in rows if row["curve"] in learned]
    clip = 0 < len(own) < len(rows)
    if clip:
        low, high = min(0.0, *own), max(0.0, *own)
        margin = 0.05 * (high - low) or 1.0
        y = y.scale(domain=[low - margin, high + margin], nice=False)
    lines = _plot(rows, looks, x, y, tooltip, width=0.6, clip=clip)
    return _panel(title, *lines, *_intervals(means, looks, {"x": x}, [], clip), border, _zero())


def _ticks(count: int) -> list[int]:
    return list(range(1, count + 1, -(-count // 8)))


# gains at each lambda


def _gains(curves: Sequence[Curve], anchors: Sequence[Curve], tables: Sequence[Gains], looks: Styles) -> Chart:
    found = {
        f"L against {anchor.name} [%]": [(one.name, lambda_changes(anchor, one)) for one in curves if one is not anchor]
        for anchor in anchors
    }
    own = {id(row.point): row.own for table in tables for row in table.rows}
    found["L against the same quantizer on the base [%]"] = [
        (curve.name, {point.lmbda: change for point in curve.points if point.lmbda and (change := own.get(id(point)))})
        for curve in curves
    ]
    panels = []
    for title, changes in found.items():
        rows = [
            _interval_row(name, change, lmbda=f"{lmbda:g}")
            for name, by_lambda in changes
            for lmbda, change in by_lambda.items()
        ]
        if rows:
            order = sorted({row["lmbda"] for row in rows}, key=float)
            x = {"x": alt.X("lmbda:N", title="lambda", sort=order, axis=alt.Axis(labelAngle=0)), "xOffset": "curve:N"}
            panels.append(_panel(title, *_intervals(rows, looks, x, [alt.Tooltip("lmbda:N")]), _zero(), zooms=False))
    says = (
        "The change of L = lambda 255² MSE + bpp at each lambda, with its 95 % bootstrap interval over images: below "
        "zero is better."
    )
    return Chart("gains", "Gain at each lambda", says, tuple(panels))


# inside the latents


def _latents(curves: Sequence[Curve], anchor: Curve, looks: Styles) -> Chart:
    panels = (*_channels(curves, anchor, looks), *_indices(curves, looks))
    says = (
        "Estimated bits of each channel of y, the anchor's largest first, and where the rate is saved; how often each "
        "index k is sent (the outermost two count all beyond)."
    )
    return Chart("latents", "Inside the latents", says, panels)


def _channels(curves: Sequence[Curve], anchor: Curve, looks: Styles) -> list[Panel]:
    points = _points_with(curves, "channel_bits")
    points = {name: one for name, one in points.items() if all(0 <= bits < 1e4 for bits in one.channel_bits)}
    if not points:
        return []
    first = points.get(anchor.name) or next(iter(points.values()))
    points = {name: one for name, one in points.items() if len(one.channel_bits) == len(first.channel_bits)}
    order = np.argsort(first.channel_bits)[::-1]
    bits = {name: np.asarray(one.channel_bits)[order] for name, one in points.items()}
    log = alt.Y("value:Q", title=None).scale(type="log", nice=False)
    shown = {name: np.maximum(one, FEWEST_BITS) for name, one in bits.items()}
    panels = [_by_channel(f"bit per pixel of each channel of y at lambda {first.lmbda:g}", shown, looks, log)]
    if anchor.name in bits and len(bits) > 1:
        sums = {name: np.cumsum(one - bits[anchor.name]) for name, one in bits.items() if name != anchor.name}
        title = f"change against {anchor.name}, summed up to that channel [bit per pixel]"
        panels.append(_by_channel(title, sums, looks, alt.Y("value:Q", title=None), _zero()))
    return panels


def _by_channel(title: str, values: Mapping[str, np.ndarray], looks: Styles, y: alt.Y, *more: alt.Chart) -> Panel:
    rows = [
        {"curve": name, "channel": number, "value": float(value)}
        for name, found in values.items()
        for number, value in enumerate(found, 1)
    ]
    x = alt.X("channel:Q", title="channel, by the anchor's bits").scale(
        domain=[1, max(map(len, values.values()))], nice=False
    )
    tooltip = [alt.Tooltip("channel:Q"), alt.Tooltip("value:Q", format=".4g")]
    return _panel(title, *_plot(rows, looks, x, y, tooltip, points=False), *more)


def _indices(curves: Sequence[Curve], looks: Styles) -> list[Panel]:
    points = {name: one for name, one in _points_with(curves, "k_counts").items() if _is_histogram(one.k_counts)}
    if not points:
        return []
    rows = [
        {"curve": name, "k": k, "share": count / sum(one.k_counts) if count else None}
        for name, one in points.items()
        for k, count in enumerate(one.k_counts, -LARGEST)
    ]
    ends = f"datum.value == {-LARGEST} ? '≤ {-LARGEST}' : datum.value == {LARGEST} ? '≥ {LARGEST}' : datum.value"
    x = alt.X("k:Q", axis=alt.Axis(values=[*range(-LARGEST, LARGEST + 1, 2)], labelExpr=ends))
    tooltip = [alt.Tooltip("k:Q"), alt.Tooltip("share:Q", format=".3g")]
    lines = _plot(rows, looks, x, alt.Y("share:Q", title=None).scale(type="log"), tooltip, width=1.1)
    title = f"share of the elements of y with this k, at lambda {next(iter(points.values())).lmbda:g}"
    return [_panel(title, *lines)]


def _points_with(curves: Sequence[Curve], field: str) -> dict[str, Point]:
    lmbda = detailed_lambda(curves, field)
    found = {curve.name: point_at(curve, lmbda) for curve in curves} if lmbda is not None else {}
    return {name: point for name, point in found.items() if point and getattr(point, field)}


def _is_histogram(counts: Sequence[int]) -> bool:
    return len(counts) == 2 * LARGEST + 1 and min(counts) >= 0 and 0 < sum(counts) < 2**62
