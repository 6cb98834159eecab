"""Staged work over units: in this process, in processes of this machine, or on Ray.

A unit (a shard number, say) flows through all stages; the result of one stage is the argument of the next:

    unit -> read -> encode -> search and write -> result

A stage that finds nothing to do for a unit returns None: that is the unit's result then, and no later stage sees it.
The engine knows nothing of what the work is. Work must be idempotent: a unit whose worker died starts again
from its first stage.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any

from lic_dist.errors import UsageError

Work = Callable[[Any], Any]


@dataclass(frozen=True)
class Stage:
    """One step of the work and the pool of workers that does it.

    `make` is called once in each worker, before its first unit, and returns the function that does the
    work; it must pickle (a module-level function, or a functools.partial of one). `gpus` is what one worker
    holds.
    """

    name: str
    make: Callable[[], Work]
    workers: int = 1
    gpus: float = 0.0

    def __post_init__(self) -> None:
        if self.workers < 1 or self.gpus < 0:
            raise ValueError(f"stage {self.name}: {self.workers} workers with {self.gpus} GPUs each")


def run(
    stages: Sequence[Stage],
    units: Sequence[Any],
    *,
    engine: str = "local",
    address: str | None = None,
    num_cpus: int | None = None,
) -> Generator[tuple[Any, Any], None, None]:
    """Run every unit through all stages; yields (unit, result) in order of completion.

    `engine` is "local": a single stage of several workers has a process for each, else one unit after the other
    is done in this process. Or "ray": then `address` is a running cluster's (default: RAY_ADDRESS, else a Ray of
    our own with `num_cpus`, default all, which ends with the run). A Ray that is already initialised is used and
    left alone. Results must be small on Ray: they are all that the driver fetches.

    Raises:
        UsageError: an unknown engine.
        LicError: the cluster lacks the GPUs asked for, or the workers of one unit died again and again; a process
            of this machine died.
        Exception: whatever the work raises, unchanged; the first failure ends the run.
    """
    if not stages:
        raise ValueError("no stages to run")
    if engine == "local" and len(stages) == 1 and min(stages[0].workers, len(units)) > 1:
        from lic_dist.engine.processes import run_in_processes

        return run_in_processes(stages[0], units)
    if engine == "local":
        return _run_here(stages, units)
    if engine == "ray":
        from lic_dist.engine.on_ray import run_on_ray

        return run_on_ray(stages, units, address, num_cpus)
    raise UsageError(f"no engine '{engine}'", hint="one of: local, ray")


def _run_here(stages: Sequence[Stage], units: Sequence[Any]) -> Generator[tuple[Any, Any], None, None]:
    works: list[Work] = []
    for unit in units:
        works = works or [stage.make() for stage in stages]
        value = unit
        for work in works:
            value = work(value)
            if value is None:
                break
        yield unit, value
