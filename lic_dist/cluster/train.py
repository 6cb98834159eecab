"""Finetuning under Ray Train: the one training function, in `engine.trainers` workers of a Ray cluster.

Ray Train places the workers and joins them in a process group: NCCL where they have GPUs, gloo otherwise. It stores
nothing: the state from which a job resumes is the job's own, in `finetune.out`, which all nodes see. The folder that
Ray Train requires is a temporary one on the driver's node, and is removed with the job.

A worker or node that dies takes the others down, and the driver restarts the job from its last state. Where
`engine.trainers` is a range it does so with as many workers as find room, and where they left with a state, too: see
elastic.py. Ray Train's own elastic scaling counts nodes alone; a batch wants workers that divide it.

The driver raises an exception of the training function as the worker raised it. Only a LostRank counts as a loss, since
it says that another rank is gone.

ray and torch are imported inside functions, so that importing this module is cheap.
"""

from __future__ import annotations

import os
import socket
import sys
import tempfile
from pathlib import Path
from typing import Any

from lic_dist import config
from lic_dist.cluster import elastic
from lic_dist.errors import LicError, LostRank, Stopped
from lic_dist.text import counted

RESTARTS = 3  # of one job, after a worker or node was lost, without a new state in between
RESTART_HINT = "start it again: it goes on from its last state on disk"

# Ray reads these here and in its processes: every line printed is shown; the ranks watch for preempted nodes, no actor
# of Ray does.
SETTINGS = {
    "RAY_DEDUP_LOGS": "0",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
}


class TrainersLost(Exception):
    """A worker or node died, or did not start; the message says how."""


def finetune_on_ray(experiment: config.Experiment) -> Path:
    """Finetune under Ray Train; return the path of the checkpoint, as `training.finetune.finetune` does.

    The cluster is that of `engine.address`, else one started here. Relative paths begin in the current folder, on every
    node.

    Raises:
        LicError, UsageError: as `training.finetune.finetune`; a node lacks the current folder; no cluster, or one with
            too few GPUs; workers were lost more than RESTARTS times; no number of workers divides the batch.
    """
    section = config.need(experiment.finetune, "finetune")
    sizes = elastic.sizes(experiment)
    os.environ.update(SETTINGS)
    from lic_dist.engine import ray_cluster

    engine = experiment.engine
    losses, first, states = 0, True, _states(section.out)
    while True:
        with ray_cluster.connected(
            engine.address, engine.num_cpus, show_workers=True
        ):  # a new connection, so that nothing of the last run is left
            if first:  # after a loss, Ray Train waits a minute for a node to return
                ray_cluster.require_gpus(sizes[0] * engine.gpus_per_trainer)
            first, world = False, sizes[0]
            if len(sizes) > 1:
                world = elastic.wait_for_room(sizes, engine.gpus_per_trainer)
                print(f"training in {counted(world, 'rank')} of {sizes[-1]}", file=sys.stderr, flush=True)
            try:
                if path := _run(experiment, world):
                    return path
            except TrainersLost as lost:
                losses = 1 if states != (states := _states(section.out)) else losses + 1
                if losses > RESTARTS:
                    raise LicError(f"lost a trainer {losses} times, at last: {lost}", hint=RESTART_HINT) from lost
                print(f"lost a trainer ({lost}): starting again, {losses} of {RESTARTS}", file=sys.stderr, flush=True)


def _states(out: Path) -> set[Path]:
    return set(out.rglob("states/*.pth"))


def _run(experiment: config.Experiment, world: int) -> Path | None:
    """Run the job once, in `world` workers; return None where they left it with a state on disk.

    Raises:
        Exception: what the training function raised.
        TrainersLost: a worker or node was lost.
    """
    import ray.train.torch
    from ray.exceptions import RayActorError, RayError, RaySystemError
    from ray.train.v2._internal.exceptions import RayTrainError
    from ray.train.v2._internal.execution.callback import WorkerGroupCallback

    from lic_dist.engine.ray_cluster import cpu_share
    from lic_dist.training.distributed import SILENCE_TIMEOUT

    ray_train: Any = ray.train  # its type hints describe Ray Train's first version

    class Signals(WorkerGroupCallback):
        def after_worker_group_start(self, worker_group: Any) -> None:
            worker_group.execute(elastic.take_signals)

    class Trainer(ray_train.torch.TorchTrainer):
        def _register_sigint_handler(self, controller: Any) -> None:
            """Register no handler: Ctrl-C ends the driver, and its workers end with it."""

        def _create_default_callbacks(self) -> list[Any]:
            """Leave out the actor that cleans up after a controller: it needs a dashboard, and takes 12 s to end."""
            made = super()._create_default_callbacks()
            return [*(one for one in made if type(one).__name__ != "PlacementGroupCleanerCallback"), Signals()]

    engine = experiment.engine
    resources: dict[str, float] = {"CPU": cpu_share(world)}
    if engine.gpus_per_trainer:
        resources["GPU"] = engine.gpus_per_trainer
    with tempfile.TemporaryDirectory(prefix="lic_dist-") as storage:
        trainer = Trainer(
            _finetune,
            train_loop_config={"experiment": experiment.model_dump(mode="json"), "folder": os.getcwd()},
            torch_config=ray_train.torch.TorchConfig(
                backend="nccl" if engine.gpus_per_trainer else "gloo", timeout_s=int(SILENCE_TIMEOUT.total_seconds())
            ),
            scaling_config=ray_train.ScalingConfig(
                num_workers=world,
                use_gpu=bool(engine.gpus_per_trainer),
                resources_per_worker=resources,
            ),
            run_config=ray_train.RunConfig(
                name="finetune",
                storage_path=storage,
                failure_config=ray_train.FailureConfig(max_failures=0, controller_failure_limit=0),
                logging_config=ray_train.LoggingConfig(log_level="CRITICAL"),  # the driver reports errors itself
            ),
        )
        try:
            made = str(trainer.fit().return_value)
            return Path(made) if made else None
        except ray_train.WorkerGroupError as error:
            for failure in error.worker_failures.values():
                if not isinstance(failure, (RayError, RayTrainError, LostRank)):
                    raise failure from error
            raise TrainersLost(_one_line(*error.worker_failures.values())) from error
        except ray_train.ControllerError as error:
            raise TrainersLost(_one_line(error.controller_failure)) from error
        except (ray_train.TrainingFailedError, RayActorError) as error:
            raise TrainersLost(_one_line(error)) from error
        except RaySystemError as error:
            raise LicError(f"lost the Ray cluster: {_one_line(error)}", hint=RESTART_HINT) from error


def _one_line(*failures: Exception) -> str:
    return "; ".join(f"{type(one).__name__}: {' '.join(str(one).split())[:200]}" for one in failures)


def _finetune(job: dict[str, Any]) -> str:
    """Run the training function in a worker; return the checkpoint's path, or "" where the ranks left."""
    try:
        os.chdir(job["folder"])
    except OSError:
        raise LicError(
            f"node {socket.gethostname()} has no folder {job['folder']}",
            hint="relative paths begin there: start the job in a folder that all nodes see",
        ) from None
    import torch.distributed as dist

    from lic_dist.training.distributed import joined
    from lic_dist.training.finetune import finetune

    experiment = config.Experiment.model_validate(job["experiment"])
    sizes, gpus = elastic.sizes(experiment), experiment.engine.gpus_per_trainer
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    notice = elastic.ClusterNotice(rank, world, sizes, gpus)
    try:
        return str(finetune(experiment, joined(notice, usual=sizes[-1])))
    except Stopped as stopped:
        if rank == 0:
            print(f"{stopped.message}", flush=True)
        return ""
