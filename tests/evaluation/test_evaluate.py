"""The rate-distortion run over a folder: real bits, resumed, reported."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lic_dist import config
from lic_dist.building.records import analytic_record
from lic_dist.errors import LicError, UsageError
from lic_dist.evaluation import run as running
from lic_dist.evaluation.jobs import Task, is_control, short_name
from lic_dist.evaluation.results import read_points
from lic_dist.evaluation.run import evaluate
from lic_dist.models import checkpoint
from lic_dist.quantization.record import NO_Z
from lic_dist.reporting.curves import read_curves
from lic_dist.reporting.gains import gains
from lic_dist.reporting.report import report


def experiment(base: Path, photos: Path, out: Path, *quantizers: str) -> config.Experiment:
    return config.Experiment.model_validate(
        {
            "name": "e",
            "engine": {"name": "local"},
            "evaluate": {
                "images": str(photos / "valid"),
                "checkpoints": [str(base)],
                "quantizers": list(quantizers),
                "out": str(out),
            },
        }
    )


@pytest.mark.slow
def test_a_run_is_measured_resumed_and_reported(
    base: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = checkpoint.load(str(base))
    record = analytic_record(loaded, "tcq", 8, 0.6, 0.2, np.ones(12))
    record.save(tmp_path / "mine" / "record.json")
    out = evaluate(experiment(base, photos, tmp_path / "r.json", "sq", str(tmp_path / "mine")))
    points = read_points(out)
    assert [(point.arm, point.quantizer) for point in points] == [("base", "sq"), ("base", "mine")]
    for point in points:
        assert [row.image for row in point.images] == ["6.png", "7.png"] and point.lmbda == 0.05
        for row in point.images:
            # a stream's state and padding to words weigh much in so small a picture
            assert abs(row.bpp - row.estimated_bpp) * row.height * row.width < 2 * 100
            assert row.container_bpp == pytest.approx(29 * 8 / (row.height * row.width))
    assert [curve.name for curve in read_curves([out])] == ["base sq", "base mine"]
    with monkeypatch.context() as patch:
        patch.setattr(running, "measure_image", lambda *_: pytest.fail("measured again"))
        evaluate(experiment(base, photos, tmp_path / "r.json", "sq", str(tmp_path / "mine")))
        assert read_points(out) == points
        evaluate(experiment(base, photos, tmp_path / "r.json", "sq"))
        assert read_points(out) == points  # what this run does not name stays
    report([out], ["base sq"], tmp_path / "report")
    assert "| mine |" in (tmp_path / "report" / "results.md").read_text()
    with pytest.raises(UsageError):
        report([out], ["nothing"], tmp_path / "report")


@pytest.mark.slow
def test_a_finetuned_checkpoint_is_compared_with_the_base_at_the_quantizer_of_its_name(
    base: Path, photos: Path, tmp_path: Path
) -> None:
    loaded = checkpoint.load(str(base))
    analytic_record(loaded, "tcq", 8, 0.6, 0.2, np.ones(12)).save(tmp_path / "x.zarr/quantized/tcq8/record.json")
    loaded.quantizers["tcq8"] = analytic_record(loaded, "tcq", 8, 0.9, 0.1, np.ones(12)).to_json()
    loaded.history.append({"recipe": "decoder", "latents": "quantized"})
    checkpoint.save(loaded, tmp_path / "finetuned.pth.tar")
    asked = experiment(base, photos, tmp_path / "r.json", "tcq8")
    both = {"checkpoints": [str(base), str(tmp_path / "finetuned.pth.tar")]}
    sections = asked.model_dump(exclude_none=True)
    sections |= {"evaluate": {**sections["evaluate"], **both}, "cache": {"path": str(tmp_path / "x.zarr")}}
    (table,) = gains(read_points(evaluate(config.Experiment.model_validate(sections))))
    first, second = table.rows
    assert [(row.point.quantizer, row.arm) for row in table.rows] == [("tcq8", "base"), ("tcq8", "decoder")]
    assert first.point.record != second.point.record and first.own is None
    sections["evaluate"] |= {"checkpoints": [str(tmp_path / "finetuned.pth.tar")], "quantizers": ["carried"]}
    alone = sections["evaluate"] | {"out": str(tmp_path / "alone.json")}
    points = read_points(evaluate(config.Experiment.model_validate({**sections, "evaluate": alone})))
    assert [point.record for point in points] == [second.point.record]
    assert second.own is not None and second.own.mean == pytest.approx(100 * (second.loss / first.loss - 1))


def test_other_pictures_of_the_same_names_are_measured_anew(base: Path, photos: Path, tmp_path: Path) -> None:
    shutil.copytree(photos / "valid", tmp_path / "p" / "valid")
    first = read_points(evaluate(experiment(base, tmp_path / "p", tmp_path / "r.json", "sq")))
    shutil.copy(photos / "train" / "0.png", tmp_path / "p" / "valid" / "6.png")
    second = read_points(evaluate(experiment(base, tmp_path / "p", tmp_path / "r.json", "sq")))
    assert first[0].images[0].bpp != second[0].images[0].bpp and first[0].images[1].bpp == second[0].images[1].bpp


def test_a_quantizer_of_another_model_is_refused_before_anything_is_coded(
    base: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = checkpoint.load(str(base))
    other = replace(analytic_record(loaded, "tcq", 8, 0.6, 0.2, np.ones(12)), z_tables=NO_Z)
    other.save(tmp_path / "x" / "record.json")
    monkeypatch.setattr(running, "measure_image", lambda *_: pytest.fail("coded"))
    with pytest.raises(UsageError, match="made for another model"):
        evaluate(experiment(base, photos, tmp_path / "r.json", "sq", str(tmp_path / "x")))


def test_a_decoder_that_shows_another_picture_is_an_error(
    base: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    true = running.ImageCodec.decode_latents

    def altered(codec: Any, data: bytes) -> Any:
        found = true(codec, data)
        return replace(found, y_hat=torch.nextafter(found.y_hat, found.y_hat + 1))

    monkeypatch.setattr(running.ImageCodec, "decode_latents", altered)
    with pytest.raises(LicError, match="differs from the encoder's"):
        evaluate(experiment(base, photos, tmp_path / "r.json", "sq"))


def test_a_retraining_that_changed_nothing_is_a_point_beside_its_base(
    base: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    same = checkpoint.load(str(base))
    same.history.append({"recipe": "decoder", "latents": "quantized"})
    checkpoint.save(same, tmp_path / "same.pth.tar")
    both, alone = (experiment(base, photos, tmp_path / "r.json", "sq") for _ in range(2))
    section = config.need(both.evaluate, "evaluate")
    section = section.model_copy(update={"checkpoints": (str(base), str(tmp_path / "same.pth.tar"))})
    both = both.model_copy(update={"evaluate": section})
    points = read_points(evaluate(both))
    assert [point.arm for point in points] == ["base", "decoder"] and points[0].model == points[1].model
    assert points[0].figures == points[1].figures
    monkeypatch.setattr(running, "measure_image", lambda *_: pytest.fail("measured again"))
    for one in (alone, both):
        assert {point.arm for point in read_points(evaluate(one))} == {"base", "decoder"}


def test_offsets_are_measured_beside_their_quantizer(base: Path, photos: Path, tmp_path: Path) -> None:
    loaded = checkpoint.load(str(base))
    analytic_record(loaded, "tcq", 4, 0.7, 0.2, np.full(12, 30.0, np.float32)).save(tmp_path / "mine.json")
    mine = f"{tmp_path}/mine.json"
    plain, own = read_points(evaluate(experiment(base, photos, tmp_path / "r.json", mine, f"{mine}+offsets")))
    assert (plain.quantizer, own.quantizer) == ("mine", "mine+offsets") and plain.record != own.record
    assert own.figures.bpp < plain.figures.bpp
    for row in own.images:
        assert row.bpp == pytest.approx(row.estimated_bpp, rel=0.01, abs=0.02)


def test_arms_can_be_given_by_pattern(base: Path, photos: Path, tmp_path: Path) -> None:
    loaded = checkpoint.load(str(base))
    for name in ("continued-1", "continued-2"):
        checkpoint.save(loaded, tmp_path / f"{name}.pth.tar")
    one = experiment(base, photos, tmp_path / "r.json", "sq")
    section = config.need(one.evaluate, "evaluate").model_copy(
        update={
            "checkpoints": (str(base), f"{tmp_path}/continued-*.pth.tar"),
            "arms": {f"{tmp_path}/*-1.pth.tar": "control", f"{tmp_path}/*-2.pth.tar": "longer (control)"},
        }
    )
    task = Task.of(one.model_copy(update={"evaluate": section}))
    assert [job.arm for job in task.jobs] == ["base", "control", "longer (control)"]
    section = section.model_copy(update={"checkpoints": (str(base),)})
    with pytest.raises(UsageError, match=r"evaluate.arms names .*continued-1.pth.tar, which"):
        Task.of(one.model_copy(update={"evaluate": section}))


def test_controls_are_known_by_a_word_of_their_arm() -> None:
    controls = "decoder noise", "decoder straight-through round 2", "all parts control"
    assert all(map(is_control, controls)) and not any(map(is_control, ("base", "decoder+hyper round 2", "controlled")))


def test_short_names() -> None:
    assert short_name("sq") == "sq"
    assert short_name("runs/a.zarr/quantized/tcq8") == short_name("runs/a.zarr/quantized/tcq8/record.json") == "tcq8"
    assert short_name("runs/photos.tcq8.json") == "photos.tcq8"
    assert short_name("runs/photos.tcq8.json+offsets") == "photos.tcq8+offsets"


def test_checkpoints_may_be_patterns_each_with_quantizers_of_its_own(base: Path, photos: Path, tmp_path: Path) -> None:
    loaded = checkpoint.load(str(base))
    for name in ("a", "b"):
        loaded.quantizers = {name: analytic_record(loaded, "tcq", 8, 0.6, 0.2, np.ones(12)).to_json()}
        checkpoint.save(loaded, tmp_path / "runs" / name / "checkpoint.pth.tar")
    (tmp_path / "runs" / "unfinished").mkdir()
    asked = experiment(base, photos, tmp_path / "r.json", "deadzone").model_dump(exclude_none=True)
    asked["evaluate"]["checkpoints"] = {str(base): ["sq"], f"{tmp_path}/runs/*": ["carried"]}
    task = Task.of(config.Experiment.model_validate(asked))
    assert [(job.checkpoint, job.quantizer) for job in task.jobs] == [
        (str(base), "sq"),
        (f"{tmp_path}/runs/a", "a"),
        (f"{tmp_path}/runs/b", "b"),
    ]
    asked["evaluate"] |= {"checkpoints": ["base-s*"], "quantizers": ["sq"]}
    assert [job.checkpoint for job in Task.of(config.Experiment.model_validate(asked)).jobs] == ["base-small"]
    asked["evaluate"]["checkpoints"] = [f"{tmp_path}/runs/c*"]
    with pytest.raises(UsageError, match="no checkpoint matches"):
        Task.of(config.Experiment.model_validate(asked))
