"""Finetuning under Ray Train, without a Ray: lost workers, a node without the folder, who asks for it."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path

import pytest
import yaml

from lic_dist import config
from lic_dist.cluster import elastic, train
from lic_dist.errors import LicError, UsageError
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


@pytest.mark.slow
def test_a_job_that_loses_a_trainer_again_and_again_ends_with_one_error(
    job: Job, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, sections = job
    runs = []

    def lose(experiment: config.Experiment, world: int) -> Path:
        runs.append(world)
        raise train.TrainersLost("killed")

    monkeypatch.setattr("lic_dist.engine.ray_cluster.connected", lambda *_, **__: contextlib.nullcontext())
    monkeypatch.setattr("lic_dist.engine.ray_cluster.require_gpus", lambda wanted: None)
    monkeypatch.setattr(train, "_run", lose)
    with pytest.raises(LicError, match="lost a trainer 4 times, at last: killed") as caught:
        train.finetune_on_ray(config.Experiment.model_validate(sections))
    assert runs == 4 * [2] and "goes on" in caught.value.hint
    assert [line[-6:] for line in capsys.readouterr().err.splitlines()] == ["1 of 3", "2 of 3", "3 of 3"]


def test_a_loss_after_a_new_state_counts_anew_and_ranks_that_left_are_no_loss(
    job: Job, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    ends = ["lost", "lost", "lost", "state", "lost", "lost", "left", "state", "lost", "lost", "done"]
    runs: list[int] = []

    def end(experiment: config.Experiment, world: int) -> Path | None:
        runs.append(world)
        what = ends[len(runs) - 1]
        if what in ("lost", "state"):
            if what == "state":
                (tmp_path / "states").mkdir(exist_ok=True)
                (tmp_path / "states" / f"{len(runs):08d}.pth").touch()
            raise train.TrainersLost("killed")
        return tmp_path if what == "done" else None

    room = [4, 2, 1, 4, 4, 2, 1, 4, 4, 2, 1]
    monkeypatch.setattr("lic_dist.engine.ray_cluster.connected", lambda *_, **__: contextlib.nullcontext())
    monkeypatch.setattr("lic_dist.engine.ray_cluster.require_gpus", lambda wanted: None)
    monkeypatch.setattr(elastic, "wait_for_room", lambda sizes, gpus: room[len(runs)])
    monkeypatch.setattr(train, "_run", end)
    sections = {**job[1], "engine": {"trainers": "1..4"}, "finetune": {**job[1]["finetune"], "out": str(tmp_path)}}
    assert train.finetune_on_ray(config.Experiment.model_validate(sections)) == tmp_path
    assert runs == room


@pytest.mark.parametrize(
    ("trainers", "changes", "found"),
    [
        (3, {"batch": 8}, (3,)),  # what is no range is refused by the job itself
        ("1..8", {"batch": 8}, (1, 2, 4, 8)),
        ("2..6", {"batch": 24}, (2, 3, 4, 6)),
        ("1..8", {"batch": 24, "accumulate": 2}, (1, 2, 3, 4, 6)),
        ("1..8", {"batch": 24, "streams": 8}, (1, 2, 4, 8)),
        ("16..64", {"batch": 64}, (16, 32, 64)),
    ],
)
def test_ranks_of_a_range_are_those_that_divide_the_batch(
    job: Job, trainers: object, changes: dict, found: tuple
) -> None:
    sections = {**job[1], "engine": {"trainers": trainers}, "finetune": {**job[1]["finetune"], **changes}}
    assert elastic.sizes(config.Experiment.model_validate(sections)) == found


def test_a_range_of_which_no_number_divides_the_batch_is_refused(job: Job) -> None:
    sections = {**job[1], "engine": {"trainers": "5..7"}}
    with pytest.raises(UsageError, match="no number from 5 to 7 of engine.trainers divides a batch of 4"):
        elastic.sizes(config.Experiment.model_validate(sections))


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
