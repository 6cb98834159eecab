"""On a cluster whose nodes come and go: pools follow it, nodes that drain lose no work, ranks leave with a state."""

from __future__ import annotations

import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from lic_dist import config
from lic_dist.cluster import elastic
from lic_dist.cluster.train import finetune_on_ray
from lic_dist.engine import on_ray
from lic_dist.engine.ray_cluster import unreachable
from lic_dist.engine.run import run
from lic_dist.engine.stages import Stage
from lic_dist.training.finetune import finetune
from lic_dist.training.log import read_log
from tests.building.test_kill import ray_environment
from tests.cluster.test_ray_train import Job, job  # noqa: F401  (a fixture)
from tests.engine.test_engine import make_add, make_where

pytestmark = pytest.mark.slow
UNITS = 160


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A cluster of a head with one CPU, to which these processes are connected."""
    import ray
    from ray.cluster_utils import Cluster

    folder = Path(f"/tmp/le{os.getpid()}")
    before = dict(os.environ)
    os.environ.update(ray_environment(folder))
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    ray.init(address=made.address, log_to_driver=False, logging_level="ERROR")
    try:
        yield made
    finally:
        ray.shutdown()
        made.shutdown()
        os.environ.clear()
        os.environ.update(before)


def drain(cluster: Any, node: Any) -> None:
    """What SIGTERM to `ray start --block` does, and `ray drain-node`."""
    from ray._raylet import GcsClient
    from ray.core.generated import autoscaler_pb2

    reason = autoscaler_pb2.DrainNodeReason.DRAIN_NODE_REASON_PREEMPTION
    deadline = int(1000 * time.time()) + 60_000
    assert GcsClient(cluster.address).drain_node(node.node_id, reason, "spot", deadline)[0]


def kill(cluster: Any, node: Any) -> None:
    cluster.remove_node(node, allow_graceful=False)


@pytest.mark.parametrize("leave", [pytest.param(drain, marks=pytest.mark.nightly), kill])
def test_pools_grow_onto_a_node_that_joins_and_go_on_without_it(
    cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, leave: Callable[[Any, Any], None]
) -> None:
    monkeypatch.setattr("lic_dist.engine.actors.PLACEMENT_SECONDS", 1e9)  # nobody waits for CPUs that are gone
    log = tmp_path / "log"
    stages = [
        Stage("add", partial(make_add, 0)),
        Stage("where", partial(make_where, log, 0.1), 1, 4),
        Stage("last", partial(make_add, ""), 1, 2),
    ]
    found: set[str] = set()
    monkeypatch.setattr(on_ray, "unreachable", lambda nodes: found.update(lost := unreachable(nodes)) or lost)
    nodes: list[str] = []
    joined: Any = None
    left_at = 0
    for _, node in run(stages, range(UNITS), engine="ray"):
        nodes.append(node)
        if len(nodes) == 8:
            joined = cluster.add_node(num_cpus=4)
        if joined and not left_at and nodes.count(joined.node_id) == 8:
            leave(cluster, joined)
            left_at = len(nodes)
    begun = Counter(line.split()[0] for line in log.read_text().splitlines())
    assert len(nodes) == UNITS and len(begun) == UNITS
    assert len(set(nodes[:8])) == 1 and 0 < left_at < UNITS
    assert set(nodes[-8:]) == set(nodes[:8])  # the node that stays
    assert found == (set() if leave is drain else {joined.node_id})  # before Ray said so
    if leave is drain:  # what it had begun it finished
        assert set(begun.values()) == {1}
        cluster.remove_node(joined)


@pytest.mark.nightly
def test_ranks_leave_a_node_that_drains_and_the_job_goes_on_with_fewer(
    job: Job,  # noqa: F811
    cluster: Any,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    folder, sections = job
    monkeypatch.chdir(folder)
    monkeypatch.setenv("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
    section = {**sections["finetune"], "steps": 300, "evaluate_every": 100, "out": "elastic"}
    asked = {**sections, "engine": {"trainers": "1..2"}, "finetune": section}
    second = cluster.add_node(num_cpus=1)
    assert elastic.fitting((1, 2), 0) == 2 and elastic.fitting((4,), 0) is None
    notice = elastic.ClusterNotice(0, 1, (1, 2), 0)
    assert notice.why() == ""
    monkeypatch.setattr(elastic, "GROW_SECONDS", 0)
    notice.looked -= 2
    assert notice.why() == "there is room for 2 trainers"

    made: list[Path] = []
    experiment = config.Experiment.model_validate(asked)
    driver = threading.Thread(target=lambda: made.append(finetune_on_ray(experiment)))
    driver.start()
    deadline = time.monotonic() + 240
    while not (folder / "elastic" / "log.jsonl").exists():
        assert driver.is_alive() and time.monotonic() < deadline
        time.sleep(0.02)
    drain(cluster, second)
    driver.join()
    cluster.remove_node(second)
    told = [line for line in capfd.readouterr().err.splitlines() if line.startswith(("training in", "lost"))]
    assert made and told == ["training in 2 ranks of 2", "training in 1 rank of 2"]
    alone = config.Experiment.model_validate({**asked, "finetune": {**section, "out": "alone"}})
    finetune(alone)
    one, two = (read_log(folder / name / "log.jsonl") for name in ("alone", "elastic"))
    assert [row["step"] for row in one] == [row["step"] for row in two] == [0, 100, 200, 300]
    for name in ("loss", "held_out_L"):
        assert [row[name] for row in two[1:]] == pytest.approx([row[name] for row in one[1:]], rel=1e-3)
