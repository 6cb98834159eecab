"""The report: curves over several files, tables, charts, and files that are odd."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from typer.testing import CliRunner

from lic_dist.app.cli import app
from lic_dist.drawing import INK
from lic_dist.errors import LicError, UsageError
from lic_dist.evaluation.results import Figures, Point, write_points
from lic_dist.reporting.charts import charts
from lic_dist.reporting.comparison import against, best
from lic_dist.reporting.curves import Curve, collect, curve_of
from lic_dist.reporting.findings import Findings
from lic_dist.reporting.frames import read_results
from lic_dist.reporting.gains import lambda_changes
from lic_dist.reporting.panels import Chart, page_spec
from lic_dist.reporting.report import report
from lic_dist.reporting.styles import styles
from tests.points import detailed, measured, of_arm


def names(*files: Path) -> list[tuple[str, int]]:
    return [(curve.name, len(curve.figures)) for curve in collect(files).curves]


# curves


def test_points_of_one_arm_and_quantizer_are_a_curve_in_whichever_files(tmp_path: Path) -> None:
    file = tmp_path / "kodak.json"
    arms = [of_arm(measured(quantizer), arm) for arm in ("base", "decoder noise") for quantizer in ("sq", "tcq8")]
    write_points(file, "my run", [point for arm in arms for point in arm])
    assert names(file) == [("base sq", 5), ("base tcq8", 5), ("decoder noise sq", 5), ("decoder noise tcq8", 5)]
    with pytest.raises(UsageError, match="there are base sq, base tcq8"):
        collect([file]).named("sq")
    write_points(file, "my run", arms[0][::-1])
    (curve,) = collect([file]).curves
    assert [one.bpp for one in curve.figures] == sorted(one.bpp for one in curve.figures)
    assert curve.name == "base sq" and curve.folders == (tmp_path,) * 5


def test_a_file_for_each_checkpoint(tmp_path: Path) -> None:
    files = [tmp_path / f"{n}.json" for n in range(5)]
    for n, file in enumerate(files):
        write_points(file, f"kodak-0.0{n}", of_arm([measured("sq")[n], measured("tcq8", 0.9)[n]], "base"))
    found = collect(files)
    assert [curve.name for curve in found.curves] == ["base sq", "base tcq8"]
    assert [[point.lmbda for point in curve.points] for curve in found.curves] == [
        [0.0018 * 2**n for n in range(5)]
    ] * 2
    rates = against(*found.curves[:1], found.curves).comparisons[0]
    whole = against(curve_of("a", measured("sq")), [curve_of("b", measured("tcq8", 0.9))]).comparisons[0]
    assert rates.images == whole.images and rates.pchip == whole.pchip


def test_where_a_lambda_repeats_a_curve_is_split_by_what_differs(tmp_path: Path) -> None:
    points = of_arm(measured("sq"), "base")
    written = {"a0": points[:2], "a1": points[2:], "b0": points[:3], "b1": points[3:], "c": points[1:2]}
    files = [tmp_path / f"{stem}.json" for stem in written]
    for stem, file in zip(written, files, strict=True):
        write_points(file, f"{stem[0]} run", written[stem])
    assert names(*files) == [("base sq (a run)", 5), ("base sq (b run)", 5), ("base sq (c run)", 1)]
    for file in files[:4:2]:
        write_points(file, "one name", points)
    assert names(*files[:4:2]) == [("base sq (a0)", 5), ("base sq (b0)", 5)]
    seeds = [replace(point, seed=seed) for seed in (1, 2, 3) for point in points]
    write_points(files[0], "run", seeds)
    assert names(files[0]) == [("base sq (seed 1)", 5), ("base sq (seed 2)", 5), ("base sq (seed 3)", 5)]


def test_sets_of_pictures_are_curves_of_their_own(tmp_path: Path) -> None:
    points = of_arm(measured("sq"), "base")
    kodak, clic, both = (tmp_path / f"{stem}.json" for stem in ("kodak", "clic", "both"))
    write_points(kodak, "a run", points)
    write_points(clic, "a run", [replace(point, pictures="others") for point in points[3:]])
    assert names(kodak, clic) == [("base sq (kodak)", 5), ("base sq (clic)", 2)]
    write_points(both, "run", [*points[:2], *(replace(point, pictures="others") for point in points[2:])])
    assert names(both) == [("base sq", 2), ("base sq 2", 3)]


def test_a_label_groups_and_names(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    points = [*of_arm(measured("sq", lambdas=2), "base"), *of_arm(measured("sq")[2:], "decoder")]
    write_points(file, "run", points)
    assert [curve.name for curve in collect([file], "{quantizer} of {run}").curves] == ["sq of run"]
    write_points(file, "run", [*points, *of_arm(measured("sq", lambdas=2), "other")])
    found = [(curve.name, len(curve.points)) for curve in collect([file], "{quantizer}").curves]
    assert found == [("sq (base)", 2), ("sq (decoder)", 3), ("sq (other)", 2)]
    for label in ("{what}", "{", "{0}", "{arm.real.x}"):
        with pytest.raises(UsageError, match="no label") as caught:
            collect([file], label)
        assert caught.value.hint is not None and "{arm}" in caught.value.hint


@given(st.lists(st.tuples(*[st.sampled_from("ab")] * 3, st.sampled_from([1.0, 2.0])), min_size=1, max_size=12))
def test_every_point_is_in_one_curve_and_names_differ(rows: list[tuple[str, str, str, float]]) -> None:
    (image,) = measured("sq", lambdas=1, images=1)[0].images
    with TemporaryDirectory() as folder:
        for run in "ab":
            points = [
                Point("c", quantizer, lmbda, (image,), arm=arm) for which, arm, quantizer, lmbda in rows if which == run
            ]
            write_points(Path(folder) / f"{run}.json", run, points) if points else None
        curves = collect(sorted(Path(folder).iterdir())).curves
    assert sum(len(curve.points) for curve in curves) == len(rows)
    assert len({curve.name for curve in curves}) == len(curves)
    assert all(len({(point.arm, point.quantizer) for point in curve.points}) == 1 for curve in curves)


def test_published_files_stay_on_their_own(tmp_path: Path) -> None:
    for stem in ("one", "two"):
        content = {"name": "sq", "results": {"bpp": [1, 2], "psnr-rgb": [30, 32]}}
        (tmp_path / f"{stem}.json").write_text(json.dumps(content))
    write_points(tmp_path / "ours.json", "ours", [*of_arm(measured("sq"), "base"), *of_arm(measured("tcq8"), "base")])
    shown = [tmp_path / f"{stem}.json" for stem in ("ours", "one", "two")]
    assert [name for name, _ in names(*shown)] == ["base sq", "base tcq8", "sq (one)", "sq (two)"]


def test_results_as_a_data_frame(tmp_path: Path) -> None:
    write_points(tmp_path / "a.json", "run", of_arm([*measured("sq"), *measured("tcq8", 0.9)], "base"))
    rows = read_results([tmp_path / "a.json"])
    assert len(rows) == 2 * 5 * 3 and set(rows.curve) == {"base sq", "base tcq8"}
    means = rows.groupby(["curve", "lmbda"]).bpp.mean().loc["base sq"]
    assert list(means) == pytest.approx([0.2 * 2.0**n for n in range(5)])


# tables


def test_the_best_curve() -> None:
    sq, worse, better = (curve_of(name, measured(name, factor)) for name, factor in (("a", 1), ("b", 1.1), ("c", 0.9)))
    far = Curve("far", tuple(Figures(one.bpp / 2, one.psnr, None) for one in sq.figures))
    table = against(sq, [sq, worse, far, better])
    assert [best(table, found).name for found in (("b", "c"), ("b",), ())] == ["c", "b", "far"]
    assert best(against(sq, [sq]), ()) is None


@pytest.mark.slow
def test_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_points(tmp_path / "a.json", "run", detailed(of_arm([*measured("sq"), *measured("tcq8", 0.9)], "base")))
    write_points(tmp_path / "b.json", "run", of_arm(measured("sq", lambdas=3), "short"))
    files = [tmp_path / "a.json", tmp_path / "b.json"]
    (found, again) = report(files, ["base sq", "base tcq8", "base sq"], tmp_path / "out").tables
    first, second = found.comparisons
    assert [(one.name, one.points) for one in (first, second)] == [("base tcq8", 5), ("short sq", 3)]
    assert first.pchip is not None and first.images is not None
    assert first.images.mean == pytest.approx(100 * (0.9 + 0.81 + 0.729 - 3) / 3)
    assert second.pchip is None and second.notes == ("the curve has 3 points, a BD-rate needs 4",)
    assert again.anchor.name == "base tcq8" and again.comparisons[0].images.mean > 18
    page, shown = (tmp_path / "out/results.md").read_text(), capsys.readouterr().out
    assert "| base tcq8 | 5 | -2" in page and "-18.70 % [-27.10, -10.00]" in page
    assert "| short sq | 3 |  |  |  |  |  |  | a |" in page and "- a: the curve has 3 points" in page
    assert "| MS-SSIM: PCHIP | MS-SSIM: mean of images [95 %] | note |" in page
    assert page.count("-18.70 % [-27.10, -10.00]") == 2 and shown.count("-18.70 %") == 2
    assert "+0.10 %" in page  # written against estimated
    assert "# BD-rate against base tcq8" in page and "| base sq | 0.500 | 0.250 | 0.39 |" in page
    assert "-18.70 %" in shown and "BD-rate against base tcq8" in shown and "MB" in shown
    plots = re.findall(r"\]\((.*\.png)\)", page)
    assert plots == ["rd.png", "saving.png", "images.png", "gains.png", "latents.png"]
    for plot in plots:
        assert Image.open(tmp_path / "out" / plot).size[0] > 800
        assert "<svg" in (tmp_path / "out" / plot).with_suffix(".svg").read_text()
    html = (tmp_path / "out/report.html").read_text()
    assert "\N{MINUS SIGN}18.70 %" in html and 'id="viewer"' not in html
    with pytest.raises(UsageError, match="no curve is named 'base'"):
        report(files, ["base"], tmp_path / "out")
    (tmp_path / "file").write_text("")
    with pytest.raises(LicError, match="cannot write"):
        report(files, ["base sq"], tmp_path / "file")
    (found,) = report(files, ["base sq"], tmp_path / "out", ["s*t sq", "base sq"]).tables
    assert [one.name for one in found.comparisons] == ["short sq"]
    assert "tcq8" not in (tmp_path / "out/results.md").read_text()
    with pytest.raises(UsageError, match=r"no curve matches 'tcq8'"):
        report(files, ["base sq"], tmp_path / "out", ["tcq8"])


@pytest.mark.slow
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


# charts


def drawn(curves: list[Curve]) -> dict[str, Chart]:
    looks = styles(curves, curves[0].name)
    return {one.name: one for one in charts(Findings.of(curves, curves[:1]), looks)}


def rows_of(spec: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of all data sets of a panel."""
    return [row for rows in spec["datasets"].values() for row in rows]


def test_a_panel_has_the_figures_of_its_points() -> None:
    points = {"base": measured("sq"), "a < b": measured("tcq8", 0.9)}
    found = drawn([curve_of(name, one) for name, one in points.items()])
    spec = page_spec(found["rd"].panels[0])
    rows = {(row["curve"], row["lambda"]): (row["bpp"], row["quality"]) for row in rows_of(spec)}
    assert rows == {
        (name, f"{point.lmbda:g}"): (point.figures.bpp, point.figures.psnr)
        for name, one in points.items()
        for point in one
    }
    assert {"name": "picked", "value": []} in spec["params"] and spec["config"]["legend"] == {"disable": True}
    change = lambda_changes(*(curve_of(name, one) for name, one in points.items()))[points["base"][0].lmbda]
    rows = [row for row in rows_of(page_spec(found["gains"].panels[0])) if row.get("lmbda") == "0.0018"]
    assert [(row["mean"], row["low"], row["high"]) for row in rows] == [(change.mean, change.low, change.high)]


def test_a_picture_that_equals_its_original_breaks_the_line() -> None:
    points = measured("sq")
    equal = replace(points[1], images=(replace(points[1].images[0], psnr=math.inf), *points[1].images[1:]))
    spec = page_spec(drawn([curve_of("a", [points[0], equal, *points[2:]])])["rd"].panels[0])
    assert [row["quality"] for row in rows_of(spec)].count(None) == 1
    assert "NaN" not in json.dumps(spec) and "Infinity" not in json.dumps(spec)


def test_retrained_curves_are_drawn_against_their_own_base() -> None:
    arms = {"base": measured("tcq8"), "decoder": measured("tcq8", 0.9)}
    panels = drawn([curve_of(arm, of_arm(points, arm)) for arm, points in arms.items()])["gains"].panels
    assert [one.title for one in panels] == ["L against base [%]", "L against the same quantizer on the base [%]"]
    assert {row["curve"] for row in rows_of(page_spec(panels[1])) if "curve" in row} == {"decoder"}


def test_broken_statistics_are_not_drawn() -> None:
    points = detailed(measured("sq"))
    odd = [replace(point, channel_bits=(math.nan, 1.0), k_counts=(1, 2)) for point in points]
    for each, names_ in ((points, ["latents"]), (odd, [])):
        curves = [curve_of("a", each)]
        assert [name for name in drawn(curves) if name == "latents"] == names_


def test_decoders_of_equal_bits_are_set_against_each_other_by_every_metric() -> None:
    points = [replace(one, model=f"m{n}") for n, one in enumerate(measured("tcq8", lambdas=1) * 3)]
    worse = tuple(replace(row, psnr=row.psnr - 1) for row in points[2].images)
    points[2] = replace(points[2], images=worse)
    (panel,) = drawn([curve_of(f"w {n}", [one]) for n, one in enumerate(points)])["tradeoff"].panels
    assert panel.title.startswith("MS-SSIM")
    rows = {row["curve"]: row["psnr"] for row in rows_of(page_spec(panel)) if "psnr" in row}
    assert rows == {f"w {n}": one.figures.psnr for n, one in enumerate(points)}
    others = [
        replace(one, images=tuple(replace(row, bpp=row.bpp + n) for row in one.images)) for n, one in enumerate(points)
    ]
    for curves in (points[:2], others):  # too few, and of other bits
        assert "tradeoff" not in drawn([curve_of(f"w {n}", [one]) for n, one in enumerate(curves)])


def test_styles_of_many_curves_differ() -> None:
    curves = [Curve(str(n), (Figures(1, 1, None),)) for n in range(17)]
    looks = styles(curves, "3")
    assert list(looks)[0] == "3" and looks["3"].colour == INK
    assert len({(one.colour, one.shape, one.dash) for one in looks.values()}) == 17


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


@pytest.mark.slow
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
