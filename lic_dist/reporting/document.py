"""A report as plain values: sections of tables, charts and notes, which terminal, Markdown and page show alike."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from lic_dist.evaluation.jobs import BASE
from lic_dist.evaluation.metrics import METRICS
from lic_dist.evaluation.results import Point
from lic_dist.reporting import gains as changes
from lic_dist.reporting import lead as leading
from lic_dist.reporting import signed_rank
from lic_dist.reporting.comparison import AnchorTable, Comparison, Rates, has_rates
from lic_dist.reporting.costs import costs, networks
from lic_dist.reporting.curves import Curve, place_of
from lic_dist.reporting.findings import Findings
from lic_dist.reporting.grid import Grid, Grids
from lic_dist.reporting.panels import Chart
from lic_dist.reporting.preference import Preference
from lic_dist.reporting.sets import SetRow, SetsApart
from lic_dist.reporting.tables import Cell, Section, Table, Value, letter, percent, table
from lic_dist.text import counted

BD_SAYS = (
    "Change of rate at equal PSNR, in percent: negative is less rate. PCHIP and Akima interpolate the curves averaged "
    "over images; the mean of the images' own BD-rates (PCHIP) has a 95 % bootstrap interval over images. `p`: "
    + signed_rank.SAYS
)
OTHER_METRICS_SAY = " Of other metrics: PCHIP, and under it the mean of images."
OF_ALL_SETS_SAYS = (
    " All of it averages all pictures as one, those of every set: `Sets apart` has each kind, and the mean of the sets."
)
SEEDS_SAY = (
    " Where models differ in their seed alone, a figure is the mean over the seeds, its interval is over pictures, and "
    "`±` is the standard deviation of the seeds' means."
)
SETS_SAY = (
    "The BD-rates of each set of pictures, a folder, with the number of its pictures: the mean of the pictures' own "
    "with its 95 % bootstrap interval, in percent. `mean of sets` is the mean of the sets' means, so that a set of "
    "many pictures does not outweigh the others; its interval draws pictures anew within each set. Against its "
    "control: what an arm gains over the same training on other latents, or over an arm named a control. Empty where a "
    "picture of the set has no figure."
)
SET_CHANGES_SAY = "The change of L in percent at each lambda, for each set of pictures and as the mean of the sets'."
GRID_SAYS = (
    "Change of rate at equal PSNR, in percent, of each quantizer (rows) on models retrained as the column says: "
    "negative is less rate. First the BD-rate of the curves averaged over images (PCHIP), then the mean of the images' "
    "own with its 95 % bootstrap interval. A curve's own base is the same quantizer without retraining. Empty where a "
    "curve or its anchor is not there."
)
GRID_BY_ANOTHER_SAYS = "The same figures at equal {}."
POINTS_SAY = (
    "Means over images. bpp counts the entropy-coded streams, `z bpp` the estimated part of z; `container` is what is "
    "around the streams, `estimated` the gap from the tables' own rate to the written bytes, `likelihood` the gap from "
    "the continuous model's rate."
)
PREFERENCE_SAYS = (
    "Each compared two pictures of one image, of rates within 15 %, without knowing whose they were. Scores are those "
    "of Bradley and Terry, natural logarithms of odds; `chosen over` is the part of answers that they give against the "
    "anchor, with its 95 % bootstrap interval over "
)
CLASSIC_SAY = (
    "Codecs that were coded in place, with what each library was given. Their bpp counts the whole file, as is usual "
    "for them; that of a learned codec counts the entropy-coded streams, and `container` what is around them."
)
COSTS_SAY = (
    "Thousands of multiply-accumulates of the networks for each pixel (kMAC) and their parameters, means over lambdas; "
    "medians over images and lambdas of the seconds that an image took on one thread of the machine that measured; and "
    "the memory that encoding and decoding took above the loaded program, of the image that took most."
)


def sections(found: Findings, charts: Sequence[Chart]) -> list[Section]:
    """The whole report, in its order; what there is nothing to say of is left out."""
    led = bool(found.leads)
    parts = [
        *(Section(leading.lead_title(one), tables=(_lead(one, _of_all_sets(found)),)) for one in found.leads),
        Section(
            "BD-rates",
            _bd_says(found) + _of_seeds(found),
            tuple(table for one in found.tables for table in _comparisons(one)),
        ),
        Section(
            "Quantizers and arms", GRID_SAYS + _of_seeds(found), _grids(found.grids, "psnr"), notes=found.grids.notes
        ),
        *_grids_by_others(found.grids),
        *_sets(found.sets, led, _of_seeds(found)),
        *(Section(chart.title, chart.says, charts=(chart,), detail=True) for chart in charts),
        Section("Picture by picture: change of L", tables=tuple(map(_by_picture, found.leads)), detail=True),
        Section(
            "Gains at each lambda", changes.GAINS_SAY + _of_seeds(found), tuple(map(_gains, found.gains)), detail=led
        ),
        Section("Complexity", COSTS_SAY, _costs(found.parts), detail=True),
        Section("All points", POINTS_SAY, (_points(found.parts),), detail=True),
        Section("Classic codecs", CLASSIC_SAY, _classic(found.parts), detail=True),
    ]
    return [part for part in parts if part.tables or part.charts or part.notes]


def preferences(found: Preference) -> Section:
    """What viewers preferred in a study."""
    drawn = "sessions" if found.by_session else "answers, since there are few sessions"
    says = f"{counted(found.answers, 'answer')} in {counted(found.sessions, 'session')}. {PREFERENCE_SAYS}{drawn}."
    columns = ("curve", "score", f"chosen over {found.anchor} [95 %]", "chosen", "even", "not chosen")
    rows = []
    for row in found.rows:
        middle, low, high = row.chosen
        part = "anchor" if row.curve == found.anchor else f"{middle:.0f} % [{low:.0f}, {high:.0f}]"
        rows.append((row.curve, f"{row.score:+.2f}", part, str(row.won), str(row.even), str(row.lost)))
    return Section("What viewers preferred", says, (table("", columns, rows),))


def _letters(notes: Sequence[str], known: Sequence[str]) -> str:
    return " ".join(letter(known.index(note)) for note in notes)


def _lead(found: leading.Lead, more: str) -> Table:
    columns = ("", "change of L [95 %]", "p", "L", "bpp", "PSNR dB", "as rate [95 %]", "against own base [95 %]")
    rows = []
    for row in found.rows:
        numbers = f"{row.gain.loss:.4f}", f"{row.gain.bpp:.4f}", f"{row.gain.psnr:.3f}"
        change = row.change or ("anchor" if row is found.anchor else "")
        rows.append((row.name, change, signed_rank.shown(row.p), *numbers, row.rate, row.own))
    return table("", columns, rows, says=leading.LEAD_SAYS + more, brief=[6])


def _by_picture(found: leading.Lead) -> Table:
    """The anchor's L of each picture, and the change of L in percent of each other row."""
    others = [row for row in found.rows if row is not found.anchor]
    base, losses = found.anchor.gain.losses, [row.gain.losses for row in others]
    columns = "picture", f"L, {found.anchor.name}", *(f"{row.name} [%]" for row in others)
    rows = [
        (image, f"{base[image]:.4f}", *(f"{100 * (one[image] / base[image] - 1):+.2f}" for one in losses))
        for image in found.pictures
    ]
    return table("", columns, rows)


def _bd_says(found: Findings) -> str:
    others = [name for name in METRICS if any(name in table.others for table in found.tables)]
    says = [f" `{METRICS[name].title}`: the same at equal {_scaled(name)}." for name in others]
    if set(others) - {"ms-ssim"}:
        says.append(OTHER_METRICS_SAY)
    return "".join((BD_SAYS, *says, _of_all_sets(found)))


def _scaled(metric: str) -> str:
    """A metric as BD-rates read it, in words."""
    named = METRICS[metric]
    return f"{named.title} in dB, {named.formula}" if named.formula else named.title


def _of_seeds(found: Findings) -> str:
    return SEEDS_SAY if any(len(curves) > 1 for curves in found.grids.placed.values()) else ""


def _of_all_sets(found: Findings) -> str:
    return OF_ALL_SETS_SAYS if found.sets else ""


def _comparisons(found: AnchorTable) -> list[Table]:
    """BD-rates by PSNR and MS-SSIM, and a table of those by other metrics."""
    by_ms_ssim = ("MS-SSIM: PCHIP", "MS-SSIM: mean of images [95 %]") if "ms-ssim" in found.others else ()
    columns = ("curve", "points", "PCHIP", "Akima", "mean of images [95 %]", "p", *by_ms_ssim, "note")
    rows = []
    for one in found.comparisons:
        similar = one.by["ms-ssim"]
        rates = percent(one.pchip), percent(one.akima), one.images, signed_rank.shown(one.p)
        more = (percent(similar.pchip), similar.images) if by_ms_ssim else ()
        rows.append((one.name, str(one.points), *rates, *more, _letters(one.notes, found.notes)))
    title = f"BD-rate against {found.anchor.name} ({counted(len(found.anchor.figures), 'point')})"
    tables = [table(title, columns, rows, notes=tuple(found.notes))]
    if others := [name for name in found.others if name != "ms-ssim"]:
        heads = ("curve", *(METRICS[name].title for name in others))
        cells: list[list[Value]] = [
            [one.name, *(_rates_cell(one.by[name]) for name in others)] for one in found.comparisons
        ]
        tables.append(table(f"BD-rate against {found.anchor.name} by other metrics [%]", heads, cells))
    return tables


def _rates_cell(rates: Rates, notes: str = "") -> Cell:
    """PCHIP with the letters of its notes; under it the mean over images and its interval."""
    lines = [f"{percent(rates.pchip).removesuffix(' %')} {notes}".strip()]
    lines += [str(rates.images).replace(" %", "")] if rates.images else []
    return Cell("\n".join(line for line in lines if line), rates.images)


def _grids_by_others(found: Grids) -> list[Section]:
    return [
        Section(
            f"Quantizers and arms{_by(name)}",
            GRID_BY_ANOTHER_SAYS.format(_scaled(name)),
            _grids(found, name),
            detail=True,
        )
        for name in METRICS
        if name != "psnr"
    ]


def _grids(found: Grids, quality: str) -> tuple[Table, ...]:
    grids = [grid for grid in found.grids if quality == "psnr" or has_rates(grid.cells.values(), quality)]
    return tuple(_grid(grid, quality) for grid in grids)


def _grid(grid: Grid, quality: str) -> Table:
    columns = "quantizer", *("no retraining" if arm == BASE else arm for arm in grid.arms)
    rows = [
        (quantizer, *(_grid_cell(grid, arm, quantizer, quality) for arm in grid.arms)) for quantizer in grid.quantizers
    ]
    against = "its own base" if grid.anchor is None else f"base {grid.anchor}"
    return table(f"BD-rate against {against}{_by(quality)} [%]", columns, rows, notes=tuple(grid.notes))


def _grid_cell(grid: Grid, arm: str, quantizer: str, quality: str) -> Value:
    if arm == BASE and quantizer == grid.anchor:
        return "anchor"
    cell: Comparison | None = grid.cells.get((arm, quantizer))
    if cell is None:
        return None
    return _rates_cell(cell.by[quality], _letters(cell.notes, grid.notes))


def _sets(found: SetsApart | None, led: bool, more: str) -> tuple[Section, ...]:
    if found is None:
        return ()
    by_quality = [(table, quality) for table in found.tables for quality in METRICS if table.rates[quality]]
    rates = tuple(
        _set_table(
            f"BD-rate against {table.against}{_by(quality)}, set by set [%]", table.heads, table.rates[quality], found
        )
        for table, quality in by_quality
    )
    changes = tuple(
        _set_table(
            f"Change of L against {table.against}, set by set [%]", (*table.heads, "lambda"), table.changes, found
        )
        for table in found.tables
        if table.changes
    )
    return (
        Section("Sets apart", SETS_SAY + more, rates),
        Section("Sets apart: change of L", SET_CHANGES_SAY + more, changes, detail=not led),
    )


def _set_table(title: str, heads: tuple[str, ...], rows: Sequence[SetRow], found: SetsApart) -> Table:
    cells = [(*row.names, *(one and Cell(str(one).replace(" %", ""), one) for one in row.cells)) for row in rows]
    return table(title, (*heads, *found.sets.heads), cells, names=len(heads))


def _by(quality: str) -> str:
    return "" if quality == "psnr" else f" by {METRICS[quality].title}"


def _gains(found: changes.Gains) -> Table:
    changed = "L against base [95 %]", "p", "L against sq-adapted [95 %]"
    columns = ("quantizer", "arm", "bpp", "PSNR dB", "L", *changed)
    rows = []
    for row in found.rows:
        numbers = f"{row.bpp:.4f}", f"{row.psnr:.3f}", f"{row.loss:.4f}"
        rows.append((row.point.quantizer, row.arm, *numbers, row.own, signed_rank.shown(row.p), row.sq_adapted))
    return table(f"L at lambda {found.lmbda:g}, {counted(found.images, 'image')}", columns, rows, names=2)


def _costs(curves: Sequence[Curve]) -> tuple[Table, ...]:
    """Of each curve, and of each network of its models."""
    found = costs(curves)
    both = "encode", "decode"
    columns = ("curve", *(f"{one} {of}" for of in ("kMAC", "s", "MB") for one in both), "parameters", "megapixels")
    rows = []
    for one in found:
        kmac = (_number(value, ".1f") for value in (one.encode_kmac, one.decode_kmac))
        seconds = (f"{value:.3f}" for value in (one.encode_seconds, one.decode_seconds))
        memory = (_number(value and value / 1e6, ".0f") for value in (one.encode_bytes, one.decode_bytes))
        rows.append((one.name, *kmac, *seconds, *memory, _number(one.parameters, ",.0f"), f"{one.megapixels:.2f}"))
    tables = [table("", columns, rows)] if rows else []
    for names, nets in networks(curves):
        cells = [(name, f"{cost.kmac:.2f}", f"{cost.parameters:,}") for name, cost in nets.items()]
        tables.append(table(f"Networks of {', '.join(names)}", ("network", "kMAC a pixel", "parameters"), cells))
    return tuple(tables)


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _points(curves: Sequence[Curve]) -> Table:
    """Every point; a published one has its figures only."""
    beside = [name for name in METRICS if any(name in one.metrics for curve in curves for one in curve.figures)]
    metrics = ("psnr", "ms-ssim", *beside)
    heads = [METRICS[name].head for name in metrics]
    columns = ("curve", "lmbda", "images", "bpp", *heads, "container", "estimated", "likelihood", "z bpp")
    rows = []
    for curve in curves:
        for number, one in enumerate(curve.figures):
            point = curve.points[number] if curve.points else None
            of = (place_of(point), str(len(point.images))) if point else ("", "")
            values = [METRICS[name].text(one.quality.get(name)) for name in metrics]
            rows.append((curve.name, *of, f"{one.bpp:.4f}", *values, *(_gaps(point) if point else ("",) * 4)))
    return table("", columns, rows)


def _classic(curves: Sequence[Curve]) -> tuple[Table, ...]:
    """The settings of every classic codec's points, and the versions of its library."""
    classic = [(curve, point) for curve in curves for point in curve.points if point.lmbda is None]
    rows = [(curve.name, point.checkpoint, point.settings, point.versions) for curve, point in classic]
    return (table("", ("curve", "quality", "settings", "versions"), rows),) if rows else ()


def _gaps(point: Point) -> tuple[str, ...]:
    bpp, *rates = (
        fmean(getattr(row, name) for row in point.images) for name in ("bpp", "estimated_bpp", "likelihood_bpp")
    )
    gaps = (percent(100 * (bpp / rate - 1) if rate > 0 else None) for rate in rates)
    container = f"{fmean(row.container_bpp for row in point.images):.4f}"
    return container, *gaps, "" if point.z_bpp is None else f"{point.z_bpp:.4f}"
