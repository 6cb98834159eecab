"""How many ranks a finetuning under Ray Train has: as many of a range as divide the batch and find room.

The driver takes them when the job starts, and again after a loss or when the ranks left. In the ranks, `ClusterNotice`
tells them to leave when their node drains, or when there is room for more of them. The order of the batches does not
depend on their number, so that a job goes on from a state with any.
"""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Sequence
from typing import Any

from lic_dist import config
from lic_dist.cache.order import default_streams
from lic_dist.errors import UsageError
from lic_dist.training.notice import Notice

LOOK_SECONDS = 1.0  # between two looks at the cluster
SETTLE_SECONDS = 2.0  # in which ranks that ended give back their CPUs
GROW_SECONDS = 60.0  # that ranks train before they make way for more of them
_told: list[str] = []  # in a worker of Ray: the signal that it was sent


def sizes(experiment: config.Experiment) -> tuple[int, ...]:
    """Return the numbers of ranks that a job may have, ascending; of a number that is no range just that one.

    Raises:
        UsageError: no number of the range divides the batch, its parts and its streams.
    """
    section = config.need(experiment.finetune, "finetune")
    least, most = config.bounds(experiment.engine.trainers)
    if least == most:
        return (least,)
    batch = section.batch
    streams = default_streams(batch, batch) if section.streams == "auto" else section.streams
    found = tuple(
        ranks
        for ranks in range(least, most + 1)
        if batch % (ranks * section.accumulate) == 0 and (streams % ranks == 0 or ranks > streams)
    )
    if not found:
        raise UsageError(
            f"no number from {least} to {most} of engine.trainers divides a batch of {batch}",
            hint="each rank takes as many crops, in finetune.accumulate parts and whole streams",
        )
    return found


def fitting(of: Sequence[int], gpus: float, present: int = 0) -> int | None:
    """Return the largest number of ranks that the cluster has room for, beside what else runs there; None where that is
    fewer than the smallest. `present` ranks run already and would make room.
    """
    import ray

    from lic_dist.engine.ray_cluster import room, staying_nodes

    free = ray.available_resources()
    beside = min(int(free.get(name, 0.0) / one) for name, one in (("CPU", 1.0), ("GPU", gpus)) if one)
    limit = min(room(staying_nodes(), 1.0, gpus), present + beside)
    return max((ranks for ranks in of if ranks <= limit), default=None)


def wait_for_room(of: Sequence[int], gpus: float) -> int:
    """Return how many ranks to start now. Where there is not a GPU for each of the least, wait until there is; without
    GPUs they share CPUs.
    """
    started, told = time.monotonic(), False
    while (found := fitting(of, gpus)) != of[-1]:
        if time.monotonic() > started + SETTLE_SECONDS:
            if found or not gpus:
                break
            if not told:
                print(f"waiting for room for {of[0]} trainers", file=sys.stderr, flush=True)
            told = True
        time.sleep(LOOK_SECONDS / 2)
    return found or of[0]


class ClusterNotice(Notice):
    """Notice for a rank in a worker of Ray, by a look at the cluster about once a second."""

    def __init__(self, rank: int, world: int, of: Sequence[int], gpus: float) -> None:
        super().__init__()
        import ray

        self.rank, self.world, self.of, self.gpus = rank, world, of, gpus
        self.node = ray.get_runtime_context().get_node_id()
        self.started = self.looked = time.monotonic()

    def why(self) -> str:
        if not self._why and (_told or time.monotonic() > self.looked + LOOK_SECONDS):
            self._why = _told[0] if _told else self._look()
            self.looked = time.monotonic()
        return self._why

    def _look(self) -> str:
        from lic_dist.engine.ray_cluster import staying_nodes

        if self.node not in staying_nodes():
            return f"the node of rank {self.rank} drains"
        if self.rank == 0 and self.world < self.of[-1] and time.monotonic() > self.started + GROW_SECONDS:
            possible = fitting(self.of, self.gpus, self.world) or 0
            if possible > self.world:
                return f"there is room for {possible} trainers"
        return ""


def take_signals() -> None:
    """Take SIGTERM for notice in this process, whose main thread is here: Ray's own answer is to end at once."""

    def heed(*_: Any) -> None:
        _told.append("SIGTERM")
        signal.signal(signal.SIGTERM, before)

    before = signal.signal(signal.SIGTERM, heed)
