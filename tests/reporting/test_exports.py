"""What a report writes for other programs, by those programs' own readers where they are at hand."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from lic_dist.errors import LicError, UsageError
from lic_dist.evaluation.jobs import distinct_file_names
from lic_dist.evaluation.results import Point, read_file, write_points
from lic_dist.models.compat import import_compressai
from lic_dist.reporting.codec_compare import NO_ERROR, batch
from lic_dist.reporting.curves import Curve, collect, curve_of
from lic_dist.reporting.document import sections
from lic_dist.reporting.exports import EXPORTS, compressai_content, write_exports
from lic_dist.reporting.findings import Findings
from lic_dist.reporting.frames import read_results
from lic_dist.reporting.latex import escaped, tabular, write_latex
from lic_dist.reporting.report import report
from lic_dist.reporting.tables import Cell, Section, Table
from tests.points import measured, of_arm

HOSTILE = r"50% of_{a} & \b $c$ #~^ <|> [x]"


def anchor(step: int) -> Point:
    (point,) = measured("webp", 1.3, 1)
    rows = tuple(replace(row, bpp=row.bpp * 2.0**step, container_bpp=0.0) for row in point.images)
    return replace(
        point, checkpoint=f"quality {10 * step + 5}", lmbda=None, images=rows, versions="Pillow, libwebp 1.5"
    )


@pytest.fixture()
def curves(tmp_path: Path) -> tuple[Curve, ...]:
    """Those of two quantizers, one of them of seeded models, of a classic codec, and a published one."""
    own = [*of_arm(measured("sq"), "base"), *of_arm(measured(HOSTILE, 0.9), "decoder")]
    own = [replace(point, seed=3) if point.arm == "decoder" else point for point in own]
    write_points(tmp_path / "a.json", "run", [*own, *(anchor(step) for step in range(4))])
    published = {"name": "VTM", "results": {"bpp": [0.2, 0.4], "psnr-rgb": [30.0, 33.0]}}
    (tmp_path / "b.json").write_text(json.dumps(published))
    return collect([tmp_path / "a.json", tmp_path / "b.json"]).curves


def test_curves_are_read_again_as_published_ones(curves: tuple[Curve, ...], tmp_path: Path) -> None:
    (folder,) = write_exports(["compressai"], curves, (), tmp_path / "out")
    files = sorted(folder.iterdir())
    assert [file.name for file in files] == ["VTM.json", "base-sq.json", "decoder-50-of_-a-b-c-x.json", "webp.json"]
    again = collect(files).curves
    assert {curve.name: [one.psnr for one in curve.figures] for curve in again} == {
        curve.name: [one.psnr for one in curve.figures] for curve in curves
    }
    assert "lmbda" not in json.loads(files[3].read_text())["results"]  # a classic codec has none
    assert read_file(files[1]).figures[2].ms_ssim == curves[0].figures[2].ms_ssim


def test_a_figure_that_a_point_lacks_is_no_list(curves: tuple[Curve, ...]) -> None:
    first, *others = curves[0].points
    equal = replace(first, images=tuple(replace(row, psnr=math.inf) for row in first.images))
    small = replace(others[0], images=tuple(replace(row, ms_ssim=None) for row in others[0].images))
    found = compressai_content(curve_of("x", [equal, small, *others[1:]]))["results"]
    assert set(found) == {"bpp", "psnr-rgb", "encoding_time", "decoding_time", "lmbda"}
    assert {len(values) for values in found.values()} == {4} and first.lmbda not in found["lmbda"]


@pytest.mark.slow
def test_compressai_plots_the_curves(curves: tuple[Curve, ...], tmp_path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import_compressai()
    from compressai.utils.plot import __main__ as plot

    (folder,) = write_exports(["compressai"], curves, (), tmp_path)
    files = [str(folder / f"{name}.json") for name in ("base-sq", "webp")]
    plot.main(["-f", *files, "-m", "ms-ssim", "-o", str(tmp_path / "x.png")])
    assert (tmp_path / "x.png").stat().st_size > 10_000
    read = plot.parse_json_file(files[0], "psnr")
    assert (read["name"], len(read["xs"]), len(read["ys"])) == ("base sq", 5, 5)


def test_rows_are_those_of_the_data_frame(curves: tuple[Curve, ...], tmp_path: Path) -> None:
    csv, parquet = write_exports(["csv", "parquet", "csv"], curves, (), tmp_path / "out")
    expected = read_results([tmp_path / "a.json"])
    assert len(expected) == 2 * 5 * 3 + 4 * 3
    for found in (pd.read_csv(csv, float_precision="round_trip"), pd.read_parquet(parquet)):
        assert list(found.columns) == list(expected.columns)
        for name in ("curve", "image", "bpp", "psnr", "ms_ssim"):
            assert found[name].tolist() == expected[name].tolist(), name
        assert found.lmbda.isna().sum() == 4 * 3 and found.seed.dropna().unique().tolist() == [3]
    assert ",3,0.0018," in csv.read_text() and pd.read_parquet(parquet).seed.dtype == "Int64"


def test_without_measured_curves_there_are_no_rows(curves: tuple[Curve, ...], tmp_path: Path) -> None:
    for path in write_exports(list(EXPORTS), curves[-1:], (), tmp_path):
        assert path.exists()
    assert json.loads((tmp_path / "codec-compare/batches.json").read_text()) == []


# LaTeX


def rows_of_cells(text: str) -> list[list[str]]:
    """The cells of a tabular, its braces and commands taken apart: raises AssertionError where they do not fit."""
    plain = re.sub(r"^%.*\n", "", text, flags=re.MULTILINE)
    depth, cells, rows = 0, [""], []
    for token in re.findall(r"\\[a-zA-Z]+|\\.|[{}&%$#_^~]|[^\\{}&%$#_^~]", plain, re.DOTALL):
        depth += {"{": 1, "}": -1}.get(token, 0)
        assert depth >= 0 and token not in ("%", "#", "_", "^", "~")
        if token == "&" and not depth:
            cells.append("")
        elif token == "\\\\" and not depth:
            rows.append(cells)
            cells = [""]
        else:
            cells[-1] += token
    assert depth == 0 and plain.count("$") % 2 == plain.count(r"\$") % 2
    return rows


def test_tables_are_tabulars(curves: tuple[Curve, ...], tmp_path: Path) -> None:
    found = Findings.of(curves, curves[:1])
    parts = sections(found, ())
    (document,) = write_exports(["latex"], curves, parts, tmp_path)
    text = document.read_text()
    inputs = re.findall(r"\\input\{([^}]*)\}", text)
    assert len(inputs) == sum(len(part.tables) for part in parts) == len(set(inputs)) > 4
    assert text.startswith(r"\documentclass") and text.endswith("\\end{document}\n")
    for name, table in zip(inputs, (table for part in parts for table in part.tables), strict=True):
        rows = rows_of_cells((tmp_path / "latex" / f"{name}.tex").read_text())
        assert len(rows) == 1 + len(table.rows) and {len(row) for row in rows} == {len(table.columns)}
    rates = (tmp_path / "latex" / f"{inputs[0]}.tex").read_text()
    assert r"decoder 50\% of\_\{a\} \& \textbackslash{}b \$c\$ \#" in rates and r"$-$18.70 \%" in rates


def test_what_explains_a_section_has_its_names_in_a_fixed_width(tmp_path: Path) -> None:
    section = Section("a & b", "of `a_b` & 5 %", (Table("", ("x",), ((Cell("y"),),)),))
    write_latex([section], tmp_path)
    text = (tmp_path / "all.tex").read_text()
    assert "\\section*{a \\& b}\nof \\texttt{a\\_b} \\& 5 \\%\n" in text and "{\\input{a-b}}" in text


def test_a_cell_is_no_argument_of_the_row_before_it() -> None:
    rows = ((Cell("[a]"), Cell("-1.5\n[-2, -1]")), (Cell("*b"), Cell("1e-5")))
    text = tabular(Table("t", ("x", "y-z"), rows, notes=("50 % only",)))
    assert text.startswith("% a: 50 \\% only\n\\begin{tabular}{@{}lr@{}}")
    assert r"{}[a] & \shortstack[r]{$-$1.5 \\ {}[$-$2, $-$1]} \\" in text
    assert r"{}*b & 1e-5 \\" in text and r"x & y-z \\" in text


def test_signs_that_fonts_lack_are_question_marks() -> None:
    assert escaped("caf\u00e9 \u00b1 \u6f22\n\u200b") == "caf\u00e9 $\\pm$ ???"


# Codec-Compare


def assert_codec_compare(content: dict[str, Any]) -> None:
    """The format of Codec-Compare's README, and what its entry_loader.ts refuses."""
    for kind in ("constant", "field"):
        said = content[f"{kind}_descriptions"]
        assert all(len(one) == 1 and isinstance(*one.values(), str) for one in said)
        assert len({name for one in said for name in one}) == len(said) >= 1
    assert len(content["constant_values"]) == len(content["constant_descriptions"])
    assert all(isinstance(value, str) for value in content["constant_values"])
    names = [name for one in content["field_descriptions"] for name in one]
    for row in content["field_values"]:
        assert len(row) == len(names) and isinstance(row[0], str)
        assert all(isinstance(value, int | float) and math.isfinite(value) for value in row[1:])


def test_batches_are_of_the_documented_format(curves: tuple[Curve, ...], tmp_path: Path) -> None:
    (listed,) = write_exports(["codec-compare"], curves, (), tmp_path)
    names = json.loads(listed.read_text())
    assert names == [["base-sq.json"], ["decoder-50-of_-a-b-c-x.json"], ["webp.json"]]
    found = [json.loads((listed.parent / name).read_text()) for (name,) in names]
    for content in found:
        assert_codec_compare(content)
    fields = [name for one in found[0]["field_descriptions"] for name in one]
    assert fields[:5] == ["original_name", "width", "height", "quality", "encoded_size"]
    assert fields[5:] == ["encoding_time", "decoding_time", "psnr", "msssim"]
    row = curves[0].points[0].images[0]
    size = round((row.bpp + row.container_bpp) * 512 * 768 / 8)
    assert found[0]["field_values"][0][:5] == ["0.png", 768, 512, 0.0018, size]
    assert found[0]["constant_values"][2].startswith("q0, q1") and found[2]["constant_values"][2].endswith("1.5")
    assert [values[3] for values in found[2]["field_values"][::3]] == [5.0, 15.0, 25.0, 35.0]


def test_what_an_image_lacks_is_no_field_and_equal_pictures_have_99_decibels(curves: tuple[Curve, ...]) -> None:
    point = curves[0].points[0]
    rows = (replace(point.images[0], psnr=math.inf, ms_ssim=None), *point.images[1:])
    content = batch(curve_of("x", [replace(point, images=rows)]))
    assert list(content["field_descriptions"][-1]) == ["psnr"] and content["field_values"][0][-1] == NO_ERROR
    broken = replace(curves[2].points[0], checkpoint="best")
    with pytest.raises(LicError, match="webp has a point without a quality: 'best'"):
        batch(curve_of("x", [broken]))


# names


def test_names_of_files_differ() -> None:
    names = ["a b", "a/b", "A-b", "", "../x", "..", "a-b-2"]
    assert distinct_file_names(names) == ["a-b", "a-b-2", "A-b-3", "unnamed", "x", "unnamed-2", "a-b-2-2"]


def test_an_unknown_export_is_refused_before_anything_is_written(curves: tuple[Curve, ...], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no export is named 'excel'") as caught:
        report([tmp_path / "a.json"], (), tmp_path / "out", exports=["csv", "excel"])
    assert caught.value.hint == "there are compressai, csv, parquet, latex, codec-compare"
    assert not (tmp_path / "out").exists()
