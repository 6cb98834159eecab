"""The report as one HTML page without any other file: figures, the picture viewer, plots, tables.

The page's own policy forbids every address but its own data and every script but its own, by its digest; names from
result files are escaped besides.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Sequence
from html import escape
from importlib import resources
from string import Template

from lic_dist.evaluation.bd import Interval
from lic_dist.evaluation.charts import Chart, svg
from lic_dist.evaluation.comparison import AnchorTable, Comparison, best, times
from lic_dist.evaluation.findings import Findings
from lic_dist.evaluation.gains import COLUMNS as GAIN_COLUMNS
from lic_dist.evaluation.gains import cells
from lic_dist.evaluation.grid import Grids
from lic_dist.evaluation.lead import COLUMNS as LEAD_COLUMNS
from lic_dist.evaluation.lead import FEW, LEAD_SAYS, Lead, lead_cells, lead_title, picture_rows
from lic_dist.evaluation.results import Curve
from lic_dist.evaluation.rows import (
    BD_SAYS,
    COMPARISON_COLUMNS,
    GAINS_SAY,
    GRID_SAYS,
    POINT_COLUMNS,
    POINTS_SAY,
    TIME_COLUMNS,
    TIMES_SAY,
    comparison_cells,
    gains_title,
    grid_heads,
    grid_rows,
    grid_title,
    lettered,
    point_rows,
    time_rows,
)
from lic_dist.evaluation.shown import ShownPictures
from lic_dist.evaluation.styles import Style, Styles
from lic_dist.text import counted
from lic_dist.version import __version__

_MARKERS = {
    "o": '<circle cx="13" cy="6" r="3.4"/>',
    "s": '<path d="M9.8 2.8h6.4v6.4h-6.4z"/>',
    "^": '<path d="M13 2l4 7.4h-8z"/>',
    "D": '<path d="M13 1.6l4.4 4.4-4.4 4.4-4.4-4.4z"/>',
    "v": '<path d="M13 10l4-7.4h-8z"/>',
    "P": '<path d="M11.6 2h2.8v2.6h2.6v2.8h-2.6v2.6h-2.8v-2.6h-2.6v-2.8h2.6z"/>',
    "X": '<path d="M10 1.6l3 3 3-3 1.8 1.8-3 2.6 3 2.6-1.8 1.8-3-3-3 3-1.8-1.8 3-2.6-3-2.6z"/>',
}

_DASHES = {"--": "5 3", "-.": "6 2 2 2", ":": "2 2.5"}


def page(
    found: Findings,
    drawn: Sequence[Chart],
    looks: Styles,
    shown: ShownPictures | None,
    names: Sequence[str] = (),
    made: str = "",
) -> str:
    """The text of report.html; `names` are the experiments', `made` says when, how and by what it was made."""
    script = _asset("viewer.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    viewer = Template(_asset("viewer.html")).substitute(note=escape(shown.note)) if shown else ""
    body, contents = _contents(
        "\n".join([_leads(found.leads), _grids(found.grids), viewer, _plots(drawn, looks), _tables(found)])
    )
    return Template(_asset("report.html.in")).substitute(
        title=escape(f"{', '.join(names)}: rate and distortion" if names else "Rate-distortion report"),
        script_hash=f"sha256-{digest}",
        style=_asset("style.css"),
        script=script,
        subtitle=escape(_subtitle(found.curves)),
        cards=_lead_cards(found.leads) or _cards(found.tables, found.curves),
        contents=contents,
        body=body,
        made=escape(made or f"lic-dist {__version__}"),
        data=f'<script type="application/json" id="pictures">{_json(shown.data)}</script>' if shown else "",
    )


def _contents(body: str) -> tuple[str, str]:
    """The body with a place to jump to at each section, and the list of them."""
    titles: list[str] = []

    def placed(heading: re.Match[str]) -> str:
        titles.append(heading[1])
        return f'<h2 id="part-{len(titles)}">{heading[1]}</h2>'

    body = re.sub(r"<h2>(.*?)</h2>", placed, body)
    links = "".join(f'<li><a href="#part-{number}">{title}</a></li>' for number, title in enumerate(titles, 1))
    return body, f'<nav aria-label="contents"><ul>{links}</ul></nav>'


def _asset(name: str) -> str:
    return (resources.files("lic_dist.evaluation") / "page" / name).read_text("utf-8")


def _json(data: object) -> str:
    """As JSON that cannot end its element."""
    return json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")


def _subtitle(curves: Sequence[Curve]) -> str:
    points = [point for curve in curves for point in curve.points]
    images = {row.image for point in points for row in point.images}
    lambdas = [f"{lmbda:g}" for lmbda in sorted({point.lmbda for point in points})]
    parts = [counted(len(curves), "curve")]
    if points:
        parts += [counted(len(images), "image"), f"lambda {', '.join(lambdas)}"]
    return " · ".join(parts)


def _cards(tables: Sequence[AnchorTable], curves: Sequence[Curve]) -> str:
    """The best curve against each anchor."""
    measured = [curve.name for curve in curves if curve.points]
    cards = []
    for table in tables:
        one = best(table, measured)
        if one is not None and one.pchip is not None:
            cards.append(_card(one, one.pchip, table.anchor.name))
    return f'<div class="cards">{"".join(cards)}</div>' if cards else ""


def _card(one: Comparison, pchip: float, anchor: str) -> str:
    value, said = pchip, "averaged curves"
    if one.images:
        value = one.images.mean
        low, high = _signed(one.images.low), _signed(one.images.high)
        said = "one image"
        if len(one.rates) > 1:
            said = f"95 % interval over {len(one.rates)} images: {low} to {high}\N{NO-BREAK SPACE}%"
    said = "; ".join([said, *one.notes])
    return (
        f'<div class="card"><b class="{_sense(value)}">{_signed(value)} %<small> rate at equal PSNR</small></b>'
        f'<span class="what">{escape(one.name)} against {escape(anchor)}</span><span>{escape(said)}</span></div>'
    )


def _lead_cards(leads: Sequence[Lead]) -> str:
    """The least L against each anchor, with its interval and what it is worth as rate."""
    cards = []
    for found in leads:
        one = found.best
        if one is None or one.change is None or one.rate is None:
            continue
        said = f"95 % interval over {len(found.pictures)} pictures: {_signed(one.change.low)} to "
        said += f"{_signed(one.change.high)}\N{NO-BREAK SPACE}%"
        if len(found.pictures) == 1:
            said = "one picture: that proves nothing"
        elif len(found.pictures) < FEW:
            said += "; few pictures prove little"
        cards.append(
            f'<div class="card"><b class="{_clear(one.change)}">{_signed(one.change.mean)} %<small> of L</small></b>'
            f'<span class="what">{escape(one.name)} against {escape(found.anchor.name)}</span>'
            f"<span>{escape(said)}</span><span>as rate at equal quality: {_signed(one.rate.mean)} %</span></div>"
        )
    return f'<div class="cards">{"".join(cards)}</div>' if cards else ""


def _leads(leads: Sequence[Lead]) -> str:
    parts = []
    for found in leads:
        rows = [lead_cells(row) for row in found.rows]
        senses = [{1: _clear(row.change), 5: _clear(row.rate), 6: _clear(row.own)} for row in found.rows]
        parts.append(f"<h2>{escape(lead_title(found))}</h2>{_table(LEAD_COLUMNS, rows, senses)}")
        parts.append(f"<p>{_prose(LEAD_SAYS)}</p>")
    return "\n".join(parts)


def _signed(value: float) -> str:
    return f"{value:+.2f}".replace("-", "\N{MINUS SIGN}")


def _sense(value: float) -> str:
    return "less" if value < 0 else "more"


def _plots(drawn: Sequence[Chart], looks: Styles) -> str:
    legend = "".join(
        f'<li><button type="button" aria-pressed="false" data-series="{look.series}">{_swatch(look)}{escape(name)}'
        f"{' (anchor)' if look.series == 0 else ''}</button></li>"
        for name, look in looks.items()
    )
    sections = [
        f"<h2>{escape(chart.title)}</h2><p>{escape(chart.says)}</p><div class='charts'>{_figures(chart, looks)}</div>"
        for chart in drawn
    ]
    return f'<ul class="legend" aria-label="curves: press to pick some out">{legend}</ul>{"".join(sections)}'


def _figures(chart: Chart, looks: Styles) -> str:
    return "".join(
        f'<figure role="img" aria-label="{escape(f"{chart.title}: {panel.title}. {chart.says}")}">'
        f"<figcaption>{escape(panel.title)}</figcaption>{svg(panel, looks, f'{chart.name}-{number}')}</figure>"
        for number, panel in enumerate(chart.panels)
    )


def _swatch(look: Style) -> str:
    colour = "currentColor" if look.series == 0 else f"var(--c{(look.series - 1) % 8})"
    dash = f' stroke-dasharray="{_DASHES[look.line]}"' if look.line in _DASHES else ""
    return (
        f'<svg viewBox="0 0 26 12" aria-hidden="true" style="color:inherit"><g fill="{colour}">'
        f'<path d="M0 6h26" stroke="{colour}" stroke-width="2"{dash}/>{_MARKERS[look.marker]}</g></svg>'
    )


def _tables(found: Findings) -> str:
    pictures = [picture_rows(one) for one in found.leads]
    parts = [f"<h2>Picture by picture: change of L</h2>{_table(heads, rows)}" for heads, rows in pictures]
    parts += [f"<h2>BD-rates</h2><p>{_prose(BD_SAYS)}</p>"] if found.tables else []
    for table in found.tables:
        rows = [comparison_cells(one, table.notes) for one in table.comparisons]
        senses = [{4: _clear(one.images)} for one in table.comparisons]
        parts.append(f"<h3>against {escape(table.anchor.name)}</h3>{_table(COMPARISON_COLUMNS, rows, senses)}")
        parts += [f'<p class="soft">{key}: {escape(note)}</p>' for key, note in lettered(table.notes)]
    each = () if found.leads else found.gains
    if each:
        parts.append(f"<h2>Gains at each lambda</h2><p>{_prose(GAINS_SAY)}</p>")
    for gains in each:
        senses = [{5: _clear(row.own), 6: _clear(row.sq_adapted)} for row in gains.rows]
        rows = [cells(row) for row in gains.rows]
        parts.append(f"<h3>{escape(gains_title(gains))}</h3>{_table(GAIN_COLUMNS, rows, senses)}")
    measured = times(found.curves)
    if measured:
        parts.append(f"<h2>Times</h2><p>{_prose(TIMES_SAY)}</p>{_table(TIME_COLUMNS, time_rows(measured))}")
    parts.append(f"<h2>All points</h2><p>{_prose(POINTS_SAY)}</p>{_table(POINT_COLUMNS, point_rows(found.curves))}")
    return "\n".join(parts)


def _grids(found: Grids) -> str:
    parts = ["<h2>Quantizers and arms</h2>"] if found.grids or found.notes else []
    parts += [f"<p>{_prose(GRID_SAYS)}</p>"] if found.grids else []
    for grid in found.grids:
        rows = [["\n".join(cell) for cell in row] for row in grid_rows(grid)]
        made = [[grid.cells.get((arm, quantizer)) for arm in grid.arms] for quantizer in grid.quantizers]
        senses = [{n: _clear(one.images) for n, one in enumerate(row, 1) if one} for row in made]
        parts.append(f"<h3>{escape(grid_title(grid))}</h3>{_table(grid_heads(grid), rows, senses)}")
        parts += [f'<p class="soft">{key}: {escape(note)}</p>' for key, note in lettered(grid.notes)]
    return "\n".join([*parts, *(f'<p class="soft">{escape(note)}</p>' for note in found.notes)])


def _clear(change: Interval | None) -> str:
    """The class of a change whose interval leaves zero out."""
    return _sense(change.mean) if change and change.low < change.high and change.low * change.high > 0 else ""


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]], senses: Sequence[dict[int, str]] | None = None) -> str:
    """A table; a cell may have lines; `senses` has the class of some columns' cells for each row."""
    head = "".join(
        f'<th scope="col" aria-sort="none"><button type="button">{escape(one)}</button></th>' for one in heads
    )
    body = []
    for number, row in enumerate(rows):
        marks = senses[number] if senses else {}
        cells_ = (
            f'<td class="{marks[column]}">{cell}</td>' if marks.get(column) else f"<td>{cell}</td>"
            for column, cell in enumerate(escape(cell).replace("\n", "<br>") for cell in row)
        )
        body.append(f"<tr>{''.join(cells_)}</tr>")
    return (
        f'<div class="table" tabindex="0"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div>"
        '<p class="soft wider">The table is wider than the page: it scrolls to the right.</p>'
    )


def _prose(text: str) -> str:
    return re.sub(r"`([^`]*)`", r"<code>\1</code>", escape(text))
