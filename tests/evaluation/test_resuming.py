"""The evaluation image by image: the same figures on every engine, resumed, kept pictures, faults, tables."""

from __future__ import annotations

import csv
import json
import shutil
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from lic_dist import config
from lic_dist.building.records import analytic_record
from lic_dist.codec.codec import ImageCodec
from lic_dist.data import images
from lic_dist.errors import LicError, UsageError
from lic_dist.evaluation import run as running
from lic_dist.evaluation.generations import evaluate_generations, read_generations
from lic_dist.evaluation.jobs import Task
from lic_dist.evaluation.journal import Journal
from lic_dist.evaluation.metrics import psnr8
from lic_dist.evaluation.results import Point, read_originals, read_points
from lic_dist.evaluation.run import evaluate
from lic_dist.evaluation.summary import summary
from lic_dist.models import checkpoint, packs
from lic_dist.models.architectures import adapt
from lic_dist.models.stages import analyse, dequantize_z, to_input
from lic_dist.quantization.rates import level_index
from tests.app.test_cli import lic_dist, refused, write
from tests.models.test_packs import packed


@pytest.fixture()
def folder(base: Path, photos: Path, tmp_path: Path) -> Path:
    """A folder with pictures/a.png and pictures/sub/b.png, and a TCQ record at mine/record.json."""
    (tmp_path / "pictures" / "sub").mkdir(parents=True)
    shutil.copy(photos / "valid" / "6.png", tmp_path / "pictures" / "a.png")
    shutil.copy(photos / "valid" / "7.png", tmp_path / "pictures" / "sub" / "b.png")
    loaded = checkpoint.load(str(base))
    analytic_record(loaded, "tcq", 8, 0.6, 0.2, np.ones(12)).save(tmp_path / "mine" / "record.json")
    return tmp_path


def sections(base: Path, folder: Path, out: str = "r.json", **changes: object) -> dict:
    engine = changes.pop("engine", {"name": "local"})
    evaluating = {
        "images": str(folder / "pictures"),
        "checkpoints": [str(base)],
        "quantizers": ["sq", str(folder / "mine")],
        "out": str(folder / out),
        **changes,
    }
    return {"name": "e", "engine": engine, "evaluate": evaluating}


def experiment(*arguments: object, **changes: object) -> config.Experiment:
    return config.Experiment.model_validate(sections(*arguments, **changes))


TIMELESS = {"encode_seconds": 0, "decode_seconds": 0, "encode_bytes": 0, "decode_bytes": 0}


def timeless(points: tuple[Point, ...]) -> list[Point]:
    return [replace(one, images=tuple(replace(row, **TIMELESS) for row in one.images)) for one in points]


def members(path: Path) -> dict[str, bytes]:
    """The members of an archive of bitstreams."""
    with zipfile.ZipFile(path) as file:
        return {name: file.read(name) for name in file.namelist()}


def counting(monkeypatch: pytest.MonkeyPatch, die_at: int = 0) -> list[str]:
    """The names of the images coded from now on; at number `die_at` the run is interrupted."""
    coded: list[str] = []
    measure = running.measure_image

    def count(codec: ImageCodec, image: np.ndarray, name: str, *metrics: Sequence[str]) -> running.Measured:
        if len(coded) + 1 == die_at:
            raise KeyboardInterrupt
        coded.append(name)
        return measure(codec, image, name, *metrics)

    monkeypatch.setattr(running, "measure_image", count)
    monkeypatch.setattr("lic_dist.evaluation.generations.measure_image", count)
    return coded


@pytest.mark.slow
def test_one_process_and_several_give_the_same_figures(base: Path, folder: Path, forked_workers: None) -> None:
    found = {}
    for name, engine in {
        "one": {"name": "local"},
        "two": {"name": "local", "searchers": 2},
    }.items():
        kept = {"show": ["sub/b.png"], "bitstreams": True}
        out = evaluate(experiment(base, folder, f"{name}.json", engine=engine, **kept))
        found[name] = timeless(read_points(out))
        for point in found[name]:
            assert set(point.shown) == {"sub/b.png"} and (folder / point.shown["sub/b.png"]).is_file()
    pictures = [[images.read(folder / point.shown["sub/b.png"]) for point in points] for points in found.values()]
    bare = [[replace(point, shown={}) for point in points] for points in found.values()]
    assert bare[0] == bare[1] and len(bare[0]) == 2
    for one, two in zip(*pictures, strict=True):
        assert np.array_equal(one, two)
    first, then = (members(folder / f"{name}.bitstreams.zip") for name in found)
    assert first.pop("results.json") != then.pop("results.json")  # by its times
    assert first == then and len(first) == 2 * 2 + 2 + 1  # streams, records, the manifest


@pytest.mark.slow
def test_statistics_are_those_of_the_indices(base: Path, folder: Path) -> None:
    points = read_points(evaluate(experiment(base, folder)))
    loaded = checkpoint.load(str(base))
    for point, job in zip(points, ("sq", str(folder / "mine")), strict=True):
        bits, counts = np.zeros((2, 12)), np.zeros(17, int)
        codec = ImageCodec(
            loaded.model, running.Task.of(experiment(base, folder, quantizers=[job])).jobs[0].codec().record
        )
        for number, row in enumerate(point.images):
            image = images.read(folder / "pictures" / row.image)
            k = codec.encode(image).k
            rows = codec.quantizer.rows(k, levels(codec, image))
            for channel in range(12):
                tables = codec.record.y_tables
                bits[number, channel] = tables.bits(k[channel], rows[channel]).sum() / (row.height * row.width)
            for index in k.ravel().tolist():
                counts[min(max(index, -8), 8) + 8] += 1
        assert point.k_counts == tuple(counts)
        assert point.channel_bits == pytest.approx(bits.mean(axis=0), rel=1e-12)
        estimated = np.mean([row.estimated_bpp for row in point.images])
        assert point.z_bpp is not None and point.z_bpp > 0
        assert sum(point.channel_bits) + point.z_bpp == pytest.approx(estimated, rel=1e-9)


def levels(codec: ImageCodec, image: np.ndarray) -> np.ndarray:
    """The scale levels of a picture, on a way of their own."""
    import torch

    from lic_dist.codec.codec import padding

    left, right, top, bottom = padding(*image.shape[:2])
    x = torch.nn.functional.pad(
        to_input(torch.from_numpy(image.transpose(2, 0, 1).copy())[None], codec.device), (left, right, top, bottom)
    )
    found = []
    with torch.no_grad():
        y, z = analyse(codec.model, x)

        def serve(stage):
            found.append(level_index(stage.to_lanes(stage.scales), codec.record.level_rule))
            return y.float()

        adapt(codec.model).drive((dequantize_z(codec.model, z),), serve)
    return found[0]


@pytest.mark.slow
def test_a_killed_run_loses_no_image_that_is_coded(base: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = timeless(read_points(evaluate(experiment(base, folder, "whole.json"))))
    journal, out = folder / "r.rows.jsonl", folder / "r.json"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        counting(patch, die_at=2)
        evaluate(experiment(base, folder))
    assert not out.exists() and [json.loads(line)["row"]["image"] for line in journal.open()] == ["a.png"]
    foreign = {**json.loads(journal.read_text()), "checkpoint": "another", "model": "1234"}
    stale = {**json.loads(journal.read_text()), "pictures": "of long ago"}
    with journal.open("a") as file:
        file.write(f"{json.dumps(foreign)}\nno JSON\n{json.dumps(stale)}\n" + json.dumps(stale)[:40])  # torn
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        coded = counting(patch, die_at=3)
        evaluate(experiment(base, folder))
    assert coded == ["sub/b.png", "a.png"] and len(read_points(out)) == 1  # the first point is whole
    with monkeypatch.context() as patch:
        coded = counting(patch)
        assert timeless(read_points(evaluate(experiment(base, folder)))) == whole
        assert coded == ["sub/b.png"]
        evaluate(experiment(base, folder))
        assert coded == ["sub/b.png"]
    assert [json.loads(line) for line in journal.open()] == [foreign]  # another's work stays
    journal.unlink()
    evaluate(experiment(base, folder))
    assert not journal.exists()


def test_one_model_of_two_names_is_one_point(base: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = str(folder / "copy.pth.tar")
    shutil.copy(base, copy)
    both = experiment(base, folder, checkpoints=[str(base), copy], quantizers=["sq"])
    assert [point.checkpoint for point in read_points(evaluate(both))] == [copy]
    monkeypatch.setattr(running, "measure_image", lambda *_: pytest.fail("measured again"))
    again = experiment(base, folder, quantizers=["sq"])
    assert [point.checkpoint for point in read_points(evaluate(again))] == [str(base)]


def test_a_model_that_changes_while_a_run_waits_for_it_is_an_error(base: Path, folder: Path) -> None:
    copy = folder / "copy.pth.tar"
    shutil.copy(base, copy)
    (job,) = Task.of(experiment(base, folder, checkpoints=[str(copy)], quantizers=["sq"])).jobs
    loaded = checkpoint.load(str(base))
    with torch.no_grad():
        loaded.model.g_s[0].bias[0] += 1
    checkpoint.save(loaded, copy)
    with pytest.raises(UsageError, match="has changed since the run began"):
        job.codec()


def test_a_folder_of_a_quantizers_name_does_not_hide_it(
    base: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = checkpoint.load(str(base))
    loaded.quantizers["tcq8"] = analytic_record(loaded, "tcq", 8, 0.6, 0.2, np.ones(12)).to_json()
    checkpoint.save(loaded, folder / "carries.pth.tar")
    analytic_record(loaded, "tcq", 8, 0.9, 0.2, np.ones(12)).save(folder / "tcq8" / "record.json")
    (folder / "sq").mkdir()
    monkeypatch.chdir(folder)
    both = experiment(base, folder, checkpoints=["carries.pth.tar"], quantizers=["sq", "tcq8"])
    for job in Task.of(both).jobs:
        assert job.codec().record.digest == job.record


def test_two_runs_on_one_file_are_refused(base: Path, folder: Path) -> None:
    with Journal.of(folder / "r.json"), pytest.raises(LicError, match="another run writes"):
        evaluate(experiment(base, folder))
    assert len(read_points(evaluate(experiment(base, folder)))) == 2


@pytest.mark.slow
def test_rows_and_points_count_only_with_all_metrics_asked_for(
    base: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = timeless(read_points(evaluate(experiment(base, folder))))
    coded = counting(monkeypatch, die_at=2)
    more = ["psnr", "ms-ssim", "psnr-yuv", "gmsd"]
    with pytest.raises(KeyboardInterrupt):
        evaluate(experiment(base, folder, metrics=more))
    assert timeless(read_points(folder / "r.json")) == first  # stands until it is measured again
    monkeypatch.undo()
    coded = counting(monkeypatch)
    out = evaluate(experiment(base, folder, metrics=more))
    assert coded == ["sub/b.png", "a.png", "sub/b.png"]  # one was in the journal
    found = timeless(read_points(out))
    assert [replace(row, metrics={}) for row in found[0].images] == list(first[0].images)
    assert all(list(row.metrics) == ["psnr-yuv", "gmsd"] for point in found for row in point.images)
    for fewer in (more, ["gmsd"], ["psnr", "ms-ssim"]):  # of small pictures, which have no MS-SSIM
        evaluate(experiment(base, folder, metrics=fewer))
    assert len(coded) == 3 and timeless(read_points(out)) == found
    (row, *_), mean = csv.DictReader((folder / "r.csv").open()), found[0].figures.metrics["gmsd"]
    assert float(row["gmsd"]) == found[0].images[0].metrics["gmsd"] and list(row)[-2:] == ["psnr_yuv", "gmsd"]
    assert json.loads(out.read_text())["results"]["gmsd"][0] == mean == summary(out)["points"][0]["metrics"]["gmsd"]


@pytest.mark.slow
def test_shown_pictures_are_kept_and_come_again_when_lost(
    base: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UsageError, match=r"no image: 'b.png' \(there is 'sub/b.png'\)"):
        evaluate(experiment(base, folder, show=["b.png"]))
    with pytest.raises(UsageError, match="lies in the folder of images"):
        evaluate(experiment(base, folder, "pictures/r.json", show=["a.png"]))
    first = read_points(evaluate(experiment(base, folder)))
    assert not (folder / "r.pictures").exists() and first[0].shown == {}
    coded = counting(monkeypatch)
    out = evaluate(experiment(base, folder, show=["sub/b.png"]))
    second = read_points(out)
    assert coded == ["sub/b.png"] * 2 and [replace(one, shown={}) for one in second] == list(first)
    original = images.read(folder / "pictures" / "sub" / "b.png")
    assert read_originals(out) == {"sub/b.png": f"r.pictures/original-{second[0].pictures[:8]}/sub/b.png.png"}
    assert np.array_equal(images.read(folder / read_originals(out)["sub/b.png"]), original)
    assert len({point.shown["sub/b.png"] for point in second}) == 2
    for point in second:
        assert psnr8(original, images.read(folder / point.shown["sub/b.png"])) == point.images[1].psnr
    (folder / second[1].shown["sub/b.png"]).unlink()
    assert read_points(evaluate(experiment(base, folder, show=["sub/b.png"]))) == second and len(coded) == 3
    evaluate(experiment(base, folder))
    assert read_points(out) == second and len(coded) == 3  # what is kept stays named


def overflowing(monkeypatch: pytest.MonkeyPatch, breaks: Callable[[np.ndarray], bool]) -> None:
    encode = ImageCodec.encode

    def encoded(codec: ImageCodec, image: np.ndarray):
        if breaks(image):
            raise LicError("the encoder's latents overflow", hint="is this the checkpoint of a trained model?")
        return encode(codec, image)

    monkeypatch.setattr(ImageCodec, "encode", encoded)


@pytest.mark.slow
def test_an_image_that_cannot_be_coded_is_set_aside_and_told(
    base: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = read_points(evaluate(experiment(base, folder, "whole.json", quantizers=["sq"])))
    file = write(folder / "e.yaml", **sections(base, folder, quantizers=["sq"]))
    second = images.read(folder / "pictures" / "sub" / "b.png")
    overflowing(monkeypatch, lambda image: image.shape == second.shape)
    for _ in range(2):  # again from the result file, where nothing is coded
        told = lic_dist("evaluate", file, "--json", folder / "figures.json")
        refused(told, 3, "could not be coded are missing from 1 of 1 point")
        assert f"warning: sub/b.png with {base}, sq: the encoder's latents overflow" in told.stderr
        (point,) = read_points(folder / "r.json")
        assert point.set_aside == {"sub/b.png": "the encoder's latents overflow"}
        assert timeless((point,))[0].images == timeless(whole)[0].images[:1]
        monkeypatch.setattr(running, "measure_image", lambda *_: pytest.fail("coded again"))
    (figures,) = json.loads((folder / "figures.json").read_text())
    assert figures["points"][0]["images"] == 1 and figures["points"][0]["bpp"] == point.images[0].bpp
    monkeypatch.undo()
    overflowing(monkeypatch, lambda image: True)
    with pytest.raises(LicError, match="no image can be coded with .*, mine: a.png: the encoder's latents overflow"):
        evaluate(experiment(base, folder, quantizers=[str(folder / "mine")]))


def test_figures_on_the_terminal_in_a_csv_and_as_json(base: Path, folder: Path) -> None:
    file = write(folder / "e.yaml", **sections(base, folder))
    told = lic_dist("evaluate", file, "--json", folder / "figures.json")
    assert told.returncode == 0 and "mine" in told.stdout and told.stdout.splitlines()[-1] == str(folder / "r.json")
    points = read_points(folder / "r.json")
    rows = list(csv.DictReader((folder / "r.csv").open()))
    assert [(row["quantizer"], row["image"]) for row in rows] == [
        (name, image) for name in ("sq", "mine") for image in ("a.png", "sub/b.png")
    ]
    results = [(point, result) for point in points for result in point.images]
    for row, (point, result) in zip(rows, results, strict=True):
        assert (row["checkpoint"], row["arm"], float(row["lmbda"])) == (str(base), "base", 0.05)
        for name in ("bpp", "psnr", "estimated_bpp", "container_bpp", "encode_seconds", "decode_seconds"):
            assert float(row[name]) == getattr(result, name)
        assert (int(row["height"]), int(row["width"])) == (result.height, result.width)
        assert (row["likelihood_bpp"] == "") == (point.quantizer == "mine")
    (figures,) = json.loads((folder / "figures.json").read_text())
    for mean, point in zip(figures["points"], points, strict=True):
        assert mean["bpp"] == point.figures.bpp and mean["psnr"] == point.figures.psnr and mean["images"] == 2
        assert mean["encode_seconds"] == np.mean([row.encode_seconds for row in point.images])
        assert (mean["likelihood_bpp"] is None) == (point.quantizer == "mine") and mean["set_aside"] == {}


def test_files_of_earlier_versions_load(base: Path, folder: Path) -> None:
    out = evaluate(experiment(base, folder, quantizers=["sq"]))
    content = json.loads(out.read_text())
    del content["originals"]
    for name in ("channel_bits", "k_counts", "z_bpp", "shown", "set_aside"):
        del content["points"][0][name]
    (new,) = read_points(out)
    out.write_text(json.dumps(content))
    assert read_points(out) == (replace(new, channel_bits=(), k_counts=(), z_bpp=None),) and not read_originals(out)


@pytest.mark.parametrize(
    ("wrong", "code", "words"),
    [
        ("truncated", 1, ("sub/c.png", "truncated")),
        ("no image", 1, ("sub/c.png", "not an image")),
        ("empty", 1, ("no photos in",)),
        ("checkpoint", 2, ("no checkpoint 'none'",)),
        ("quantizer", 2, ("no quantizer 'none'",)),
        ("no JSON", 1, ("r.json", "not JSON")),
        ("published", 1, ("r.json", "published curve")),
        ("metric", 2, ("evaluate.metrics", "iw-ssim")),
        ("package", 2, ("vif needs the package piq", "pip install piq")),
    ],
)
def test_what_is_wrong_is_told_before_anything_is_coded(
    base: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, wrong: str, code: int, words: tuple[str, ...]
) -> None:
    monkeypatch.setattr(running, "measure_image", lambda *_: pytest.fail("coded"))
    changes: dict[str, object] = {}
    photo, bad = (folder / "pictures" / name for name in ("a.png", "sub/c.png"))
    if wrong == "truncated":
        bad.write_bytes(photo.read_bytes()[:-500])
    elif wrong == "no image":
        bad.write_text("no image")
    elif wrong == "empty":
        (folder / "empty").mkdir()
        changes["images"] = str(folder / "empty")
    elif wrong == "checkpoint":
        changes["checkpoints"] = [str(base), "none"]
    elif wrong == "quantizer":
        changes["quantizers"] = ["sq", "none"]
    elif wrong == "metric":
        changes["metrics"] = ["psnr", "ssimm"]
    elif wrong == "package":
        changes["metrics"] = ["vif"]
        monkeypatch.setattr("lic_dist.evaluation.metrics.find_spec", lambda name: None)
    else:
        published = {"name": "theirs", "results": {"bpp": [0.1], "psnr": [30.0]}}
        (folder / "r.json").write_text("{" if wrong == "no JSON" else json.dumps(published))
    file = write(folder / "e.yaml", **sections(base, folder, **changes))
    refused(lic_dist("evaluate", file), code, *words)


@pytest.mark.slow
def test_generations_code_the_decoded_picture_again(base: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        counting(patch, die_at=6)  # the second image in its third generation
        evaluate_generations(experiment(base, folder, quantizers=["sq"]), 3)
    coded = counting(monkeypatch)
    out = evaluate_generations(experiment(base, folder, quantizers=["sq"]), 3)
    assert coded == ["sub/b.png"] * 3 and out == folder / "r.generations.json"
    assert (folder / "r.generations.png").read_bytes()[:4] == b"\x89PNG" and not (folder / "r.json").exists()
    (point,) = read_generations(out)
    codec = running.Task.of(experiment(base, folder, quantizers=["sq"])).jobs[0].codec()
    for row in point.images:
        original = before = images.read(folder / "pictures" / row["image"])
        for generation in range(3):
            data = codec.encode(before).data
            after = codec.decode(data)
            assert row["psnr"][generation] == psnr8(original, after)
            assert row["psnr_previous"][generation] == psnr8(before, after)
            pixels = original.shape[0] * original.shape[1]
            assert 0 <= 8 * len(data) / pixels - row["bpp"][generation] < 300 / pixels
            before = after
    (written,) = json.loads(out.read_text())["points"]
    assert written["bpp"] == [np.mean([row["bpp"][g] for row in point.images]) for g in range(3)]
    file = write(folder / "e.yaml", **sections(base, folder, quantizers=["sq"]))
    told = lic_dist("evaluate", file, "--generations", 2, "--json", folder / "figures.json")
    assert told.returncode == 0 and len(coded) == 3, told.stderr  # known already
    (figures,) = json.loads((folder / "figures.json").read_text())
    assert figures["points"][0]["psnr"] == pytest.approx(
        [np.mean([row["psnr"][g] for row in point.images]) for g in (0, 1)]
    )
    assert lic_dist("evaluate", file, "--generations", 0).returncode == 2


@pytest.mark.slow
def test_a_model_with_a_pack_is_coded_again_as_any_other(base: Path, folder: Path) -> None:
    packs.save(packed(base), folder / "screen.pack")
    merged = f"{base}+{folder / 'screen.pack'}"
    out = evaluate_generations(experiment(base, folder, checkpoints=[str(base), merged], quantizers=["sq"]), 2)
    plain, point = read_generations(out)
    assert plain.model != point.model and (folder / "r.generations.png").exists()
    codec = running.Task.of(experiment(base, folder, checkpoints=[merged], quantizers=["sq"])).jobs[0].codec()
    for row in point.images:
        original = images.read(folder / "pictures" / row["image"])
        once = codec.decode(codec.encode(original).data)
        again = codec.decode(codec.encode(once).data)
        assert row["psnr"] == [psnr8(original, once), psnr8(original, again)]


@pytest.mark.slow
def test_pictures_of_generations_are_kept_and_made_again_where_they_are_lost(base: Path, folder: Path) -> None:
    keep, chosen = folder / "kept", experiment(base, folder, quantizers=["sq"])
    evaluate_generations(chosen, 3, keep)
    names = running.Task.of(chosen).names
    codec = running.Task.of(chosen).jobs[0].codec()
    kept = {}
    for name in names:
        picture = images.read(folder / "pictures" / name)
        for generation in range(3):
            path = (keep / name).parent / f"g{generation}" / f"{Path(name).name}.png"
            kept[path] = path.read_bytes()
            assert np.array_equal(images.read(path), picture)
            picture = codec.decode(codec.encode(picture).data)
    assert {path for path in keep.rglob("*") if path.is_file()} == kept.keys()
    lost = next(iter(kept))
    lost.unlink()
    evaluate_generations(chosen, 3, keep)
    assert lost.read_bytes() == kept[lost]
    with pytest.raises(UsageError, match="of one checkpoint and quantizer are kept, not of .*, sq; .*, mine"):
        evaluate_generations(experiment(base, folder), 3, keep)
    with pytest.raises(UsageError, match="lies in the folder of images"):
        evaluate_generations(chosen, 3, folder / "pictures" / "kept")
    file = write(folder / "e.yaml", **sections(base, folder, quantizers=["sq"]))
    refused(lic_dist("evaluate", file, "--keep", keep), 2, "--keep without --generations")
