"""The report: curves over several files, tables, plots, and files that are odd."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from html import escape
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from typer.testing import CliRunner

from lic_dist.app.cli import app
from lic_dist.errors import LicError, UsageError
from lic_dist.evaluation.charts import charts, svg
from lic_dist.evaluation.comparison import against, best, times
from lic_dist.evaluation.curves import collect
from lic_dist.evaluation.findings import Findings
from lic_dist.evaluation.gains import lambda_changes
from lic_dist.evaluation.report import report
from lic_dist.evaluation.results import Curve, Figures, Point, curve_of, write_points
from lic_dist.evaluation.styles import styles
from tests.test_evaluation import measured


def detailed(points: list[Point]) -> list[Point]:
    """With what an evaluation tells of channels and indices."""
    return [
        replace(point, channel_bits=(0.2, 0.5 - n / 100, 0.1), k_counts=tuple(range(17)), z_bpp=0.01)
        for n, point in enumerate(points)
    ]


def of_arm(points: list[Point], arm: str) -> list[Point]:
    return [replace(point, arm=arm) for point in points]


def names(*files: Path) -> list[tuple[str, int]]:
    return [(curve.name, len(curve.figures)) for curve in collect(files).curves]


# curves


def test_one_file_of_lambdas_quantizers_and_arms(tmp_path: Path) -> None:
    file = tmp_path / "kodak.json"
    arms = [of_arm(measured(quantizer), arm) for arm in ("base", "decoder noise") for quantizer in ("sq", "tcq8")]
    write_points(file, "my run", [point for arm in arms for point in arm])
    found = collect([file])
    assert names(file) == [("base sq", 5), ("base tcq8", 5), ("decoder noise sq", 5), ("decoder noise tcq8", 5)]
    assert found.named("base sq") is found.named("my run base sq") is found.curves[0]
    with pytest.raises(UsageError, match="there are base sq, base tcq8"):
        found.named("sq")
    write_points(file, "my run", [*arms[0], *arms[1]])
    assert names(file) == [("sq", 5), ("tcq8", 5)]
    write_points(file, "my run", arms[0])
    assert names(file) == [("my run", 5)]


def test_a_file_for_each_checkpoint(tmp_path: Path) -> None:
    files = [tmp_path / f"{n}.json" for n in range(5)]
    for n, file in enumerate(files):
        write_points(file, f"kodak-0.0{n}", of_arm([measured("sq")[n], measured("tcq8", 0.9)[n]], "base"))
    found = collect(files)
    assert found.full == {"sq": "kodak base sq", "tcq8": "kodak base tcq8"}
    assert [[point.lmbda for point in curve.points] for curve in found.curves] == [
        [0.0018 * 2**n for n in range(5)]
    ] * 2
    rates = against(*found.curves[:1], found.curves).comparisons[0]
    whole = against(curve_of("a", measured("sq")), [curve_of("b", measured("tcq8", 0.9))]).comparisons[0]
    assert rates.images == whole.images and rates.pchip == whole.pchip


def test_where_a_lambda_repeats_curves_stay_apart(tmp_path: Path) -> None:
    points = of_arm(measured("sq"), "base")
    written = {"a0": points[:2], "a1": points[2:], "b0": points[:3], "b1": points[3:], "c": points[1:2]}
    files = [tmp_path / f"{stem}.json" for stem in written]
    for stem, file in zip(written, files, strict=True):
        write_points(file, f"{stem[0]} run", written[stem])
    assert names(*files) == [("a run", 5), ("b run", 5), ("c run", 1)]
    other = tmp_path / "other.json"  # of other pictures
    write_points(other, "a run", [replace(point, pictures="others") for point in points[3:]])
    assert names(files[0], other) == [("a run (a0)", 2), ("a run (other)", 2)]
    mixed = [*points[:2], *(replace(point, pictures="others") for point in points[2:])]
    write_points(other, "mixed", mixed)
    assert names(other) == [("mixed (other)", 2), ("mixed (other) 2", 3)]


def test_published_files_stay_on_their_own(tmp_path: Path) -> None:
    for stem in ("one", "two"):
        content = {"name": "sq", "results": {"bpp": [1, 2], "psnr-rgb": [30, 32]}}
        (tmp_path / f"{stem}.json").write_text(json.dumps(content))
    write_points(tmp_path / "ours.json", "ours", [*of_arm(measured("sq"), "base"), *of_arm(measured("tcq8"), "base")])
    shown = [tmp_path / f"{stem}.json" for stem in ("ours", "one", "two")]
    assert [name for name, _ in names(*shown)] == ["ours base sq", "ours base tcq8", "sq (one)", "sq (two)"]


# tables


def test_the_best_curve_and_times() -> None:
    sq, worse, better = (curve_of(name, measured(name, factor)) for name, factor in (("a", 1), ("b", 1.1), ("c", 0.9)))
    far = Curve("far", tuple(Figures(one.bpp / 2, one.psnr, None) for one in sq.figures))
    table = against(sq, [sq, worse, far, better])
    assert [best(table, found).name for found in (("b", "c"), ("b",), ())] == ["c", "b", "far"]
    assert best(against(sq, [sq]), ()) is None
    slow = [replace(row, encode_seconds=float(n)) for n, row in enumerate(measured("sq", lambdas=1)[0].images)]
    (found,) = times([curve_of("x", [replace(measured("sq")[0], images=tuple(slow))]), far])
    assert (found.encode, found.decode, found.megapixels) == (1.0, 0.25, pytest.approx(0.393216))


def test_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_points(tmp_path / "a.json", "base", detailed([*measured("sq"), *measured("tcq8", 0.9)]))
    write_points(tmp_path / "b.json", "short", measured("sq", lambdas=3))
    files = [tmp_path / "a.json", tmp_path / "b.json"]
    (found, again) = report(files, ["base sq", "base tcq8", "base sq"], tmp_path / "out").tables
    first, second = found.comparisons
    assert [(one.name, one.points) for one in (first, second)] == [("base tcq8", 5), ("short", 3)]
    assert first.pchip is not None and first.images is not None
    assert first.images.mean == pytest.approx(100 * (0.9 + 0.81 + 0.729 - 3) / 3)
    assert second.pchip is None and second.notes == ("the curve has 3 points, a BD-rate needs 4",)
    assert again.anchor.name == "base tcq8" and again.comparisons[0].images.mean > 18
    page, shown = (tmp_path / "out/results.md").read_text(), capsys.readouterr().out
    assert "| base tcq8 | 5 | -2" in page and "-18.70 % [-27.10, -10.00]" in page
    assert "| short | 3 |  |  |  | a |" in page and "- a: the curve has 3 points" in page
    assert "+0.10 %" in page  # written against estimated
    assert "# BD-rate against base tcq8" in page and "| base sq | 0.500 | 0.250 | 0.39 |" in page
    assert "-18.70 %" in shown and "BD-rate against base tcq8" in shown and "MB" in shown
    plots = re.findall(r"\]\((.*\.png)\)", page)
    assert plots == ["rd.png", "saving.png", "images.png", "gains.png", "latents.png"]
    assert all(Image.open(tmp_path / "out" / plot).size[0] > 800 for plot in plots)
    html = (tmp_path / "out/report.html").read_text()
    assert "\N{MINUS SIGN}18.70 %" in html and 'id="viewer"' not in html
    with pytest.raises(UsageError, match="no curve is named 'base'"):
        report(files, ["base"], tmp_path / "out")
    (tmp_path / "file").write_text("")
    with pytest.raises(LicError, match="cannot write"):
        report(files, ["base sq"], tmp_path / "file")
    (found,) = report(files, ["base sq"], tmp_path / "out", ["s*t", "base sq"]).tables
    assert [one.name for one in found.comparisons] == ["short"]
    assert "tcq8" not in (tmp_path / "out/results.md").read_text()
    with pytest.raises(UsageError, match=r"no curve matches 'tcq8'"):
        report(files, ["base sq"], tmp_path / "out", ["tcq8"])


def test_the_command_takes_several_anchors(tmp_path: Path) -> None:
    for name, factor in (("sq", 1.0), ("vtm", 0.8)):
        figures = [point.figures for point in measured("sq", factor)]
        results = {"bpp": [one.bpp for one in figures], "psnr-rgb": [one.psnr for one in figures]}
        (tmp_path / f"{name}.json").write_text(json.dumps({"name": name, "results": results}))
    asked = ["report", *(str(tmp_path / f"{name}.json") for name in ("sq", "vtm")), "--out", str(tmp_path / "out")]
    found = CliRunner().invoke(app, [*asked, "--anchor", "sq", "--anchor", "vtm"])
    assert found.exit_code == 0 and "against sq" in found.stdout and "against vtm" in found.stdout
    unnamed = CliRunner().invoke(app, asked).exception  # published curves have no base to take
    assert isinstance(unnamed, UsageError) and unnamed.message == "no curve is named 'base sq'"


def test_curves_of_one_name_are_told_apart(tmp_path: Path) -> None:
    for stem in ("first", "second"):
        write_points(tmp_path / f"{stem}.json", "run", measured("sq"))
    found = collect([tmp_path / "first.json", tmp_path / "second.json"])
    (rates,) = against(found.named("run (first)"), found.curves).comparisons
    assert (rates.name, rates.pchip) == ("run (second)", pytest.approx(0, abs=1e-9))


# plots


def test_a_panel_in_a_page_takes_the_pages_colours() -> None:
    curves = [curve_of("a", measured("sq")), curve_of("b", measured("tcq8", 0.9))]
    looks = styles(curves, "a")
    saving = next(one for one in charts(Findings.of(curves, curves[:1]), looks) if one.name == "saving")
    drawn = svg(saving.panels[0], looks, "x")
    assert drawn.count('class="series-1"') == 1 and "series-0" not in drawn
    assert "var(--c0)" in drawn and "currentColor" in drawn and "var(--grid)" in drawn
    assert not re.search(r"#[0-9a-f]{6}", drawn) and "http" not in drawn
    used, held = set(re.findall(r'(?:href="|url\()#(\w+)', drawn)), set(re.findall(r' id="(\w+)"', drawn))
    assert used and used <= held
    assert not held & set(re.findall(r' id="(\w+)"', svg(saving.panels[0], looks, "y")))


def test_retrained_curves_are_drawn_against_their_own_base() -> None:
    arms = {"base": measured("tcq8"), "decoder": measured("tcq8", 0.9)}
    curves = [curve_of(arm, of_arm(points, arm)) for arm, points in arms.items()]
    looks = styles(curves, "base")
    drawn = {one.name: one for one in charts(Findings.of(curves, curves[:1]), looks)}
    titles = [panel.title for panel in drawn["gains"].panels]
    assert titles == ["L against base [%]", "L against the same quantizer on the base [%]"]
    own = svg(drawn["gains"].panels[1], looks, "x")
    assert "series-1" in own and "series-0" not in own


def test_points_and_curves_have_their_figures_as_tooltips() -> None:
    points = {"base": measured("sq"), "a < b": measured("tcq8", 0.9)}
    curves = [curve_of(name, one) for name, one in points.items()]
    looks = styles(curves, "base")
    drawn = {one.name: one for one in charts(Findings.of(curves, curves[:1]), looks)}
    rd = svg(drawn["rd"].panels[0], looks, "x")
    for name, one in points.items():
        assert f"><title>{escape(name)}</title>" in rd
        for point in one:
            figures = point.figures
            said = f"{escape(name)}: rate [bit per pixel] {figures.bpp:.5g}, {figures.psnr:.5g}"
            assert f"<title>{said}</title></use>" in rd
    change = lambda_changes(curves[0], curves[1])[points["base"][0].lmbda]
    said = f"lambda {points['base'][0].lmbda:g}, {change.mean:.5g} [{change.low:.3g}, {change.high:.3g}]"
    assert said in svg(drawn["gains"].panels[0], looks, "x")


def test_broken_statistics_are_not_drawn() -> None:
    points = detailed(measured("sq"))
    odd = [replace(point, channel_bits=(math.nan, 1.0), k_counts=(1, 2)) for point in points]
    for each, names_ in ((points, ["latents"]), (odd, [])):
        curves = [curve_of("a", each)]
        drawn = charts(Findings.of(curves, curves[:1]), styles(curves, "a"))
        assert [one.name for one in drawn if one.name == "latents"] == names_


def test_styles_of_many_curves_differ() -> None:
    curves = [Curve(str(n), (Figures(1, 1, None),)) for n in range(17)]
    looks = styles(curves, "3")
    assert looks["3"].series == 0 and looks["3"].colour == "#111111"
    assert len({(one.colour, one.marker, one.line) for one in looks.values()}) == 17


# odd files


def good_files() -> list[dict[str, Any]]:
    published = {
        "name": "vtm",
        "description": "x",
        "meta": {"a": 1},
        "results": {"bpp": [0.1, 0.2, 0.4, 0.8], "psnr-rgb": [28.0, 30.0, 32.0, 34.0], "ms-ssim-rgb": [0.9] * 4},
    }
    file = Path("ours.json")
    row = {"image": "a.png", "height": 8, "width": 8, "ms_ssim": 0.9, "estimated_bpp": 1.0, "likelihood_bpp": None}
    row |= {"container_bpp": 0.1, "encode_seconds": 0.1, "decode_seconds": 0.1}
    points = [
        {
            "checkpoint": f"{n}.pth.tar",
            "quantizer": quantizer,
            "lmbda": 0.001 * 2**n,
            "images": [row | {"image": i, "bpp": 0.11 * 2**n, "psnr": 28.0 + 2 * n} for i in ("a.png", "b.png")],
            "arm": "base",
            "channel_bits": [0.1, 0.2],
            "k_counts": [1] * 17,
            "z_bpp": 0.1,
            "shown": {"a.png": "shown/a.png"},
        }
        for quantizer in ("sq", "tcq8")
        for n in range(4)
    ]
    ours = {"name": file.stem, "results": {}, "points": points, "originals": {"a.png": "a.png"}}
    return [published, ours]


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in JSON, by its keys."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, one in inner for place in places(one, (*path, key)))]


ODD = st.sampled_from(
    [None, True, 0, -1, 1e308, 10**400, math.nan, math.inf, 1e-300, "", "x$_{", "<b>|[/red]\ud800\0", [], {}, [[]], [1]]
)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")
@settings(max_examples=10, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_file_changed_anywhere_is_reported_or_one_clear_error(tmp_path: Path, data: st.DataObject) -> None:
    contents = good_files()
    content = data.draw(st.sampled_from(contents))
    for _ in range(data.draw(st.integers(1, 2))):
        place = data.draw(st.sampled_from(places(content)[1:]))
        parent = content
        for key in place[:-1]:
            parent = parent[key]
        if data.draw(st.integers(0, 3)) == 0:
            del parent[place[-1]]
        else:
            parent[place[-1]] = data.draw(ODD)
    files = [tmp_path / "vtm.json", tmp_path / "ours.json"]
    for file, one in zip(files, contents, strict=True):
        file.write_text(json.dumps(one))
    try:
        first = collect(files).curves[0].name
        report(files, [first], tmp_path / "out")
    except LicError as error:
        assert "\n" not in error.message and len(error.message) < 400
