"""Bitstreams that an evaluation keeps, over kills and later runs, and the check of their archive."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from lic_dist import config
from lic_dist.app.cli import app
from lic_dist.building.records import analytic_record
from lic_dist.codec import open_codec
from lic_dist.data import images
from lic_dist.errors import LicError, UsageError
from lic_dist.evaluation.archive import MANIFEST, RESULTS, Archive, add
from lic_dist.evaluation.results import read_points
from lic_dist.evaluation.run import evaluate
from lic_dist.evaluation.verify import Verified, tolerance, verify
from lic_dist.models import checkpoint
from lic_dist.models.names import label
from tests.evaluation.test_resuming import counting, members

Members = dict[str, bytes]
LEARNED, CLASSIC = ("a.png", "sub/b.png"), "webp-quality-20"


def experiment(base: Path, folder: Path, **changes: object) -> config.Experiment:
    section = {
        "images": str(folder / "pictures"),
        "checkpoints": [str(base)],
        "quantizers": ["sq"],
        "bitstreams": True,
        "out": str(folder / "r.json"),
    }
    engine = changes.pop("engine", {"name": "local"})
    return config.Experiment.model_validate({"name": "e", "engine": engine, "evaluate": {**section, **changes}})


def filled(folder: Path, photos: Path) -> Path:
    (folder / "pictures" / "sub").mkdir(parents=True)
    shutil.copy(photos / "valid" / "6.png", folder / "pictures" / "a.png")
    shutil.copy(photos / "valid" / "7.png", folder / "pictures" / "sub" / "b.png")
    return folder


@pytest.fixture()
def folder(photos: Path, tmp_path: Path) -> Path:
    """A folder with pictures/a.png and pictures/sub/b.png."""
    return filled(tmp_path, photos)


def streams(path: Path) -> Members:
    return {name: data for name, data in members(path).items() if name.endswith((".lic", ".webp", ".jpg"))}


# what is kept


@pytest.mark.slow
def test_bitstreams_are_the_codecs_and_the_archive_is_the_same_again(base: Path, folder: Path) -> None:
    evaluate(experiment(base, folder, anchors={"webp": [20], "jpeg": [30]}))
    path = folder / "r.bitstreams.zip"
    codec = open_codec(str(base))
    found = streams(path)
    for image, member in zip(LEARNED, ("a.png", "sub-b.png"), strict=True):
        pixels = images.read(folder / "pictures" / image)
        assert found.pop(f"{label(str(base))}-sq/{member}.lic") == codec.encode(pixels).data
        assert Image.open(io.BytesIO(found.pop(f"{CLASSIC}/{member}.webp"))).size == pixels.shape[1::-1]
    assert sorted(found) == ["jpeg-quality-30/a.png.jpg", "jpeg-quality-30/sub-b.png.jpg"]
    assert not (folder / "r.bitstreams").exists()
    before = path.read_bytes()
    evaluate(experiment(base, folder, anchors={"webp": [20], "jpeg": [30]}))
    assert path.read_bytes() == before
    with zipfile.ZipFile(path) as file:
        assert {one.date_time[0] for one in file.infolist()} == {1980}
        assert {one.compress_type for one in file.infolist()} == {zipfile.ZIP_STORED}


def test_a_killed_run_has_the_bitstreams_of_its_rows(base: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        counting(patch, die_at=2)
        with pytest.raises(KeyboardInterrupt):
            evaluate(experiment(base, folder))
    kept = [one for one in (folder / "r.bitstreams").rglob("*") if one.is_file()]
    assert len(kept) == 2 and not (folder / "r.bitstreams.zip").exists()  # about.json, and that of the first row
    coded = counting(monkeypatch)
    evaluate(experiment(base, folder))
    assert coded == ["sub/b.png"] and verify(folder / "r.bitstreams.zip").streams == 2


def test_a_row_whose_bitstream_is_lost_is_coded_again(
    base: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        counting(patch, die_at=2)
        with pytest.raises(KeyboardInterrupt):
            evaluate(experiment(base, folder))
    shutil.rmtree(folder / "r.bitstreams")
    coded = counting(monkeypatch)
    evaluate(experiment(base, folder))
    assert coded == [*LEARNED] and verify(folder / "r.bitstreams.zip").streams == 2


@pytest.mark.slow
def test_an_archive_grows_and_points_without_bitstreams_are_coded_anew(
    base: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluate(experiment(base, folder, bitstreams=False))
    record = analytic_record(checkpoint.load(str(base)), "tcq", 8, 0.6, 0.2, np.ones(12))
    record.save(folder / "mine" / "record.json")
    evaluate(experiment(base, folder, quantizers=[str(folder / "mine")]))
    path = folder / "r.bitstreams.zip"
    assert "2 bitstreams of 1 point, of 1 none were kept" in capsys.readouterr().out
    first = streams(path)
    coded = counting(monkeypatch)
    evaluate(experiment(base, folder))
    assert coded == [*LEARNED] and first.items() < streams(path).items() and len(streams(path)) == 4
    found = verify(path, str(folder / "pictures"))
    assert found.differences == [] and [point.quantizer for point in found.points] == ["sq", "mine"]
    evaluate(experiment(base, folder, quantizers=["sq", str(folder / "mine")]))
    assert coded == [*LEARNED] and len(streams(path)) == 4


@pytest.mark.slow
def test_checkpoints_are_packed_once_they_are_asked_for(
    base: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate(experiment(base, folder))
    coded = counting(monkeypatch)
    path = folder / "r.bitstreams.zip"
    for asked, there in (("with checkpoints", 1), ("with checkpoints", 1), (True, 0)):
        evaluate(experiment(base, folder, bitstreams=asked))
        files = [data for name, data in members(path).items() if name.startswith("checkpoints/")]
        assert files == [base.read_bytes()] * there and verify(path).differences == []
    assert coded == []


def test_pictures_with_odd_names_are_kept(base: Path, folder: Path) -> None:
    (folder / "pictures" / "a.png").rename(folder / "pictures" / "-a\\b: c.png")
    evaluate(experiment(base, folder))
    path = folder / "r.bitstreams.zip"
    found = verify(path, str(folder / "pictures"))
    assert found.differences == [] and [row.image for row in found.points[0].images] == ["-a\\b: c.png", "sub/b.png"]
    assert [name.partition("/")[2] for name in streams(path)] == ["a-b-c.png.lic", "sub-b.png.lic"]


def test_an_archive_that_is_broken_is_not_gone_on_with(base: Path, folder: Path) -> None:
    (folder / "r.bitstreams.zip").write_bytes(b"PK")
    with pytest.raises(LicError, match="is no archive of bitstreams") as caught:
        evaluate(experiment(base, folder))
    assert caught.value.hint == "remove it: its pictures are coded again"


# the check


@pytest.fixture(scope="module")
def packed(base: Path, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the archive of a learned and a classic codec, the checkpoint in it, and the pictures."""
    folder = filled(tmp_path_factory.mktemp("packed"), photos)
    shutil.copy(base, folder / "gone.pth.tar")
    changes = {"anchors": {"webp": [20]}, "bitstreams": "with checkpoints", "metrics": ["psnr", "psnr-yuv"]}
    evaluate(experiment(folder / "gone.pth.tar", folder, **changes))
    (folder / "gone.pth.tar").unlink()
    return folder


def altered(packed: Path, to: Path, change: Callable[[Members], object]) -> Path:
    """A copy of the archive whose members were changed; digests of bitstreams are those of what is there."""
    found = members(packed / "r.bitstreams.zip")
    change(found)
    written(found, to / "x.zip")
    return to / "x.zip"


def written(found: Members, path: Path) -> None:
    with zipfile.ZipFile(path, "w") as file:
        for name, data in found.items():
            add(file, name, data)


def in_json(member: str, change: Callable[[Any], object]) -> Callable[[Members], None]:
    def changed(found: Members) -> None:
        content = json.loads(found[member])
        change(content)
        found[member] = json.dumps(content).encode()

    return changed


def rehashed(found: Members) -> None:
    content = json.loads(found[MANIFEST])
    for stream in (one for point in content["points"] for one in point["streams"]):
        stream["sha256"] = hashlib.sha256(found[stream["member"]]).hexdigest()
    found[MANIFEST] = json.dumps(content).encode()


def figures(found: Verified) -> list[tuple[str, str]]:
    return [(one.image, one.figure) for one in found.differences]


def test_an_archive_gives_its_figures_again(packed: Path) -> None:
    path = packed / "r.bitstreams.zip"
    bare = verify(path)
    assert (bare.differences, bare.points, bare.near, bare.streams) == ([], [], 0, 4)
    assert bare.line == f"{path}: 4 bitstreams give the stated bytes, sizes and pixels"
    found = verify(path, str(packed / "pictures"))
    assert found.differences == [] and found.line.endswith("give the stated figures")
    for now, then in zip(found.points, read_points(packed / "r.json"), strict=True):
        assert now.figures == then.figures and now.figures.metrics["psnr-yuv"] is not None
    done = CliRunner().invoke(app, ["evaluate", "--verify", str(path), "--images", str(packed / "pictures")])
    assert done.exit_code == 0 and "4 bitstreams give the stated figures\n" in done.output


@pytest.mark.parametrize(
    ("figure", "by", "pixels", "differs"),
    [
        ("bpp", 1e-12, False, True), ("container_bpp", 1e-9, False, True), ("psnr", 1e-6, False, True),
        ("psnr", 0.009, True, False), ("psnr", 0.011, True, True), ("psnr-yuv", 0.011, False, True),
    ],
)  # fmt: skip
def test_another_figure_is_named(
    packed: Path, tmp_path: Path, figure: str, by: float, pixels: bool, differs: bool
) -> None:
    def stated(content: Any) -> None:
        row = content["points"][0]["images"][1]
        row |= (
            {"metrics": {figure: row["metrics"][figure] + by}} if figure == "psnr-yuv" else {figure: row[figure] + by}
        )

    def other_pixels(content: Any) -> None:
        content["points"][0]["streams"][1]["decoded"] = "0" * 64

    path = altered(packed, tmp_path, in_json(RESULTS, stated))
    if pixels:  # as on a machine whose g_s ends in other last bits
        path = altered_again(path, in_json(MANIFEST, other_pixels))
    found = verify(path, str(packed / "pictures"))
    assert figures(found) == ([("sub/b.png", figure)] if differs else []) and found.near == pixels
    if not differs:
        assert found.line.endswith("stated figures, 1 with pixels of another last level")
        assert figures(verify(path)) == [("sub/b.png", "pixels")]
    else:
        with pytest.raises(LicError, match="1 of 4 bitstreams differ from what is stated"):
            found.require_equal()


def altered_again(path: Path, change: Callable[[Members], object]) -> Path:
    found = members(path)
    change(found)
    written(found, path)
    return path


def test_the_command_shows_what_differs_and_fails(packed: Path, tmp_path: Path) -> None:
    path = altered(packed, tmp_path, in_json(RESULTS, lambda found: found["points"][0]["images"][0].update(bpp=0.5)))
    done = CliRunner().invoke(app, ["evaluate", "--verify", str(path), "--json", str(tmp_path / "d.json")])
    assert isinstance(done.exception, LicError) and done.exception.exit_code == 1 and "a.png" in done.output
    (one,) = json.loads((tmp_path / "d.json").read_text())["differences"]
    assert (one["image"], one["figure"], one["stored"]) == ("a.png", "bpp", "0.5")
    for words in ((), ("e.yaml", "--verify", str(path)), ("e.yaml", "--images", "x")):
        done = CliRunner().invoke(app, ["evaluate", *words])
        assert isinstance(done.exception, UsageError) and done.exception.exit_code == 2


def flipped(found: Members) -> None:
    member = next(name for name in found if name.endswith(".lic"))
    found[member] = found[member][:40] + bytes([found[member][40] ^ 1]) + found[member][41:]


def exchanged(found: Members) -> None:
    first, second = (name for name in found if name.endswith(".webp"))
    found[first], found[second] = found[second], found[first]


def test_an_altered_bitstream_is_named(packed: Path, tmp_path: Path) -> None:
    with pytest.raises(LicError, match=r"is altered: .*/a.png.lic has another digest"):
        verify(altered(packed, tmp_path, flipped))
    found = verify(altered_again(tmp_path / "x.zip", rehashed))
    assert figures(found) == [("a.png", "picture")] and "checksum" in found.differences[0].found
    altered(packed, tmp_path, exchanged)
    found = verify(altered_again(tmp_path / "x.zip", rehashed))
    assert figures(found) == [("a.png", "picture"), ("sub/b.png", "picture")]  # they are of other sizes
    assert "cannot be decoded as webp: it has " in found.differences[0].found
    raw = bytearray((packed / "r.bitstreams.zip").read_bytes())
    raw[raw.index(b"LIC") + 40] ^= 1
    (tmp_path / "x.zip").write_bytes(raw)
    with pytest.raises(LicError, match=r"is altered: .*/a.png.lic cannot be read"):
        verify(tmp_path / "x.zip")


def test_another_original_is_refused(packed: Path, tmp_path: Path) -> None:
    shutil.copytree(packed / "pictures", tmp_path / "pictures")
    shutil.copy(packed / "pictures" / "a.png", tmp_path / "pictures" / "sub" / "b.png")
    with pytest.raises(LicError, match="sub/b.png in .* is another picture than the one that was coded"):
        verify(packed / "r.bitstreams.zip", str(tmp_path / "pictures"))
    (tmp_path / "pictures" / "a.png").unlink()
    with pytest.raises(LicError, match=r"a.png"):
        verify(packed / "r.bitstreams.zip", str(tmp_path / "pictures"))


def test_the_checkpoint_is_the_one_of_the_digests(base: Path, packed: Path, tmp_path: Path) -> None:
    def bare(found: Members) -> None:
        del found[next(name for name in found if name.startswith("checkpoints/"))]
        in_json(MANIFEST, lambda content: content["points"][0]["model"].update(member=""))(found)

    path = altered(packed, tmp_path, bare)
    with pytest.raises(LicError, match="no checkpoint '.*gone.pth.tar'") as caught:
        verify(path)
    assert caught.value.hint == "name the checkpoint with --checkpoint PATH" and caught.value.exit_code == 1
    other = checkpoint.load(str(base))
    next(iter(other.model.g_s.parameters())).data += 1
    checkpoint.save(other, tmp_path / "other.pth.tar")
    assert verify(path, given=[str(tmp_path / "other.pth.tar"), str(base)]).differences == []
    named = in_json(
        MANIFEST, lambda content: content["points"][0]["model"].update(checkpoint=str(tmp_path / "other.pth.tar"))
    )
    with pytest.raises(LicError, match=r"was made with another model than .*other.pth.tar is"):
        verify(altered_again(path, named))


# archives from elsewhere


def of_model(**changes: object) -> Callable[[Members], None]:
    return in_json(MANIFEST, lambda content: content["points"][0]["model"].update(changes))


def of_image(name: str) -> Callable[[Members], None]:
    def changed(found: Members) -> None:
        in_json(MANIFEST, lambda content: content["points"][0]["streams"][0].update(image=name))(found)
        in_json(RESULTS, lambda content: content["points"][0]["images"][0].update(image=name))(found)

    return changed


def record_of(found: Members) -> None:
    member = next(name for name in found if name.startswith("records/"))
    loaded = checkpoint.load("base-small")
    found[member] = analytic_record(loaded, "tcq", 8, 0.6, 0.2, np.ones(loaded.codec.channels)).to_json().encode()


HOSTILE: dict[str, tuple[Callable[[Members], object], str]] = {
    "traversal": (lambda found: found.update({"../x": b""}), "outside of its folder: ../x"),
    "absolute": (lambda found: found.update({"/etc/x": b""}), "outside of its folder: /etc/x"),
    "unknown": (lambda found: found.update({"run\nme.sh": b""}), r"does not name: run\\nme.sh"),
    "missing": (lambda found: found.pop(next(name for name in found if name.endswith(".webp"))), "lacks webp-"),
    "no manifest": (lambda found: found.pop(MANIFEST), "it has no archive.json"),
    "no results": (lambda found: found.update({RESULTS: b"[" * 100_000}), "has no result file"),
    "manifest": (lambda found: found.update({MANIFEST: b"[" * 100_000}), "has a broken manifest"),
    "fields": (in_json(MANIFEST, lambda content: content.update(more=1)), "broken manifest at more"),
    "version": (in_json(MANIFEST, lambda content: content.update(version=2)), "broken manifest at version"),
    "picture": (of_image("../../x.png"), "a picture outside of its folder: '../../x.png'"),
    "class": (of_model(architecture="os:system"), "os:system, a class that is not imported"),
    "family": (of_model(architecture="x", member="", checkpoint="base-small"), "no architecture 'x'|x"),
    "pickle": (lambda found: found.update({next(n for n in found if n.startswith("che")): b"x" * 99}), "checkpoint"),
    "record": (record_of, "has another record"),
    "rows": (in_json(RESULTS, lambda content: content["points"].pop()), "has other pictures than its manifest"),
    "codec": (in_json(RESULTS, lambda content: content["points"][1].update(quantizer="x")), "'x', which is no codec"),
    "metric": (
        in_json(RESULTS, lambda content: content["points"][0]["images"][0]["metrics"].update(x=1.0)),
        "'x', which is no metric",
    ),
    "no model": (in_json(MANIFEST, lambda content: content["points"][0].update(model=None, record="")), "."),
}  # fmt: skip


@pytest.mark.parametrize("fault", HOSTILE)
def test_an_archive_from_elsewhere_is_one_line(packed: Path, tmp_path: Path, fault: str) -> None:
    change, message = HOSTILE[fault]
    path = altered(packed, tmp_path, change)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(LicError, match=message) as caught:
        verify(path, str(packed / "pictures"))
    assert "\n" not in caught.value.message and len(caught.value.message) < 600
    assert sorted(tmp_path.rglob("*")) == before


def test_bombs_are_not_unfolded(packed: Path, tmp_path: Path) -> None:
    found, path = members(packed / "r.bitstreams.zip"), tmp_path / "x.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr(MANIFEST, found[MANIFEST])
        file.writestr("zeros", bytes(1 << 20))
    with pytest.raises(LicError, match="compressed or encrypted: archive.json"):
        verify(path)
    written({MANIFEST: found[MANIFEST], **{f"x{number}": bytes(5000) for number in range(9)}}, path)
    with zipfile.ZipFile(path, "a") as file:
        first = file.getinfo("x0").header_offset
        for number in range(9):  # all of them are the first
            file.getinfo(f"x{number}").header_offset = first
            file.getinfo(f"x{number}").file_size = file.getinfo(f"x{number}").compress_size = 40_000
        file._didModify = True
    with pytest.raises(LicError, match="lie over each other"):
        verify(path)
    with pytest.warns(UserWarning, match="Duplicate name"), zipfile.ZipFile(path, "w") as file:
        add(file, MANIFEST, found[MANIFEST])
        add(file, MANIFEST, found[MANIFEST])
    with pytest.raises(LicError, match="two members of one name"):
        verify(path)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"{}"])
def test_another_file_is_no_archive(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.zip").write_bytes(content)
    with pytest.raises(LicError, match="x.zip is no archive of bitstreams"), Archive.open(tmp_path / "x.zip"):
        pass
    with pytest.raises(LicError, match="cannot read .*y.zip: No such file"), Archive.open(tmp_path / "y.zip"):
        pass


def test_tolerances_are_ten_units_of_the_last_digit() -> None:
    assert {name: tolerance(name) for name in ("psnr", "ms-ssim", "vmaf")} == pytest.approx(
        {"psnr": 0.01, "ms-ssim": 0.001, "vmaf": 0.1}
    )
