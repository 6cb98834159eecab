"""Gains at one lambda, by hand: lambda 255^2 = 100, so that L = 100 MSE + bpp."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest

from lic_dist import intervals
from lic_dist.evaluation.results import ImageResult, Point, write_points
from lic_dist.reporting.curves import curve_of
from lic_dist.reporting.gains import gains, image_losses, lambda_changes
from lic_dist.reporting.report import report

pytestmark = pytest.mark.usefixtures("no_chart_files")
LMBDA = 100 / 255**2


def point(quantizer: str, arm: str, bpps: tuple[float, float], psnrs: tuple[float, float], record: str = "") -> Point:
    rows = tuple(
        ImageResult(f"{n}.png", 8, 8, bpp, psnr, None, bpp, math.nan, 0.1, 0.1, 0.1)
        for n, (bpp, psnr) in enumerate(zip(bpps, psnrs, strict=True))
    )
    return Point(f"{arm}.pth.tar", quantizer, LMBDA, rows, record=record or f"{quantizer} {arm}", arm=arm)


SQ_ADAPTED = point("sq-adapted", "base", (1.0, 2.0), (20.0, 20.0))  # L 2, 3
TCQ = point("tcq8", "base", (0.5, 1.5), (20.0, 20.0), record="cached")  # L 1.5, 2.5
RETRAINED = point("tcq8", "decoder+hyper", (0.25, 1.75), (20.0, 20.0))  # L 1.25, 2.75


def test_change_of_a_mean_with_its_interval() -> None:
    # draws of two images: both the first, one of each, both the second
    found = intervals.change_interval([1.0, 3.0], [2.0, 3.0])
    assert found == intervals.Interval(pytest.approx(-20), pytest.approx(-50), pytest.approx(0))
    assert intervals.change_interval([1.8, 2.7], [2.0, 3.0]) == intervals.Interval(*[pytest.approx(-10)] * 3)


def test_l_and_its_changes() -> None:
    (table,) = gains([RETRAINED, TCQ, SQ_ADAPTED])
    assert (table.lmbda, table.images) == (LMBDA, 2)
    base, retrained, sq = table.rows  # the base first
    assert (base.point, retrained.point, sq.point) == (TCQ, RETRAINED, SQ_ADAPTED)
    assert [row.loss for row in table.rows] == pytest.approx([2.0, 2.0, 2.5])
    assert image_losses(RETRAINED) == pytest.approx({"0.png": 1.25, "1.png": 2.75})
    assert base.own is None and sq.own is None and sq.sq_adapted is None
    assert base.sq_adapted == intervals.Interval(pytest.approx(-20), pytest.approx(-25), pytest.approx(-50 / 3))
    assert retrained.own == intervals.Interval(pytest.approx(0), pytest.approx(-50 / 3), pytest.approx(10))


def test_images_are_matched_by_name_and_equal_pictures_cost_no_distortion() -> None:
    turned = replace(RETRAINED, images=RETRAINED.images[::-1])
    assert gains([TCQ, turned])[0].rows[1].own == gains([TCQ, RETRAINED])[0].rows[1].own
    assert image_losses(point("sq", "base", (1.0, 2.0), (math.inf, 20.0))) == {"0.png": 1.0, "1.png": 3.0}


def test_lambdas_and_sets_of_images_stay_apart() -> None:
    other = replace(RETRAINED, lmbda=LMBDA / 2)
    fewer = replace(RETRAINED, images=RETRAINED.images[:1])
    elsewhere = replace(RETRAINED, pictures="others of the same names")
    found = gains([TCQ, RETRAINED, other, fewer, elsewhere])
    assert [(table.lmbda, table.images, len(table.rows)) for table in found] == [
        (LMBDA / 2, 2, 1),
        (LMBDA, 2, 2),
        (LMBDA, 1, 1),
        (LMBDA, 2, 1),
    ]
    assert all(row.own is None for table in (found[0], *found[2:]) for row in table.rows)


def test_the_bits_that_a_decoder_was_trained_on_are_compared_by_their_record() -> None:
    cached = point("tcq8-cached", "decoder", (0.5, 1.5), (20.0, 30.0), record="cached")  # L 1.5, 1.6
    unknown = replace(cached, quantizer="other", record="")
    rows = {row.point.quantizer: row for row in gains([TCQ, cached, unknown])[0].rows}
    own = rows["tcq8-cached"].own
    assert own is not None and own.mean == pytest.approx(100 * (3.1 / 4 - 1))
    assert rows["other"].own is None


def test_of_two_base_models_neither_is_taken_and_equal_points_count_once() -> None:
    again = replace(TCQ, checkpoint="elsewhere.pth.tar")
    rows = gains([TCQ, again, RETRAINED])[0].rows
    assert len(rows) == 2 and rows[1].own is not None
    worse = point("tcq8", "base", (1.0, 2.0), (20.0, 20.0))
    rows = gains([TCQ, replace(worse, checkpoint="worse.pth.tar"), RETRAINED])[0].rows
    assert [row.own for row in rows] == [None] * 3
    assert [row.arm for row in rows] == ["base (base.pth.tar)", "base (worse.pth.tar)", "decoder+hyper"]
    rows = gains([TCQ, worse, RETRAINED])[0].rows
    assert [row.arm for row in rows] == [
        "base (base.pth.tar, cached)",
        "base (base.pth.tar, tcq8 bas)",
        "decoder+hyper",
    ]


@pytest.mark.slow
def test_the_report_has_a_table_for_each_lambda(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_points(tmp_path / "a.json", "ours", [SQ_ADAPTED, TCQ, RETRAINED, replace(TCQ, lmbda=2 * LMBDA)])
    (tmp_path / "published.json").write_text('{"name": "vtm", "results": {"bpp": [1, 2], "psnr-rgb": [30, 32]}}')
    report([tmp_path / "published.json", tmp_path / "a.json"], ["vtm"], tmp_path / "out")
    page, shown = (tmp_path / "out/results.md").read_text(), capsys.readouterr().out
    assert "| tcq8 | decoder+hyper | 1.0000 | 20.000 | 2.0000 | +0.00 % [-16.67, +10.00] | 1.000 | -20.00 % [" in page
    assert page.count("## L at lambda 0.00") == shown.count("L at lambda 0.00") == 2
    assert "[-16.67, +10.00]" in shown
    report([tmp_path / "published.json"], ["vtm"], tmp_path / "out")
    assert "L at lambda" not in (tmp_path / "out/results.md").read_text()


def test_changes_of_l_between_curves() -> None:
    sq, tcq = curve_of("sq", [SQ_ADAPTED, replace(SQ_ADAPTED, lmbda=1.0)]), curve_of("tcq8", [TCQ])
    assert lambda_changes(sq, tcq) == {LMBDA: gains([SQ_ADAPTED, TCQ])[0].rows[1].sq_adapted}
    assert lambda_changes(sq, curve_of("tcq8", [replace(TCQ, images=TCQ.images[:1])])) == {}
    assert lambda_changes(sq, curve_of("tcq8", [TCQ, RETRAINED])) == {}  # which of the two?


def test_of_two_base_models_at_one_lambda_neither_is_taken() -> None:
    other = replace(point("sq", "base", (1.0, 1.0), (20.0, 20.0)), model="another")
    (table,) = gains([RETRAINED, TCQ, SQ_ADAPTED, other])
    assert all(row.own is None and row.sq_adapted is None for row in table.rows)
