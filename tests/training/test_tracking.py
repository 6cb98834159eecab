"""Trackers beside the log: what they are sent, runs that resumed jobs go on with, and trackers that fail."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from types import SimpleNamespace

import pytest

from lic_dist import config
from lic_dist.errors import UsageError
from lic_dist.training.log import Log, read_log

SETTINGS = {"lr": 1e-4, "cache": "ab" * 400}


class Recorder:
    """Stands for MLflow's client and for wandb: notes what is called."""

    def __init__(self) -> None:
        self.calls: list[tuple] = []
        self.fail = False

    def __getattr__(self, name: str):
        def call(*arguments: object, **named: object) -> object:
            self.calls.append((name, arguments, named))
            if self.fail:
                raise ConnectionError("the server is\ngone")
            return {
                "create_run": SimpleNamespace(info=SimpleNamespace(run_id="r1")),
                "create_experiment": "7",
                "init": self,
            }.get(name)

        return call

    def of(self, name: str) -> list[tuple]:
        return [one[1:] for one in self.calls if one[0] == name]


@pytest.fixture()
def mlflow(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    client = Recorder()
    entities = types.ModuleType("mlflow.entities")
    entities.Metric, entities.Param = (lambda *values: values), (lambda *values: values)  # type: ignore[attr-defined]
    tracking = types.ModuleType("mlflow.tracking")
    tracking.MlflowClient = lambda: client  # type: ignore[attr-defined]
    for name, module in (
        ("mlflow", types.ModuleType("mlflow")),
        ("mlflow.entities", entities),
        ("mlflow.tracking", tracking),
    ):
        monkeypatch.setitem(sys.modules, name, module)
    return client


@pytest.fixture()
def wandb(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    handle = Recorder()
    module = types.ModuleType("wandb")
    module.init = handle.init  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", module)
    return handle


def test_mlflow_is_sent_settings_and_rows_and_goes_on_with_its_run(tmp_path: Path, mlflow: Recorder) -> None:
    log = Log(tmp_path, 0, ["mlflow"], SETTINGS)
    log.write(3, loss=0.5, **{"held_out_L büro: x?": 1.5})
    log.close()
    assert mlflow.of("create_run") == [(("7",), {"run_name": tmp_path.name, "tags": {"out": str(tmp_path)}})]
    (_, params), ((_, rows), _) = mlflow.of("log_batch")
    assert params["params"] == [("lr", "0.0001"), ("cache", ("ab" * 400)[:500])]
    assert [(name, value, step) for name, value, _, step in rows] == [("loss", 0.5, 3), ("held_out_L büro_ x_", 1.5, 3)]
    assert mlflow.of("set_terminated") == [(("r1",), {})]
    Log(tmp_path, 3, ["mlflow"], SETTINGS).write(6, loss=0.4)
    assert mlflow.of("update_run") == [(("r1", "RUNNING"), {})] and len(mlflow.of("create_run")) == 1
    Log(tmp_path, 0, ["mlflow"], SETTINGS)  # from the start: another run
    assert len(mlflow.of("create_run")) == 2


def test_wandb_has_the_step_as_a_figure_and_goes_on_with_its_run(tmp_path: Path, wandb: Recorder) -> None:
    for resumed_at in (0, 4):
        log = Log(tmp_path, resumed_at, ["wandb"], SETTINGS)
        log.write(resumed_at + 2, loss=0.5)
        log.close()
    first, second = (named for _, named in wandb.of("init"))
    assert first["config"] == SETTINGS and first["project"] == "lic_dist" and first["dir"] == str(tmp_path)
    assert first["id"] == second["id"] == json.loads((tmp_path / "tracking.json").read_text())["wandb"]
    assert second["resume"] == "allow" and wandb.of("define_metric")[0] == (("*",), {"step_metric": "trained"})
    assert [given[0] for given, _ in wandb.of("log")] == [{"trained": 2, "loss": 0.5}, {"trained": 6, "loss": 0.5}]
    assert len(wandb.of("finish")) == 2


def test_a_tracker_that_fails_is_left_out_and_the_log_goes_on(
    tmp_path: Path, mlflow: Recorder, wandb: Recorder, capsys: pytest.CaptureFixture[str]
) -> None:
    log = Log(tmp_path, 0, ["mlflow", "wandb"], SETTINGS)
    mlflow.fail = True
    for step in (1, 2):
        log.write(step, loss=0.5)
    log.close()
    said = capsys.readouterr().err
    assert said == "warning: mlflow is left out: it cannot write: ConnectionError: the server is gone\n"
    assert [row["step"] for row in read_log(log.path)] == [1, 2] and len(wandb.of("log")) == 2
    with pytest.raises(UsageError, match="mlflow does not begin: ConnectionError: the server is gone") as refused:
        Log(tmp_path, 0, ["wandb", "mlflow"], SETTINGS)
    assert "MLFLOW_TRACKING_URI" in refused.value.hint and len(wandb.of("finish")) == 2


def test_a_package_that_is_missing_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, package in (("wandb", "wandb"), ("mlflow", "mlflow-skinny"), ("tensorboardX", "tensorboardX")):
        monkeypatch.setitem(sys.modules, name, None)
        tracker = name.removesuffix("X")
        with pytest.raises(UsageError, match=f"tracking: {tracker} needs") as refused:
            Log(tmp_path, 0, [tracker])
        assert refused.value.hint == f"pip install {package}"


def test_tensorboard_of_0_1_0_is_read() -> None:
    assert config.Finetune.model_validate({"tensorboard": True}).tracking == ("tensorboard",)
    assert config.Train.model_validate({"tensorboard": False}).tracking == ()
    both = {"tensorboard": True, "tracking": ["wandb"]}
    assert config.Finetune.model_validate(both).tracking == ("wandb",)


@pytest.mark.slow
def test_mlflow_itself_keeps_the_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "runs").as_uri())
    for resumed_at in (0, 4):
        log = Log(tmp_path / "out", resumed_at, ["mlflow"], SETTINGS)
        log.write(resumed_at + 2, loss=0.5 - resumed_at, **{"held_out_L büro: x?": 1.5})
        log.close()
    from mlflow.tracking import MlflowClient

    run = json.loads((tmp_path / "out" / "tracking.json").read_text())["mlflow"]
    history = MlflowClient().get_metric_history(run, "loss")
    assert [(one.step, one.value) for one in history] == [(2, 0.5), (6, -3.5)]
    assert MlflowClient().get_run(run).data.metrics["held_out_L büro_ x_"] == 1.5
    assert MlflowClient().get_run(run).info.status == "FINISHED"


@pytest.mark.slow
def test_wandb_itself_keeps_the_figures_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    for resumed_at in (0, 4):
        log = Log(tmp_path, resumed_at, ["wandb"], SETTINGS)
        log.write(resumed_at + 2, loss=0.5, **{"held_out_L büro: x?": 1.5})
        log.close()
    run = json.loads((tmp_path / "tracking.json").read_text())["wandb"]
    files = list(tmp_path.glob(f"wandb/offline-run-*-{run}/run-{run}.wandb"))
    assert files and all(b"held_out_L" in file.read_bytes() for file in files)  # one folder within a second
