"""A report of one lambda: L leads, with an anchor that need not be named and a headline that can be trusted."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lic_dist.app.cli import app
from lic_dist.errors import UsageError
from lic_dist.evaluation.results import Point, write_points
from lic_dist.reporting.curves import collect
from lic_dist.reporting.findings import Findings
from tests.points import markup, measured

pytestmark = pytest.mark.usefixtures("no_chart_files")
RATES = {
    ("base", "sq"): 1.0,
    ("base", "tcq8"): 0.97,
    ("decoder", "tcq8"): 0.95,
    ("decoder straight-through", "tcq8"): 0.9,
}


def points(images: int = 9, rates: dict[tuple[str, str], float] | None = None) -> list[Point]:
    """One lambda; the control has the least L of all."""
    return [
        replace(measured(quantizer, factor, 1, images)[0], arm=arm)
        for (arm, quantizer), factor in (rates or RATES).items()
    ]


def written(folder: Path, *of: Point) -> Path:
    write_points(folder / "run.json", "run", of or points())
    return folder / "run.json"


def found(file: Path) -> Findings:
    collection = collect([file])
    return Findings.of(collection.curves, [collection.named("base sq")])


@pytest.mark.slow
def test_without_an_anchor_it_is_the_base_with_sq(tmp_path: Path) -> None:
    file = written(tmp_path)
    done = CliRunner().invoke(app, ["report", str(file), "--out", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    assert "9 pictures, against base sq" in done.output


def test_the_control_is_named_as_such_and_never_the_headline(tmp_path: Path) -> None:
    (lead,) = found(written(tmp_path)).leads
    assert [row.name for row in lead.rows][-1] == "decoder straight-through tcq8 (control)"
    assert lead.rows[-1].gain.loss == min(row.gain.loss for row in lead.rows)
    assert lead.best is not None and lead.best.name == "decoder tcq8"


@pytest.mark.slow
def test_of_one_lambda_there_are_no_bd_rates_and_no_empty_grids(tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = CliRunner().invoke(app, ["report", str(written(tmp_path)), "--out", str(out)])
    for text in (done.output, (out / "results.md").read_text(), (out / "report.html").read_text()):
        assert "BD-rate" not in text and "Quantizers and arms" not in text
        assert "L = lambda 255^2 MSE + bpp" in " ".join(text.split())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("images", "said"), [(1, "one picture: that proves nothing"), (3, "few pictures prove little")]
)
def test_a_headline_of_few_pictures_says_so(images: int, said: str, tmp_path: Path) -> None:
    file = written(tmp_path, *points(images))
    CliRunner().invoke(app, ["report", str(file), "--out", str(tmp_path / "out")])
    cards = (tmp_path / "out/report.html").read_text()
    assert said in cards[cards.index('class="cards"') : cards.index("<nav")]


@pytest.mark.slow
@pytest.mark.parametrize("arm", ["decoder+hyper+bottleneck round 2, all-but-encoder noise", "a" * 70])
def test_tables_fit_80_columns_with_the_longest_names(arm: str, tmp_path: Path) -> None:
    file = written(tmp_path, *points(rates={**RATES, (arm, "tcq32-adapted-again"): 0.96}))
    done = CliRunner(env={"COLUMNS": "80"}).invoke(app, ["report", str(file), "--out", str(tmp_path / "out")])
    table = done.output[: done.output.index("L = lambda")]
    assert max(map(len, table.splitlines())) <= 80
    assert re.search(r"-\d\.\d\d %\s", table) and "[-" in table


def test_an_anchor_that_is_several_curves_names_those_alone(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_points(tmp_path / f"{name}.json", name, points())
    with pytest.raises(UsageError, match="2 curves are 'base sq'") as caught:
        collect([tmp_path / "a.json", tmp_path / "b.json"]).named("base sq")
    assert caught.value.hint == "give one as the anchor: base sq (a), base sq (b)"


@pytest.mark.slow
def test_the_page_has_contents_that_lead_to_its_sections(tmp_path: Path) -> None:
    CliRunner().invoke(app, ["report", str(written(tmp_path)), "--out", str(tmp_path / "out")])
    page = markup((tmp_path / "out/report.html").read_text())
    links = re.findall(r'<li><a href="#(part-\d+)">(.*?)</a></li>', page)
    assert links == [(found[1], found[2]) for found in re.finditer(r'<h2 id="(part-\d+)">(.*?)</h2>', page)]
    assert len(links) >= 4 and "<h2>" not in page
