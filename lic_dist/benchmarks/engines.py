"""The engine's own actors beside Ray Data, which could run the same stages: why the engine schedules by itself.

Both get the stages of a build whose work is handing on arrays, or waiting: so their own cost shows, and a machine can
play one of more CPUs than it has.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from lic_dist.engine.stages import Stage

SHARD_BYTES = 64 * 3 * 256 * 256  # pixels of a shard
WAITS = (0.02, 0.5, 0.1)  # seconds of a unit in each stage, where nodes are lost
CPUS = 9  # of the node that is lost, beside a head with one
PATIENCE = 4.0  # times the survivors' share of the time, after which an engine is taken to hang
MIB = 2**20

Engine = Callable[[Sequence[Stage], Sequence[Any]], Iterator[tuple[Any, Any]]]


def _make_source(size: int, seconds: float) -> Callable[[int], Any]:
    def work(unit: int) -> Any:
        time.sleep(seconds)
        return unit, np.full(size, unit % 256, np.uint8)

    return work


def _make_step(seconds: float) -> Callable[[Any], Any]:
    def work(value: tuple[int, Any]) -> Any:
        time.sleep(seconds)
        return value

    return work


def _make_sink(seconds: float) -> Callable[[Any], Any]:
    def work(value: tuple[int, Any]) -> int:
        time.sleep(seconds)
        return int(value[1][0])

    return work


def _stages(size: int, waits: Sequence[float], most: Sequence[int]) -> list[Stage]:
    makes = (partial(_make_source, size, waits[0]), partial(_make_step, waits[1]), partial(_make_sink, waits[2]))
    return [
        Stage(name, make, 1, limit) for name, make, limit in zip(("read", "encode", "search"), makes, most, strict=True)
    ]


def _on_actors(stages: Sequence[Stage], units: Sequence[Any]) -> Iterator[tuple[Any, Any]]:
    from lic_dist.engine.on_ray import run_on_ray

    return run_on_ray(stages, units, None, None)


class _OfRayData:
    """A stage as Ray Data's actors run it: on batches of one row, whose value is any object."""

    def __init__(self, stage: Stage) -> None:
        self.work = stage.make()

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        value = np.empty(1, object)
        value[0] = self.work(batch["value"][0])
        return {"unit": batch["unit"], "value": value}


def _on_ray_data(stages: Sequence[Stage], units: Sequence[Any]) -> Iterator[tuple[Any, Any]]:
    """Run the stages as Ray Data does. Actors of all stages share a CPU, or they would wait for ever for their own."""
    import ray

    ray.data.DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    rows: Any = ray.data.from_items([{"unit": unit, "value": unit} for unit in units], override_num_blocks=len(units))
    for stage in stages:
        pool = ray.data.ActorPoolStrategy(min_size=stage.workers, max_size=stage.limit)
        rows = rows.map_batches(
            _OfRayData, fn_constructor_args=(stage,), batch_size=1, compute=pool, num_cpus=1 / len(stages)
        )
    for row in rows.iter_rows():
        yield row["unit"], row["value"]


ENGINES: dict[str, Engine] = {"actors": _on_actors, "Ray Data": _on_ray_data}


def compare(handed: int, rounds: int, lost: int) -> dict[str, Any]:
    """Measure both engines: seconds to the first of so many units, units a second, MB; and what nine of ten lost CPUs
    cost, in the middle of so many.
    """
    return {"handing": handing(handed, rounds), "losing": losing(lost)}


def handing(units: int, rounds: int) -> dict[str, Any]:
    """Hand a shard's pixels through three stages that do nothing; on a Ray of three CPUs, in turn."""
    from lic_dist.engine.ray_cluster import connected

    found: dict[str, Any] = {name: {"start": [], "rate": [], "mb": []} for name in ENGINES}
    with connected(None, 3):
        for name in [*ENGINES] * rounds:
            started, times, mb = time.monotonic(), [], 0.0
            for _ in ENGINES[name](_stages(SHARD_BYTES, (0.0, 0.0, 0.0), (1, 1, 1)), range(units)):
                times.append(time.monotonic() - started)
                if len(times) % (units // 4) == 0:
                    mb = max(mb, _resident())
            early = units // 5
            rate = (units - 1 - early) / (times[-1] - times[early])
            for key, value in (("start", times[0]), ("rate", rate), ("mb", mb)):
                found[name][key].append(value)
    return {name: {key: median(values) for key, values in one.items()} for name, one in found.items()}


def losing(units: int) -> dict[str, Any]:
    """Lose nine of ten CPUs when half of the units are done: how long the other half takes, over what one worker of the
    slowest stage would; infinite where it is not done in PATIENCE times that.
    """
    import ray
    from ray.cluster_utils import Cluster

    found = {}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    ray.init(address=cluster.address, log_to_driver=False)
    try:
        for name, engine in ENGINES.items():
            node = cluster.add_node(num_cpus=CPUS)
            results = engine(_stages(1000, WAITS, (1, 6, 3)), range(units))
            times = [time.monotonic() for _ in islice(results, units // 2)]
            cluster.remove_node(node, allow_graceful=False)
            lost, left = time.monotonic(), units - len(times)
            share = max(WAITS) * left
            rest = threading.Thread(target=_drain, args=(results, times), daemon=True)
            rest.start()
            rest.join(PATIENCE * share)
            seconds = times[-1] - lost if len(times) == units else float("inf")
            before = (units // 4) / (times[units // 2 - 1] - times[units // 4 - 1])
            found[name] = {"rate_before": before, "left": left, "share": share, "seconds": seconds}
    finally:
        ray.shutdown()
        cluster.shutdown()
    return found


def _drain(results: Iterator[Any], times: list[float]) -> None:
    for _ in results:
        times.append(time.monotonic())


def _resident() -> float:
    """Return the MB that the Ray processes below this one and this one hold, each page counted once."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:  # it has just ended
                continue
    total, mine = 0, {os.getpid()}
    while grown := {process for process, parent in parents.items() if parent in mine} - mine:
        mine |= grown
    for process in mine:
        try:
            lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
        except OSError:
            continue
        total += next((1024 * int(line.split()[1]) for line in lines if line.startswith("Pss:")), 0)
    return total / MIB
