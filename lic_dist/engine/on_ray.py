"""Staged work on Ray: one pool of actors a stage; results are passed from pool to pool by object reference.

The driver waits for small tokens and passes references. What a stage returns stays in the object store until the next
stage reads it; only the last stage's results are fetched. At most twice as many units as the largest pool has workers
are in flight, so that memory is bounded however slow the last stage is. Each actor has one call at a time, and gets its
first when it has been placed.

The pools follow the cluster. About once a second the driver looks at the nodes that stay and allots their room by the
seconds that a unit takes in each stage: a pool grows up to `Stage.most` as nodes join, and where there is room for
fewer than all pools want, workers of one make way for another's. Once they fill the room, as many again are asked for,
which is what an autoscaler sees. A node that drains gets no new unit. If there is no CPU for each stage, workers
share one: fewer machines are slower, but work goes on.

When a worker or node dies, its units start again at the first stage. Ray takes ten seconds and more to say that a node
has gone without notice: where a worker does not answer, the driver tries the nodes itself, and goes on without those it
cannot reach. If the driver dies, so do its actors. Ray gets only pickles of `Stage.make` and the units; the workers
import the `lic_dist` that is installed.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ray.exceptions import ActorUnavailableError, ObjectLostError, RayError, RaySystemError, RayTaskError

from lic_dist.engine import actors
from lic_dist.engine.actors import Pool
from lic_dist.engine.allotment import allot, rate
from lic_dist.engine.ray_cluster import connected, cpu_share, ray, require_gpus, room, staying_nodes, unreachable
from lic_dist.engine.stages import Stage
from lic_dist.errors import LicError

RESTART_HINT = "finished units stay finished: start the job again"
LOOK_SECONDS = 1.0  # between two looks at the cluster
BETTER = 1.2  # times as many units a second, for which workers of one stage make way for another's


@dataclass(frozen=True)
class _Call:
    position: int
    stage: int
    actor: Any
    result: Any


class _Run:
    """The state of one run: pools, calls in flight by their token, failures by unit."""

    def __init__(self, stages: Sequence[Stage], units: Sequence[Any]) -> None:
        self.share = cpu_share(sum(stage.workers for stage in stages))
        self.units = units
        self.pools = [Pool(stage) for stage in stages]
        self.counts = [1] * len(stages)  # of workers that there is room for
        self.limits: list[Any] = []  # what the counts were made for
        self.looked = float("-inf")
        self.lost: set[str] = set()  # nodes that are gone, until Ray has noticed too
        self.probed = float("-inf")
        self.made_on: dict[int, str | None] = {}  # of each unit that is handed on, the node that its result lies on
        self.calls: dict[Any, _Call] = {}
        self.failures: Counter[int] = Counter()
        self.admitted = self.finished = 0
        self._follow_cluster()

    def results(self) -> Iterator[tuple[Any, Any]]:
        while self.finished < len(self.units):
            self._submit()
            for position, result in self._collect():
                self.finished += 1
                self._submit()  # before the caller processes the result
                yield self.units[position], result

    def _submit(self) -> None:
        limit = 2 * max(max(self.counts), *(pool.size for pool in self.pools))
        while self.admitted < min(len(self.units), self.finished + limit):
            self.pools[0].waiting.append((self.admitted, self.units[self.admitted]))
            self.admitted += 1
        for stage, pool in enumerate(self.pools):
            while pool.waiting and pool.free:
                position, argument = pool.waiting.popleft()
                actor, token, result = pool.begin(argument)
                self.calls[token] = _Call(position, stage, actor, result)

    def _collect(self) -> Iterator[tuple[int, Any]]:
        """Wait for a call to end; hand its unit on, or yield it when that was the last stage."""
        if time.monotonic() > self.looked + LOOK_SECONDS:
            self._follow_cluster()
        tokens = [*self.calls, *(token for pool in self.pools for token in pool.asked)]
        ready, _ = ray.wait(tokens, num_returns=1, timeout=LOOK_SECONDS)
        if not ready:
            return
        for pool in self.pools:
            if ready[0] in pool.asked:
                if not pool.settle(ready[0]):
                    self._follow_cluster()
                return
        call = self.calls.pop(ready[0])
        try:
            last = not ray.get(ready[0]) or call.stage == len(self.pools) - 1
            result = ray.get(call.result) if last else call.result
        except RayError as error:
            self._handle_failure(call, error)
            return
        self.made_on[call.position] = self.pools[call.stage].nodes.get(call.actor)
        self.pools[call.stage].end(call.actor)
        if last:
            yield call.position, result
        else:
            self.pools[call.stage + 1].waiting.append((call.position, result))

    def _follow_cluster(self) -> None:
        """Let the pools be as large as the nodes that stay have room for."""
        self.looked = time.monotonic()
        nodes = self._present()
        for pool in self.pools:
            pool.avoid(frozenset(self.lost))
            pool.leave(nodes)
            pool.share_cpu(self.share)
        seconds = self._seconds()
        bounds = [self._bounds(pool.stage, nodes) for pool in self.pools]
        present = room(nodes, self.share)
        counts = allot(bounds, seconds, present)
        limits = [present, *bounds]
        if limits != self.limits or (seconds and rate(counts, seconds) > BETTER * rate(self.counts, seconds)):
            self.counts, self.limits = counts, limits
        ahead = self.counts
        full = sum(self.counts) == present and not any(pool.sharing for pool in self.pools)  # what is asked for waits
        if full and all(pool.size >= count for pool, count in zip(self.pools, self.counts, strict=True)):
            wanted = [(pool.stage.workers, pool.stage.limit) for pool in self.pools]
            ahead = allot(wanted, seconds, present + sum(self.counts))
        cpus = self.share if sum(self.counts) <= present else 0.0
        for pool, count, asked in zip(self.pools, self.counts, ahead, strict=True):
            pool.resize(count, max(count, asked), cpus)

    def _present(self) -> dict[str, dict[str, float]]:
        """Return the resources of the nodes that stay, but for those that are lost; all where that leaves none."""
        nodes = staying_nodes()
        self.lost &= nodes.keys()
        if self.lost and time.monotonic() > self.probed + LOOK_SECONDS:
            self.lost, self.probed = unreachable(self.lost), time.monotonic()
        return {node: resources for node, resources in nodes.items() if node not in self.lost} or nodes

    def _look_for_lost(self) -> None:
        """Find the nodes that are gone without Ray's knowing, and start the units again whose results lay there."""
        self.lost |= unreachable(staying_nodes().keys() - self.lost)
        self.probed = time.monotonic()
        for pool in self.pools[1:]:
            gone = {position for position, _ in pool.waiting if self.made_on[position] in self.lost}
            pool.waiting = deque(one for one in pool.waiting if one[0] not in gone)
            self.pools[0].waiting.extend((position, self.units[position]) for position in gone)

    def _seconds(self) -> list[float] | None:
        """Return what a unit takes in each stage, as soon as all were measured."""
        found = [pool.seconds for pool in self.pools]
        return [max(one, 1e-3) for one in found if one is not None] if None not in found else None

    def _bounds(self, stage: Stage, nodes: dict[str, dict[str, float]]) -> tuple[int, int]:
        """Return the least and greatest number of a stage's workers, of which GPUs may allow fewer."""
        most = max(1, room(nodes, self.share, stage.gpus)) if stage.gpus else stage.limit
        return min(stage.workers, most), min(stage.limit, most)

    def _handle_failure(self, call: _Call, error: RayError) -> None:
        cause = error.cause if isinstance(error, RayTaskError) else error
        if not isinstance(cause, RayError):
            raise cause from error
        if type(cause) is RayError:  # what Ray makes of an exception that does not pickle
            raise error
        pool = self.pools[call.stage]
        node = pool.nodes.get(call.actor)
        if isinstance(cause, ActorUnavailableError) and node not in self.lost:
            self._look_for_lost()
        if node in staying_nodes() and node not in self.lost:  # else its node has left, which is not the unit's fault
            self.failures[call.position] += 1
        if self.failures[call.position] > actors.RETRIES:
            raise LicError(
                f"{self.units[call.position]}: its worker in stage '{pool.stage.name}' died {actors.RETRIES + 1} times",
                hint=f"out of memory? Ray says: {' '.join(str(cause).split())[:300]}",
            ) from error
        if isinstance(cause, ObjectLostError):  # the object's node is gone; the worker that asked for it is alive
            pool.end(call.actor)
        else:
            pool.lose(call.actor)
            self._follow_cluster()
        self.pools[0].waiting.append((call.position, self.units[call.position]))

    def close(self) -> None:
        for pool in self.pools:
            pool.close()


def run_on_ray(
    stages: Sequence[Stage], units: Sequence[Any], address: str | None, num_cpus: int | None
) -> Generator[tuple[Any, Any], None, None]:
    """Run `engine.run.run` on Ray; see there."""
    if not units:
        return
    with connected(address, num_cpus):
        require_gpus(sum(stage.workers * stage.gpus for stage in stages))
        state = _Run(stages, units)
        try:
            yield from state.results()
        except RaySystemError as error:
            raise LicError(f"lost the Ray cluster: {' '.join(str(error).split())[:200]}", hint=RESTART_HINT) from error
        finally:
            state.close()
