"""The quick start: its photos, the whole job on a few small ones, and what its closing table says."""

from __future__ import annotations

import shutil
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from lic_dist import config
from lic_dist.app.quickstart import closing, job
from lic_dist.app.quickstart import photos as quick_photos
from lic_dist.app.quickstart.photos import PARTS, Split, lay_out, split
from lic_dist.data import images
from lic_dist.data.manifest import scan
from lic_dist.errors import LicError
from lic_dist.evaluation.results import ImageResult, Point
from lic_dist.reporting.report import report
from tests.conftest import picture


def test_the_embedded_photos_are_apart_named_in_the_provenance_and_small() -> None:
    parts = split(None)
    assert len(parts.test) >= 12 and len(parts.train) >= 10 and len(parts.held_out) >= 3
    files = [parts.source / name for part in PARTS for name in getattr(parts, part)]
    assert len({file.read_bytes() for file in files}) == len(files)
    assert sum(file.stat().st_size for file in files) < 10e6
    provenance = (parts.source / "PROVENANCE.md").read_text()
    assert all(f"`{file.name.split('-')[0]}-*`" in provenance for file in files)


@pytest.fixture()
def embedded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Six small photos in place of the embedded ones, and a job of few steps."""
    seed = 0
    for part, count in zip(PARTS, (3, 1, 2), strict=True):
        (tmp_path / "embedded" / part).mkdir(parents=True)
        for _ in range(count):
            Image.fromarray(picture(seed, 256, 320)).save(tmp_path / "embedded" / part / f"{part} {seed}.png")
            seed += 1
    monkeypatch.setattr(quick_photos, "EMBEDDED", tmp_path / "embedded")
    monkeypatch.setattr(job, "CROPS", 6)
    monkeypatch.setattr(job, "STEPS", 2)
    monkeypatch.setattr("os.cpu_count", lambda: 1)  # to start a process takes longer than its work
    return tmp_path


@pytest.mark.slow
def test_the_main_job_and_the_same_comparison_from_what_it_wrote(
    embedded: Path, capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = embedded / "out"
    figures = job.quickstart(out, None, "local")
    sq, tcq, refined, retrained, control = figures["rows"]
    assert figures["images"] == ["test 4.png", "test 5.png"]
    assert tcq["bpp"] == retrained["bpp"] == control["bpp"] < sq["bpp"]
    assert refined["L"] < tcq["L"] < sq["L"] and retrained["retraining"]["mean"] == pytest.approx(
        100 * (retrained["L"] / tcq["L"] - 1)
    )
    assert retrained["rate"]["mean"] == pytest.approx(100 * (retrained["L"] - sq["L"]) / sq["bpp"])
    said = capfd.readouterr()
    assert "2 test photos prove little" in said.out and "report.html" in said.out
    page = (out / "report" / "report.html").read_text()
    assert "test 4.png" in page and "data:image" in page
    experiment = config.load(out / "experiment.yaml")
    assert experiment.finetune is not None and experiment.finetune.steps == 2 and experiment.evaluate is not None
    before = (out / "evaluation.json").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(job, "report", lambda *_, **__: None)
        patch.setattr(job, "_finetune_alongside", lambda *_: nullcontext())
        again = job.quickstart(out, None, "local")
    assert again["rows"] == figures["rows"] and (out / "evaluation.json").read_bytes() == before
    found = report([out / "evaluation.json"], (), out / "again", console=Console(quiet=True))
    assert found.leads[0].anchor.name == "base sq-adapted" and found.leads[0].lmbda == 0.025


def test_a_users_photos_are_split_by_digest_and_keep_their_names(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quick_photos, "CROP", 128)
    parts = split(photos)
    assert [len(getattr(parts, part)) for part in PARTS] == [4, 2, 2]
    assert lay_out(parts, tmp_path / "out") == []
    laid = {
        path.relative_to(tmp_path / "out" / "test").as_posix() for path in (tmp_path / "out" / "test").rglob("*.png")
    }
    assert laid == set(parts.test) and all("/" in name for name in laid)
    renamed = tmp_path / "renamed"
    renamed.mkdir()
    for number, file in enumerate(sorted(photos.rglob("*.png"), reverse=True)):
        shutil.copy(file, renamed / f"{number} ä.png")
    lay_out(split(renamed), tmp_path / "again")
    digests = [{one.digest for one in scan(tmp_path / folder / "test")} for folder in ("out", "again")]
    assert digests[0] == digests[1] and len(digests[0]) == 2


def test_photos_passed_over_are_named_with_the_reason(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quick_photos, "CROP", 128)
    shutil.copytree(photos, tmp_path / "photos")
    shutil.copy(tmp_path / "photos" / "train" / "0.png", tmp_path / "photos" / "twin.png")
    Image.fromarray(picture(20, 90, 200)).save(tmp_path / "photos" / "low.png")
    whole = (tmp_path / "photos" / "train" / "1.png").read_bytes()
    (tmp_path / "photos" / "cut.png").write_bytes(whole[: len(whole) // 2])
    found = split(tmp_path / "photos").passed_over
    assert set(found) == {"twin.png", "low.png", "cut.png"}
    assert found["twin.png"] == "the same file as train/0.png" and found["low.png"].startswith(
        "200x90, smaller than 128"
    )


def test_of_a_large_test_photo_the_middle_is_coded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quick_photos, "TEST_LONG", 300)
    monkeypatch.setattr(quick_photos, "TEST_SHORT", 200)
    pixels = picture(3, 420, 260)
    (tmp_path / "mine").mkdir()
    Image.fromarray(pixels).save(tmp_path / "mine" / "tall.png")
    parts = Split(tmp_path / "mine", (), (), ("tall.png",))
    assert lay_out(parts, tmp_path / "out") == ["tall.png.png"] == lay_out(parts, tmp_path / "out")
    assert np.array_equal(images.read(tmp_path / "out" / "test" / "tall.png.png"), pixels[60:360, 30:230])


def test_nothing_of_the_users_is_ever_removed(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quick_photos, "CROP", 128)
    shutil.copytree(photos, tmp_path / "photos")
    before = sorted(tmp_path.rglob("*.png"))
    with pytest.raises(LicError, match="holds other photos"):
        job.quickstart(tmp_path, tmp_path / "photos", "local")
    assert set(before) <= set(tmp_path.rglob("*.png"))


def test_too_few_photos_are_one_line(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quick_photos, "CROP", 128)
    few = tmp_path / "few"
    few.mkdir()
    shutil.copy(photos / "train" / "0.png", few)
    with pytest.raises(LicError, match="1 usable photos"):
        job.quickstart(tmp_path / "out", few, "local")


def points(retrained: float, count: int = 10) -> list[Point]:
    """Points of a quick start with these decibels gained by retraining, the same for all photos."""
    made = []
    for arm, quantizer, bpp, psnr in (
        ("base", "sq-adapted", 0.5, 32.0),
        ("base", "tcq32", 0.45, 31.9),
        ("base", "tcq32-refined", 0.42, 32.0),
        ("decoder", "tcq32", 0.45, 31.9 + retrained),
        ("decoder straight-through", "tcq32", 0.45, 31.9),
    ):
        rows = tuple(
            ImageResult(f"{n}.png", 64, 64, bpp, psnr + 0.1 * n, None, bpp, bpp, 0.0, 1.0, 1.0) for n in range(count)
        )
        made.append(Point("m", quantizer, 0.013, rows, arm=arm))
    return made


def test_the_closing_words_say_what_is_proven() -> None:
    rows = closing.rows_of(points(0.05))
    assert list(rows) == ["SQ", "TCQ-32", "TCQ-32, refined", "TCQ-32, retrained", "control"]
    said = " ".join(closing.words(rows, 10, 50, best_step=40))
    assert "proves nothing" not in said and "prove little" not in said
    losses = [row.gain.loss for row in rows.values()]
    assert f"worth {100 * (losses[0] - losses[3]) / 0.5:.1f} % of the rate" in said
    assert f"TCQ-32, refined: L {100 * (losses[2] / losses[0] - 1):+.2f} %" in said
    nothing = " ".join(closing.words(closing.rows_of(points(0.0)), 3, 12, best_step=0))
    assert "the best weights were those it began with. 12 photos to retrain on are few" in nothing
    assert "3 test photos prove little" in nothing
