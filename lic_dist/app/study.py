"""A study: every stage of the experiments of a file, each done once; what is done already stays.

    train -> cache -> finetune -> evaluate -> report

An experiment takes part in the stages that it has sections for. Those that write into one place are one unit of work,
one after another; the units of a stage are independent. One that fails does not stop the others of its stage, but no
later stage begins.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from lic_dist.config import Evaluate, Experiment, Finetune, Report, Train, need
from lic_dist.engine.run import run
from lic_dist.engine.stages import Stage
from lic_dist.errors import LicError, UsageError
from lic_dist.progress import Progress
from lic_dist.text import counted


@dataclass(frozen=True)
class Unit:
    """The experiments that write into one place in one stage."""

    stage: str
    place: str
    experiments: tuple[Experiment, ...]

    def __str__(self) -> str:
        return f"{self.stage} {self.place}"


def study(documents: Sequence[Sequence[Experiment]], jobs: int, logs: Path) -> None:
    """Do the stages of each document's experiments, document after document.

    Of training, building and finetuning `jobs` units run side by side, each in a process with its share of the cores
    that writes what it says into a file in `logs`; one at a time, or a single one, runs here. An evaluation has `jobs`
    workers.

    Raises:
        LicError: units failed; the first is named, each has said why.
        UsageError: nothing to do, or several jobs on an engine that is not of this machine.
    """
    work = [units for one in documents for stage in STAGES if (units := units_of(stage, one))]
    if not work:
        raise UsageError("the file has nothing to run", hint="add sections: cache, finetune, evaluate ...")
    if jobs > 1 and any(one.engine.name != "local" for document in documents for one in document):
        raise UsageError("several jobs are processes of this machine", hint="--engine local, or one job at a time")
    for units in work:
        _do(units, jobs, logs)
    print(*_afterwards([one for document in documents for one in document]), sep="\n", flush=True)


def units_of(stage: str, experiments: Sequence[Experiment]) -> list[Unit]:
    """The units of a stage in the order of the experiments, equal work once."""
    found: dict[str, list[Experiment]] = {}
    for one in experiments:
        if (place := STAGES[stage].place(one)) is not None:
            found.setdefault(place, []).append(one)
    return [Unit(stage, place, tuple(chosen)) for place, chosen in found.items()]


def _afterwards(experiments: Sequence[Experiment]) -> list[str]:
    """Where the reports of a study that is done lie; else what makes the next thing to look at."""
    pages = dict.fromkeys((one.report.out / "report.html").resolve() for one in experiments if one.report)
    results = dict.fromkeys(str(one.evaluate.out) for one in experiments if one.evaluate)
    if pages:
        return [f"the report, to open in a browser: {page}" for page in pages]
    if results:
        return [f"done; a page to look at: lic-dist report {' '.join(results)}"]
    return ["done; to measure what it brought, give the file an evaluate section: lic-dist config explain evaluate"]


def _do(units: Sequence[Unit], jobs: int, logs: Path) -> None:
    stage = STAGES[units[0].stage]
    failed: list[tuple[Unit, str]] = []
    if jobs > 1 and len(units) > 1 and stage.apart:
        print(
            f"{stage.title}: {counted(len(units), stage.what)}, {jobs} side by side; what they say: {logs}/", flush=True
        )
        make = partial(_make, str(logs.resolve()), max(1, (os.cpu_count() or 1) // jobs))
        results = run([Stage(units[0].stage, make, jobs)], units)
        with closing(results), Progress(stage.title, len(units), stage.what) as bar:
            for unit, fault in results:
                bar.advance()
                failed += [(unit, fault)] if fault else []
    else:
        for unit in units:
            print(unit, flush=True)
            failed += [(unit, fault)] if (fault := _fault(unit, jobs)) else []
    for unit, fault in failed:
        print(f"failed: {unit}: {fault}", file=sys.stderr)
    if failed:
        hint = "the same command does what is left"
        raise LicError(
            f"{len(failed)} of {counted(len(units), stage.what)} failed, such as {failed[0][0].place}", hint=hint
        )


def _make(logs: str, threads: int) -> Callable[[Unit], str]:
    """A process for units: its threads, and its output in a file of each unit."""
    os.environ["OMP_NUM_THREADS"] = os.environ["NUMBA_NUM_THREADS"] = str(threads)  # read when torch is loaded
    Path(logs).mkdir(parents=True, exist_ok=True)
    from lic_dist.evaluation.jobs import file_safe

    def work(unit: Unit) -> str:
        with (Path(logs) / f"{file_safe(str(unit))}.log").open("a") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
            fault = _fault(unit, 1)
            print(f"failed: {fault}" if fault else "done", flush=True)
        return fault

    return work


def _fault(unit: Unit, jobs: int) -> str:
    """Do a unit; what went wrong, empty if nothing did."""
    try:
        STAGES[unit.stage].work(unit.experiments, jobs)
    except LicError as error:
        return str(error)
    return ""


@dataclass(frozen=True)
class _Stage:
    """A stage: what it does, to how many of what, where an experiment writes in it, and whether units go apart."""

    title: str
    what: str
    place: Callable[[Experiment], str | None]
    work: Callable[[Sequence[Experiment], int], None]
    apart: bool = True


def _train(experiments: Sequence[Experiment], _: int) -> None:
    from lic_dist.training.base import train

    train(need(experiments[0].train, "train"), need(experiments[0].images, "images"))


def _build(experiments: Sequence[Experiment], _: int) -> None:
    from lic_dist.building.build import build

    groups = {need(one.quantizer, "quantizer").group: one for one in experiments}
    for one in groups.values():
        build(one).require_tolerated()


def _finetune(experiments: Sequence[Experiment], _: int) -> None:
    if experiments[0].engine.name == "ray":
        from lic_dist.cluster.train import finetune_on_ray as finetune
    else:
        from lic_dist.training.finetune import finetune
    finetune(experiments[0])


def _evaluate(experiments: Sequence[Experiment], jobs: int) -> None:
    from lic_dist.evaluation.run import evaluate
    from lic_dist.evaluation.summary import require_coded, summary

    for one in experiments:
        engine = one.engine.model_copy(update={"searchers": jobs}) if jobs > 1 else one.engine
        path = evaluate(one.model_copy(update={"engine": engine}))
    require_coded([summary(path)])


def _report(experiments: Sequence[Experiment], _: int) -> None:
    from lic_dist.reporting.report import report

    section = need(experiments[0].report, "report")
    files = dict.fromkeys(need(one.evaluate, "evaluate").out for one in experiments)
    report(list(files), section.anchors, section.out, label=section.label)


def _out(section: Train | Finetune | Evaluate | Report | None) -> str | None:
    return None if section is None else str(section.out)


def _store(one: Experiment) -> str | None:
    return one.cache.path if one.cache and one.quantizer and one.images else None


STAGES = {
    "train": _Stage("training", "model", lambda one: _out(one.train), _train),
    "cache": _Stage("building caches", "store", _store, _build),
    "finetune": _Stage("finetuning", "model", lambda one: _out(one.finetune), _finetune),
    "evaluate": _Stage("evaluating", "result file", lambda one: _out(one.evaluate), _evaluate, apart=False),
    "report": _Stage("reporting", "report", lambda one: _out(one.report), _report, apart=False),
}
