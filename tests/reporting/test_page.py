"""The report's page in headless Chromium: its script runs, its pictures are drawn, nothing is asked of a network."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

import numpy as np
import pytest
from PIL import Image

from lic_dist.evaluation.results import write_points
from lic_dist.reporting import shown
from lic_dist.reporting.curves import collect
from lic_dist.reporting.report import report
from lic_dist.reporting.styles import styles
from tests.browser import Browser, find
from tests.points import detailed, markup, measured, of_arm

pytestmark = pytest.mark.slow  # a browser starts

COLOURS = {"original": (10, 20, 30), "base sq": (200, 100, 50), "base tcq8": (60, 160, 240)}
ATTACKS = ('<img src=x onerror="document.body.dataset.broken=1">', "</script><script>document.body.dataset.broken=1")


def write_results(folder: Path, quantizer: str = "tcq8", image: str = "1.png") -> Path:
    """Two quantizers at four lambdas with pictures: 0.png of noise, the other one colour for each curve."""
    generator = np.random.default_rng(0)
    (folder / "shown").mkdir(parents=True)
    noise = {name: generator.integers(0, 256, (64, 96, 3), dtype=np.uint8) for name in COLOURS}
    for name, colour in COLOURS.items():
        Image.fromarray(noise[name]).save(folder / f"shown/0-{name}.png")
        Image.fromarray(np.full((64, 96, 3), colour, np.uint8)).save(folder / f"shown/1-{name}.png")
    points = []
    for name, called, factor in (("base sq", "sq", 1.0), ("base tcq8", quantizer, 0.9)):
        kept = {"0.png": f"shown/0-{name}.png", image: f"shown/1-{name}.png"}
        for point in detailed(of_arm(measured(called, factor, lambdas=4, images=2), "base")):
            rows = (point.images[0], replace(point.images[1], image=image))
            points.append(replace(point, images=rows, shown=kept))
    originals = {"0.png": "shown/0-original.png", image: "shown/1-original.png"}
    write_points(folder / "results.json", "run", points, originals=originals)
    return folder / "results.json"


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("page")
    report([write_results(folder / "results")], ["base sq"], folder)
    assert sorted(path.name for path in folder.glob("pictures-*.png")) == ["pictures-0.png", "pictures-1.png"]
    return folder / "report.html"


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    program = find()
    if program is None:
        pytest.skip("no Chromium here")
    with Browser(program, tmp_path_factory.mktemp("profile")) as browser:
        yield browser


def probed(chromium: Browser) -> dict[str, tuple[int, ...]]:
    """The colours on the canvas, by curve; fails where the console has a word or another address was asked."""
    assert chromium.said == []
    assert [one for one in chromium.asked if not one.startswith(("data:", "file:"))] == []
    assert sum(one.startswith("file:") for one in chromium.asked) == 1
    found = json.loads(chromium.value("document.body.dataset.probe"))
    return {one["arm"]: tuple(one["rgb"]) for one in found}


def state(chromium: Browser) -> dict[str, str]:
    return dict(parse_qsl(chromium.value("location.hash.slice(1)")))


def place(chromium: Browser, x: float, y: float) -> tuple[float, float]:
    """A place on the canvas by its shares of width and height, in the window."""
    box = "document.getElementById('view').getBoundingClientRect()"
    left, top, width, height = chromium.value(f"(b => [b.left, b.top, b.width, b.height])({box})")
    return left + x * width, top + y * height


def minus(name: str, gain: int) -> tuple[int, ...]:
    return tuple(min(gain * abs(a - b), 255) for a, b in zip(COLOURS[name], COLOURS["original"], strict=True))


@pytest.mark.parametrize(
    ("view", "expected"),
    [
        ("mode=side", COLOURS),
        ("mode=flicker&arms=2-1-2", {"base sq": COLOURS["base sq"]}),
        ("mode=split&lambda=3", {"original": COLOURS["original"], "base tcq8": COLOURS["base tcq8"]}),
        ("difference=2", {"original": (0, 0, 0), "base sq": minus("base sq", 2), "base tcq8": minus("base tcq8", 2)}),
        ("mode=what&arms=9--x&lambda=99&zoom=x&x=-5", COLOURS),  # an address that somebody changed
    ],
)
def test_the_canvas_shows_the_pictures(
    chromium: Browser, page: Path, view: str, expected: dict[str, tuple[int, ...]]
) -> None:
    chromium.open(page, f"probe&image=1&{view}")
    assert probed(chromium) == expected


def test_zoomed_pixels_are_the_pictures_own(chromium: Browser, page: Path) -> None:
    chromium.open(page, "probe&zoom=16&x=50.5&y=30.5")
    found = probed(chromium)
    for name in COLOURS:
        pixels = np.asarray(Image.open(page.parent / f"results/shown/0-{name}.png"))
        assert found[name] == tuple(pixels[30, 50])


def test_a_phone_begins_with_two_pictures_and_pinches(chromium: Browser, page: Path) -> None:
    chromium.open(page, "probe", 390, 844)
    assert list(probed(chromium)) == ["base sq", "base tcq8"]
    assert chromium.value("document.documentElement.scrollWidth <= innerWidth")
    chromium.open(page, "zoom=4&x=48&y=32&arms=1&mode=flicker", 390, 844)
    chromium.value("document.getElementById('view').scrollIntoView()")
    a, b = place(chromium, 0.45, 0.5), place(chromium, 0.55, 0.5)
    chromium.touch("touchStart", a, b)
    chromium.touch("touchMove", place(chromium, 0.4, 0.5), place(chromium, 0.6, 0.5))
    chromium.touch("touchEnd")
    assert float(state(chromium)["zoom"]) == pytest.approx(8, rel=0.05)


def test_keys(chromium: Browser, page: Path) -> None:
    chromium.open(page, "probe&image=1")
    chromium.key("2")
    assert list(probed(chromium)) == ["original", "base tcq8"]
    chromium.key(" ")
    assert probed(chromium) == {"base tcq8": COLOURS["base tcq8"]}
    chromium.key(" ")
    assert probed(chromium) == {"original": COLOURS["original"]}
    chromium.key("2")
    assert probed(chromium) == {"base sq": COLOURS["base sq"]}
    chromium.key(" ", held=0.5)  # a look at the next, and back
    assert probed(chromium) == {"base sq": COLOURS["base sq"]}
    chromium.key("d")
    assert probed(chromium) == {"base sq": minus("base sq", 8)}


def test_wheel_drag_and_arrows_move_all_pictures(chromium: Browser, page: Path) -> None:
    chromium.open(page, "zoom=12&x=40&y=30")
    chromium.drag(place(chromium, 0.15, 0.5), place(chromium, 0.15, 0.55), (place(chromium, 0.15, 0)[0] + 24, 500))
    moved = state(chromium)
    assert float(moved["x"]) == pytest.approx(40 - 24 / 12, abs=0.11)
    chromium.mouse("mouseWheel", *place(chromium, 0.15, 0.5), deltaX=0, deltaY=-1000)
    assert float(state(chromium)["zoom"]) == 16
    chromium.value("document.getElementById('view').focus()")
    before = float(state(chromium)["y"])
    chromium.key("ArrowDown")
    assert float(state(chromium)["y"]) == pytest.approx(min(before + 40 / 16, 64), abs=0.11)
    chromium.key("0")
    assert float(state(chromium)["zoom"]) == 1  # the whole picture is small here
    # where nothing is left to zoom the page scrolls
    chromium.mouse("mouseWheel", *place(chromium, 0.15, 0.5), deltaX=0, deltaY=200)
    chromium.wait("scrollY > 0")


def test_the_split_is_dragged(chromium: Browser, page: Path) -> None:
    chromium.open(page, "mode=split&zoom=4&x=48&y=32")
    chromium.drag(place(chromium, 0.5, 0.5), place(chromium, 0.4, 0.5), place(chromium, 0.2, 0.5))
    assert float(chromium.value("document.getElementById('split').value")) == pytest.approx(20, abs=1)
    assert state(chromium)["x"] == "48.0"


def test_the_hold_button_shows_the_next_while_it_is_held(chromium: Browser, page: Path) -> None:
    chromium.open(page, "probe&image=1&mode=flicker&arms=0-2")
    chromium.value("hold.scrollIntoView({block: 'center'})")
    x, y = chromium.value("(b => [b.left + b.width / 2, b.top + b.height / 2])(hold.getBoundingClientRect())")
    chromium.mouse("mousePressed", x, y, button="left", clickCount=1)
    assert list(probed(chromium)) == ["base tcq8"]
    chromium.mouse("mouseReleased", x, y + 90, button="left", clickCount=1)
    assert list(probed(chromium)) == ["original"]


def test_buttons_say_what_is_chosen(chromium: Browser, page: Path) -> None:
    chromium.open(page, "")
    pressed = (
        "[...document.querySelectorAll('#viewer [aria-pressed=true]')].map(b => b.innerText.replace(/\\s+/g, ' '))"
    )
    assert chromium.value(pressed) == ["0.0072", "Side by side", "1original", "2base sq", "3base tcq8"]
    unnamed = "[...document.querySelectorAll('button, select, input')].filter(b => !b.innerText && !b.ariaLabel)"
    assert chromium.value(f"{unnamed}.map(b => b.outerHTML)") == []


def test_charts_are_drawn_and_a_press_in_the_legend_picks_a_curve_out(chromium: Browser, page: Path) -> None:
    chromium.open(page, "")
    assert chromium.said == []
    plots = "[...document.querySelectorAll('.plot svg.marks')]"
    assert chromium.value(f"{plots}.length") == chromium.value("document.querySelectorAll('[data-chart]').length") >= 6
    faded = f"{plots}.map(svg => svg.querySelectorAll('[opacity=\"0.13\"]').length > 0)"
    assert not any(chromium.value(faded))
    chromium.value("document.querySelectorAll('.legend button')[1].click()")
    chromium.wait(f"{faded}[0]")
    chromium.value("document.querySelectorAll('.legend button')[1].click()")
    chromium.wait(f"!{faded}.some(Boolean)")


def test_a_point_tells_what_it_is(chromium: Browser, page: Path) -> None:
    chromium.open(page, "")
    points = "[...document.querySelectorAll('.plot svg .mark-symbol path')]"
    chromium.value(f"{points}[2].scrollIntoView({{block: 'center'}})")
    box = f"{points}[2].getBoundingClientRect()"
    x, y = chromium.value(f"(b => [b.left + b.width / 2, b.top + b.height / 2])({box})")
    chromium.mouse("mouseMoved", x - 60, y)
    chromium.mouse("mouseMoved", x, y)
    tip = "document.getElementById('vg-tooltip-element')"
    chromium.wait(f"{tip}?.classList.contains('visible')")
    told = chromium.value(f"{tip}.textContent")
    assert re.search(r"curvebase (?:sq|tcq8)lambda0\.\d+bpp[\d.]+PSNR[\d.]+", told), told


def test_a_press_on_a_heading_sorts_by_its_figures(chromium: Browser, page: Path) -> None:
    chromium.open(page, "probe")
    table = "[...document.querySelectorAll('table')].at(-1)"
    head = f"{table}.querySelectorAll('th')[1]"
    for direction, sign in (("ascending", 1), ("descending", -1)):
        chromium.value(f"{head}.firstElementChild.click()")
        cells = chromium.value(f"[...{table}.tBodies[0].rows].map(row => row.cells[1].textContent)")
        figures = [float(re.sub("[^0-9.eE-]", "", cell) or "nan") for cell in cells]
        assert figures == sorted(figures, reverse=sign < 0) and len(figures) > 4
        assert chromium.value(f"{head}.getAttribute('aria-sort')") == direction


@pytest.mark.usefixtures("no_chart_files")
def test_a_report_without_pictures_has_no_viewer(chromium: Browser, tmp_path: Path) -> None:
    (tmp_path / "vtm.json").write_text('{"name": "vtm", "results": {"bpp": [1, 2], "psnr-rgb": [30, 32]}}')
    report([tmp_path / "vtm.json"], ["vtm"], tmp_path / "out")
    chromium.open(tmp_path / "out/report.html", "")
    assert chromium.said == [] and not chromium.value("document.getElementById('viewer')")


@pytest.mark.slow
@pytest.mark.usefixtures("no_chart_files")
def test_names_from_files_do_not_run(chromium: Browser, tmp_path: Path) -> None:
    file = write_results(tmp_path / "results", *ATTACKS)
    content = file.read_text().replace('"run"', json.dumps(ATTACKS[0]))
    file.write_text(content.replace('"arm": "base"', '"arm": "<script>document.body.dataset.broken=1</script>"'))
    report([file], [collect([file]).curves[0].name], tmp_path / "out")
    text = markup((tmp_path / "out/report.html").read_text())
    assert "<img src=x" not in text and "</script><script>document" not in text and "<script>document" not in text
    assert "<script>" not in (tmp_path / "out/results.md").read_text()
    chromium.open(tmp_path / "out/report.html", "image=1")
    assert chromium.said == [] and chromium.value("document.body.dataset.broken === undefined")
    assert ATTACKS[1] in chromium.value("document.getElementById('image').innerText")


def test_a_page_has_all_that_it_needs(page: Path) -> None:
    text = markup(page.read_text())
    assert not re.search(r"""(?:src|href)=["'](?!data:|#)|url\((?!#)|@import|https?://""", text)
    assert "default-src 'none'" in text


# which pictures


def shown_of(file: Path) -> Any:
    collection = collect([file])
    found = shown.collect_pictures(collection, styles(collection.curves, "base sq"), ["base sq"])
    return found and (found.data, found.note)


def test_pictures_that_are_absent_or_elsewhere_are_left_out(tmp_path: Path) -> None:
    file = write_results(tmp_path / "results")
    data, note = shown_of(file)
    assert [one["name"] for one in data["images"]] == ["0.png", "1.png"] and note == ""
    assert [one["name"] for one in data["arms"]] == ["original", "base sq", "base tcq8"] and data["start"] == [0, 1]
    assert data["images"][0]["sets"][0]["pictures"][2]["figures"] == "0.090 bpp, 16.07 dB"
    Image.new("RGB", (10, 10)).save(tmp_path / "results/shown/1-base tcq8.png")  # another size
    (tmp_path / "results/shown/0-original.png").rename(tmp_path / "outside.png")
    content = json.loads(file.read_text())
    content["originals"]["0.png"] = "../outside.png"
    for point in content["points"]:
        point["shown"]["0.png"] = str(tmp_path / "outside.png") if point["quantizer"] == "sq" else "shown/absent.png"
    file.write_text(json.dumps(content))
    data, note = shown_of(file)
    (entry,) = data["images"]
    assert entry["name"] == "1.png" and [list(one["pictures"]) for one in entry["sets"]] == [[1]] * 4
    assert note == "1 of 2 pictures are shown; 8 kept pictures are absent or of another size"
    shutil.rmtree(tmp_path / "results/shown")
    assert shown_of(file) is None


def test_large_pictures_are_cut_and_many_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write_results(tmp_path / "results")
    monkeypatch.setattr(shown, "WHOLE_PIXELS", 96 * 64 * 17)
    monkeypatch.setattr(shown, "LONG_SIDE", 32)
    monkeypatch.setattr(shown, "SHORT_SIDE", 16)
    for name in ("base sq", "base tcq8"):
        picture = np.full((64, 96, 3), 100, np.uint8)
        picture[40:56, 60:92] += 10 * len(name)
        Image.fromarray(picture).save(tmp_path / f"results/shown/0-{name}.png")
    data, note = shown_of(file)
    assert [one["name"] for one in data["images"]] == ["0.png (32x16 at 60, 40)", "1.png (32x16 at 0, 0)"]
    assert note == "large pictures are cut to where they differ most"
    monkeypatch.setattr(shown, "PAGE_PIXELS", 32 * 16 * 10)
    data, note = shown_of(file)
    assert len(data["images"]) == 1 and note.startswith("1 of 2 pictures are shown; large")
