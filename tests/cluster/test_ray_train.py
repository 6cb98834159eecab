"""Finetuning under Ray Train, without a Ray: lost workers, a node without the folder, who asks for it."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path

import pytest
import yaml

from lic_dist import config
from lic_dist.cluster import train
from lic_dist.errors import LicError
from tests.app.test_cli import lic_dist, refused
from tests.training.test_finetune import document

STEPS = 24
Job = tuple[Path, dict]


@pytest.fixture(scope="module")
def job(base: Path, photos: Path, made: Path, tmp_path_factory: pytest.TempPathFactory) -> Job:
    """A folder with a cache and with x.yaml, which retrains from it in two workers, all paths relative to it."""
    folder = tmp_path_factory.mktemp("job")
    shutil.copytree(made, folder / "a.zarr")
    sections = document(base, photos, Path("a.zarr"), Path("out"), recipe="decoder+hyper", steps=STEPS)
    sections["engine"] = {"trainers": 2, "num_cpus": 2}
    (folder / "x.yaml").write_text(yaml.safe_dump(sections))
    return folder, sections


def test_a_job_that_loses_a_trainer_again_and_again_ends_with_one_error(
    job: Job, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, sections = job
    runs = []

    def lose(experiment: config.Experiment) -> Path:
        runs.append(experiment)
        raise train.TrainersLost("killed")

    monkeypatch.setattr("lic_dist.engine.on_ray.connected", lambda *_, **__: contextlib.nullcontext())
    monkeypatch.setattr("lic_dist.engine.on_ray.require_gpus", lambda wanted: None)
    monkeypatch.setattr(train, "_run", lose)
    with pytest.raises(LicError, match="lost a trainer 4 times, at last: killed") as caught:
        train.finetune_on_ray(config.Experiment.model_validate(sections))
    assert len(runs) == 4 and "goes on" in caught.value.hint
    assert [line[-6:] for line in capsys.readouterr().err.splitlines()] == ["1 of 3", "2 of 3", "3 of 3"]


def test_a_node_without_the_folder_says_so(job: Job, tmp_path: Path) -> None:
    with pytest.raises(LicError, match=f"has no folder {tmp_path}/none") as caught:
        train._finetune({"experiment": job[1], "folder": str(tmp_path / "none")})
    assert "all nodes see" in caught.value.hint


def test_ray_is_asked_for_by_option_alone(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr("lic_dist.training.finetune.finetune", lambda experiment: asked.append("here"))
    monkeypatch.setattr(train, "finetune_on_ray", lambda experiment: asked.append("ray"))
    file = job[0] / "x.yaml"
    for options in ([], ["--set", "engine.name=ray"], ["--engine", "local"], ["--engine", "ray"]):
        assert lic_dist("finetune", file, *options).returncode == 0
    assert asked == ["here", "here", "here", "ray"]
    refused(lic_dist("finetune", file, "--engine", "rya"), 2, "engine.name")
    monkeypatch.setenv("WORLD_SIZE", "2")
    refused(lic_dist("finetune", file, "--engine", "ray"), 2, "under torchrun")
