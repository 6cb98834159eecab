"""A blind comparison of kept pictures: its trials, its page in headless Chromium, and the scores of its answers."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import pytest
from PIL import Image

from lic_dist.errors import LicError, UsageError
from lic_dist.evaluation.results import read_file, write_points
from lic_dist.reporting import pairs
from lic_dist.reporting.curves import collect
from lic_dist.reporting.document import preferences
from lic_dist.reporting.pairs import KEY, PAGE, find_trials, study_page, write_study
from lic_dist.reporting.preference import PRIOR, preference, scores_of
from lic_dist.reporting.shown import read_kept
from tests.browser import Browser, find
from tests.points import measured, of_arm

NAMES = ("base sq", "base tcq8")
LAMBDAS, IMAGES = 4, 2


def pixels_of(name: str, step: int, image: int) -> np.ndarray:
    """Colours whose red channel tells the curve."""
    return np.full((64, 96, 3), (40 + 100 * NAMES.index(name), 10 * step, 20 * image), np.uint8)


def results(folder: Path, factor: float = 0.97) -> Path:
    """Two quantizers at four lambdas that kept both pictures, the second with rates times `factor`, and its square."""
    (folder / "shown").mkdir(parents=True)
    originals, points = {}, []
    for image in range(IMAGES):
        originals[f"{image}.png"] = f"shown/{image}.png"
        Image.fromarray(np.full((64, 96, 3), 200 + image, np.uint8)).save(folder / f"shown/{image}.png")
    for name, quantizer, times in ((NAMES[0], "sq", 1.0), (NAMES[1], "tcq8", factor)):
        for step, point in enumerate(of_arm(measured(quantizer, times, LAMBDAS, IMAGES), "base")):
            shown = {f"{image}.png": f"shown/{image}-{quantizer}-{step}.png" for image in range(IMAGES)}
            for image, path in enumerate(shown.values()):
                Image.fromarray(pixels_of(name, step, image)).save(folder / path)
            points.append(replace(point, shown=shown))
    write_points(folder / "results.json", "run", points, originals=originals)
    return folder / "results.json"


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the study of both curves."""
    folder = tmp_path_factory.mktemp("study")
    collection = collect([results(folder / "results")])
    assert write_study(collection, collection.curves, folder) == LAMBDAS * IMAGES
    return folder


def key_of(folder: Path) -> dict[str, Any]:
    key: dict[str, Any] = json.loads((folder / KEY).read_text())
    return key


def answered(folder: Path, choose: dict[str, str] | str, session: str = "a", study: str | None = None) -> Path:
    """A file of answers to all trials, the first picture as A: which curve was chosen, or "same"."""
    key = key_of(folder)
    answers = []
    for name, trial in key["trials"].items():
        wanted = choose if isinstance(choose, str) else choose[trial["first"]["image"]]
        choice = "same" if wanted == "same" else "a" if trial["first"]["curve"] == wanted else "b"
        answers.append({"trial": name, "a": "first", "choice": choice, "seconds": 1.5})
    path = folder / f"answers-{session}.json"
    path.write_text(json.dumps({"study": study or key["study"], "session": session, "who": "", "answers": answers}))
    return path


def test_each_picture_meets_the_others_nearest_in_rate(study: Path) -> None:
    for trial in key_of(study)["trials"].values():
        first, second = trial["first"], trial["second"]
        assert first["image"] == second["image"] and first["lmbda"] == second["lmbda"]
        assert {first["curve"], second["curve"]} == {*NAMES}
        assert abs(math.log(first["bpp"] / second["bpp"])) < math.log(1.15)


def test_rates_too_far_apart_are_not_compared(tmp_path: Path) -> None:
    collection = collect([results(tmp_path / "results", 0.9)])  # 0.81 for the second image
    assert {one.first.row.image for one in find_trials(collection, collection.curves)} == {"0.png"}
    collection = collect([results(tmp_path / "far", 0.8)])  # and 0.64, 1.28 of the rate below
    with pytest.raises(UsageError, match="at about one rate"):
        write_study(collection, collection.curves, tmp_path)
    assert not (tmp_path / PAGE).exists()


@pytest.fixture()
def with_anchors(tmp_path: Path) -> Path:
    """A result file of two quantizers and two classic codecs of nearly the same rates."""
    path = results(tmp_path / "results")
    anchors = []
    for codec, colour in (("webp", 30), ("jpeg", 60)):
        for step, point in enumerate(measured(codec, 0.99, LAMBDAS, IMAGES)):
            shown = {f"{image}.png": f"shown/{image}-{codec}-{step}.png" for image in range(IMAGES)}
            for image, name in enumerate(shown.values()):
                pixels = np.full((64, 96, 3), (colour, 20 * step, 10 * image), np.uint8)
                Image.fromarray(pixels).save(path.parent / name)
            anchors.append(replace(point, lmbda=None, checkpoint=f"quality {step}", shown=shown))
    found = read_file(path)
    write_points(path, "run", [*found.points, *anchors], originals=found.originals)
    return path


def test_classic_codecs_meet_each_other_only_among_themselves(with_anchors: Path) -> None:
    collection = collect([with_anchors])
    assert [curve.name for curve in collection.curves] == [*NAMES, "webp", "jpeg"]
    trials = find_trials(collection, collection.curves)
    compared = {frozenset((one.first.curve, one.second.curve)) for one in trials}
    assert len(compared) == 5 and frozenset(("webp", "jpeg")) not in compared and len(trials) == 5 * LAMBDAS * IMAGES
    assert len(find_trials(collection, collection.curves[2:])) == LAMBDAS * IMAGES


def test_each_picture_is_read_once(with_anchors: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Path] = []
    monkeypatch.setattr(pairs, "read_kept", lambda path: asked.append(path) or read_kept(path))
    collection = collect([with_anchors])
    find_trials(collection, collection.curves)
    assert len(asked) == len(set(asked)) == 4 * LAMBDAS * IMAGES


def test_the_page_names_nothing_and_is_the_same_again(study: Path) -> None:
    collection = collect([study / "results" / "results.json"])
    trials = find_trials(collection, collection.curves)
    text = study_page(trials)
    assert text == (study / PAGE).read_text() == study_page(find_trials(collection, collection.curves[::-1]))
    for secret in ("tcq8", "0.png", '"base', "bpp", "run"):
        assert secret not in text.replace("runtime", ""), secret
    ordered = [one.first.curve for one in trials]
    assert 0 < ordered.count(NAMES[0]) < len(ordered)  # digests decide which is the first


def test_pictures_that_are_gone_or_equal_are_no_trial(tmp_path: Path) -> None:
    path = results(tmp_path / "results")
    (path.parent / "shown/0-sq-0.png").unlink()
    same = path.parent / "shown/1-tcq8-1.png"
    same.write_bytes((path.parent / "shown/1-sq-1.png").read_bytes())
    collection = collect([path])
    assert len(find_trials(collection, collection.curves)) == LAMBDAS * IMAGES - 2


def test_two_curves_have_the_logarithm_of_their_odds() -> None:
    won = np.array([[[0.0, 7.0], [2.0, 0.0]], [[0.0, 0.0], [5.0, 0.0]]])
    scores = scores_of(won)
    half = PRIOR / 2
    expected = [math.log((7 + half) / (2 + half)), math.log(half / (5 + half))]
    assert (scores[:, 0] - scores[:, 1]).tolist() == pytest.approx(expected, abs=1e-7)


def test_scores_are_those_of_the_greatest_likelihood() -> None:
    strength = np.exp([0.0, 0.7, -0.4, 1.1])
    won = 1e7 * strength[:, None] / (strength[:, None] + strength[None, :]) * (1 - np.eye(4))
    won[0, 3] = won[3, 0] = 0  # never compared
    found = scores_of(won[None])[0]
    assert (found - found[0]).tolist() == pytest.approx([0.0, 0.7, -0.4, 1.1], abs=1e-5)


def test_answers_become_scores_and_a_session_counts_once(study: Path) -> None:
    chosen = answered(study, {"0.png": NAMES[1], "1.png": "same"})
    again = study / "copy.json"
    again.write_text(chosen.read_text())
    found = preference([chosen, again], study, NAMES[0])
    assert (found.sessions, found.answers, found.by_session, found.anchor) == (1, 8, False, NAMES[0])
    best, base = found.rows
    assert (best.curve, best.won, best.even, best.lost) == (NAMES[1], 4, 4, 0)
    assert (base.curve, base.won, base.even, base.lost, base.score) == (NAMES[0], 0, 4, 4, 0.0)
    assert best.score == pytest.approx(math.log((6 + PRIOR / 2) / (2 + PRIOR / 2)))
    middle, low, high = best.chosen
    assert 50 < low < middle < high < 100 and base.chosen == (50, 50, 50)
    (table,) = preferences(found).tables
    assert [cell.text for cell in table.rows[1]] == [NAMES[0], "+0.00", "anchor", "0", "4", "4"]


def test_of_several_sessions_sessions_are_drawn(study: Path) -> None:
    files = [answered(study, NAMES[1] if number < 4 else NAMES[0], f"s{number}") for number in range(5)]
    found = preference(files, study, NAMES[0])
    assert found.by_session and found.sessions == 5
    _, low, high = found.rows[0].chosen
    alone = preference(files[:4], study, NAMES[0])
    assert low < 50 < high and not alone.by_session and alone.rows[0].chosen[1] > 50


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot read .*no such file"), ("{", "is no file of a study's answers"),
        ('{"study": "x"}', "is no file of a study's answers"), ("other", "has answers to another study"),
        ("empty", "no answers in"),
    ],
)  # fmt: skip
def test_other_files_are_one_line(study: Path, tmp_path: Path, content: str | None, message: str) -> None:
    path = tmp_path / "x.json"
    if content == "other":
        path = answered(study, "same", "other", study="0" * 12)
    elif content == "empty":
        path.write_text(json.dumps({"study": key_of(study)["study"], "session": "a", "answers": []}))
    elif content is not None:
        path.write_text(content)
    with pytest.raises(LicError, match=message) as caught:
        preference([path], study, NAMES[0])
    assert "\n" not in caught.value.message
    with pytest.raises(LicError, match="no study was written here"):
        preference([answered(study, "same")], tmp_path, NAMES[0])
    (tmp_path / KEY).write_text(json.dumps(key_of(study) | {"curves": [NAMES[0], "another"]}))
    with pytest.raises(LicError, match="is no key of a study"):
        preference([answered(study, "same")], tmp_path, NAMES[0])


@pytest.mark.slow
def test_a_viewer_answers_by_keys_and_buttons(study: Path, tmp_path: Path) -> None:
    program = find()
    if program is None:
        pytest.skip("no Chromium here")
    red = "(i => { const c = document.createElement('canvas').getContext('2d'); c.drawImage(i, 0, 0); "
    red += "return c.getImageData(0, 0, 1, 1).data[0]; })(document.getElementById('%s'))"
    asked = "document.body.dataset.trial === '%d' && [...document.images].every(i => i.complete && i.naturalWidth)"
    with Browser(program, tmp_path / "profile") as browser:
        browser.open(study / PAGE, "")
        browser.value("document.getElementById('begin').click()")
        for number in range(LAMBDAS * IMAGES):
            browser.wait(asked % number)
            a, b = browser.value(red % "a"), browser.value(red % "b")
            assert {a, b} == {40, 140}
            if number == 0:
                browser.key(" ", held=0.1)  # a look at the original, and back
                browser.wait(f"{red % 'a'} === {a}")
                browser.key("ArrowDown")
                browser.wait(asked % 1)
                browser.key("Backspace")  # another answer to the first
                browser.wait(asked % 0)
            browser.key("ArrowLeft" if a == 140 else "ArrowRight")
        browser.wait("document.body.dataset.ended === '1'")
        assert browser.said == [] and all(one.startswith(("data:", "file:")) for one in browser.asked)
        saved = unquote(browser.value("document.getElementById('save').href").partition(",")[2])
        browser.value("document.getElementById('save').click()")
    (tmp_path / "answers.json").write_text(saved)
    found = preference([tmp_path / "answers.json"], study, NAMES[0])
    assert [(row.curve, row.won) for row in found.rows] == [(NAMES[1], LAMBDAS * IMAGES), (NAMES[0], 0)]
    assert {one["a"] for one in json.loads(saved)["answers"]} <= {"first", "second"}
