"""What a report says of classic codecs, whose points have no lambda."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from lic_dist import config
from lic_dist.evaluation.results import Point, read_points, write_points
from lic_dist.evaluation.run import evaluate
from lic_dist.reporting.bd import overlap
from lic_dist.reporting.comparison import compare
from lic_dist.reporting.curves import collect, read_curves
from lic_dist.reporting.report import report
from tests.conftest import picture
from tests.points import image_result, measured, of_arm


def anchored(name: str, factor: float) -> list[Point]:
    """Points of a classic codec that needs `factor` times the rate at equal PSNR, beyond both ends of `measured`."""
    points = []
    for number, point in enumerate(measured(name, lambdas=7)):
        rows = tuple(
            image_result(row.image, row.bpp * factor / 2, row.psnr - 6) for row in point.images
        )  # one step lower
        points.append(
            replace(
                point,
                lmbda=None,
                arm="",
                checkpoint=f"quality {10 * number}",
                images=rows,
                settings="<b>",
                record=str(number),
            )
        )
    return points


def test_a_bd_rate_against_a_classic_codec_has_an_interval_and_no_lambda(tmp_path: Path) -> None:
    write_points(tmp_path / "r.json", "r", [*of_arm(measured("sq"), "base"), *anchored("webp", 1.5)])
    ours, webp = read_curves([tmp_path / "r.json"])
    assert (ours.name, webp.name) == ("base sq", "webp") and webp.classic and ours.learned and not webp.learned
    found = compare(webp, ours)
    assert found.pchip == pytest.approx(100 * (1 / 1.5 - 1), abs=1e-6) and not found.notes and found.trusted
    assert found.images is not None and found.images.mean == pytest.approx(found.pchip)
    assert overlap(webp, ours) == overlap(ours, webp) == 1
    assert collect([tmp_path / "r.json"]).named("webp").name == "webp"


def test_a_report_draws_classic_codecs_without_making_them_the_headline(tmp_path: Path, no_chart_files: None) -> None:
    best = [replace(one, arm="decoder") for one in measured("sq", 0.99)]
    points = [*of_arm(measured("sq"), "base"), *best, *anchored("vvc", 0.5)]
    write_points(tmp_path / "r.json", "r", points)
    found = report([tmp_path / "r.json"], [], tmp_path / "report")
    assert [curve.name for curve in found.curves] == ["base sq", "decoder sq", "vvc"] and found.best == ["decoder sq"]
    assert [one.name for one in found.tables[0].comparisons] == ["decoder sq", "vvc"]
    text = (tmp_path / "report" / "results.md").read_text()
    assert "# Classic codecs" in text and "| quality 30 |" in text
    page = (tmp_path / "report" / "report.html").read_text()
    assert "&lt;b&gt;" in page and "lambda 0.0018, 0.0036" in page
    found = report([tmp_path / "r.json"], ["vvc"], tmp_path / "against")
    assert [one.name for one in found.tables[0].comparisons] == ["base sq", "decoder sq"]
    one_lambda = [point for point in points if point.lmbda in (None, 0.0018)]
    write_points(tmp_path / "one.json", "r", one_lambda)
    assert len(report([tmp_path / "one.json"], [], tmp_path / "one").leads) == 1


@pytest.mark.slow
def test_the_viewer_shows_each_classic_codec_at_the_nearest_rate(tmp_path: Path, no_chart_files: None) -> None:
    (tmp_path / "pictures").mkdir()
    for seed in (0, 1):
        Image.fromarray(picture(seed, 64, 96)).save(tmp_path / "pictures" / f"{seed}.png")
    section = {"images": str(tmp_path / "pictures"), "anchors": {"jpeg": [5, 20, 50, 80]}, "show": ["1.png"]}
    given = {"engine": {"name": "local"}, "evaluate": {**section, "out": str(tmp_path / "r.json")}}
    out = evaluate(config.Experiment.model_validate(given))
    jpeg = read_points(out)
    nearest = jpeg[2].images[1]
    learned = replace(
        jpeg[0], lmbda=0.01, arm="base", quantizer="sq", settings="", versions="",
        images=tuple(replace(row, bpp=1.02 * nearest.bpp) for row in jpeg[0].images),
    )  # fmt: skip
    content = json.loads(out.read_text())
    write_points(out, "r", [learned, *jpeg], originals=content["originals"])
    report([out], ["base sq"], tmp_path / "report")
    page = (tmp_path / "report" / "report.html").read_text()
    assert page.count(f'"figures":"{nearest.bpp:.3f} bpp, {nearest.psnr:.2f} dB"') == 1
    others = [row.bpp for point in jpeg for row in point.images[1:2] if row is not nearest]
    assert not any(f'"figures":"{bpp:.3f} bpp' in page for bpp in others)
