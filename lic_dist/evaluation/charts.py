"""The plots of a report: panels, drawn alone into a page (SVG) or together with their legend into a PNG."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from html import escape
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, LogLocator, MaxNLocator, NullFormatter

from lic_dist.errors import LicError
from lic_dist.evaluation.bd import Interval, rate_change
from lic_dist.evaluation.comparison import AnchorTable, detailed_lambda, point_at
from lic_dist.evaluation.findings import Findings
from lic_dist.evaluation.gains import Gains, lambda_changes
from lic_dist.evaluation.plots import ANCHOR_COLOUR, COLOURS, GRID_COLOUR, clean, new_figure, plain, save
from lic_dist.evaluation.results import Curve, Figures, Point
from lic_dist.evaluation.styles import Style, Styles

POINT_TOLERANCE = 0.02  # of an SVG's units, between a point as drawn and as computed
FEWEST_BITS = 1e-6  # a pixel, of a channel on a logarithmic axis


@dataclass(frozen=True)
class Panel:
    title: str
    draw: Callable[[Axes], None]


@dataclass(frozen=True)
class Chart:
    """Panels that make one PNG `name`.png; what they show, in a sentence or two."""

    name: str
    title: str
    says: str
    panels: tuple[Panel, ...]


def charts(found: Findings, looks: Styles) -> list[Chart]:
    """All that these results can show."""
    curves, anchors = found.curves, found.anchors
    drawn = (
        _rd(curves, anchors[0], looks),
        _saving(curves, anchors, looks),
        _images(found.tables, looks),
        _gains(curves, anchors, found.gains, looks),
        _latents(curves, anchors[0], looks),
    )
    return [chart for chart in drawn if chart.panels]


def write_png(chart: Chart, looks: Styles, path: Path) -> None:
    """The panels in rows of two, a legend of the curves in them beside."""
    columns = min(2, len(chart.panels))
    rows = -(-len(chart.panels) // columns)
    figure = new_figure(5.6 * columns + 2.2, 4.2 * rows)
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes, panel in zip(grid, chart.panels, strict=False):
        panel.draw(axes)
        axes.set_title(plain(panel.title), fontsize=10, loc="left")
    for axes in grid[len(chart.panels) :]:
        axes.set_visible(False)
    seen = {line.get_gid() for axes in grid for line in axes.get_lines()}
    shown = [(name, look) for name, look in looks.items() if _gid(look) in seen]
    handles = [
        Line2D([], [], color=look.colour, linestyle=look.line, marker=look.marker, markersize=4.5) for _, look in shown
    ]
    labels = [plain(name) for name, _ in shown]
    figure.set_figheight(max(figure.get_figheight(), 0.17 * len(shown)))  # as high as the legend
    figure.legend(handles, labels, loc="outside right upper", fontsize=8, frameon=False, handlelength=2.6)
    save(figure, path)


def svg(panel: Panel, looks: Styles, salt: str) -> str:
    """The panel as an SVG element for a page: text as text, colours as the page's variables, curves as classes.

    A curve has its name as its `title`, a point its figures besides. `salt` keeps the ids of one page's SVGs apart.
    """
    written = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": salt}):
        figure = new_figure(4.7, 3.3)
        axes = figure.subplots()
        panel.draw(axes)
        figure.savefig(written, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    names = {_gid(look): name for name, look in looks.items()}
    text = written.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = _titled_points(text, axes, names)
    text = re.sub(r'<g id="(series-\d+)">', lambda found: f"{found[0]}<title>{escape(names[found[1]])}</title>", text)
    text = re.sub(r' id="(series-\d+)"', r' class="\1"', text)
    text = re.sub(r' id="[\w.]+_\d+"', "", text)
    text = re.sub(r"<svg [^>]*viewBox=\"([^\"]*)\"[^>]*>", r'<svg viewBox="\1" aria-hidden="true">', text, count=1)
    text = text.replace("xlink:href", "href")
    text = re.sub(r"'?DejaVu Sans'?(, [^;\"]*)?", "inherit", text).replace("font-family: inherit", "")
    for number, colour in enumerate(COLOURS):
        text = text.replace(colour.lower(), f"var(--c{number})")
    for colour in (ANCHOR_COLOUR, "#000000"):
        text = text.replace(colour, "currentColor")
    return text.replace(GRID_COLOUR.lower(), "var(--grid)")


def _titled_points(text: str, axes: Axes, names: Mapping[str, str]) -> str:
    """The text of an SVG, drawn, with the figures of its points in them; points that coincide are named together."""
    figure = axes.get_figure(root=True)
    assert figure is not None
    dots = 72 / figure.dpi  # an SVG has 72 to the inch
    lines = [(line.get_gid() or "", np.asarray(line.get_xydata(), np.float64)) for line in axes.get_lines()]
    known = [(gid, data) for gid, data in lines if gid in names]
    intervals = {(gid, data[0, 0]): data[:, 1] for gid, data in known if len(data) == 2 and data[0, 0] == data[1, 0]}
    places, said = [], []
    for gid, data in known:
        for (across, up), (x, y) in zip(axes.transData.transform(data) * dots, data, strict=True):
            places.append((across, figure.bbox.height * dots - up))
            interval = "" if (gid, x) not in intervals else " [{:.3g}, {:.3g}]".format(*intervals[gid, x])
            said.append(f"{names[gid]}: {_said(axes.xaxis, x)}, {y:.5g}{interval}")
    spots = np.asarray(places).reshape(-1, 2)

    def titled(found: re.Match[str]) -> str:
        at = np.array([float(found[1]), float(found[2])])
        here = np.flatnonzero(np.abs(spots - at).max(axis=1, initial=0.0) < POINT_TOLERANCE)
        if not len(here):
            return found[0]
        title = "\n".join(dict.fromkeys(said[number] for number in here))
        return f"{found[0].removesuffix('/>')}><title>{escape(title)}</title></use>"

    return re.sub(r'<use [^>]*x="([-\d.]+)" y="([-\d.]+)"[^>]*/>', titled, text)


def _said(axis: Axis, value: float) -> str:
    """A place on an axis: by the label that it has there, else as a number."""
    if isinstance(axis.get_major_locator(), FixedLocator):
        labels = [label.get_text() for label in axis.get_ticklabels()]
        number = int(np.argmin(np.abs(np.asarray(axis.get_ticklocs()) - value)))
        return f"{axis.get_label_text()} {labels[number]}".strip()
    return f"{axis.get_label_text()} {value:.5g}".strip()


def _gid(look: Style) -> str:
    return f"series-{look.series}"


def _line(axes: Axes, look: Style, x: Sequence[float], y: Sequence[float], **more: object) -> None:
    wide = 2.0 if look.series == 0 else 1.5
    form = {"color": look.colour, "linestyle": look.line, "linewidth": wide, "marker": look.marker, "markersize": 4.5}
    (line,) = axes.plot(x, y, **{**form, **more})  # type: ignore[arg-type]
    line.set_gid(_gid(look))


def _interval(axes: Axes, look: Style, x: float, found: Interval) -> None:
    """A mean as its marker, over the line of its interval."""
    (bar,) = axes.plot([x, x], [found.low, found.high], color=look.colour, linewidth=1.5)
    bar.set_gid(_gid(look))
    _line(axes, look, [x], [found.mean], linestyle="", markersize=5.5)


def _zero(axes: Axes) -> None:
    axes.axhline(0, color=ANCHOR_COLOUR, linewidth=1.2, zorder=1)


def _logarithmic(axes: Axes) -> None:
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())


# rate and distortion


def _rd(curves: Sequence[Curve], anchor: Curve, looks: Styles) -> Chart:
    panels = [Panel("PSNR [dB]", partial(_draw_rd, curves, anchor, looks, lambda one: one.psnr))]
    similar = [curve for curve in curves if all(one.ms_ssim is not None for one in curve.figures)]
    if similar:
        title = "MS-SSIM [dB] = -10 log10(1 - MS-SSIM)"
        panels.append(Panel(title, partial(_draw_rd, similar, anchor, looks, _ms_ssim_decibels)))
    says = "Means over the images: quality over rate. Up and to the left is better."
    return Chart("rd", "Rate and distortion", says, tuple(panels))


def _ms_ssim_decibels(one: Figures) -> float:
    return -10 * np.log10(1 - one.ms_ssim) if one.ms_ssim is not None and one.ms_ssim < 1 else np.nan


def _draw_rd(
    curves: Sequence[Curve], anchor: Curve, looks: Styles, value: Callable[[Figures], float], axes: Axes
) -> None:
    limit = _rate_limit(curves, anchor)
    shown: list[float] = []
    for curve in curves:
        bpp = [one.bpp for one in curve.figures]
        quality = [one if np.isfinite(one) else np.nan for one in map(value, curve.figures)]
        _line(axes, looks[curve.name], bpp, quality, zorder=3 if curve is anchor else 2)
        within = [one for rate, one in zip(bpp, quality, strict=True) if rate <= limit]
        shown += [one for one in (*within, float(np.interp(limit, bpp, quality))) if np.isfinite(one)]
    axes.set_xlabel("rate [bit per pixel]", fontsize=9)
    rates = [one.bpp for curve in curves for one in curve.figures]
    single = all(len(curve.figures) == 1 for curve in curves)  # points, not curves: their distances are what counts
    axes.set_xlim(1.1 * min(rates) - 0.1 * limit if single else 0, limit)
    if shown:
        margin = 0.04 * (max(shown) - min(shown)) or 1.0
        axes.set_ylim(min(shown) - margin, max(shown) + margin)
    clean(axes)


def _rate_limit(curves: Sequence[Curve], anchor: Curve) -> float:
    """Rates shown: a quarter more than the anchor reaches, so that a curve of far higher rates hides nothing."""
    most = max(curve.figures[-1].bpp for curve in curves)
    reach = anchor.figures[-1].bpp if any(curve is anchor for curve in curves) else most
    return min(1.25 * reach, 1.05 * most) or 1.0


# rate saved


def _saving(curves: Sequence[Curve], anchors: Sequence[Curve], looks: Styles) -> Chart:
    panels = []
    for anchor in anchors:
        lines = list(_changes(curves, anchor))
        if lines:
            measured = {curve.name for curve in curves if curve.points}
            panels.append(Panel(f"against {anchor.name} [%]", partial(_draw_saving, lines, measured, looks)))
    says = (
        "The change of rate at equal PSNR, in percent, over PSNR (averaged curves, PCHIP): below zero is less rate. "
        "The BD-rate is its mean. Published curves do not widen the axes."
    )
    return Chart("saving", "Rate saved at equal PSNR", says, tuple(panels))


def _changes(curves: Sequence[Curve], anchor: Curve) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    for curve in curves:
        if curve is not anchor:
            try:
                yield curve.name, *rate_change(anchor, curve)
            except LicError:  # the table says why
                continue


def _draw_saving(
    lines: Sequence[tuple[str, np.ndarray, np.ndarray]], measured: Container[str], looks: Styles, axes: Axes
) -> None:
    """Axes as the measured curves need them, so that fractions of a percent show beside a far published curve."""
    _zero(axes)
    for name, psnr, change in lines:
        _line(axes, looks[name], list(psnr), list(change), markevery=(5, 30), linewidth=1.6)
    own = [one for one in lines if one[0] in measured] or lines
    low, high = min(0.0, *(one[2].min() for one in own)), max(0.0, *(one[2].max() for one in own))
    left, right = min(one[1][0] for one in own), max(one[1][-1] for one in own)
    margin = 0.05 * (high - low) or 1.0
    axes.set(ylim=(low - margin, high + margin), xlim=(left, right))
    axes.set_xlabel("PSNR [dB]", fontsize=9)
    clean(axes)


def _images(tables: Sequence[AnchorTable], looks: Styles) -> Chart:
    panels = []
    for table in tables:
        rates = {one.name: (one.images, sorted(rate for _, rate in one.rates)) for one in table.comparisons}
        known = {name: (mean, found) for name, (mean, found) in rates.items() if mean and len(found) > 1}
        if known:
            panels.append(Panel(f"against {table.anchor.name} [%]", partial(_draw_images, known, looks)))
    says = "The BD-rate of each image, sorted; at the right the mean over images with its 95 % bootstrap interval."
    return Chart("images", "BD-rate image by image", says, tuple(panels))


def _draw_images(rates: Mapping[str, tuple[Interval, list[float]]], looks: Styles, axes: Axes) -> None:
    _zero(axes)
    count = max(len(found) for _, found in rates.values())
    for number, (name, (mean, found)) in enumerate(rates.items()):
        places = np.linspace(1, count, len(found))
        _line(axes, looks[name], list(places), found, linewidth=0.6, markersize=3.5)
        _interval(axes, looks[name], count * 1.06 + 0.04 * count * number + 0.1, mean)
    axes.set_xticks([place for place in MaxNLocator(integer=True).tick_values(1, count) if 1 <= place <= count])
    axes.axvline(count * 1.03 + 0.05, color=GRID_COLOUR, linewidth=1)
    axes.set_xlabel("image, by its BD-rate", fontsize=9)
    clean(axes)


# gains at each lambda

_Change = tuple[str, dict[float, Interval]]


def _gains(curves: Sequence[Curve], anchors: Sequence[Curve], tables: Sequence[Gains], looks: Styles) -> Chart:
    panels = []
    for anchor in anchors:
        found = [(curve.name, lambda_changes(anchor, curve)) for curve in curves if curve is not anchor]
        panels += _gain_panel(f"L against {anchor.name} [%]", found, looks)
    changes = {id(row.point): row.own for table in tables for row in table.rows}
    own = [
        (curve.name, {point.lmbda: change for point in curve.points if (change := changes.get(id(point)))})
        for curve in curves
    ]
    panels += _gain_panel("L against the same quantizer on the base [%]", own, looks)
    says = (
        "The change of L = lambda 255² MSE + bpp at each lambda, with its 95 % bootstrap interval over images: below "
        "zero is better."
    )
    return Chart("gains", "Gain at each lambda", says, tuple(panels))


def _gain_panel(title: str, found: Sequence[_Change], looks: Styles) -> list[Panel]:
    known = [(name, changes) for name, changes in found if changes]
    return [Panel(title, partial(_draw_gains, known, looks))] if known else []


def _draw_gains(found: Sequence[_Change], looks: Styles, axes: Axes) -> None:
    _zero(axes)
    lambdas = sorted({lmbda for _, changes in found for lmbda in changes})
    for number, (name, changes) in enumerate(found):
        shift = 0.6 * ((number + 0.5) / len(found) - 0.5)
        for lmbda, change in changes.items():
            _interval(axes, looks[name], lambdas.index(lmbda) + shift, change)
    axes.set_xlabel("lambda", fontsize=9)
    clean(axes)
    axes.set_xticks(range(len(lambdas)), [f"{lmbda:g}" for lmbda in lambdas])
    axes.grid(False, axis="x")
    axes.set_xlim(-0.5, len(lambdas) - 0.5)


# inside the latents


def _latents(curves: Sequence[Curve], anchor: Curve, looks: Styles) -> Chart:
    panels = (*_channels(curves, anchor, looks), *_indices(curves, looks))
    says = (
        "Estimated bits of each channel of y, the anchor's largest first, and where the rate is saved; how often each "
        "index k is sent (the outermost two count all beyond)."
    )
    return Chart("latents", "Inside the latents", says, panels)


def _channels(curves: Sequence[Curve], anchor: Curve, looks: Styles) -> Iterator[Panel]:
    points = _points_with(curves, "channel_bits")
    points = {name: one for name, one in points.items() if all(0 <= bits < 1e4 for bits in one.channel_bits)}
    if not points:
        return
    first = points.get(anchor.name) or next(iter(points.values()))
    points = {name: one for name, one in points.items() if len(one.channel_bits) == len(first.channel_bits)}
    order = np.argsort(first.channel_bits)[::-1]
    bits = {name: np.asarray(one.channel_bits)[order] for name, one in points.items()}
    title = f"bit per pixel of each channel of y at lambda {first.lmbda:g}"
    yield Panel(title, partial(_draw_channels, bits, looks))
    if anchor.name in bits and len(bits) > 1:
        sums = {name: np.cumsum(one - bits[anchor.name]) for name, one in bits.items() if name != anchor.name}
        title = f"change against {anchor.name}, summed up to that channel [bit per pixel]"
        yield Panel(title, partial(_draw_summed, sums, looks))


def _points_with(curves: Sequence[Curve], field: str) -> dict[str, Point]:
    lmbda = detailed_lambda(curves, field)
    found = {curve.name: point_at(curve, lmbda) for curve in curves} if lmbda is not None else {}
    return {name: point for name, point in found.items() if point and getattr(point, field)}


def _draw_channels(bits: Mapping[str, np.ndarray], looks: Styles, axes: Axes) -> None:
    for name, values in bits.items():
        ranks = list(range(1, len(values) + 1))
        _line(axes, looks[name], ranks, list(np.maximum(values, FEWEST_BITS)), marker="", linewidth=1.3)
    axes.set_xlabel("channel, by the anchor's bits", fontsize=9)
    clean(axes)
    _logarithmic(axes)


def _draw_summed(sums: Mapping[str, np.ndarray], looks: Styles, axes: Axes) -> None:
    _zero(axes)
    for name, values in sums.items():
        _line(axes, looks[name], list(range(1, len(values) + 1)), list(values), marker="")
    axes.set_xlabel("channel, by the anchor's bits", fontsize=9)
    clean(axes)


def _indices(curves: Sequence[Curve], looks: Styles) -> Iterator[Panel]:
    points = {name: one for name, one in _points_with(curves, "k_counts").items() if _is_histogram(one.k_counts)}
    if points:
        shares = {name: np.asarray(one.k_counts) / sum(one.k_counts) for name, one in points.items()}
        title = f"share of the elements of y with this k, at lambda {next(iter(points.values())).lmbda:g}"
        yield Panel(title, partial(_draw_indices, shares, looks))


def _is_histogram(counts: Sequence[int]) -> bool:
    return len(counts) == 17 and min(counts) >= 0 and 0 < sum(counts) < 2**62


def _draw_indices(shares: Mapping[str, np.ndarray], looks: Styles, axes: Axes) -> None:
    places = list(range(-8, 9))
    for name, share in shares.items():
        _line(axes, looks[name], places, [one if one > 0 else np.nan for one in share], linewidth=1.1, markersize=4)
    axes.set_xlabel("k", fontsize=9)
    clean(axes)
    _logarithmic(axes)
    axes.set_xticks(places[::2], ["≤ -8", *(str(k) for k in places[2:-2:2]), "≥ 8"])
