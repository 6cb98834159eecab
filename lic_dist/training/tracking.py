"""Trackers: where a job's figures go beside its log, by the names of `tracking`.

    tensorboard   event files in out/tensorboard
    mlflow        a run on the server of MLFLOW_TRACKING_URI, in the experiment MLFLOW_EXPERIMENT_NAME or lic_dist
    wandb         a run in the project WANDB_PROJECT or lic_dist; WANDB_MODE=offline keeps it in out/wandb

A resumed job goes on with its runs, whose names lie in out/tracking.json; figures of steps that it takes again are sent
again. A tracker that fails in mid-job is left out with a warning: neither log nor weights depend on any.
"""

from __future__ import annotations

import json
import os
import re
import sys
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from lic_dist.errors import UsageError

PROJECT = "lic_dist"
FILE = "tracking.json"
LONGEST_PARAMETER = 500  # characters that every version of MLflow takes


class Tracker(Protocol):
    """What a tracker can do. `run` names what it writes to, so that a resumed job goes on there."""

    run: str

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        """Send the figures of a step."""

    def close(self) -> None:
        """Send what is left, and end the run."""


class TensorBoard:
    """Event files; those of steps beyond the resumed one are purged."""

    def __init__(self, folder: Path, settings: Mapping[str, Any], run: str, resumed_at: int) -> None:
        from tensorboardX import SummaryWriter

        self.run = ""
        self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=resumed_at + 1)

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        for name, value in figures.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


class MLflow:
    """A run of MLflow, by its client: nothing global is set."""

    def __init__(self, folder: Path, settings: Mapping[str, Any], run: str, resumed_at: int) -> None:
        from mlflow.entities import Metric, Param
        from mlflow.tracking import MlflowClient

        self.metric, self.client = Metric, MlflowClient()
        self.run = run
        if run:
            self.client.update_run(run, "RUNNING")
            return
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        experiment = self.client.get_experiment_by_name(name)
        number = experiment.experiment_id if experiment else self.client.create_experiment(name)
        self.run = self.client.create_run(number, run_name=folder.name, tags={"out": str(folder)}).info.run_id
        params = [Param(key, str(value)[:LONGEST_PARAMETER]) for key, value in settings.items()]
        self.client.log_batch(self.run, params=params)

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        now = int(1000 * time.time())
        named = {re.sub(r"[^\w.\- /]", "_", name): value for name, value in figures.items()}  # what it takes in names
        self.client.log_batch(self.run, [self.metric(name, value, now, step) for name, value in named.items()])

    def close(self) -> None:
        self.client.set_terminated(self.run)


class WandB:
    """A run of Weights & Biases. The step is a figure of its own, so that rows that are sent again are not refused."""

    def __init__(self, folder: Path, settings: Mapping[str, Any], run: str, resumed_at: int) -> None:
        import wandb

        self.run = run or uuid.uuid4().hex[:8]
        self.handle = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            id=self.run,
            name=folder.name,
            dir=str(folder),
            config=dict(settings),
            resume="allow",
        )
        self.handle.define_metric("*", step_metric="trained")

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        self.handle.log({"trained": step, **figures})

    def close(self) -> None:
        self.handle.finish()


KINDS: dict[str, tuple[Callable[[Path, Mapping[str, Any], str, int], Tracker], str]] = {
    "tensorboard": (TensorBoard, "tensorboardX"),
    "mlflow": (MLflow, "mlflow-skinny"),
    "wandb": (WandB, "wandb"),
}


class Trackers:
    """The trackers of a job by name; `settings` is what its weights depend on.

    Raises:
        UsageError: a package is missing, or a tracker cannot begin.
    """

    def __init__(self, names: Sequence[str], folder: Path, settings: Mapping[str, Any], resumed_at: int) -> None:
        self.trackers: dict[str, Tracker] = {}
        runs = _runs(folder) if resumed_at else {}
        for name in dict.fromkeys(names):
            make, package = KINDS[name]
            try:
                self.trackers[name] = make(folder, settings, runs.get(name, ""), resumed_at)
            except ModuleNotFoundError as error:
                self.close()
                raise UsageError(f"tracking: {name} needs {error.name}", hint=f"pip install {package}") from None
            except Exception as error:  # of any kind: a server's, or of what is set for it
                self.close()
                raise UsageError(f"tracking: {name} does not begin: {_one_line(error)}", hint=_HINTS[name]) from error
        found = {name: one.run for name, one in self.trackers.items() if one.run}
        if found and found != runs:
            (folder / FILE).write_text(json.dumps(found) + "\n")

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        """Send the figures of a step to each."""
        self._each("write", lambda one: one.write(step, figures))

    def close(self) -> None:
        """End each run."""
        self._each("close", lambda one: one.close())

    def _each(self, what: str, call: Callable[[Tracker], None]) -> None:
        for name, one in list(self.trackers.items()):
            try:
                call(one)
            except Exception as error:  # of any kind, as above: the training goes on
                print(f"warning: {name} is left out: it cannot {what}: {_one_line(error)}", file=sys.stderr)
                del self.trackers[name]


_HINTS = {
    "tensorboard": "is out writable?",
    "mlflow": "set MLFLOW_TRACKING_URI=http://...; a database here needs the whole package: pip install mlflow",
    "wandb": "`wandb login`, or WANDB_MODE=offline",
}


def _runs(folder: Path) -> dict[str, str]:
    try:
        found = json.loads((folder / FILE).read_text())
    except (FileNotFoundError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
