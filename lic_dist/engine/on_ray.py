"""Staged work on Ray: one pool of actors a stage; results are passed from pool to pool by object reference.

The driver waits for small tokens and passes references. What a stage returns stays in the object store until the next
stage reads it; only the last stage's results are fetched. At most twice as many units as the largest pool has workers
are in flight, so that memory is bounded however slow the last stage is. Each actor has one call at a time, and gets its
first when it has been placed.

When a worker or node dies, its units start again at the first stage and the worker is replaced. If the remaining
cluster has no CPU free for a stage's only worker, the worker shares one: fewer machines are slower, but work goes on.
If the driver dies, so do its actors.

Ray gets only pickles of `Stage.make` and the units; the workers import the `lic_dist` that is installed.
"""

from __future__ import annotations

import os
import secrets
import socket
import sys

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # read when ray is imported
os.environ.setdefault("RAY_prestart_worker_first_driver", "false")  # a Ray of our own: no idle process for each core

import time
from collections import Counter, deque
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import ObjectLostError, RayError, RaySystemError, RayTaskError

from lic_dist.engine.stages import Stage, Work
from lic_dist.errors import LicError
from lic_dist.temporary import can_write

RETRIES = 3  # of one unit, after its worker, its node or one of its objects was lost
RESTART_HINT = "finished units stay finished: start the job again"
SAME_VERSION_HINT = "is the same lic_dist installed on every node?"
ANSWER_SECONDS = 10.0  # seconds in which a cluster's address has to answer
PLACEMENT_SECONDS = 60.0  # seconds that a stage without workers waits for a CPU of its own


class _Worker:
    """What runs in an actor. `make` is called at the first call, so that its errors appear as errors of the work."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self.work: Work | None = None

    def placed(self) -> None:
        """Answer as soon as the actor runs."""

    def call(self, value: Any) -> tuple[bool, Any]:
        """Return a token that tells the driver whether there is a result, and the result, which the driver does not
        fetch.
        """
        if self.work is None:
            self.work = self.stage.make()
        result = self.work(value)
        return result is not None, result


class _Pool:
    """The actors of one stage, and the units that wait for one."""

    def __init__(self, stage: Stage, cpus: float) -> None:
        self.stage, self.cpus = stage, cpus
        self.placing: dict[Any, tuple[Any, float]] = {}  # token -> (actor, since when)
        self.placed: set[Any] = set()
        self.free: deque[Any] = deque()
        self.waiting: deque[tuple[int, Any]] = deque()  # (position of the unit, argument or reference to it)
        self.failed_starts = 0  # actors that died before they ran, since the last that did
        for _ in range(stage.workers):
            self.add()

    def add(self) -> None:
        """Ask for one more actor."""
        asked: Any = ray.remote(num_cpus=self.cpus, num_gpus=self.stage.gpus, max_restarts=0)
        actor: Any = asked(_Worker).remote(self.stage)
        self.placing[actor.placed.remote()] = (actor, time.monotonic())

    def settle(self, token: Any) -> None:
        """Register an actor that has answered, or replace one that died before it could."""
        actor, _ = self.placing.pop(token)
        try:
            ray.get(token)
        except RayError as error:
            ray.kill(actor, no_restart=True)
            self.failed_starts += 1
            if self.failed_starts > RETRIES * self.stage.workers:
                why = " ".join(str(error).split())[:300]
                raise LicError(
                    f"the workers of stage '{self.stage.name}' do not start: {why}", hint=SAME_VERSION_HINT
                ) from error
            self.add()
        else:
            self.failed_starts = 0
            self.placed.add(actor)
            self.free.append(actor)

    def replace(self, actor: Any) -> None:
        """End an actor for good, if it still lives, and ask for a new one in its place."""
        ray.kill(actor, no_restart=True)
        self.placed.discard(actor)
        self.add()

    def share_cpu(self) -> None:
        """If no actor could be placed for long, ask for one that reserves no CPU, for this stage from now on.

        This happens once a stage, so that workers which are slow to start are not ended again and again.
        """
        if self.placed or not self.placing or not self.cpus or ray.available_resources().get("CPU", 0) >= self.cpus:
            return
        token, (actor, since) = min(self.placing.items(), key=lambda item: item[1][1])
        if time.monotonic() - since < PLACEMENT_SECONDS:
            return
        if self.stage.gpus:
            print(f"stage '{self.stage.name}' waits for a GPU", file=sys.stderr, flush=True)
            self.placing[token] = (actor, time.monotonic())
            return
        print(f"stage '{self.stage.name}' has no CPU of its own left: it shares one", file=sys.stderr, flush=True)
        del self.placing[token]
        ray.kill(actor, no_restart=True)
        self.cpus = 0
        self.add()

    def close(self) -> None:
        for actor in [*self.placed, *(actor for actor, _ in self.placing.values())]:
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
        share = cpu_share(sum(stage.workers for stage in stages))
        self.units = units
        self.pools = [_Pool(stage, share) for stage in stages]
        self.limit = 2 * max(stage.workers for stage in stages)
        self.calls: dict[Any, _Call] = {}
        self.failures: Counter[int] = Counter()
        self.admitted = self.finished = 0

    def results(self) -> Iterator[tuple[Any, Any]]:
        while self.finished < len(self.units):
            self._submit()
            for position, result in self._collect():
                self.finished += 1
                self._submit()  # before the caller processes the result
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
        tokens = [*self.calls, *(token for pool in self.pools for token in pool.placing)]
        ready, _ = ray.wait(tokens, num_returns=1, timeout=PLACEMENT_SECONDS / 3)
        for pool in self.pools:
            pool.share_cpu()
        if not ready:
            return
        for pool in self.pools:
            if ready[0] in pool.placing:
                pool.settle(ready[0])
                return
        if ready[0] not in self.calls:  # of an actor that was given up meanwhile
            return
        call = self.calls.pop(ready[0])
        try:
            last = not ray.get(ready[0]) or call.stage == len(self.pools) - 1
            result = ray.get(call.result) if last else call.result
        except RayError as error:
            self._handle_failure(call, error)
            return
        self.pools[call.stage].free.append(call.actor)
        if last:
            yield call.position, result
        else:
            self.pools[call.stage + 1].waiting.append((call.position, result))

    def _handle_failure(self, call: _Call, error: RayError) -> None:
        cause = error.cause if isinstance(error, RayTaskError) else error
        if not isinstance(cause, RayError):
            raise cause from error
        if type(cause) is RayError:  # what Ray makes of an exception that does not pickle
            raise error
        self.failures[call.position] += 1
        pool = self.pools[call.stage]
        if self.failures[call.position] > RETRIES:
            raise LicError(
                f"{self.units[call.position]}: its worker in stage '{pool.stage.name}' died {RETRIES + 1} times",
                hint=f"out of memory? Ray says: {' '.join(str(cause).split())[:300]}",
            ) from error
        if isinstance(cause, ObjectLostError):  # the object's node is gone; the worker that asked for it is alive
            pool.free.append(call.actor)
        else:
            pool.replace(call.actor)
        self.pools[0].waiting.append((call.position, self.units[call.position]))

    def close(self) -> None:
        for pool in self.pools:
            pool.close()


def cpu_share(workers: int) -> float:
    """Return the CPUs that each worker asks for: one, or the largest fraction by which all workers fit on the nodes."""
    cpus = [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]]
    return 1 / max(1, -(-workers // sum(cpus))) if sum(cpus) else 1.0


def require_gpus(wanted: float) -> None:
    """Refuse workers that would wait for GPUs for ever.

    Raises:
        LicError: the cluster has fewer GPUs.
    """
    present = ray.cluster_resources().get("GPU", 0.0)
    if wanted > present:
        raise LicError(f"the workers ask for {wanted:g} GPUs, the Ray cluster has {present:g}")


@contextmanager
def connected(address: str | None, num_cpus: int | None, show_workers: bool = False) -> Iterator[None]:
    """Connect to the Ray cluster at `address`, or start one that ends with the block. An initialised Ray is left alone.

    `show_workers` shows here what the workers print, and of Ray's own logs only errors.

    Raises:
        LicError: no cluster at the address.
    """
    if ray.is_initialized():
        yield
        return
    options: dict[str, Any] = {"log_to_driver": show_workers, "logging_level": "ERROR"}
    if show_workers:
        options["logging_config"] = ray.LoggingConfig(log_level="ERROR")
    told = os.environ.get("RAY_ADDRESS", "")
    address = address or ("" if told.startswith("http") else told)  # an http URL is the job server's address
    if address:
        _require_answer(address)
        try:
            ray.init(address=address, **options)
        except ConnectionError as error:
            raise LicError(f"no Ray cluster at {address}: {error}", hint="`ray start --head` starts one") from error
    else:
        if not can_write(Path(os.path.expanduser("~/.ray"))):  # where Ray would keep the token of its clusters
            os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex())
        ray.init(address="local", num_cpus=num_cpus or os.cpu_count(), include_dashboard=False, **options)
    try:
        yield
    finally:
        ray.shutdown()


def _require_answer(address: str) -> None:
    """Raise LicError where nothing answers at a host and port within ANSWER_SECONDS: Ray would try for minutes."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not colon or not port.isdecimal():
        return  # "auto", or a form that Ray judges at once
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=ANSWER_SECONDS).close()
    except (OSError, OverflowError) as error:
        from_environment = address == os.environ.get("RAY_ADDRESS")
        hint = "unset RAY_ADDRESS to work on this machine, or " if from_environment else ""
        raise LicError(
            f"no Ray cluster answers at {address}: {error}", hint=f"{hint}`ray start --head` starts one"
        ) from None


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
