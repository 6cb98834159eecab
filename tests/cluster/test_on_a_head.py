"""Real jobs on a real Ray head: a submitted build, and a finetuning that loses a worker."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from lic_dist import config
from lic_dist.cache.verify import verify
from lic_dist.models import checkpoint
from lic_dist.models.parts import tensors
from lic_dist.training.finetune import finetune
from lic_dist.training.log import read_log
from tests.building.test_kill import of_ray
from tests.cluster.test_ray_train import STEPS, Job, job  # noqa: F401  (a fixture)
from tests.cluster.test_submit import CLEAN, Done, experiment, refused, submit
from tests.forked import free_port, run


@dataclass(frozen=True)
class Head:
    """A running Ray head: the addresses of its dashboard and for drivers, and the folder that marks its processes."""

    address: str
    drivers: str
    folder: Path


Started = tuple[Head, subprocess.Popen[bytes], Path]


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Started]:
    """A Ray head of two CPUs that may not answer yet, its process and its log; ended by its own process group."""
    port = free_port()
    options = {
        "port": free_port(),
        "dashboard-port": port,
        "dashboard-agent-listen-port": free_port(),
        "ray-client-server-port": free_port(),
        "num-cpus": 2,
        "include-dashboard": "true",
    }
    environment = {**CLEAN, "PATH": f"{Path(sys.executable).parent}:{CLEAN['PATH']}"}
    environment["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"] = "0"
    environment["RAY_prestart_worker_first_driver"] = "false"  # none that nobody has work for
    ray = Path(sys.executable).with_name("ray")
    log = tmp_path_factory.mktemp("head") / "log"
    with tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as short, log.open("w") as output:
        process = subprocess.Popen(
            [
                ray,
                "start",
                "--head",
                "--block",
                "--no-monitor",
                f"--temp-dir={short}",
                *(f"--{k}={v}" for k, v in options.items()),
            ],
            env={**environment, "RAY_TMPDIR": short},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            yield Head(f"http://127.0.0.1:{port}", f"127.0.0.1:{options['port']}", Path(short)), process, log
        finally:
            process.send_signal(signal.SIGTERM)  # it ends what it started
            try:
                process.wait(30)
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def head(started: Started, tiny: Path, job: Job) -> Head:  # noqa: F811
    """The head, as soon as it answers; meanwhile what the jobs need was made."""
    found, process, log = started
    deadline = time.monotonic() + 150  # seven seconds on idle cores
    while submit("status", "--address", found.address).returncode != 0:
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()
    return found


@pytest.fixture(scope="module")
def tiny(base: Path, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An experiment of eight samples, in a folder of its own."""
    return experiment(
        tmp_path_factory.mktemp("tiny") / "tiny.yaml",
        model={"checkpoint": str(base)},
        images={"path": str(photos), "crop": 64, "held_out": "valid"},
        quantizer={"step": 0.5, "lambda_scale": 0.1, "group": "a"},
        cache={"path": "runs/x.zarr", "shard": 4},
        engine={"name": "ray", "encoders": 1, "readers": 1, "searchers": 1},
    )


@pytest.mark.slow
def test_a_submitted_build_leaves_a_whole_store(head: Head, tiny: Path) -> None:
    done = submit("cache", tiny, "--address", head.address, "--follow", folder=tiny.parent)
    assert done.returncode == 0, done.stdout + done.stderr
    name = done.stdout.splitlines()[0]
    assert "8 samples, 2 of 2 shards built now" in done.stdout and f"{name}: SUCCEEDED" in done.stderr
    assert verify(tiny.parent / "runs" / "x.zarr") == []
    assert f"{name}: SUCCEEDED" in submit("status", name, "--address", head.address).stdout
    assert submit("logs", name, "--address", head.address).stdout in done.stdout
    assert submit("logs", name, "--follow", "--address", head.address).returncode == 0


@pytest.mark.slow
def test_a_job_is_stopped(head: Head, tiny: Path) -> None:
    where = ("--address", head.address)
    long = submit("cache", tiny, "--set", "cache.path=y.zarr", "--set", "images.variations=9999", *where)
    name = long.stdout.strip()
    ends: list[Done] = []
    following = threading.Thread(target=lambda: ends.append(submit("logs", name, "--follow", *where)))
    following.start()
    stopped = submit("stop", name, *where)
    following.join()
    assert stopped.returncode == 0 and f"{name}: STOPPED" in stopped.stdout, stopped.stderr
    refused(ends[0], 1, "was stopped")
    assert f"{name}: STOPPED" in submit("stop", name, *where).stdout  # nothing left to stop
    assert states(head)[-1] == "STOPPED"
    refused(submit("logs", "nobody", "--follow", *where), 1, "knows no job nobody")


@pytest.mark.slow
def test_two_workers_of_which_one_is_killed_give_the_weights_of_one_process(
    job: Job,  # noqa: F811
    head: Head,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder, sections = job
    monkeypatch.chdir(folder)
    ends: list[Done] = []
    command = ("finetune", "x.yaml", "--engine", "ray", "--set", f"engine.address={head.drivers}")
    quick = {**CLEAN, "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2"}
    driver = threading.Thread(target=lambda: ends.append(run(*command, environment=quick, folder=folder, timeout=200)))
    driver.start()
    wait_for_rows(Path("out"), 2, driver)  # the first is of before the first step
    (_, worker) = of_ray(head.folder, "ray::RayTrainWorker")
    os.kill(worker, signal.SIGKILL)
    time.sleep(0.5)
    assert max(rows(Path("out"))) < STEPS
    here = {**sections, "finetune": {**sections["finetune"], "out": "one"}}
    one = checkpoint.load(str(finetune(config.Experiment.model_validate(here))))
    driver.join()
    (done,) = ends
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr.count("lost a trainer") == done.stderr.count("starting again, 1 of 3") == 1, done.stderr
    assert "best weights at step" in done.stdout and "out/checkpoint.pth.tar" in done.stdout.splitlines()
    assert rows(Path("out")) == list(range(0, STEPS + 1, 4))
    two = checkpoint.load("out").model.state_dict()
    for name, value in tensors(one.model, ("g_s.", "h_s.")).items():
        if not name.endswith("gamma"):  # see above_bound in test_ranks.py
            torch.testing.assert_close(two[name], value, rtol=1e-4, atol=2e-6)
    assert {file.name for file in Path("out").iterdir()} == {
        "checkpoint.pth.tar",
        "log.jsonl",
        "snapshot.json",
        "states",
    }


@pytest.mark.slow
def test_a_job_that_fails_in_a_worker_says_why(
    job: Job,  # noqa: F811
    head: Head,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder, sections = job
    monkeypatch.chdir(folder)
    changes = {"steps": 2, "out": "other"}
    finetune(config.Experiment.model_validate({**sections, "finetune": {**sections["finetune"], **changes}}))
    wrong = {"finetune.batch": 3, "engine.trainers": 1} | {f"finetune.{name}": one for name, one in changes.items()}
    sets = [word for name, one in wrong.items() for word in ("--set", f"{name}={one}")]
    where = ("--address", head.address)
    failed = submit("finetune", "x.yaml", *sets, *where, "--follow", folder=folder)
    refused(failed, 2, "failed", "exit code 2")
    errors = [line for line in failed.stdout.splitlines() if line.startswith("error:")]
    assert errors == ["error: other/states is of another job: batch (4 there, 3 here)"]
    assert "Traceback" not in failed.stdout and "lost a trainer" not in failed.stdout
    assert states(head)[-1] == "FAILED"


def states(head: Head) -> list[str]:
    """Those of the head's jobs, in their order."""
    listed = submit("status", "--address", head.address).stdout.splitlines()
    return [line.split(": ")[1].split(",")[0] for line in listed]


def rows(out: Path) -> list[int]:
    """The steps that a job has logged."""
    return [row["step"] for row in read_log(out / "log.jsonl")]


def wait_for_rows(out: Path, count: int, driver: threading.Thread) -> None:
    deadline = time.monotonic() + 240
    while len(rows(out)) < count:
        assert driver.is_alive() and time.monotonic() < deadline
        time.sleep(0.005)
