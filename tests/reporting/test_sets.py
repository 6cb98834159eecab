"""Sets of pictures apart: each set's figures and their mean, by brute force; which arms control which; how it shows."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
from rich.console import Console

from lic_dist import intervals
from lic_dist.evaluation.results import Point
from lic_dist.intervals import Interval, change_interval, mean_interval
from lic_dist.reporting import comparison
from lic_dist.reporting.comparison import compare
from lic_dist.reporting.curves import Curve, curve_of
from lic_dist.reporting.document import sections
from lic_dist.reporting.findings import Findings
from lic_dist.reporting.gains import image_losses
from lic_dist.reporting.markdown import markdown
from lic_dist.reporting.page import page
from lic_dist.reporting.sets import Sets, SetsApart
from lic_dist.reporting.styles import styles
from lic_dist.reporting.terminal import show
from tests.points import markup, measured

NAMES = ("kodak/0.png", "hires/1.png", "kodak/2.png", "screens/a/3.png", "kodak/4.png", "hires/5.png")
SETS = {"hires": (1, 5), "kodak": (0, 2, 4), "screens": (3,)}


def points(
    arm: str, quantizer: str, factor: float = 1.0, names: Sequence[str] = NAMES, lambdas: int = 5
) -> list[Point]:
    return [
        replace(
            one,
            arm=arm,
            record=f"{quantizer} {arm}",
            images=tuple(replace(row, image=name) for row, name in zip(one.images, names, strict=True)),
        )
        for one in measured(quantizer, factor, lambdas, len(names))
    ]


def curve(arm: str, quantizer: str, factor: float = 1.0, names: Sequence[str] = NAMES, lambdas: int = 5) -> Curve:
    return curve_of(f"{arm} {quantizer}", points(arm, quantizer, factor, names, lambdas))


def without_ms_ssim(one: Curve, *images: str) -> Curve:
    def bare(point: Point) -> Point:
        rows = (replace(row, ms_ssim=None if row.image in images else row.ms_ssim) for row in point.images)
        return replace(point, images=tuple(rows))

    return curve_of(one.name, [bare(point) for point in one.points])


SQ, TCQ = curve("base", "sq"), curve("base", "tcq8", 0.97)
DECODER, NOISE = curve("decoder", "tcq8", 0.9), curve("decoder noise", "tcq8", 0.94)
ALL = (SQ, TCQ, DECODER, NOISE)


@pytest.fixture(autouse=True)
def _few_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(intervals, "DRAWS", 300)


def apart(curves: Sequence[Curve]) -> SetsApart:
    found = Findings.of(curves, curves[:1]).sets
    assert found is not None
    return found


def drawn(sets: Sequence[np.ndarray], statistic: Callable[[np.ndarray], float]) -> Interval:
    """By a loop over draws: of each set as many as it has, then the mean of the sets' statistics."""
    generator = np.random.default_rng(0)
    chosen = [generator.integers(0, len(own), (intervals.DRAWS, len(own))) for own in sets]
    draws = [
        np.mean([statistic(own[rows[number]]) for own, rows in zip(sets, chosen, strict=True)])
        for number in range(intervals.DRAWS)
    ]
    low, high = np.quantile(draws, [0.025, 0.975])
    return Interval(*(pytest.approx(float(one)) for one in (np.mean([statistic(own) for own in sets]), low, high)))


def test_a_set_is_the_folder_in_which_names_differ() -> None:
    found = Sets.of([SQ])
    assert found.pictures == {name: tuple(NAMES[n] for n in numbers) for name, numbers in SETS.items()}
    assert found.heads == ("hires (2)", "kodak (3)", "screens (1)", "mean of sets")
    many = [f"{number:02}/{n}.png" for number in range(13) for n in range(2 if number < 3 else 1)]
    joined = Sets.of([curve("base", "sq", names=many, lambdas=1)]).heads
    assert len(joined) == 13 and joined[-2:] == ("others (2)", "mean of sets")


def test_cells_are_means_over_sets_and_the_mean_of_sets_weighs_them_alike() -> None:
    sq, own, control = apart(ALL).tables
    assert [(one.against, one.heads) for one in (sq, own, control)] == [
        ("base sq", ("curve",)),
        ("its own base", ("quantizer", "arm")),
        ("its control", ("quantizer", "arm", "control")),
    ]
    assert [row.names for row in sq.rates["psnr"]] == [(one.name,) for one in ALL[1:]]
    assert [row.names for row in own.rates["psnr"]] == [("tcq8", "decoder"), ("tcq8", "decoder noise")]
    assert [row.names for row in control.rates["psnr"]] == [("tcq8", "decoder", "decoder noise")]
    for table, pair in ((sq, (SQ, DECODER)), (own, (TCQ, DECODER)), (control, (NOISE, DECODER))):
        row = table.rates["psnr"][1 if table is sq else 0]
        rates = compare(*pair).rates
        sets = [np.array([rates[NAMES[n]] for n in numbers]) for numbers in SETS.values()]
        assert row.cells == (*(drawn([one], np.mean) for one in sets), drawn(sets, np.mean))
        assert row.cells[-1].mean != pytest.approx(np.mean(list(rates.values())), abs=0.1)


def test_changes_of_l_by_set_are_those_of_its_pictures() -> None:
    sq, *_ = apart(ALL).tables
    assert [row.names for row in sq.changes[:5]] == [("base tcq8", f"{one.lmbda:g}") for one in SQ.points]
    for number, row in enumerate(sq.changes[5:10]):
        ours, theirs = (image_losses(one.points[number]) for one in (DECODER, SQ))
        sets = [np.array([[ours[NAMES[n]], theirs[NAMES[n]]] for n in numbers]) for numbers in SETS.values()]
        by_set = [change_interval(one[:, 0], one[:, 1]) for one in sets]
        mean = drawn(sets, lambda one: 100 * (one[:, 0].mean() / one[:, 1].mean() - 1))
        assert row.cells == (*by_set, mean)


def test_one_set_is_the_mean_and_change_of_all() -> None:
    rates = [-3.0, -1.0, 2.5]
    assert mean_interval(rates) == drawn([np.array(rates)], np.mean)
    assert intervals.changes_interval([([1.0, 3.0], [2.0, 3.0], [2.0, 3.0])]) == change_interval([1, 3], [2, 3])


def test_a_set_without_a_figure_is_blank_and_so_is_the_mean() -> None:
    whole = apart(ALL).tables[0].rates
    bare = apart([without_ms_ssim(one, NAMES[2]) for one in ALL]).tables[0].rates
    assert bare["psnr"] == whole["psnr"]
    for some, full in zip(bare["ms-ssim"], whole["ms-ssim"], strict=True):
        assert some.cells == (full.cells[0], None, full.cells[2], None)
    assert apart([without_ms_ssim(one, *NAMES) for one in ALL]).tables[0].rates["ms-ssim"] == ()
    kodak = curve("decoder", "rdoq", 0.9, [name for name in NAMES if "kodak" in name])
    base = curve("base", "rdoq", 1.0, [name for name in NAMES if "kodak" in name])
    assert [bool(cell) for cell in apart([*ALL, base, kodak]).tables[1].rates["psnr"][-1].cells] == [
        False,
        True,
        False,
        False,
    ]


@pytest.mark.parametrize(
    ("control", "of"),
    [
        ("decoder noise", {"decoder"}),
        ("decoder straight-through", {"decoder"}),
        ("decoder+hyper noise round 2", {"decoder+hyper round 2"}),
        ("hyper noise", set()),
        ("base control", {"decoder", "decoder+hyper round 2"}),
        ("control", {"decoder", "decoder+hyper round 2"}),
        ("decoder control", {"decoder"}),
    ],
)
def test_which_arms_a_control_is_of(control: str, of: set[str]) -> None:
    arms = ("decoder", "decoder+hyper round 2")
    curves = [SQ, *(curve(arm, "tcq8", 0.9) for arm in arms), curve(control, "tcq8", 0.95), curve(control, "sq", 0.95)]
    tables = {one.against: one for one in apart(curves).tables}
    rows = tables["its control"].rates["psnr"] if of else ()
    assert {row.names for row in rows} == {("tcq8", arm, control) for arm in of}
    assert of or "its control" not in tables


def test_no_pair_is_compared_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[str, str]] = []

    def counted(anchor: Curve, test: Curve) -> comparison.Comparison:
        made.append((anchor.name, test.name))
        return compare(anchor, test)

    monkeypatch.setattr(comparison, "compare", counted)
    apart(ALL)
    assert len(made) == len(set(made)) == 6  # three against sq, two against their base, one against its control


def shown(curves: Sequence[Curve], width: int = 80) -> tuple[str, str]:
    """The terminal and the Markdown, without charts."""
    parts = sections(Findings.of(curves, curves[:1]), ())
    console = Console(width=width, file=io.StringIO())
    show(parts, console)
    return console.file.getvalue(), markdown(parts)


def html_of(curves: Sequence[Curve]) -> tuple[str, str]:
    """The page's tables, and its headline with real minus signs made plain."""
    found = Findings.of(curves, curves[:1])
    text = markup(page(sections(found, ()), found, styles(curves, curves[0].name), None))
    return text, text[text.index('class="cards"') : text.index("<nav")].replace("\N{MINUS SIGN}", "-")


def test_of_one_folder_a_report_is_what_it_was() -> None:
    reports = []
    for folder in ("", "kodak/"):
        names = [folder + name.split("/")[-1] for name in NAMES]
        curves = [
            curve("base", "sq", names=names),
            curve("base", "tcq8", 0.97, names),
            curve("decoder", "tcq8", 0.9, names),
        ]
        found = Findings.of(curves, curves[:1])
        assert found.sets is None
        reports.append(sections(found, ()))
    assert reports[0] == reports[1]
    assert "ets apart" not in repr(reports) and "mean of sets" not in repr(reports)


def test_terminal_and_markdown_have_the_tables() -> None:
    terminal, text = shown(ALL)
    mean = mean_of_sets(ALL)
    assert str(mean).replace(" %", "") in text and f"[{mean.low:+.2f}, {mean.high:+.2f}]" in terminal
    for against in ("base sq", "its own base", "its control"):
        for by in ("", " by MS-SSIM"):
            assert all(f"BD-rate against {against}{by}, set by set [%]" in part for part in (terminal, text))
    assert "Change of L against its control, set by set [%]" in text and "Change of L" not in terminal
    assert "| hires (2) | kodak (3) | screens (1) | mean of sets |" in text
    assert "averages all pictures as one" in text and max(map(len, terminal.splitlines())) <= 80


@pytest.mark.slow
def test_the_page_has_the_tables_and_the_mean_of_sets_as_its_headline() -> None:
    text, card = html_of(ALL)
    mean = mean_of_sets(ALL)
    assert str(mean).replace(" %", "") in text and ">kodak (3)</button>" in text
    assert f"mean of 3 sets; 95 % interval over their 6 images: {mean.low:+.2f}" in card
    assert f"{mean.mean:+.2f}" in card and "decoder tcq8 against base sq" in card


@pytest.mark.slow
def test_of_one_lambda_the_change_of_l_by_set_leads() -> None:
    curves = [curve_of(one.name, one.points[:1]) for one in ALL]
    terminal, text = shown(curves)
    row = apart(curves).tables[0].changes[1]
    assert row.names == ("decoder tcq8", "0.0018") and row.cells[-1] is not None
    assert "Change of L against its control, set by set [%]" in terminal and "BD-rate" not in text
    assert f"{row.cells[-1].mean:+.2f} %" in html_of(curves)[1] and "mean of 3 sets" in html_of(curves)[1]


@pytest.mark.slow
def test_names_of_sets_are_escaped() -> None:
    names = ["<img src=x>|[red]\n/0.png", "b/1.png", "b/2.png"]
    curves = [curve("base", "sq", names=names), curve("base", "tcq8", 0.9, names)]
    terminal, text = shown(curves, 200)
    assert "<img" in terminal and "x>|[red]" in terminal and "| &lt;img src=x>\\|[red] (1) |" in text
    html, _ = html_of(curves)
    assert "&lt;img src=x&gt;|[red] (1)</button>" in html and "<img" not in text and "<img" not in html


def mean_of_sets(curves: Sequence[Curve]) -> Interval:
    best = apart(curves).tables[0].best
    assert best is not None and best.names == ("decoder tcq8",) and best.cells[-1] is not None
    return best.cells[-1]
