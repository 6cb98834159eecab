"""Curves that differ in their seed alone: one cell of the grid and one row of each set, by brute force."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from pathlib import Path
from statistics import fmean, stdev

import numpy as np
import pytest

from lic_dist import intervals
from lic_dist.evaluation.results import write_points
from lic_dist.intervals import Interval, change_interval, mean_interval
from lic_dist.reporting.bd import rate_change
from lic_dist.reporting.charts import charts
from lic_dist.reporting.comparison import Rates, compare
from lic_dist.reporting.curves import Curve, collect, curve_of
from lic_dist.reporting.document import sections
from lic_dist.reporting.findings import Findings
from lic_dist.reporting.gains import gains, image_losses
from lic_dist.reporting.grid import grids_of
from lic_dist.reporting.seeds import joined
from lic_dist.reporting.signed_rank import shown, signed_rank
from lic_dist.reporting.styles import styles
from tests.points import measured

NAMES = ("kodak/0.png", "kodak/1.png", "hires/2.png")


@pytest.fixture(autouse=True)
def _few_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(intervals, "DRAWS", 300)


def curve(arm: str, factor: float, seed: int | None = None, lambdas: int = 5) -> Curve:
    """Of tcq8; its name has the seed."""
    points = [
        replace(
            one,
            arm=arm,
            seed=seed,
            images=tuple(replace(row, image=name) for row, name in zip(one.images, NAMES, strict=True)),
        )
        for one in measured("tcq8", factor, lambdas)
    ]
    return curve_of(f"{arm} tcq8 (seed {seed})", points)


BASE = curve("base", 1)
SEEDS = [curve("decoder", factor, seed) for seed, factor in enumerate((0.9, 0.92, 0.97), 1)]
NOISE = [curve("decoder noise", factor, seed) for seed, factor in enumerate((0.95, 0.96), 1)]


def close(one: Interval) -> Interval:
    return Interval(*map(pytest.approx, (one.mean, one.low, one.high)), one.seeds, pytest.approx(one.spread))


def over_seeds(found: list[Rates]) -> Interval:
    """The mean over images of each image's mean over seeds, and the spread of the seeds' means."""
    images = [fmean(one.rates[image] for one in found) for image in found[0].rates]
    means = [fmean(one.rates.values()) for one in found]
    assert fmean(images) == pytest.approx(fmean(means))
    return close(replace(mean_interval(images), seeds=len(found), spread=stdev(means)))


def test_a_cell_of_the_grid_is_the_mean_over_seeds() -> None:
    (grid,) = grids_of([BASE, *SEEDS]).grids
    cell, each = grid.cells["decoder", "tcq8"], [compare(BASE, one) for one in SEEDS]
    for quality in ("psnr", "ms-ssim"):
        rates = [one.by[quality] for one in each]
        assert cell.by[quality].pchip == pytest.approx(fmean(one.pchip for one in rates))
        assert cell.by[quality].images == over_seeds(rates)
        assert cell.by[quality].seeds == tuple(one.rates for one in rates)
    assert cell.akima == pytest.approx(fmean(one.akima for one in each))
    parts = {part.title: part for part in sections(Findings.of([BASE, *SEEDS], [BASE]), ())}
    text = parts["Quantizers and arms"].tables[0].rows[0][1].text
    spread = stdev(one.images.mean for one in each)
    assert text.split("\n")[2] == f"3 seeds, ± {spread:.2f}" and "the seeds' means" in parts["Quantizers and arms"].says
    alone = {part.title: part for part in sections(Findings.of([BASE, SEEDS[0]], [BASE]), ())}
    assert "seed" not in alone["Quantizers and arms"].says


def test_only_the_seed_may_differ() -> None:
    for other in (curve("decoder", 0.95, 1), curve("decoder", 0.95, 2, lambdas=4), curve("decoder", 0.95)):
        found = grids_of([BASE, SEEDS[0], other])
        assert found.grids == () or not found.grids[0].cells
        assert found.notes == (f"2 curves are decoder tcq8, none is in a grid: {SEEDS[0].name}, {other.name}",)
    same = curve("decoder", 0.9, 2)  # of another seed, though it measures what the first does
    (cell,) = grids_of([BASE, SEEDS[0], same]).grids[0].cells.values()
    assert cell.images is not None and (cell.images.seeds, cell.images.spread) == (2, 0)
    assert grids_of([BASE, SEEDS[0], SEEDS[0]]).grids[0].cells["decoder", "tcq8"] == compare(BASE, SEEDS[0])


def test_each_set_is_the_mean_over_seeds_with_their_spread() -> None:
    found = Findings.of([BASE, *SEEDS], [BASE]).sets
    assert found is not None
    anchored, own = found.tables
    rates = [compare(BASE, one).rates for one in SEEDS]
    means = np.array([[rates[n]["hires/2.png"], fmean(rates[n][name] for name in NAMES[:2])] for n in range(3)])
    for table, names in ((anchored, ("decoder tcq8",)), (own, ("tcq8", "decoder"))):
        (row,) = table.rates["psnr"]
        assert row.names == names
        assert [cell and (cell.mean, cell.seeds, cell.spread) for cell in row.cells] == [
            (pytest.approx(one.mean()), 3, pytest.approx(one.std(ddof=1))) for one in (*means.T, means.mean(axis=1))
        ]
    at = [(image_losses(one.points[0]), image_losses(BASE.points[0])) for one in SEEDS]
    of_kodak = [change_interval(*([losses[name] for name in NAMES[:2]] for losses in pair)).mean for pair in at]
    cell = own.changes[0].cells[1]
    assert cell is not None and (cell.mean, cell.spread) == pytest.approx((fmean(of_kodak), stdev(of_kodak)))


def test_arms_and_controls_of_several_seeds_are_paired_by_seed() -> None:
    found = Findings.of([BASE, *SEEDS, *NOISE], [BASE]).sets
    assert found is not None and found.tables[2].against == "its control"
    (row,) = found.tables[2].rates["psnr"]
    means = [compare(NOISE[n], SEEDS[n]).rates["hires/2.png"] for n in range(2)]
    cell = row.cells[0]
    assert cell is not None and (cell.mean, cell.seeds, cell.spread) == (
        pytest.approx(fmean(means)),
        2,
        pytest.approx(stdev(means)),
    )
    found = Findings.of([BASE, *SEEDS, NOISE[0]], [BASE]).sets
    assert found is not None
    cell = found.tables[2].rates["psnr"][0].cells[0]
    means = [compare(NOISE[0], one).rates["hires/2.png"] for one in SEEDS]
    assert cell is not None and (cell.mean, cell.seeds) == (pytest.approx(fmean(means)), 3)


def test_seeds_in_a_file_become_one_cell(tmp_path: Path) -> None:
    write_points(tmp_path / "a.json", "run", [point for one in (BASE, *SEEDS) for point in one.points])
    curves = collect([tmp_path / "a.json"]).curves
    assert [one.name for one in curves] == ["base tcq8", *(f"decoder tcq8 (seed {n})" for n in (1, 2, 3))]
    found = Findings.of(curves, curves[:1])
    assert found.grids.grids[0].cells["decoder", "tcq8"].images == over_seeds(
        [compare(BASE, one).by["psnr"] for one in SEEDS]
    )
    (row,) = found.tables[0].comparisons
    assert (row.name, row.by["psnr"]) == ("decoder tcq8", found.grids.grids[0].cells["decoder", "tcq8"].by["psnr"])
    assert [one.name for one in found.curves] == ["base tcq8", "decoder tcq8"] and found.parts == curves


def test_seeds_are_one_curve_of_means() -> None:
    base, mean = joined([BASE, *SEEDS])
    assert base is BASE and mean.name == "decoder tcq8" and mean.parts == tuple(SEEDS)
    for number, figures in enumerate(mean.figures):
        of_seeds = [one.points[number] for one in SEEDS]
        assert figures.bpp == pytest.approx(fmean(one.figures.bpp for one in of_seeds))
        assert figures.psnr == pytest.approx(fmean(one.figures.psnr for one in of_seeds))
        rows = zip(*(one.images for one in of_seeds), strict=True)
        for row, own in zip(mean.points[number].images, rows, strict=True):
            assert row.image == own[0].image and row.bpp == pytest.approx(fmean(one.bpp for one in own))
    alone = replace(BASE, name="decoder tcq8")
    assert [one.name for one in joined([alone, *SEEDS])] == ["decoder tcq8", "decoder tcq8 (mean of seeds)"]


def test_an_anchor_of_several_seeds_is_paired_with_theirs_and_one_of_them_with_the_others() -> None:
    noise = joined(NOISE)[0]
    (_, rows) = (table := Findings.of([BASE, *SEEDS, *NOISE], [noise]).tables[0]).comparisons
    assert (table.anchor, rows.name) == (noise, "decoder tcq8")
    assert rows.by["psnr"].images == over_seeds([compare(*pair).by["psnr"] for pair in zip(NOISE, SEEDS, strict=False)])
    alone, others = Findings.of(SEEDS, SEEDS[:1]).tables[0].comparisons, [compare(SEEDS[0], one) for one in SEEDS[1:]]
    assert [one.by["psnr"].images for one in alone] == [over_seeds([one.by["psnr"] for one in others])]
    without = Findings.of([*NOISE, curve("decoder", 0.9, 7), curve("decoder", 0.9, 8)], [noise]).tables[0].comparisons
    assert [one.notes for one in without] == [("no seed in common",)]


def test_gains_are_means_over_seeds_with_a_paired_test_over_images() -> None:
    found = gains([point for one in (BASE, *SEEDS) for point in one.points])[0]
    _, row = found.rows
    assert row.points == tuple(one.points[0] for one in SEEDS) and row.arm == "decoder"
    losses = np.array([[*image_losses(point).values()] for point in row.points])
    base = np.array([*image_losses(BASE.points[0]).values()])
    assert row.loss == pytest.approx(losses.mean())
    means = 100 * (losses.mean(axis=1) / base.mean() - 1)
    assert row.own is not None and (row.own.mean, row.own.seeds, row.own.spread) == (
        pytest.approx(means.mean()),
        3,
        pytest.approx(means.std(ddof=1)),
    )
    assert row.p == 0.25  # three images of which all gain: 2 / 2^3
    other = replace(SEEDS[1].points[0], seed=1)  # two runs of one seed are no seeds
    rows = gains([BASE.points[0], SEEDS[0].points[0], other])[0].rows
    assert [len(one.points) for one in rows] == [1, 1, 1]


def test_a_chart_shows_seeds_as_one_curve_with_its_spread() -> None:
    found = Findings.of([BASE, *SEEDS], [BASE])
    looks = styles(found.curves, BASE.name)
    assert list(looks) == [BASE.name, "decoder tcq8"]
    rd, saving = (next(one for one in charts(found, looks) if one.name == name) for name in ("rd", "saving"))
    assert "seeds" in rd.says and "seeds" in saving.says
    (bars,) = [layer.data for layer in rd.panels[0].plot.layer if "low" in layer.data]
    at = bars.iloc[0]
    psnrs = [one.points[0].figures.psnr for one in SEEDS]
    assert (at["low"], at["high"], at["curve"]) == (min(psnrs), max(psnrs), "decoder tcq8")
    (band,) = [layer.data for layer in saving.panels[0].plot.layer if "low" in layer.data]
    middle = band.iloc[len(band) // 2]
    of_seeds = [np.interp(middle["psnr"], *rate_change(BASE, one)) for one in SEEDS]
    assert (middle["low"], middle["high"]) == (pytest.approx(min(of_seeds)), pytest.approx(max(of_seeds)))
    alone = charts(Findings.of([BASE, SEEDS[0]], [BASE]), looks)
    assert "seeds" not in alone[0].says and len(alone[0].panels[0].plot.layer) == 2


def test_the_signed_rank_test_by_brute_force() -> None:
    changes = np.array([-3.0, -1.5, 0.5, -2.0, -0.25, 1.0])
    ranks = abs(changes).argsort().argsort() + 1
    observed = ranks[changes > 0].sum()
    sums = [sum(rank for rank, sign in zip(ranks, signs, strict=True) if sign) for signs in product((0, 1), repeat=6)]
    assert signed_rank(changes) == pytest.approx(2 * fmean(one <= observed for one in sums))
    assert signed_rank([0.0, 0.0]) == 1.0 and signed_rank([-1.0, -2.0, -3.0]) == 0.25
    assert [shown(p) for p in (None, 1.0, 0.25, 0.0004)] == ["", "1.000", ".250", "< .001"]
