"""The main job of a quick start, from photos to the closing table.

    photos -> crops -> frozen encoder -> TCQ -> cache (Ray) -> retrained decoder, and a control -> real bits -> report

Every step is a job of the experiment file that is written, so that `evaluate` and `report` can repeat the comparison.
The base model serves another lambda than its own, as one decoder for several rates does: at its own, the levels that
were fitted to its decoder leave retraining nothing to gain. Its quantizers for that lambda (`quantizers/`) were
calibrated on more photos than a quick start has. One of them refines, in the evaluation of the base alone. The control
is a decoder that takes the same steps on the same crops, but on latents quantized as in the base model's own training.
No step before the final evaluation uses the test photos.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console

from lic_dist import config
from lic_dist.app.quickstart.closing import closing
from lic_dist.app.quickstart.photos import CROP, Split, lay_out, split
from lic_dist.building.build import build
from lic_dist.building.pilot import record_location
from lic_dist.building.storage import experiment_storage
from lic_dist.data import photo_files
from lic_dist.errors import LicError
from lic_dist.evaluation.run import evaluate
from lic_dist.quantization.record import QuantizerRecord
from lic_dist.reporting.gains import SQ_ADAPTED
from lic_dist.reporting.report import report
from lic_dist.text import counted
from lic_dist.training.finetune import finetune

BASE, GROUP, REFINED, SQ = "base-0.013", "tcq32@0.025", "tcq32-refined@0.025", "sq-adapted@0.025"
RECORDS = Path(__file__).parent / "quantizers"
CROPS, MOST_VARIATIONS = 512, 48  # crops to retrain on in all, and crops of one photo at most
STEPS, SHOWN = 64, 3  # steps of the retraining; test photos shown in the report's viewer
NAMED = 8  # how many of the photos passed over are named


def quickstart(out: Path, photos: Path | None, engine: str) -> dict[str, Any]:
    """Run the main job in the folder `out`; return the closing figures.

    Raises:
        LicError: fewer than four usable photos, or `out` holds a quick start with other photos.
    """
    console = Console(highlight=False)
    console.print(f"[bold]1/4[/] photos: {photos or 'embedded'}")
    parts = split(photos)
    _print_photos(parts, lay_out(parts, out), console)
    record = (RECORDS / f"{GROUP}.json").read_text()
    experiment = _experiment(parts, QuantizerRecord.from_json(record), out)
    _save(experiment, out / "experiment.yaml")
    _save(_control(experiment, out), out / "control.yaml")
    title, _, lmbda = GROUP.replace("tcq", "TCQ-").partition("@")
    console.print(f"[bold]2/4[/] quantize their latents with {title} into a cache, for lambda {lmbda}")
    console.print(f"      {BASE} serves lambda {lmbda} besides its own: one decoder for several rates")
    _put_record(experiment, record)
    for name in (SQ, REFINED):
        shutil.copyfile(RECORDS / f"{name}.json", out / f"{name}.json")
    build(_with_engine(experiment, engine)).require_tolerated()
    console.print("[bold]3/4[/] retrain the decoder on them; beside it a control, on latents as the base knows them")
    with _finetune_alongside(out / "control.yaml", out / "control.log"):
        retrained = finetune(experiment)
    console.print("[bold]4/4[/] real bitstreams of the test photos")
    results = evaluate(experiment)
    page = config.need(experiment.report, "report")
    report([results], page.anchors, page.out, label=page.label, console=Console(quiet=True))
    figures = closing(results, retrained, len(parts.train), console)
    again = f"lic-dist evaluate {out}/experiment.yaml, then lic-dist report {results}"
    for line in (f"The report, pictures side by side: {(page.out / 'report.html').resolve()}", f"Once more: {again}"):
        console.print(line, markup=False, soft_wrap=True)
    return {**figures, "passed_over": parts.passed_over, "out": str(out)}


def _print_photos(parts: Split, cut: list[str], console: Console) -> None:
    train, held_out, test = (len(part) for part in (parts.train, parts.held_out, parts.test))
    console.print(f"      {train} to retrain on, {held_out} held out to choose the weights by, {test} to test")
    for name, reason in list(parts.passed_over.items())[:NAMED]:
        console.print(f"      passed over: {name}: {reason}", markup=False)
    if len(parts.passed_over) > NAMED:
        console.print(f"      and {len(parts.passed_over) - NAMED} more: --json FILE has them all")
    if cut:
        console.print(
            f"      of {counted(len(cut), 'large test photo')} the middle is coded, {cut[0]} for one", markup=False
        )


def _experiment(parts: Split, record: QuantizerRecord, out: Path) -> config.Experiment:
    """Return the content of `experiment.yaml`: the cache, the retraining, the evaluation and its report."""
    variations = min(MOST_VARIATIONS, -(-CROPS // len(parts.train)))
    tested = photo_files.find(out / "test")
    return config.Experiment(
        name="quickstart",
        model=config.Model(checkpoint=BASE),
        images=config.Images(path=out / "photos", crop=CROP, variations=variations, held_out="held_out", tolerate=0.5),
        quantizer=config.Quantizer(
            name="tcq",
            lmbda=record.lmbda,
            states=record.states,
            step=record.step,
            lambda_scale=record.lambda_scale,
            shift=record.shift,
            spread=record.spread if record.level_shifts is None else "fitted",
            group=GROUP,
            **record.notes["settings"],
        ),
        cache=config.Cache(path=str(out / "latents.zarr"), shard=32),
        engine=config.Engine(name="local", searchers=os.cpu_count() or 1),
        finetune=config.Finetune(
            recipe="decoder",
            steps=STEPS,
            batch=8,
            lr=2e-5,
            warmup=10,
            ema=0.95,
            evaluate_every=16,
            out=out / "retrained",
        ),
        evaluate=config.Evaluate(
            images=out / "test",
            checkpoints={
                BASE: (str(out / f"{SQ}.json"), GROUP, str(out / f"{REFINED}.json")),
                str(out / "retrained"): (GROUP,),
                str(out / "control"): (GROUP,),
            },
            show=tuple(tested[len(tested) // 5 :: max(1, len(tested) // SHOWN)]),
            out=out / "evaluation.json",
        ),
        report=config.Report(anchors=(f"base {SQ_ADAPTED}",), out=out / "report"),
    )


def _control(experiment: config.Experiment, out: Path) -> config.Experiment:
    """Return the control's experiment: the same retraining, on straight-through latents."""
    section = config.need(experiment.finetune, "finetune")
    straight = section.model_copy(update={"latents": "straight-through", "out": out / "control"})
    return experiment.model_copy(update={"name": "control", "finetune": straight, "evaluate": None, "report": None})


def _put_record(experiment: config.Experiment, record: str) -> None:
    """Put the record of the base model where `cache adapt` would put one, so that the build uses it."""
    around, key = record_location(experiment_storage(experiment), GROUP)
    around.make()
    around.put(key, record.encode())


def _with_engine(experiment: config.Experiment, engine: str) -> config.Experiment:
    """Return the experiment with one worker of each kind on this engine."""
    section = config.Engine(name=engine, encoders=1, searchers=1, readers=1, num_cpus=3)
    return experiment.model_copy(update={"engine": section})


def _save(experiment: config.Experiment, path: Path) -> None:
    path.write_text(yaml.safe_dump(experiment.model_dump(mode="json", exclude_none=True), sort_keys=False))


@contextmanager
def _finetune_alongside(experiment: Path, log: Path) -> Iterator[None]:
    """Finetune another experiment in a second process while the block runs, each of the two with half of the cores.

    Raises:
        LicError: the second process failed.
    """
    threads = max(1, (os.cpu_count() or 1) // 2)
    before = torch.get_num_threads()
    command = [sys.executable, "-m", "lic_dist", "finetune", str(experiment)]
    with log.open("w") as output:
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
        torch.set_num_threads(threads)
        try:
            yield
            if process.wait():
                raise LicError(f"the control failed: see {log}")
        finally:
            torch.set_num_threads(before)
            process.kill()
            process.wait()
