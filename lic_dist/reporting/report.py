"""The report on curves: BD-rates, gains, every point, charts; on the terminal, in Markdown, as a page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from shlex import quote

from rich.console import Console

from lic_dist.building.job import provenance
from lic_dist.config import Report
from lic_dist.errors import LicError
from lic_dist.evaluation.jobs import BASE
from lic_dist.evaluation.results import write_whole
from lic_dist.reporting.charts import charts
from lic_dist.reporting.curves import LABEL, collect
from lic_dist.reporting.document import preferences, sections
from lic_dist.reporting.exports import require_known, write_exports
from lic_dist.reporting.findings import Findings
from lic_dist.reporting.gains import SQ_ADAPTED
from lic_dist.reporting.markdown import markdown
from lic_dist.reporting.page import page
from lic_dist.reporting.pairs import KEY, PAGE, write_study
from lic_dist.reporting.panels import write_chart
from lic_dist.reporting.preference import preference
from lic_dist.reporting.seeds import joined
from lic_dist.reporting.shown import collect_pictures, write_sheets
from lic_dist.reporting.styles import styles
from lic_dist.reporting.terminal import show
from lic_dist.text import counted
from lic_dist.version import __version__

ANCHORS = (*Report.model_fields["anchors"].default, f"{BASE} {SQ_ADAPTED}")  # the first that there is


def report(
    files: Sequence[Path],
    anchors: Sequence[str],
    out: Path,
    only: Sequence[str] = (),
    label: str = LABEL,
    console: Console | None = None,
    study: bool = False,
    answers: Sequence[Path] = (),
    exports: Sequence[str] = (),
) -> Findings:
    """Compare all curves of result files with each anchor: tables on the terminal, report.html, results.md and charts.

    Where models were retrained, the grids of quantizers and arms besides; where pictures were kept, sheets of the first
    anchor and the best curves beside the original. Where all is of one lambda, L leads, and there are no BD-rates.
    `label` groups points into curves and names them, see `curves`. `anchors` are names of curves; without any, the base
    with SQ ("base sq"), or else with SQ's adapted tables ("base sq-adapted"). The first is black in the charts. `only`
    are patterns of names: curves that match none are left out, unless they are anchors. `console` is the terminal's, or
    a quiet one. `study` writes a page for viewers who compare the kept pictures in pairs, and `answers` are the files
    that they sent back: see `pairs`, `preference`. `exports` names files for other programs: see `exports`.

    Raises:
        LicError: a file that is no result file, or a folder that cannot be written.
        UsageError: no curve, pattern or export of that name, a label of unknown fields, or no pictures for a study.
    """
    require_known(exports)
    collection = collect(files, label)
    if not anchors:
        names = {one.name for one in collection.curves} | {one.label for one in collection.curves}
        anchors = [next((name for name in ANCHORS if name in names), ANCHORS[0])]
    if only:
        collection = collection.only(only, anchors)
    whole = {curve.name: curve for curve in joined(collection.curves)}
    chosen = list(dict.fromkeys(whole.get(name) or collection.named(name) for name in anchors))
    found = Findings.of(collection.curves, chosen)
    looks = styles(found.curves, chosen[0].name)
    drawn = charts(found, looks)
    parts = sections(found, drawn)
    if answers:
        parts.insert(len(found.leads), preferences(preference(answers, out, chosen[0].name)))
    parts_of = {curve.name: [part.name for part in curve.parts] for curve in found.curves}
    leading = [name for one in (chosen[0].name, *found.best) for name in parts_of[one][:1]]
    shown = collect_pictures(collection, [name for names in parts_of.values() for name in names], leading)
    show(parts, console := console or Console())
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LicError(f"cannot write {out}: {error.strerror}") from None
    for chart in drawn:
        write_chart(chart, out)
    write_sheets(collection, leading, out)
    write_whole(out / "results.md", markdown(parts).encode())
    text = page(parts, found, looks, shown, collection.runs, _made()).encode()
    write_whole(out / "report.html", text)
    for written in write_exports(exports, found.parts, parts, out):
        console.print(written, markup=False, highlight=False, soft_wrap=True)
    if study:
        trials = write_study(collection, [one for one in found.parts if one.points], out)
        console.print(f"{out / PAGE}: {counted(trials, 'pair')}; {KEY} names them", markup=False, highlight=False)
    if shown and shown.note:
        console.print(shown.note, markup=False, highlight=False)
    console.print(f"{out / 'report.html'}: {len(text) / 1e6:.1f} MB", markup=False, highlight=False, soft_wrap=True)
    return found


def _made() -> str:
    """When, by which command and by what the report is made."""
    by = provenance()
    command = " ".join(["lic-dist", *(quote(word) for word in by["argv"][1:])])
    commit = f", commit {by['commit'][:10]}" if by["commit"] else ""
    return f"Made on {by['time'][:10]} by {command}; lic-dist {__version__}{commit}"
