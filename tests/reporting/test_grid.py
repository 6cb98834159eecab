"""The grid of quantizers and arms: which curves are compared with which, and how it is written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from lic_dist.evaluation.results import ImageResult, Point, write_points
from lic_dist.reporting import comparison
from lic_dist.reporting.charts import charts
from lic_dist.reporting.comparison import compare
from lic_dist.reporting.curves import Curve, curve_of
from lic_dist.reporting.document import sections
from lic_dist.reporting.findings import Findings
from lic_dist.reporting.grid import grids_of
from lic_dist.reporting.report import report
from lic_dist.reporting.styles import SOLID, styles
from lic_dist.reporting.tables import Section, Table
from tests.points import markup, measured

pytestmark = pytest.mark.usefixtures("no_chart_files")
NOISE = "decoder+hyper noise"


def points(arm: str, quantizer: str, factor: float = 1.0, record: str = "", lambdas: int = 5) -> list[Point]:
    found = measured(quantizer, factor, lambdas)
    return [replace(one, arm=arm, record=record or f"{quantizer} {arm} {one.lmbda}") for one in found]


def curve(arm: str, quantizer: str, factor: float = 1.0, record: str = "", lambdas: int = 5, name: str = "") -> Curve:
    return curve_of(name or f"{arm} {quantizer}", points(arm, quantizer, factor, record, lambdas))


def shown(curves: Sequence[Curve]) -> tuple[Table, ...]:
    """The grids as the report has them."""
    parts = sections(Findings.of(curves, curves[:1]), ())
    return next(part.tables for part in parts if part.title == "Quantizers and arms")


SQ, ADAPTED, TCQ = curve("base", "sq"), curve("base", "sq-adapted", 0.99), curve("base", "tcq8", 0.95)
DECODER, NOISY = curve("decoder", "tcq8", 0.9), curve(NOISE, "tcq8", 0.93)


def test_every_figure_is_that_of_compare() -> None:
    decoder_sq = curve("decoder", "sq", 0.97)
    own, sq, adapted = grids_of([SQ, ADAPTED, TCQ, decoder_sq, DECODER, NOISY]).grids
    assert own.cells == {
        ("decoder", "sq"): compare(SQ, decoder_sq),
        ("decoder", "tcq8"): compare(TCQ, DECODER),
        (NOISE, "tcq8"): compare(TCQ, NOISY),
    }
    curves = {
        ("base", "sq"): SQ,
        ("base", "sq-adapted"): ADAPTED,
        ("base", "tcq8"): TCQ,
        ("decoder", "sq"): decoder_sq,
        ("decoder", "tcq8"): DECODER,
        (NOISE, "tcq8"): NOISY,
    }
    for grid, anchor in ((sq, SQ), (adapted, ADAPTED)):
        assert grid.cells == {place: compare(anchor, one) for place, one in curves.items() if one is not anchor}
    assert [grid.anchor for grid in (own, sq, adapted)] == [None, "sq", "sq-adapted"]


def test_order_of_appearance_with_the_base_first() -> None:
    own, sq = grids_of([NOISY, DECODER, TCQ, SQ]).grids
    assert (own.arms, own.quantizers) == ((NOISE, "decoder"), ("tcq8",))  # the base's column would be empty
    assert (sq.arms, sq.quantizers) == (("base", NOISE, "decoder"), ("tcq8", "sq"))
    tables = shown([NOISY, DECODER, TCQ, SQ])
    assert tables[1].columns == ("quantizer", "no retraining", NOISE, "decoder")
    assert [one.title for one in tables] == ["BD-rate against its own base [%]", "BD-rate against base sq [%]"]


def test_a_cell_has_pchip_then_the_mean_with_its_interval() -> None:
    (_, sq) = shown([SQ, TCQ, DECODER])
    first, tcq = sq.rows
    assert [cell.text for cell in first] == ["sq", "anchor", ""]
    assert tcq[2].text == f"{compare(SQ, DECODER).pchip:+.2f}\n-18.70 [-27.10, -10.00]" and tcq[2].sense == "less"


def test_the_grid_by_ms_ssim_is_a_detail_of_its_own_where_there_is_any() -> None:
    def parts(curves: Sequence[Curve]) -> dict[str, Section]:
        return {part.title: part for part in sections(Findings.of(curves, curves[:1]), ())}

    found = parts([SQ, TCQ, DECODER])
    by_ms_ssim = found["Quantizers and arms by MS-SSIM"]
    assert by_ms_ssim.detail and not found["Quantizers and arms"].detail
    assert by_ms_ssim.tables[1].title == "BD-rate against base sq by MS-SSIM [%]"
    rates = compare(SQ, DECODER).by["ms-ssim"]
    assert by_ms_ssim.tables[1].rows[1][2].text == f"{rates.pchip:+.2f}\n-18.70 [-27.10, -10.00]"

    def without(curve: Curve) -> Curve:
        points = [replace(one, images=tuple(replace(row, ms_ssim=None) for row in one.images)) for one in curve.points]
        return curve_of(curve.name, points)

    bare = parts([without(one) for one in (SQ, TCQ, DECODER)])
    assert set(found) - set(bare) == {"Quantizers and arms by MS-SSIM"}
    assert bare["Quantizers and arms"].tables == found["Quantizers and arms"].tables
    assert "MS-SSIM" not in repr(bare["BD-rates"])
    assert found["BD-rates"].tables[0].columns[6:8] == ("MS-SSIM: PCHIP", "MS-SSIM: mean of images [95 %]")


def test_other_metrics_have_a_table_a_grid_a_panel_and_columns() -> None:
    def with_vif(curve: Curve) -> Curve:
        def rows(point: Point) -> tuple[ImageResult, ...]:
            return tuple(replace(row, metrics={"vif": row.psnr / 60}) for row in point.images)

        return curve_of(curve.name, [replace(one, images=rows(one)) for one in curve.points])

    curves = [with_vif(one) for one in (SQ, TCQ, DECODER)]
    found = Findings.of(curves, curves[:1])
    drawn = charts(found, styles(curves, SQ.name))
    assert [panel.title for panel in drawn[0].panels][-1] == "VIF"
    parts = {part.title: part for part in sections(found, drawn)}
    by_psnr, by_vif = parts["BD-rates"].tables
    assert by_vif.title == "BD-rate against base sq by other metrics [%]" and by_vif.columns == ("curve", "VIF")
    both = [f"{row[2].text}\n{row[4].text}".replace(" %", "") for row in by_psnr.rows]
    assert [row[1].text for row in by_vif.rows] == both
    own, by_vif = (parts[title].tables[0] for title in ("Quantizers and arms", "Quantizers and arms by VIF"))
    texts = [[[cell.text for cell in row] for row in table.rows] for table in (own, by_vif)]
    assert texts[0] == texts[1] and "at equal VIF" in parts["Quantizers and arms by VIF"].says
    points = parts["All points"].tables[0]
    assert points.columns[6] == "VIF" and points.rows[0][6].text == f"{SQ.figures[0].psnr / 60:.4f}"


def test_a_missing_base_leaves_the_cell_blank() -> None:
    rdoq = curve("decoder", "rdoq", 0.9)
    (own,) = grids_of([TCQ, DECODER, rdoq]).grids
    assert [cell.text for cell in shown([TCQ, DECODER, rdoq])[0].rows[1]] == ["rdoq", ""]
    assert [grid.anchor for grid in (own,)] == [None]
    assert grids_of([rdoq, TCQ]).grids == ()
    assert [grid.anchor for grid in grids_of([rdoq, SQ]).grids] == ["sq"]


def test_curves_that_do_not_compare_have_a_letter() -> None:
    short = curve("decoder", "tcq8", 0.9, lambdas=3)
    elsewhere = curve_of("x", [replace(one, pictures="clic") for one in points(NOISE, "tcq8", 0.9)])
    base = curve_of("y", [replace(one, pictures="kodak") for one in points("base", "tcq8")])
    (own,) = grids_of([base, short, elsewhere]).grids
    assert own.notes == ["the curve has 3 points, a BD-rate needs 4", "y and x were measured on different images"]
    ((_, first, second),) = shown([base, short, elsewhere])[0].rows
    assert first.text == "a" and second.text == f"{compare(base, elsewhere).pchip:+.2f} b"


def test_the_cached_bits_have_the_base_of_their_record() -> None:
    cached = curve_of("c", [replace(one, record=f"tcq8 base {one.lmbda}") for one in points("decoder", "tcq8-cached")])
    (own,) = grids_of([TCQ, DECODER, cached]).grids
    assert own.quantizers == ("tcq8", "tcq8-cached")
    assert own.cells["decoder", "tcq8-cached"] == compare(TCQ, cached)
    other = curve_of("c", [*cached.points[:-1], replace(cached.points[-1], record="other")])
    assert ("decoder", "tcq8-cached") not in grids_of([TCQ, DECODER, other]).grids[0].cells
    unknown = [curve_of(one.name, [replace(point, record="") for point in one.points]) for one in (TCQ, cached)]
    assert grids_of(unknown).grids == ()


def test_of_several_curves_of_one_place_none_is_taken() -> None:
    again = curve("base", "tcq8", 0.94, name="tcq8 (again)")
    found = grids_of([SQ, TCQ, again, DECODER])
    assert [grid.anchor for grid in found.grids] == ["sq"] and "base" in found.grids[0].arms
    assert ("base", "tcq8") not in found.grids[0].cells
    assert found.notes == ("2 curves are base tcq8, none is in a grid: base tcq8, tcq8 (again)",)
    same = curve_of("again", [replace(one, checkpoint="elsewhere") for one in TCQ.points])
    assert grids_of([SQ, TCQ, same, DECODER]) == grids_of([SQ, TCQ, DECODER])


def test_of_two_base_models_neither_is_taken() -> None:
    other = curve_of("z", [replace(one, model="another") for one in SQ.points])
    found = grids_of([other, TCQ, DECODER])
    assert found.grids == () and "two base models share a lambda" in found.notes[0]


def test_without_retraining_or_arms_there_is_no_grid() -> None:
    published = Curve("vtm", SQ.figures)
    unknown = curve_of("x", measured("tcq8"))  # a file of an earlier version
    for curves in ([], [SQ, TCQ, published, unknown], [SQ, curve("base", "sq", 0.9, name="again")]):
        found = grids_of(curves)
        assert (found.grids, found.notes) == ((), ())


@pytest.mark.slow
def test_no_pair_is_compared_twice(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    made: list[tuple[str, str]] = []

    def counted(anchor: Curve, test: Curve) -> comparison.Comparison:
        made.append((anchor.name, test.name))
        return compare(anchor, test)

    monkeypatch.setattr(comparison, "compare", counted)
    write(tmp_path / "a.json", [SQ, ADAPTED, TCQ, DECODER, NOISY])
    report([tmp_path / "a.json"], ["base sq", "base tcq8"], tmp_path / "out")
    assert len(made) == len(set(made)) == 12  # four against each of three anchors; the own base is one of them


@pytest.mark.slow
def test_the_report_has_the_grid_on_the_terminal_in_markdown_and_in_the_page(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    write(tmp_path / "a.json", [SQ, TCQ, DECODER, *(curve(f"arm {n}", "tcq8", 0.9 + n / 100) for n in range(4))])
    report([tmp_path / "a.json"], ["base tcq8"], tmp_path / "out")
    shown = capsys.readouterr().out
    grid = shown[shown.index("BD-rate against base sq [%]") :]
    assert max(map(len, shown[shown.index("BD-rate against its own base") :].splitlines()[:-1])) <= 80
    assert "[-27.10, -10.00]" in grid and all(arm in grid for arm in ("decoder", "arm 0", "arm 3"))
    text = (tmp_path / "out/results.md").read_text()
    pchip = f"{compare(SQ, DECODER).pchip:+.2f}"
    assert f"{pchip}; -18.70 [-27.10, -10.00] |" in text and "| sq | anchor |" in text
    order = ["# BD-rate against base tcq8", "# Quantizers and arms", "# Rate and distortion"]
    assert sorted(order, key=text.index) == order
    page = markup((tmp_path / "out/report.html").read_text())
    assert f'<td class="less">{pchip}<br>-18.70 [-27.10, -10.00]</td>' in page
    assert page.index(">Quantizers and arms</h2>") < page.index(">Rate and distortion</h2>")


@pytest.mark.slow
def test_names_in_a_grid_are_escaped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arm, quantizer = "<script>|[/red]", "<img src=x>|[b]"
    curves = [SQ, curve("base", quantizer), curve(arm, quantizer, 0.9), curve(arm, "x"), curve(arm, "x", 0.9, name="y")]
    write(tmp_path / "a.json", curves[:4])
    write(tmp_path / "b.json", curves[4:])
    report([tmp_path / "a.json", tmp_path / "b.json"], ["base sq"], tmp_path / "out")
    text, page = (tmp_path / "out/results.md").read_text(), markup((tmp_path / "out/report.html").read_text())
    assert "| quantizer | &lt;script>\\|[/red] |" in text and "&lt;img src=x>\\|[b] | " in text
    assert "<img" not in text and "<script>|" not in text
    assert "<script>|" not in page and "<img src" not in page and "&lt;script&gt;|[/red]</button></th>" in page
    assert "2 curves are &lt;script>" in text and "2 curves are &lt;script&gt;" in page
    assert "2 curves are <script>|[/red] x" in " ".join(capsys.readouterr().out.split())


def test_of_many_curves_the_colour_is_the_quantizer_and_the_form_the_arm() -> None:
    quantizers, arms = ("sq", "rdoq", "tcq8"), ("decoder", "base", "decoder+hyper", NOISE)
    curves = [curve(arm, quantizer) for arm in arms for quantizer in quantizers]
    curves += [Curve("vtm", SQ.figures), Curve("bpg", SQ.figures), curve("base", "tcq8", name="again")]
    looks = styles(curves, "base sq")
    assert len({(one.colour, one.shape, one.dash) for one in looks.values()}) == len(curves)
    for quantizer in quantizers:
        assert len({looks[f"{arm} {quantizer}"].colour for arm in arms} - {"#111111"}) == 1
    for arm in arms:
        assert len({(looks[f"{arm} {one}"].shape, looks[f"{arm} {one}"].dash) for one in quantizers}) == 1
    assert looks["base tcq8"].dash == SOLID and len({looks[f"{arm} tcq8"].dash for arm in arms}) == 4
    colours = {looks[name].colour for name in ("vtm", "bpg", "decoder sq", "decoder rdoq", "decoder tcq8")}
    assert len(colours) == 5


def write(file: Path, curves: Sequence[Curve]) -> None:
    write_points(file, "run", [point for one in curves for point in one.points])
