"""Retraining on a group whose y was refined: what is measured is refined too, by the decoder of the moment."""

from __future__ import annotations

from pathlib import Path

import pytest

from lic_dist.building.build import build
from lic_dist.building.calibrate import measure
from lic_dist.building.latents import inputs_of
from lic_dist.building.pilot import calibration_samples
from lic_dist.building.refined import aimed_inputs
from lic_dist.cache.mixture import Mixture
from lic_dist.cache.reader import LatentCache
from lic_dist.models import checkpoint
from lic_dist.quantization.record import QuantizerRecord
from lic_dist.training.finetune import finetune
from lic_dist.training.log import read_log
from tests.stores import FIXED, experiment


@pytest.mark.slow
def test_held_out_crops_are_refined_as_a_user_would_refine_them(base: Path, photos: Path, tmp_path: Path) -> None:
    store = tmp_path / "a.zarr"
    section = {"steps": 1, "batch": 4, "warmup": 1, "lr": 1e-9, "evaluate_every": 1}
    at_first, outcomes = [], []
    for recipe in ("decoder", "decoder+hyper"):
        out = tmp_path / recipe
        job = experiment(
            base, photos, store, quantizer={**FIXED, "refine": 3}, finetune={**section, "recipe": recipe, "out": out}
        )
        build(job)
        outcomes.append(checkpoint.load(str(finetune(job))).history[-1])
        at_first.append(read_log(out / "log.jsonl")[0]["held_out_L"])
    assert at_first[0] == pytest.approx(at_first[1], rel=1e-6)  # stored indices, and those searched for anew

    cache, parent = LatentCache.open(store), checkpoint.load(str(base))
    record = QuantizerRecord.from_json(cache.record_json("tcq8"))
    assert job.quantizer
    _, samples = calibration_samples(Mixture([cache]), job.quantizer)
    plain = measure(parent, record, samples, inputs_of(parent.model, samples.y, samples.z, 4)).L
    refined = measure(parent, record, samples, aimed_inputs(parent, record, samples, 4)).L
    assert refined < 0.999 * plain
    for outcome in outcomes:
        assert outcome["calibrated_before"]["L"] == pytest.approx(refined, rel=1e-5)
