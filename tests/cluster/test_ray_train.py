"""Finetuning under Ray Train: the weights of one process, a worker killed in mid-run, errors as they were raised."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml

from lic_dist import config
from lic_dist.building.build import build
from lic_dist.cluster import train
from lic_dist.errors import LicError
from lic_dist.models import checkpoint
from lic_dist.models.parts import tensors
from lic_dist.training.finetune import finetune
from lic_dist.training.log import read_log
from tests.app.test_cli import lic_dist, refused
from tests.building.test_kill import end, of_ray, ray_environment
from tests.cluster.test_submit import head, submit  # noqa: F401  (a fixture)
from tests.training.test_finetune import document

STEPS = 24
Job = tuple[Path, dict]


@pytest.fixture(scope="module")
def job(base: Path, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Job:
    """A folder with a cache and with x.yaml, which retrains from it in two workers, all paths relative to it."""
    folder = tmp_path_factory.mktemp("job")
    store = folder / "a.zarr"
    build(config.Experiment.model_validate(document(base, photos, store, store)))
    sections = document(base, photos, Path("a.zarr"), Path("out"), recipe="decoder+hyper", steps=STEPS)
    sections["engine"] = {"trainers": 2, "num_cpus": 2}
    (folder / "x.yaml").write_text(yaml.safe_dump(sections))
    return folder, sections


@pytest.fixture()
def ray_folder() -> Iterator[Path]:
    """A folder of Ray's own, with a short name; whatever still runs in it afterwards is ended."""
    folder = Path(f"/tmp/lt{os.getpid()}{random.randrange(10**6)}")
    yield folder
    for process in of_ray(folder):
        end(process)
    shutil.rmtree(folder, ignore_errors=True)


def rows(out: Path) -> list[int]:
    """The steps that a job has logged."""
    return [row["step"] for row in read_log(out / "log.jsonl")]


@pytest.mark.slow
@pytest.mark.timeout(900)  # three clusters, one after another
def test_two_workers_give_the_weights_of_one_process_and_outlive_a_kill(
    job: Job,
    ray_folder: Path,
    head: str,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder, sections = job
    monkeypatch.chdir(folder)
    here = {**sections, "finetune": {**sections["finetune"], "out": "one"}}
    one = checkpoint.load(str(finetune(config.Experiment.model_validate(here))))

    done = submit("finetune", "x.yaml", "--address", head, "--follow", folder=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "best weights at step" in done.stdout and "out/checkpoint.pth.tar" in done.stdout.splitlines()
    two = checkpoint.load("out")
    for name, value in tensors(one.model, ("g_s.", "h_s.")).items():
        if not name.endswith("gamma"):  # see above_bound in test_ranks.py
            torch.testing.assert_close(two.model.state_dict()[name], value, rtol=1e-4, atol=2e-6)
    assert {file.name for file in Path("out").iterdir()} == {"checkpoint.pth.tar", "log.jsonl", "states"}
    wrong = ["--set", "finetune.batch=3", "--set", "engine.trainers=1"]
    failed = submit("finetune", "x.yaml", *wrong, "--address", head, "--follow", folder=folder)
    assert failed.returncode == 2, failed.stdout + failed.stderr
    errors = [line for line in failed.stdout.splitlines() if line.startswith("error:")]
    assert errors == ["error: out/states is of another job: batch (4 there, 3 here)"]
    assert "Traceback" not in failed.stdout and "lost a trainer" not in failed.stdout

    driver = subprocess.Popen(
        [sys.executable, "-m", "lic_dist", "finetune", "x.yaml", "--engine", "ray", "--set", "finetune.out=cut"],
        env={**os.environ, **ray_environment(ray_folder)}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    try:
        wait_for_rows(Path("cut"), 1, driver)  # before the first step
        (_, worker) = of_ray(ray_folder, "ray::RayTrainWorker")
        wait_for_rows(Path("cut"), 2, driver)
        os.kill(worker, signal.SIGKILL)
        time.sleep(0.5)
        assert max(rows(Path("cut"))) < STEPS
        output, _ = driver.communicate(timeout=240)
    finally:
        with contextlib.suppress(ProcessLookupError):
            driver.kill()
    assert driver.returncode == 0, output
    assert output.count("lost a trainer") == output.count("starting again, 1 of 3") == 1, output
    assert rows(Path("cut")) == list(range(0, STEPS + 1, 4))
    resumed = checkpoint.load("cut")
    assert checkpoint.digest(resumed.model.state_dict()) == checkpoint.digest(two.model.state_dict())


def wait_for_rows(out: Path, count: int, driver: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 240
    while len(rows(out)) < count:
        assert driver.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)


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
