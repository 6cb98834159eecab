"""The main job on models with a context, and one without a side latent: cache, retraining, real bitstreams."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lic_dist import config
from lic_dist.app.study import study
from lic_dist.building.build import build
from lic_dist.cache.reader import LatentCache
from lic_dist.codec import walk
from lic_dist.evaluation.results import read_points
from lic_dist.models import checkpoint
from lic_dist.quantization.quantize import Quantizer
from lic_dist.quantization.record import QuantizerRecord
from tests.codec.test_families import made


def asked(name: str, photos: Path, folder: Path) -> config.Experiment:
    path = folder / name / "checkpoint.pth.tar"
    checkpoint.save(made(name), path)
    return config.Experiment.model_validate(
        {
            "name": name,
            "model": {"checkpoint": str(path)},
            "images": {"path": str(photos), "crop": 64, "held_out": "valid"},
            "quantizer": {"name": "tcq", "states": 4, "pilot": 4, "calibration": 2, "step": 0.7, "lambda_scale": 0.1,
                          "shift": 0.05, "group": "tcq4"},
            "cache": {"path": str(folder / f"{name}.zarr"), "shard": 4, "batch": 4},
            "engine": {"name": "local"},
            "finetune": {"recipe": "decoder+hyper", "steps": 4, "batch": 2, "warmup": 1, "evaluate_every": 2,
                         "out": str(folder / f"{name}-tuned")},
            "evaluate": {"images": str(photos / "valid"), "out": str(folder / f"{name}.json"),
                         "checkpoints": {str(path): ["sq"], str(folder / f"{name}-tuned"): ["carried"]}},
        }
    )  # fmt: skip


WHOLE = ["bmshj2018-factorized", "mbt2018", "cheng2020-anchor-checkerboard", "elic2022-official", "minnen2020-charm"]


@pytest.mark.slow
@pytest.mark.parametrize("name", WHOLE)
def test_a_family_goes_through_the_whole_job(
    name: str, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    experiment = asked(name, photos, tmp_path)
    study([[experiment]], 1, tmp_path / "logs")
    points = read_points(tmp_path / f"{name}.json")
    assert {(one.arm, one.quantizer) for one in points} == {("base", "sq"), ("decoder+hyper", "tcq4")}
    assert all(row.bpp < 1.02 * row.estimated_bpp + 0.1 for one in points for row in one.images)
    cache = LatentCache.open(tmp_path / f"{name}.zarr")
    assert build(experiment).shards_built == 0 and cache.groups == ("tcq4",)
    quantizer = Quantizer(QuantizerRecord.from_json(cache.record_json("tcq4")))
    stored, codec = cache.load(("latents/y", "latents/z", "quantized/tcq4/k"), [0, 1, 2, 3]), made(name).codec
    with torch.no_grad():
        z_hat = codec.sides[0].dequantize(torch.from_numpy(stored["latents/z"]))
        coded = walk.search(codec, (z_hat,), torch.from_numpy(stored["latents/y"]).float(), quantizer)
    assert torch.equal(coded.k, torch.from_numpy(stored["quantized/tcq4/k"]))
