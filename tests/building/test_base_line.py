"""The line on a base as it is, before anything is built on it."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from lic_dist import config
from lic_dist.app.cli import app
from lic_dist.building.base_summary import base_summary
from lic_dist.building.job import prepare
from lic_dist.data import images, photo_files
from lic_dist.data.sources.opening import open_source
from lic_dist.evaluation.run import evaluate
from lic_dist.models import checkpoint as checkpoints
from lic_dist.models.stages import only_stage
from tests.stores import experiment


def test_it_is_the_rate_and_psnr_of_rounding_on_held_out_crops(base: Path, photos: Path, tmp_path: Path) -> None:
    job = prepare(experiment(base, photos, tmp_path / "a.zarr"))
    found = re.fullmatch(
        r"base .*, SQ, (\d+) held-out crops: ([\d.]+) bpp, ([\d.]+) dB", base_summary(job).splitlines()[0]
    )
    assert found is not None
    model = job.parent.model
    crops = [crop for crop in job.plan.crops if crop.held_out][: int(found[1])]
    assert len(crops) == 8 or len(crops) == job.plan.num_held_out
    pixels, _ = images.read_crops(open_source(photos), crops, job.images.crop)
    x = torch.from_numpy(pixels).float() / 255
    with torch.no_grad():
        y = model.g_a(x).half().float()
        z_hat = torch.round(model.h_a(y) - (m := model.entropy_bottleneck.quantiles[:, 0, 1].view(1, -1, 1, 1))) + m
        stage = only_stage(job.parent.codec, (z_hat,))
        error = model.g_s(torch.round(y - stage.means) + stage.means).clamp(0, 1) - x
    assert float(found[3]) == pytest.approx(-10 * np.log10(float(error.square().mean())), abs=0.05)
    assert 0.01 < float(found[2]) < 8


def test_plan_and_build_print_it_and_warn_of_a_model_that_is_not_trained(
    base: Path, photos: Path, tmp_path: Path
) -> None:
    loaded = checkpoints.load(str(base))
    with torch.no_grad():
        for parameter in loaded.model.g_s.parameters():
            parameter.mul_(-1)
    checkpoints.save(loaded, tmp_path / "bad.pth.tar")
    document = experiment(tmp_path / "bad.pth.tar", photos, tmp_path / "a.zarr")
    (tmp_path / "e.yaml").write_text(document.model_dump_json(exclude_none=True))
    said = CliRunner().invoke(app, ["cache", "plan", str(tmp_path / "e.yaml")])
    assert said.exit_code == 0 and "warning: below 15 dB" in said.output


@pytest.mark.slow
def test_evaluate_prints_it_of_each_base_that_is_about_to_code(
    base: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    section = config.Evaluate(images=photos, checkpoints=(str(base),), quantizers=("sq",), out=tmp_path / "e.json")
    evaluate(config.Experiment(evaluate=section, engine=config.Engine(name="local")))
    count = len(photo_files.find(photos))
    of = rf"the middle \d+x\d+ of {min(8, count)} pictures?"
    line = rf"base {base}, SQ, {of}: [\d.]+ bpp, [\d.]+ dB"
    assert re.fullmatch(line, capsys.readouterr().out.splitlines()[0])
    evaluate(config.Experiment(evaluate=section, engine=config.Engine(name="local")))
    assert "SQ, the middle" not in capsys.readouterr().out  # all is measured already
