"""A study: run every stage of a file's experiments, each piece of work once; finished work is not repeated.

    train -> cache -> finetune -> evaluate -> report

An experiment takes part in the stages that it has sections for. The experiments of a stage that write to one output
are one unit of work. The units of a stage are independent: one that fails does not stop the others, but no later stage
begins.
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
    """The experiments that write to one output, a file, folder or store, in one stage."""

    stage: str
    output: str
    experiments: tuple[Experiment, ...]

    def __str__(self) -> str:
        return f"{self.stage} {self.output}"


def study(documents: Sequence[Sequence[Experiment]], jobs: int, logs: Path) -> None:
    """Run the stages of each document's experiments, document after document.

    Up to `jobs` units of training, building or finetuning run at once, each in a process with its share of the cores
    and with its output in a file in `logs`. With one job, or for a single unit, the work runs in this process. An
    evaluation has `jobs` workers.

    Raises:
        LicError: units failed; the first is named, and the reason of each was printed.
        UsageError: there is nothing to do, or there are several jobs and an engine other than local.
    """
    work = [units for document in documents for stage in STAGES if (units := units_of(stage, document))]
    if not work:
        raise UsageError("the file has nothing to run", hint="add sections: cache, finetune, evaluate ...")
    if jobs > 1 and any(experiment.engine.name != "local" for document in documents for experiment in document):
        raise UsageError("several jobs are processes of this machine", hint="--engine local, or one job at a time")
    for units in work:
        _run_units(units, jobs, logs)
    print(*_closing_lines([experiment for document in documents for experiment in document]), sep="\n", flush=True)


def units_of(stage: str, experiments: Sequence[Experiment]) -> list[Unit]:
    """Return the units of a stage in the order of the experiments; those of one output are one unit."""
    by_output: dict[str, list[Experiment]] = {}
    for experiment in experiments:
        if (output := STAGES[stage].output(experiment)) is not None:
            by_output.setdefault(output, []).append(experiment)
    return [Unit(stage, output, tuple(chosen)) for output, chosen in by_output.items()]


def _closing_lines(experiments: Sequence[Experiment]) -> list[str]:
    """Return where the reports of a finished study lie or, without any, how to get one."""
    pages = dict.fromkeys((one.report.out / "report.html").resolve() for one in experiments if one.report)
    results = dict.fromkeys(str(one.evaluate.out) for one in experiments if one.evaluate)
    if pages:
        return [f"the report, to open in a browser: {page}" for page in pages]
    if results:
        return [f"done; a page to look at: lic-dist report {' '.join(results)}"]
    return ["done; to measure what it brought, give the file an evaluate section: lic-dist config explain evaluate"]


def _run_units(units: Sequence[Unit], jobs: int, logs: Path) -> None:
    """Run the units of one stage. Raises LicError where any failed, after all have run."""
    stage = STAGES[units[0].stage]
    failed: list[tuple[Unit, str]] = []
    if jobs > 1 and len(units) > 1 and stage.parallel:
        print(
            f"{stage.title}: {counted(len(units), stage.noun)}, {jobs} side by side; what they say: {logs}/", flush=True
        )
        make = partial(_make_worker, str(logs.resolve()), max(1, (os.cpu_count() or 1) // jobs))
        results = run([Stage(units[0].stage, make, jobs)], units)
        with closing(results), Progress(stage.title, len(units), stage.noun) as bar:
            for unit, fault in results:
                bar.advance()
                failed += [(unit, fault)] if fault else []
    else:
        for unit in units:
            print(unit, flush=True)
            failed += [(unit, fault)] if (fault := _run_unit(unit, jobs)) else []
    for unit, fault in failed:
        print(f"failed: {unit}: {fault}", file=sys.stderr)
    if failed:
        hint = "the same command does what is left"
        raise LicError(
            f"{len(failed)} of {counted(len(units), stage.noun)} failed, such as {failed[0][0].output}", hint=hint
        )


def _make_worker(logs: str, threads: int) -> Callable[[Unit], str]:
    """Set up a worker process; return its function, which runs a unit with its output in a log file."""
    os.environ["OMP_NUM_THREADS"] = os.environ["NUMBA_NUM_THREADS"] = str(threads)  # read when torch is loaded
    Path(logs).mkdir(parents=True, exist_ok=True)
    from lic_dist.evaluation.jobs import file_safe

    def work(unit: Unit) -> str:
        with (Path(logs) / f"{file_safe(str(unit))}.log").open("a") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
            fault = _run_unit(unit, 1)
            print(f"failed: {fault}" if fault else "done", flush=True)
        return fault

    return work


def _run_unit(unit: Unit, jobs: int) -> str:
    """Run a unit; return what went wrong, empty where nothing did."""
    try:
        STAGES[unit.stage].work(unit.experiments, jobs)
    except LicError as error:
        return str(error)
    return ""


@dataclass(frozen=True)
class _Stage:
    """A stage: its title, the noun for its units, where an experiment writes, the work, whether units run at once."""

    title: str
    noun: str
    output: Callable[[Experiment], str | None]
    work: Callable[[Sequence[Experiment], int], None]
    parallel: bool = True


def _train(experiments: Sequence[Experiment], _: int) -> None:
    from lic_dist.training.base import train

    train(need(experiments[0].train, "train"), need(experiments[0].images, "images"))


def _build(experiments: Sequence[Experiment], _: int) -> None:
    from lic_dist.building.build import build

    by_group = {need(experiment.quantizer, "quantizer").group: experiment for experiment in experiments}
    for experiment in by_group.values():
        build(experiment).require_tolerated()


def _finetune(experiments: Sequence[Experiment], _: int) -> None:
    if experiments[0].engine.name == "ray":
        from lic_dist.cluster.train import finetune_on_ray as finetune
    else:
        from lic_dist.training.finetune import finetune
    finetune(experiments[0])


def _evaluate(experiments: Sequence[Experiment], jobs: int) -> None:
    from lic_dist.evaluation.run import evaluate
    from lic_dist.evaluation.summary import require_coded, summary

    for experiment in experiments:
        engine = experiment.engine.model_copy(update={"searchers": jobs}) if jobs > 1 else experiment.engine
        path = evaluate(experiment.model_copy(update={"engine": engine}))
    require_coded([summary(path)])


def _report(experiments: Sequence[Experiment], _: int) -> None:
    from lic_dist.reporting.report import report

    section = need(experiments[0].report, "report")
    files = dict.fromkeys(need(experiment.evaluate, "evaluate").out for experiment in experiments)
    report(list(files), section.anchors, section.out, label=section.label)


def _out(section: Train | Finetune | Evaluate | Report | None) -> str | None:
    return None if section is None else str(section.out)


def _store_path(experiment: Experiment) -> str | None:
    return experiment.cache.path if experiment.cache and experiment.quantizer and experiment.images else None


STAGES = {
    "train": _Stage("training", "model", lambda one: _out(one.train), _train),
    "cache": _Stage("building caches", "store", _store_path, _build),
    "finetune": _Stage("finetuning", "model", lambda one: _out(one.finetune), _finetune),
    "evaluate": _Stage("evaluating", "result file", lambda one: _out(one.evaluate), _evaluate, parallel=False),
    "report": _Stage("reporting", "report", lambda one: _out(one.report), _report, parallel=False),
}
