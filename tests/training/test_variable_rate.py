"""Training of a variable-rate model: all rates in one job, or one; what it makes goes on at a gain."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from lic_dist import config
from lic_dist.app.study import study
from lic_dist.cache.reader import LatentCache
from lic_dist.config.sweeps import documents
from lic_dist.errors import LicError, UsageError
from lic_dist.evaluation.results import read_points
from lic_dist.models import checkpoint
from lic_dist.models.families.variable_rate import MeanScaleHyperpriorVbr
from lic_dist.models.parts import model_digest
from lic_dist.training import base as job
from lic_dist.training import loop
from lic_dist.training.log import read_log
from tests.conftest import dying_at
from tests.training.several import base_section, held_out

NAME = "mbt2018-mean-vbr"


def section(out: Path, **changes: Any) -> config.Train:
    changes = {"options": {"vr_entbttlnck": True}, "steps": 6, "evaluate_every": 3, **changes}
    return base_section(out, NAME, **changes)


@pytest.mark.slow
def test_all_rates_train_in_a_job_that_goes_on_to_the_same_weights(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gains: list[float | None] = []

    def take(codec: MeanScaleHyperpriorVbr, gain: float | None) -> None:
        gains.append(gain)
        codec.module.gain = gain

    with monkeypatch.context() as patch:
        patch.setattr(MeanScaleHyperpriorVbr, "take_gain", take)
        whole = job.train(section(tmp_path / "whole"), held_out(photos))
    assert len(set(gains[: 2 * 3 : 2])) > 1 and gains[1] is None  # of a step, and between steps
    assert len(set(gains[6 : 6 + 8])) == 8  # of an evaluation
    with monkeypatch.context() as patch:
        patch.setattr(loop, "take_step", dying_at(5))
        with pytest.raises(KeyboardInterrupt):
            job.train(section(tmp_path / "cut"), held_out(photos))
    resumed = job.train(section(tmp_path / "cut"), held_out(photos))
    one, other, fresh = (
        checkpoint.load(f"{path}@2")
        for path in (whole, resumed, job.train(section(tmp_path / "none", steps=1), held_out(photos)))
    )
    assert model_digest(one.model) == model_digest(other.model) != model_digest(fresh.model)
    assert one.spec.lmbda == 0.0067 and one.spec.options == {"vr_entbttlnck": True, "gain": 0.19293}
    rows = [row["held_out_L"] for row in read_log(whole.parent / "log.jsonl")]
    assert rows[-1] < rows[0]
    for start, gain in ((str(whole), None), (f"{whole}@2", 0.19293)):
        made = job.train(section(tmp_path / f"on-{gain}", start=start, options={}, steps=1), held_out(photos))
        held = checkpoint.load(str(made), at_gain=False)
        assert (held.codec.gain, len(held.history)) == (gain, 2)
        assert held.spec.lmbda == 0.05
    with pytest.raises(LicError, match="one rate"):
        checkpoint.load("base-small").codec.take_gain(0.5)
    with pytest.raises(UsageError, match="8 rates"):
        checkpoint.load(str(whole))


@pytest.mark.slow
def test_a_rate_goes_through_the_whole_job(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    document = {
        "name": "rates",
        "train": {**section(Path("base")).model_dump(mode="json"), "relaxation": "mixed"},
        "model": {"checkpoint": "base@4"},
        "images": {"path": str(photos), "crop": 64, "held_out": "valid"},
        "quantizer": {"name": "tcq", "states": 4, "pilot": 4, "calibration": 2, "step": 0.7, "lambda_scale": 0.1,
                      "shift": 0.05, "group": "tcq4"},
        "cache": {"path": "{model.name}.zarr", "shard": 4, "batch": 4},
        "engine": {"name": "local"},
        "finetune": {"recipe": "decoder+hyper", "steps": 4, "batch": 2, "warmup": 1, "evaluate_every": 2, "rounds": 2,
                     "out": "tuned-{model.name}"},
        "evaluate": {"images": str(photos / "valid"), "out": "points.json",
                     "checkpoints": {"base@4": ["sq"], "base@0.15": ["sq"], "tuned-base@4": ["carried"]}},
    }  # fmt: skip
    Path("rates.yaml").write_text(yaml.safe_dump(document))
    study(documents(Path("rates.yaml")), 1, tmp_path / "logs")
    points = read_points(Path("points.json"))
    assert sorted((one.checkpoint, one.arm, one.quantizer) for one in points) == [
        ("base@0.15", "base", "sq"),
        ("base@4", "base", "sq"),
        ("tuned-base@4", "decoder+hyper round 2", "tcq4"),
    ]
    assert len({one.model for one in points}) == 3
    assert all(row.bpp < 1.02 * row.estimated_bpp + 0.1 for one in points for row in one.images)
    cache = LatentCache.open("base@4.zarr")
    assert cache.identity["model"]["options"] == {"vr_entbttlnck": True, "gain": 0.37268}
    tuned = checkpoint.load("tuned-base@4")
    assert tuned.spec.options == cache.identity["model"]["options"] and tuned.spec.lmbda == 0.025
