"""Staged work on Ray: one pool of actors a stage, object references handed on from pool to pool.

The driver waits for small tokens and moves references; what a stage returns stays in the object store until
the next stage reads it, and only the last stage's results are fetched. At most twice the largest pool of
units is in flight, so that memory is bounded however slow the last stage is. Each actor has one call at a
time.

Ray is handed nothing but pickles of `Stage.make` and the units: the workers import `lic_dist` as installed.
"""

from __future__ import annotations

import os

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # read when ray is imported

from collections import deque  # noqa: E402
from collections.abc import Iterator, Sequence  # noqa: E402
from contextlib import contextmanager  # noqa: E402
from dataclasses import dataclass  # noqa: E402
from typing import Any  # noqa: E402

import ray  # noqa: E402
from ray.exceptions import RayError, RayTaskError  # noqa: E402

from lic_dist.engine.stages import Stage, Work  # noqa: E402
from lic_dist.errors import LicError  # noqa: E402

RETRIES = 3  # of one unit, after its worker, node or an object of its was lost


class _Worker:
    """What runs in an actor. `make` waits for the first call: its errors surface as errors of the work."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self.work: Work | None = None

    def call(self, value: Any) -> tuple[None, Any]:
        """A token that tells the driver of success or failure, and the result, which it leaves alone."""
        if self.work is None:
            self.work = self.stage.make()
        return None, self.work(value)


class _Pool:
    """The actors of one stage and the units that wait for one."""

    def __init__(self, stage: Stage, cpus: float) -> None:
        self.actor_class: Any = ray.remote(num_cpus=cpus, num_gpus=stage.gpus, max_restarts=0)(_Worker)
        self.stage = stage
        self.actors: list[Any] = [self.actor_class.remote(stage) for _ in range(stage.workers)]
        self.free = deque(self.actors)
        self.waiting: deque[tuple[int, Any]] = deque()  # (position of the unit, argument or reference to it)

    def replace(self, actor: Any) -> None:
        """End an actor for good, should it still live, and put a new one in its place."""
        ray.kill(actor, no_restart=True)
        new = self.actor_class.remote(self.stage)
        self.actors[self.actors.index(actor)] = new
        self.free.append(new)

    def close(self) -> None:
        for actor in self.actors:
            ray.kill(actor, no_restart=True)


@dataclass(frozen=True)
class _Call:
    position: int
    stage: int
    actor: Any
    result: Any


class _Run:
    """The state of one run: pools, calls in flight by their token, failures by unit."""

    def __init__(self, stages: Sequence[Stage], units: Sequence[Any]) -> None:
        share = _cpu_share(sum(stage.workers for stage in stages))
        self.units = units
        self.pools = [_Pool(stage, share) for stage in stages]
        self.limit = 2 * max(stage.workers for stage in stages)
        self.calls: dict[Any, _Call] = {}
        self.failures = [0] * len(units)
        self.admitted = self.finished = 0

    def results(self) -> Iterator[tuple[Any, Any]]:
        while self.finished < len(self.units):
            self._submit()
            for position, result in self._collect():
                self.finished += 1
                self._submit()  # before the caller takes its time over the result
                yield self.units[position], result

    def _submit(self) -> None:
        while self.admitted < min(len(self.units), self.finished + self.limit):
            self.pools[0].waiting.append((self.admitted, self.units[self.admitted]))
            self.admitted += 1
        for stage, pool in enumerate(self.pools):
            while pool.waiting and pool.free:
                (position, argument), actor = pool.waiting.popleft(), pool.free.popleft()
                token, result = actor.call.options(num_returns=2).remote(argument)
                self.calls[token] = _Call(position, stage, actor, result)

    def _collect(self) -> Iterator[tuple[int, Any]]:
        """Wait for a call to end; hand its unit on, or yield it when that was the last stage."""
        (token,), _ = ray.wait(list(self.calls), num_returns=1)
        call = self.calls.pop(token)
        last = call.stage == len(self.pools) - 1
        try:
            ray.get(token)
            result = ray.get(call.result) if last else call.result
        except RayError as error:
            self._failed(call, error)
            return
        self.pools[call.stage].free.append(call.actor)
        if last:
            yield call.position, result
        else:
            self.pools[call.stage + 1].waiting.append((call.position, result))

    def _failed(self, call: _Call, error: RayError) -> None:
        cause = error.cause if isinstance(error, RayTaskError) else error
        if not isinstance(cause, RayError):
            raise cause from error
        if type(cause) is RayError:  # what Ray makes of an exception that does not pickle
            raise error
        self.failures[call.position] += 1
        if self.failures[call.position] > RETRIES:
            pool = self.pools[call.stage].stage.name
            raise LicError(
                f"{self.units[call.position]}: its worker in stage '{pool}' died {RETRIES + 1} times",
                hint=f"out of memory? Ray says: {' '.join(str(cause).split())[:300]}",
            ) from error
        self.pools[call.stage].replace(call.actor)
        self.pools[0].waiting.append((call.position, self.units[call.position]))

    def close(self) -> None:
        for pool in self.pools:
            pool.close()


def _cpu_share(workers: int) -> float:
    """CPUs that each actor asks for: one, or less where there are more actors, so that all can start."""
    cpus = ray.cluster_resources().get("CPU", 0.0)
    return 1.0 if cpus < 1 else min(1.0, int(1000 * cpus / workers) / 1000)


def _require_gpus(stages: Sequence[Stage]) -> None:
    wanted = sum(stage.workers * stage.gpus for stage in stages)
    present = ray.cluster_resources().get("GPU", 0.0)
    if wanted > present:
        raise LicError(f"the workers ask for {wanted:g} GPUs, the Ray cluster has {present:g}")


@contextmanager
def _connected(address: str | None, num_cpus: int | None) -> Iterator[None]:
    """A Ray to work on. One that is already initialised is left alone; ours ends with the block."""
    if ray.is_initialized():
        yield
        return
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    address = address or os.environ.get("RAY_ADDRESS")
    if address:
        ray.init(address=address, **quiet)
    else:
        ray.init(address="local", num_cpus=num_cpus or os.cpu_count(), include_dashboard=False, **quiet)
    try:
        yield
    finally:
        ray.shutdown()


def run_on_ray(
    stages: Sequence[Stage], units: Sequence[Any], address: str | None, num_cpus: int | None
) -> Iterator[tuple[Any, Any]]:
    """`stages.run` on Ray; see there."""
    if not units:
        return
    with _connected(address, num_cpus):
        _require_gpus(stages)
        state = _Run(stages, units)
        try:
            yield from state.results()
        finally:
            state.close()
