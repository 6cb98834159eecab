"""The report as one HTML page without any other file: figures, the picture viewer, charts, tables.

The page's own policy forbids every address but its own data and every script but its own, by their digests; names from
result files are escaped besides. Charts are drawn by Vega, whose expressions are interpreted: nothing is evaluated.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from html import escape
from string import Template

import vl_convert

from lic_dist.drawing import COLOURS, GRID, INK
from lic_dist.intervals import Interval
from lic_dist.reporting.assets import as_json, asset, script_source
from lic_dist.reporting.comparison import AnchorTable, best
from lic_dist.reporting.curves import Curve
from lic_dist.reporting.findings import Findings
from lic_dist.reporting.gains import lambdas, seed_pairs
from lic_dist.reporting.lead import FEW, Lead, LeadRow
from lic_dist.reporting.panels import Chart, page_spec
from lic_dist.reporting.sets import Sets, SetTable
from lic_dist.reporting.shown import ShownPictures
from lic_dist.reporting.styles import Style, Styles
from lic_dist.reporting.tables import Cell, Section, Table, letter
from lic_dist.text import counted
from lic_dist.version import __version__

_SHAPES = {
    "circle": '<circle cx="13" cy="6" r="3.4"/>',
    "square": '<path d="M9.8 2.8h6.4v6.4h-6.4z"/>',
    "triangle-up": '<path d="M13 2l4 7.4h-8z"/>',
    "diamond": '<path d="M13 1.6l4.4 4.4-4.4 4.4-4.4-4.4z"/>',
    "triangle-down": '<path d="M13 10l4-7.4h-8z"/>',
    "cross": '<path d="M11.6 2h2.8v2.6h2.6v2.8h-2.6v2.6h-2.8v-2.6h-2.6v-2.8h2.6z"/>',
}  # any other is the saw
_SAW = '<path d="M10 1.6l3 3 3-3 1.8 1.8-3 2.6 3 2.6-1.8 1.8-3-3-3 3-1.8-1.8 3-2.6-3-2.6z"/>'
_PALETTE = {INK: "--ink", GRID: "--grid"} | {colour: f"--c{number}" for number, colour in enumerate(COLOURS)}


def page(
    parts: Sequence[Section],
    found: Findings,
    looks: Styles,
    shown: ShownPictures | None,
    names: Sequence[str] = (),
    made: str = "",
) -> str:
    """The text of report.html; `names` are the experiments', `made` says when, how and by what it was made."""
    scripts = (vega(), asset("viewer.js"))
    viewer = Template(asset("viewer.html")).substitute(note=escape(shown.note)) if shown else ""
    led = len(found.leads)  # what leads, then the pictures
    drawn = next((number for number, part in enumerate(parts) if part.charts), len(parts))
    body = [*map(_section, parts)]
    body[drawn:drawn] = [_legend(looks)]
    body[led:led] = [viewer]
    text, contents = _contents("\n".join(body))
    specs = {
        _id(chart, n): page_spec(one) for part in parts for chart in part.charts for n, one in enumerate(chart.panels)
    }
    data = {"charts": {"palette": _PALETTE, "specs": specs}} | ({"pictures": shown.data} if shown else {})
    return Template(asset("report.html.in")).substitute(
        title=escape(f"{', '.join(names)}: rate and distortion" if names else "Rate-distortion report"),
        script_sources=" ".join(map(script_source, scripts)),
        style=asset("style.css"),
        vega=scripts[0],
        script=scripts[1],
        subtitle=escape(_subtitle(found.curves)),
        cards=_cards(_headlines(found)),
        contents=contents,
        body=text,
        made=escape(made or f"lic-dist {__version__}"),
        data="".join(
            f'<script type="application/json" id="{id_}">{as_json(one)}</script>' for id_, one in data.items()
        ),
    )


@cache
def vega() -> str:
    """Vega, Vega-Lite and Vega-Embed as one script."""
    return vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;").replace("</script", "<\\/script")


def _contents(body: str) -> tuple[str, str]:
    """The body with a place to jump to at each section, and the list of them."""
    titles: list[str] = []

    def placed(heading: re.Match[str]) -> str:
        titles.append(heading[1])
        return f'<h2 id="part-{len(titles)}">{heading[1]}</h2>'

    body = re.sub(r"<h2>(.*?)</h2>", placed, body)
    links = "".join(f'<li><a href="#part-{number}">{title}</a></li>' for number, title in enumerate(titles, 1))
    return body, f'<nav aria-label="contents"><ul>{links}</ul></nav>'


def _subtitle(curves: Sequence[Curve]) -> str:
    points = [point for curve in curves for point in curve.points]
    images = {row.image for point in points for row in point.images}
    lambdas_ = [f"{lmbda:g}" for lmbda in lambdas(points)]
    parts = [counted(len(curves), "curve")]
    if points:
        parts += [counted(len(images), "image"), *([f"lambda {', '.join(lambdas_)}"] if lambdas_ else [])]
    return " · ".join(parts)


# the headline


def _cards(cards: Sequence[str]) -> str:
    return f'<div class="cards">{"".join(cards)}</div>' if any(cards) else ""


def _headlines(found: Findings) -> list[str]:
    """A card for each anchor: of L where it leads, else of BD-rates; of several sets of pictures their mean."""
    if found.leads:
        return [_lead_card(one, found.sets.sets if found.sets else None) for one in found.leads]
    by_sets = {table.against: _sets_card(table, found.sets.sets) for table in found.sets.tables} if found.sets else {}
    return [by_sets.get(table.anchor.name) or _card(table, found.curves) for table in found.tables]


def _sets_card(table: SetTable, sets: Sets) -> str:
    """The best curve against an anchor, by the mean of sets."""
    one = table.best
    if one is None or (rate := one.cells[-1]) is None:
        return ""
    sense = "less" if rate.mean < 0 else "more"
    return _headline(sense, rate.mean, "rate at equal PSNR", one.names[0], table.against, _of_sets(sets, rate))


def _of_sets(sets: Sets, change: Interval) -> str:
    pictures = counted(sum(map(len, sets.pictures.values())), "image")
    seeds = f"; {change.of_seeds}" if change.seeds > 1 else ""
    return f"mean of {len(sets.pictures)} sets; 95 % interval over their {pictures}: {_range(change)}{seeds}"


def _card(table: AnchorTable, curves: Sequence[Curve]) -> str:
    """The best curve against an anchor."""
    one = best(table, [curve.name for curve in curves if curve.learned])
    if one is None or one.rate is None:
        return ""
    said = "one image" if one.images else "averaged curves"
    if one.images and len(one.rates) > 1:
        said = f"95 % interval over {len(one.rates)} images: {_range(one.images)}"
    sense = "less" if one.rate < 0 else "more"
    return _headline(sense, one.rate, "rate at equal PSNR", one.name, table.anchor.name, "; ".join([said, *one.notes]))


def _lead_card(found: Lead, sets: Sets | None) -> str:
    """The least L against an anchor, with its interval and what it is worth as rate."""
    one = found.best
    if one is None or one.change is None or one.rate is None:
        return ""
    change, rate = one.change, one.rate
    said = f"95 % interval over {len(found.pictures)} pictures: {_range(change)}"
    if sets and (means := _set_means(found.anchor, one, sets)):
        change, rate = means
        said = _of_sets(sets, change)
    if len(found.pictures) == 1:
        said = "one picture: that proves nothing"
    elif len(found.pictures) < FEW:
        said += "; few pictures prove little"
    worth = f"as rate at equal quality: {_signed(rate.mean)} %"
    sense = Cell("", change).sense
    return _headline(sense, change.mean, "of L", one.name, found.anchor.name, said, worth)


def _set_means(anchor: LeadRow, row: LeadRow, sets: Sets) -> tuple[Interval, Interval] | None:
    """Of the change of L and of what it is worth as rate, where all sets were measured."""
    pairs = seed_pairs(anchor.gain.points, row.gain.points)
    change = sets.change(pairs)[-1]
    rate = sets.change(pairs, {one.image: one.bpp for one in anchor.gain.point.images})[-1]
    return (change, rate) if change and rate else None


def _headline(sense: str, value: float, unit: str, name: str, anchor: str, *said: str) -> str:
    return (
        f'<div class="card"><b class="{sense}">{_signed(value)} %<small> {unit}</small></b>'
        f'<span class="what">{escape(name)} against {escape(anchor)}</span>'
        f"{''.join(f'<span>{escape(one)}</span>' for one in said)}</div>"
    )


def _range(change: Interval) -> str:
    return f"{_signed(change.low)} to {_signed(change.high)}\N{NO-BREAK SPACE}%"


def _signed(value: float) -> str:
    return f"{value:+.2f}".replace("-", "\N{MINUS SIGN}")


# sections


def _section(part: Section) -> str:
    found = [f"<h2>{escape(part.title)}</h2>", f"<p>{_prose(part.says)}</p>" if part.says else ""]
    for table in part.tables:
        found.append(f"<h3>{escape(table.title)}</h3>" if table.title else "")
        found.append(_table(table))
        found.append(f"<p>{_prose(table.says)}</p>" if table.says else "")
        found += [f'<p class="soft">{letter(number)}: {escape(note)}</p>' for number, note in enumerate(table.notes)]
    found += [f"<div class='charts'>{_figures(chart)}</div>" for chart in part.charts]
    found += [f'<p class="soft">{escape(note)}</p>' for note in part.notes]
    return "".join(found)


def _figures(chart: Chart) -> str:
    return "".join(
        f'<figure role="img" aria-label="{escape(f"{chart.title}: {panel.title}. {chart.says}")}">'
        f"<figcaption>{escape(panel.title)}</figcaption>"
        f'<div class="plot" data-chart="{_id(chart, number)}"></div></figure>'
        for number, panel in enumerate(chart.panels)
    )


def _id(chart: Chart, number: int) -> str:
    return f"{chart.name}-{number}"


def _legend(looks: Styles) -> str:
    buttons = "".join(
        f'<li><button type="button" aria-pressed="false" data-curve="{escape(name)}">{_swatch(look)}{escape(name)}'
        f"{' (anchor)' if look.colour == INK else ''}</button></li>"
        for name, look in looks.items()
    )
    hint = "Press a curve to pick it out. In a chart: drag to move, shift and wheel to zoom, twice to go back."
    return f'<ul class="legend" aria-label="curves">{buttons}</ul><p class="soft">{hint}</p>'


def _swatch(look: Style) -> str:
    colour = f"var({_PALETTE[look.colour]})"
    return (
        f'<svg viewBox="0 0 26 12" aria-hidden="true"><g fill="{colour}">'
        f'<path d="M0 6h26" stroke="{colour}" stroke-width="2" stroke-dasharray="{" ".join(map(str, look.dash))}"/>'
        f"{_SHAPES.get(look.shape, _SAW)}</g></svg>"
    )


def _table(table: Table) -> str:
    head = "".join(
        f'<th scope="col" aria-sort="none"><button type="button">{escape(one)}</button></th>' for one in table.columns
    )
    rows = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in table.rows)
    return (
        f'<div class="table" tabindex="0"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'
        '<p class="soft wider">The table is wider than the page: it scrolls to the right.</p>'
    )


def _cell(cell: Cell) -> str:
    text = escape(cell.text).replace("\n", "<br>")
    return f'<td class="{cell.sense}">{text}</td>' if cell.sense else f"<td>{text}</td>"


def _prose(text: str) -> str:
    return re.sub(r"`([^`]*)`", r"<code>\1</code>", escape(text))
