"""Run every unit through all stages, on the chosen engine."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Any

from lic_dist.engine.stages import Stage, Work
from lic_dist.errors import UsageError


def run(
    stages: Sequence[Stage],
    units: Sequence[Any],
    *,
    engine: str = "local",
    address: str | None = None,
    num_cpus: int | None = None,
) -> Generator[tuple[Any, Any], None, None]:
    """Run every unit through all stages; yield (unit, result) in order of completion.

    `engine` "local" runs a single stage of several workers in as many processes, one of one worker in this thread, and
    several stages side by side, in a thread each. "ray" runs on the cluster at `address` (default: RAY_ADDRESS, else a
    Ray of our own with `num_cpus`, by default all, which ends with the run). A Ray that is already initialised is used
    and left alone. Results on Ray must be small: the driver fetches them all.

    Raises:
        UsageError: an unknown engine.
        LicError: the cluster lacks the GPUs asked for, or the workers of one unit died repeatedly, or a process of this
            machine died.
        Exception: whatever the work raises, unchanged; the first failure ends the run.
    """
    if not stages:
        raise ValueError("no stages to run")
    if engine == "local" and len(stages) == 1 and min(stages[0].here, len(units)) > 1:
        from lic_dist.engine.processes import run_in_processes

        return run_in_processes(stages[0], units)
    if engine == "local" and len(stages) == 1:
        return _run_here(stages[0], units)
    if engine == "local":
        from lic_dist.engine.pipeline import run_in_threads

        return run_in_threads(stages, units)
    if engine == "ray":
        from lic_dist.engine.on_ray import run_on_ray

        return run_on_ray(stages, units, address, num_cpus)
    raise UsageError(f"no engine '{engine}'", hint="one of: local, ray")


def _run_here(stage: Stage, units: Sequence[Any]) -> Generator[tuple[Any, Any], None, None]:
    work: Work | None = None
    for unit in units:
        work = work or stage.make()
        yield unit, work(unit)
