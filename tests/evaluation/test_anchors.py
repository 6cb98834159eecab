"""Classic codecs as anchors: their files, the choice of qualities, runs that go on."""

from __future__ import annotations

import csv
import io
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, JpegImagePlugin

from lic_dist import config
from lic_dist.data import images
from lic_dist.data.sources.opening import open_source
from lic_dist.errors import LicError, UsageError
from lic_dist.evaluation import anchors, classic
from lic_dist.evaluation import run as running
from lic_dist.evaluation.classic import CODECS, ClassicCodec
from lic_dist.evaluation.generations import evaluate_generations
from lic_dist.evaluation.metrics import measure, psnr8
from lic_dist.evaluation.results import Point, read_file, read_points
from lic_dist.evaluation.run import evaluate
from lic_dist.evaluation.summary import summary
from tests.conftest import picture
from tests.points import image_result


@pytest.fixture()
def folder(tmp_path: Path) -> Path:
    """A folder with three pictures in pictures/."""
    (tmp_path / "pictures").mkdir()
    for seed in range(3):
        Image.fromarray(picture(seed, 64, 96)).save(tmp_path / "pictures" / f"{seed}.png")
    return tmp_path


def experiment(folder: Path, wanted: object, **changes: object) -> config.Experiment:
    section = {"images": str(folder / "pictures"), "anchors": wanted, "out": str(folder / "r.json"), **changes}
    return config.Experiment.model_validate({"engine": {"name": "local"}, "evaluate": section})


# codecs


@pytest.mark.parametrize("name", CODECS)
def test_more_quality_is_more_bytes_and_less_error(name: str) -> None:
    if not CODECS[name].format.present():
        pytest.skip(f"there is no {name} here")
    image = picture(1, 64, 96)
    found = []
    for quality in (CODECS[name].ladder[2], CODECS[name].ladder[-2]):
        codec = ClassicCodec(name, quality)
        data = codec.encode(image)
        found.append((len(data), psnr8(image, codec.decode(data))))
        assert codec.encode(image) == data
    assert found[0] < found[1] and found[0][1] + 3 < found[1][1]
    ladder = [(-1 if CODECS[name].knob == "QP" else 1) * one for one in CODECS[name].ladder]
    assert ladder == sorted(set(ladder))
    assert "Pillow" in CODECS[name].versions and any(digit.isdigit() for digit in CODECS[name].versions.split(", ")[1])


BPGENC = """#!{python}
import sys
from PIL import Image
if "-h" in sys.argv:
    print("BPG Image Encoder version 0.9.8"), sys.exit(1)
options = dict(zip(sys.argv[1:-1:2], sys.argv[2:-1:2]))
if int(options["-q"]) == 13:
    sys.exit("x265 is out of order")
Image.open(sys.argv[-1]).convert("RGB").save(options["-o"], "JPEG", quality=100 - int(options["-q"]))
open(options["-o"], "ab").write(options["-f"].encode())
"""
BPGDEC = """#!{python}
import sys
from PIL import Image
Image.open(sys.argv[3]).save(sys.argv[2], "PNG")
"""


def test_bpg_is_coded_by_its_programs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs in their place that take their options, since BPG itself is not packaged."""
    monkeypatch.setenv("PATH", str(folder))
    with pytest.raises(UsageError, match="this machine has no BPG"):
        evaluate(experiment(folder, ["bpg"]))
    for name, text in (("bpgenc", BPGENC), ("bpgdec", BPGDEC)):
        (folder / name).write_text(text.format(python=sys.executable))
        (folder / name).chmod(0o755)
    image = picture(1, 64, 96)
    codec = ClassicCodec("bpg 4:4:4", 20)
    data = codec.encode(image)
    assert data.endswith(b"444") and psnr8(image, codec.decode(data, (64, 96))) > 30
    with pytest.raises(LicError, match="cannot be decoded as bpg 4:4:4: it has 96x64 pixels"):
        codec.decode(data, (64, 64))
    with pytest.raises(LicError, match="cannot be coded as bpg: bpgenc: x265 is out of order"):
        ClassicCodec("bpg", 13).encode(image)
    with pytest.raises(UsageError, match="bpg has no quality 52"):
        evaluate(experiment(folder, {"bpg": [52]}))
    evaluate(experiment(folder, {"bpg": [40, 30, 25, 20]}))
    points = read_points(folder / "r.json")
    assert [(point.checkpoint, point.versions) for point in points] == [
        (f"QP {quality}", "bpgenc 0.9.8") for quality in (40, 30, 25, 20)
    ]
    assert all(row.encode_bytes is None for point in points for row in point.images)


def test_a_jpeg_is_what_its_name_says() -> None:
    image = picture(2, 64, 96)
    plain = io.BytesIO()
    Image.fromarray(image).save(plain, "JPEG", quality=50, subsampling=0)
    for name, sampling in (("jpeg", 2), ("jpeg 4:4:4", 0)):
        data = ClassicCodec(name, 50).encode(image)
        with Image.open(io.BytesIO(data)) as opened:
            assert JpegImagePlugin.get_sampling(opened) == sampling
    assert len(data) < len(plain.getvalue())  # optimised tables, the same pixels
    with Image.open(plain) as same:
        assert np.array_equal(ClassicCodec("jpeg 4:4:4", 50).decode(data), np.asarray(same))


def test_a_jpeg2000_has_the_rate_that_it_is_asked_for() -> None:
    image = picture(3, 256, 256)
    data = ClassicCodec("jpeg2000", 0.5).encode(image)
    assert data[:4] == b"\xff\x4f\xff\x51" and 8 * len(data) / 256**2 == pytest.approx(0.5, rel=0.05)


def test_what_a_codec_does_not_take_is_said_in_one_line() -> None:
    with pytest.raises(LicError, match="cannot be coded as webp: .*16383"):
        ClassicCodec("webp", 8).encode(np.zeros((2, 16400, 3), np.uint8))
    with pytest.raises(LicError, match="cannot be decoded as webp"):
        ClassicCodec("webp", 8).decode(b"RIFF")


# what is asked for


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        (["webb"], r"no codec 'webb' \(did you mean 'webp'\?"),
        ({"jpeg": [50.5]}, r"jpeg has no quality 50.5 \(0 to 100, whole numbers"),
        ({"webp": [101]}, "webp has no quality 101"),
        ({"jpeg2000": [0]}, r"jpeg2000 has no quality 0 \(0.01 to 24"),
    ],
)
def test_wrong_anchors_are_refused_before_anything_is_coded(folder: Path, wanted: object, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        evaluate(experiment(folder, wanted))
    assert not (folder / "r.json").exists()


@pytest.mark.parametrize(("name", "command"), [("jxl", "pip install pillow-jxl-plugin"), ("avif", "pip install -U")])
def test_a_codec_that_is_not_installed_is_one_line_with_the_command(
    folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, command: str
) -> None:
    lacking = replace(CODECS[name], format=replace(CODECS[name].format, present=lambda: False))
    monkeypatch.setitem(classic.CODECS, name, lacking)
    with pytest.raises(UsageError, match=f"this Pillow has no {name.upper()}") as refused:
        evaluate(experiment(folder, ["jpeg", name]))
    assert command in refused.value.hint and not (folder / "r.json").exists()


def test_a_library_that_does_not_know_a_setting_is_one_line(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    older = replace(CODECS["avif iq"], options={**CODECS["avif iq"].options, "advanced": {"tune": "of tomorrow"}})
    monkeypatch.setitem(CODECS, "avif iq", older)
    with pytest.raises(UsageError, match="evaluate.anchors: cannot be coded as avif iq") as caught:
        evaluate(experiment(folder, ["avif iq"]))
    assert "libavif" in str(caught.value.hint) and not (folder / "r.json").exists()


def test_anchors_are_not_coded_again_and_again(folder: Path) -> None:
    with pytest.raises(UsageError, match="nothing to code again"):
        evaluate_generations(experiment(folder, ["jpeg"]), 2)
    with pytest.raises(UsageError, match="nothing to evaluate"):
        evaluate(experiment(folder, []))


# the choice of qualities


def points_at(*decibels: float, digest: str = "p") -> list[Point]:
    names = [f"{seed}.png" for seed in range(3)]
    rows = [[image_result(name, 0.5, psnr) for name in names] for psnr in decibels]
    return [Point("q", "sq", 0.01 * (n + 1), tuple(one), pictures=digest) for n, one in enumerate(rows)]


def test_qualities_cover_the_measured_points(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, names = open_source(str(folder / "pictures")).absolute(), ("0.png", "1.png", "2.png")
    ladder = CODECS["jpeg"].ladder
    originals = [images.picture(source, name) for name in names]
    codecs = [ClassicCodec("jpeg", quality) for quality in ladder]
    psnr = [float(np.mean([psnr8(one, c.decode(c.encode(one))) for one in originals])) for c in codecs]
    asked = {"jpeg": ()}
    low, high = (psnr[3] + psnr[4]) / 2, (psnr[8] + psnr[9]) / 2
    jobs = anchors.anchor_jobs(asked, source, names, "p", points_at(low, (low + high) / 2, high))
    assert [job.quality for job in jobs] == list(ladder[2:11])
    narrow = anchors.anchor_jobs(asked, source, names, "p", points_at(low))
    assert [job.quality for job in narrow] == list(ladder[2:6])
    beyond = anchors.anchor_jobs(asked, source, names, "p", points_at(psnr[0] - 9, psnr[-1] + 9))
    assert [job.quality for job in beyond] == list(ladder)
    others = anchors.anchor_jobs(asked, source, names, "p", points_at(low, digest="of other pictures"))
    assert [job.quality for job in others] == list(ladder)  # nothing to cover
    stored = [
        replace(points_at(psnr[ladder.index(job.quality)])[0], quantizer="jpeg", checkpoint=job.checkpoint,
                lmbda=None, record=job.record, model=job.model)
        for job in jobs
    ]  # fmt: skip
    monkeypatch.setattr(anchors, "psnr8", lambda *_: pytest.fail("coded to choose what is known"))
    assert anchors.anchor_jobs(asked, source, names, "p", [*points_at(low, high), *stored]) == jobs


# runs


def test_anchors_are_points_with_whole_files_and_go_on_where_they_stopped(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    true, count = running.measured_anchor_row, []

    def dying(*given):
        count.append(given[2])
        if len(count) == 5:
            raise KeyboardInterrupt
        return true(*given)

    wanted = {"jpeg": [20, 80], "webp": [50]}
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(running, "measured_anchor_row", dying)
        evaluate(experiment(folder, wanted))
    assert len((folder / "r.rows.jsonl").read_text().splitlines()) == 4 and len(read_points(folder / "r.json")) == 1
    out = evaluate(experiment(folder, wanted, show=["1.png"]))
    assert not (folder / "r.rows.jsonl").exists()
    points = read_points(out)
    found = [(point.quantizer, point.checkpoint, point.lmbda, point.arm) for point in points]
    assert found == [("jpeg", f"quality {n}", None, "") for n in (20, 80)] + [("webp", "quality 50", None, "")]
    assert points[0].settings == "JPEG: quality=20, subsampling=4:2:0, optimize=True"
    assert points[0].versions == CODECS["jpeg"].versions
    for point in points:
        codec = ClassicCodec(point.quantizer, float(point.checkpoint.split()[1]))
        for row in point.images:
            original = images.read(folder / "pictures" / row.image)
            data = codec.encode(original)
            assert row.bpp == 8 * len(data) / (64 * 96) and row.psnr == psnr8(original, codec.decode(data))
            assert row.container_bpp == 0 and np.isnan(row.estimated_bpp) and row.encode_seconds > 0
        kept = images.read(folder / point.shown["1.png"])
        assert psnr8(images.read(folder / "pictures" / "1.png"), kept) == point.images[1].psnr
    rows = list(csv.DictReader((folder / "r.csv").open()))
    assert len(rows) == 9 and all(row["lmbda"] == row["estimated_bpp"] == "" for row in rows)
    assert read_file(out).points == points or repr(read_file(out).points) == repr(points)  # nan
    monkeypatch.setattr(running, "measured_anchor_row", lambda *_: pytest.fail("measured again"))
    assert repr(read_points(evaluate(experiment(folder, wanted)))) == repr(points)


def test_anchors_have_the_metrics_that_are_asked_for(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wanted, metrics = {"jpeg": [20, 80]}, ["psnr", "psnr-yuv"]
    before = read_points(evaluate(experiment(folder, wanted)))
    out = evaluate(experiment(folder, wanted, metrics=metrics))
    points = read_points(out)
    assert [point.checkpoint for point in points] == [point.checkpoint for point in before]
    for point, plain in zip(points, before, strict=True):
        codec = ClassicCodec("jpeg", float(point.checkpoint.split()[1]))
        assert [row.psnr for row in point.images] == [row.psnr for row in plain.images] and not plain.images[0].metrics
        for row in point.images:
            original = images.read(folder / "pictures" / row.image)
            decoded = codec.decode(codec.encode(original))
            assert row.metrics == measure(["psnr-yuv"], original, decoded)
    assert all(float(row["psnr_yuv"]) > 0 for row in csv.DictReader((folder / "r.csv").open()))
    summary(out)
    assert f" q80 {points[1].figures.metrics['psnr-yuv']:.3f}" in " ".join(capsys.readouterr().out.split())
    monkeypatch.setattr(running, "measured_anchor_row", lambda *_: pytest.fail("measured again"))
    evaluate(experiment(folder, wanted, metrics=metrics))


def test_points_of_another_version_leave_the_curve(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluate(experiment(folder, {"jpeg": [20, 50], "webp": [50]}))
    newer = replace(CODECS["jpeg"].format, library=lambda: "libjpeg of tomorrow")
    monkeypatch.setitem(classic.CODECS, "jpeg", replace(CODECS["jpeg"], format=newer))
    points = read_points(evaluate(experiment(folder, {"jpeg": [20]})))
    assert [(one.quantizer, one.checkpoint) for one in points] == [("jpeg", "quality 20"), ("webp", "quality 50")]
    assert points[0].versions.endswith("of tomorrow")
    with pytest.raises(UsageError, match="where the run began"):
        anchors.AnchorJob("jpeg", 20, "of yesterday").codec()


def test_a_picture_that_a_codec_does_not_take_is_set_aside(folder: Path) -> None:
    Image.fromarray(np.zeros((2, 16400, 3), np.uint8)).save(folder / "pictures" / "long.png")
    jpeg, webp = read_points(evaluate(experiment(folder, {"jpeg": [20], "webp": [20]})))
    assert len(jpeg.images) == 4 and len(webp.images) == 3 and not jpeg.set_aside
    assert list(webp.set_aside) == ["long.png"] and "16383" in webp.set_aside["long.png"]


@pytest.mark.slow
def test_anchors_come_after_the_points_that_they_cover(base: Path, folder: Path) -> None:
    both = experiment(folder, ["jpeg"], checkpoints=[str(base)])
    points = read_points(evaluate(both))
    assert (points[0].arm, points[0].quantizer) == ("base", "sq")
    assert {point.quantizer for point in points[1:]} == {"jpeg"} and len(points) >= 5
    again = read_points(evaluate(both))
    assert repr(again) == repr(points)
