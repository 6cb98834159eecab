"""The charts of a report, as Vega-Lite by Vega-Altair: each has panels, alike in a page, a PNG and an SVG."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from operator import itemgetter
from statistics import fmean

import altair as alt
import numpy as np

from lic_dist.drawing import GRID
from lic_dist.evaluation.metrics import METRICS
from lic_dist.evaluation.results import LARGEST_COUNTED as LARGEST
from lic_dist.evaluation.results import Point
from lic_dist.intervals import Interval
from lic_dist.reporting.bd import known, rate_change, rising
from lic_dist.reporting.comparison import AnchorTable, Comparison, detailed_lambda, point_at
from lic_dist.reporting.costs import decode_kmac
from lic_dist.reporting.curves import Curve, place_of
from lic_dist.reporting.findings import Findings
from lic_dist.reporting.gains import Gains, lambda_changes
from lic_dist.reporting.panels import (
    NOTHING,
    Chart,
    Panel,
    Rows,
    finite,
    interval_row,
    intervals,
    marks,
    panel,
    plot,
    zero,
)
from lic_dist.reporting.seeds import paired
from lic_dist.reporting.styles import Styles

FEWEST_BITS = 1e-6  # a pixel, of a channel on a logarithmic axis
Band = tuple[np.ndarray, np.ndarray, np.ndarray]  # PSNR, the least and the most there


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
        _complexity(curves, found.tables, looks),
        _latents(curves, anchors[0], looks),
    )
    return [chart for chart in drawn if chart.panels]


# rate and distortion


def _rd(curves: Sequence[Curve], anchor: Curve, looks: Styles) -> Chart:
    having = {name: [curve for curve in curves if known(curve, name)] for name in METRICS}
    panels = [_rd_panel(METRICS[name].axis, found, anchor, looks, name) for name, found in having.items() if found]
    says = "Means over the images: quality over rate. Up and to the left is better." + _seeds_say(
        curves, "A bar reaches from the least to the most of the seeds."
    )
    return Chart("rd", "Rate and distortion", says, tuple(panels))


def _rd_panel(title: str, curves: Sequence[Curve], anchor: Curve, looks: Styles, quality: str) -> Panel:
    limit = _rate_limit(curves, anchor)
    rows: Rows = []
    spread: Rows = []
    shown: list[float] = []
    for curve in curves:
        bpp, values = [one.bpp for one in curve.figures], [rising(one, quality) for one in curve.figures]
        places = [place_of(point) for point in curve.points] or [""] * len(bpp)
        figures = zip(bpp, values, places, strict=True)
        rows += [{"curve": curve.name, "bpp": a, "quality": finite(b), "lambda": c} for a, b, c in figures]
        spread += _spread_rows(curve, quality)
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
    clip = max(rates) > limit
    bars = marks(spread, looks, []).mark_rule(clip=clip).encode(x=x, y="low:Q", y2="high:Q") if spread else None
    return panel(title, *plot(rows, looks, x, y, tooltip, clip=clip), *([bars] if bars else []))


def _spread_rows(curve: Curve, quality: str) -> Rows:
    """The least and the most quality of a curve's seeds at each lambda, at the mean rate."""
    of_seeds = [sorted(part.points, key=lambda point: point.lmbda or 0) for part in curve.seeds]
    found = []
    for points in zip(*of_seeds, strict=True):
        values = [rising(point.figures, quality) for point in points]
        bpp = fmean(point.figures.bpp for point in points)
        found.append({"curve": curve.name, "bpp": bpp, "low": finite(min(values)), "high": finite(max(values))})
    return found


def _rate_limit(curves: Sequence[Curve], anchor: Curve) -> float:
    """Rates shown: a quarter more than the anchor reaches, so that a curve of far higher rates hides nothing."""
    most = max(curve.figures[-1].bpp for curve in curves)
    reach = anchor.figures[-1].bpp if any(curve is anchor for curve in curves) else most
    return min(1.25 * reach, 1.05 * most) or 1.0


# distortion and perception


def _tradeoff(curves: Sequence[Curve], looks: Styles) -> Chart:
    """Every other metric over PSNR, of points that have equal bits for each image: decoders of the same indices."""
    alike: dict[frozenset[tuple[str, float]], list[tuple[str, Point]]] = {}
    for curve in curves:
        for point in curve.points if curve.learned else ():
            alike.setdefault(frozenset((row.image, row.bpp) for row in point.images), []).append((curve.name, point))
    found = [one for group in alike.values() if len({point.model for _, point in group}) > 2 for one in group]
    panels = []
    for name, metric in METRICS.items():
        rows: Rows = [
            {"curve": curve, "lambda": place_of(point), "psnr": point.figures.psnr, "quality": finite(value)}
            for curve, point in found
            if math.isfinite(value := rising(point.figures, name))
        ]
        if rows and name != "psnr":
            x = alt.X("psnr:Q", title="PSNR [dB]").scale(zero=False)
            y = alt.Y("quality:Q", title=None).scale(zero=False)
            shown = [alt.Tooltip("lambda:N"), *(alt.Tooltip(f"{one}:Q", format=".3f") for one in ("psnr", "quality"))]
            panels.append(panel(metric.axis, *plot(rows, looks, x, y, shown)))
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
            bands = {name: band for name in rated if (band := _band(table.anchor, named[name], lines[name][0]))}
            panels.append(_saving_panel(f"against {table.anchor.name} [%]", lines, bands, learned, looks))
    says = (
        "The change of rate at equal PSNR, in percent, over PSNR (averaged curves, PCHIP): below zero is less rate. "
        "The BD-rate is its mean. Published curves and classic codecs do not widen the axes."
    ) + _seeds_say(curves, "A band reaches from the least to the most of the seeds.")
    return Chart("saving", "Rate saved at equal PSNR", says, tuple(panels))


def _band(anchor: Curve, curve: Curve, psnr: np.ndarray) -> Band | None:
    """The least and the most change of rate of the curve's seeds at these PSNRs; None of a single one."""
    pairs = paired(anchor.parts, curve.parts)
    if len(pairs) < 2:
        return None
    of_seeds = [np.interp(psnr, *rate_change(*pair), left=math.nan, right=math.nan) for pair in pairs]
    return psnr, np.min(of_seeds, axis=0), np.max(of_seeds, axis=0)


def _seeds_say(curves: Sequence[Curve], sentence: str) -> str:
    return f" {sentence}" if any(curve.seeds for curve in curves) else ""


def _saving_panel(
    title: str,
    lines: Mapping[str, tuple[np.ndarray, np.ndarray]],
    bands: Mapping[str, Band],
    learned: set[str],
    looks: Styles,
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
    clip = len(own) < len(lines)
    areas = [
        {"curve": name, "psnr": float(a), "low": finite(b), "high": finite(c)}
        for name, band in bands.items()
        for a, b, c in zip(*band, strict=True)
    ]
    layers = plot(rows, looks, x, y, tooltip, points=False, clip=clip)
    if areas:
        layers.append(marks(areas, looks, []).mark_area(clip=clip, fillOpacity=0.2).encode(x=x, y="low:Q", y2="high:Q"))
    return panel(title, *layers, zero())


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
        means.append(interval_row(one.name, one.images, place=count * 1.06 + 0.04 * count * number + 0.1))
    end = means[-1]["place"] + 0.03 * count
    x = alt.X("place:Q", title="image, by its BD-rate", axis=alt.Axis(tickMinStep=1, values=_ticks(count)))
    x = x.scale(domain=[1 - 0.02 * count, end], nice=False)
    border = alt.Chart(NOTHING).mark_rule(color=GRID).encode(x=alt.datum(count * 1.03 + 0.05))
    tooltip = [alt.Tooltip("image:N"), alt.Tooltip("rate:Q", title="BD-rate", format="+.2f")]
    y = alt.Y("rate:Q", title=None)
    own = [row["rate"] for row in rows if row["curve"] in learned]
    clip = 0 < len(own) < len(rows)
    if clip:
        low, high = min(0.0, *own), max(0.0, *own)
        margin = 0.05 * (high - low) or 1.0
        y = y.scale(domain=[low - margin, high + margin], nice=False)
    lines = plot(rows, looks, x, y, tooltip, width=0.6, clip=clip)
    return panel(title, *lines, *intervals(means, looks, {"x": x}, [], clip), border, zero())


def _ticks(count: int) -> list[int]:
    return list(range(1, count + 1, -(-count // 8)))


# gains at each lambda


def _gains(curves: Sequence[Curve], anchors: Sequence[Curve], tables: Sequence[Gains], looks: Styles) -> Chart:
    found = {
        f"L against {anchor.name} [%]": [(one.name, lambda_changes(anchor, one)) for one in curves if one is not anchor]
        for anchor in anchors
    }
    own = {id(point): row.own for table in tables for row in table.rows for point in row.points}
    found["L against the same quantizer on the base [%]"] = [
        (
            curve.name,
            {point.lmbda: change for point in curve.parts[0].points if point.lmbda and (change := own.get(id(point)))},
        )
        for curve in curves
    ]
    panels = []
    for title, changes in found.items():
        rows = [
            interval_row(name, change, lmbda=f"{lmbda:g}")
            for name, by_lambda in changes
            for lmbda, change in by_lambda.items()
        ]
        if rows:
            order = sorted({row["lmbda"] for row in rows}, key=float)
            x = {"x": alt.X("lmbda:N", title="lambda", sort=order, axis=alt.Axis(labelAngle=0)), "xOffset": "curve:N"}
            panels.append(panel(title, *intervals(rows, looks, x, [alt.Tooltip("lmbda:N")]), zero(), zooms=False))
    says = (
        "The change of L = lambda 255² MSE + bpp at each lambda, with its 95 % bootstrap interval over images: below "
        "zero is better."
    )
    return Chart("gains", "Gain at each lambda", says, tuple(panels))


# complexity


def _complexity(curves: Sequence[Curve], tables: Sequence[AnchorTable], looks: Styles) -> Chart:
    named = {curve.name: curve for curve in curves}
    panels = []
    for table in tables:
        found = [(one.name, one.images) for one in table.comparisons]
        rows = [
            interval_row(name, own, kmac=kmac)
            for name, own in [(table.anchor.name, Interval(0, 0, 0)), *found]
            if own and (kmac := decode_kmac(named[name]))
        ]
        if len(rows) > 1:
            known = [row["kmac"] for row in rows]
            x = alt.X("kmac:Q", title="kMAC a pixel to decode").scale(
                type="log", domain=[min(known) / 1.5, 1.5 * max(known)], nice=False
            )
            tooltip = [alt.Tooltip("kmac:Q", title="kMAC", format=".1f")]
            low, high = min(0.0, *(row["low"] for row in rows)), max(0.0, *(row["high"] for row in rows))
            margin = 0.08 * (high - low)
            layers = intervals(rows, looks, {"x": x}, tooltip)
            scale = alt.Scale(domain=[low - margin, high + margin], nice=False)
            layers[0] = layers[0].encode(y=alt.Y("low:Q", title=None, scale=scale))
            panels.append(panel(f"BD-rate against {table.anchor.name} [%]", *layers, zero()))
    says = (
        "The BD-rate by PSNR, the mean of images with its interval, over the multiply-accumulates that it takes to "
        "decode a pixel: down and to the left is better. What stands above one place costs the same."
    )
    return Chart("complexity", "Rate saved and complexity", says, tuple(panels))


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
        panels.append(_by_channel(title, sums, looks, alt.Y("value:Q", title=None), zero()))
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
    return panel(title, *plot(rows, looks, x, y, tooltip, points=False), *more)


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
    lines = plot(rows, looks, x, alt.Y("share:Q", title=None).scale(type="log"), tooltip, width=1.1)
    title = f"share of the elements of y with this k, at lambda {next(iter(points.values())).lmbda:g}"
    return [panel(title, *lines)]


def _points_with(curves: Sequence[Curve], field: str) -> dict[str, Point]:
    lmbda = detailed_lambda(curves, field)
    found = {curve.name: point_at(curve, lmbda) for curve in curves} if lmbda is not None else {}
    return {name: point for name, point in found.items() if point and getattr(point, field)}


def _is_histogram(counts: Sequence[int]) -> bool:
    return len(counts) == 2 * LARGEST + 1 and min(counts) >= 0 and 0 < sum(counts) < 2**62
