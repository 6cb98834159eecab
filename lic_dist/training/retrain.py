"""One retraining: the decoder side of a model, from one group of its cache; the encoder stays as it is.

What is judged, for whatever a job trains on, are the really quantized held-out samples of the cache. The checkpoint
carries the quantizer calibrated for the new weights under the name of the group (METHOD.md section 3: every arm at its
own (g, D)), and the record that the cache was made with as `<group>-cached`.
"""

from __future__ import annotations

import copy
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from lic_dist import config
from lic_dist.building.calibrate import Measured, calibrate, measure
from lic_dist.building.job import check_cache
from lic_dist.building.latents import view
from lic_dist.building.pilot import calibration_samples, check_record
from lic_dist.building.records import fits
from lic_dist.cache.reader import LatentCache
from lic_dist.errors import UsageError
from lic_dist.models import checkpoint as checkpoints
from lic_dist.models.checkpoint import Checkpoint
from lic_dist.models.parts import PARTS, trainable
from lic_dist.models.stages import to_input
from lic_dist.quantization.quantize import Quantizer
from lic_dist.quantization.record import QuantizerRecord
from lic_dist.training.course import Best, Course, Trained
from lic_dist.training.decoding import Decoding, form_of
from lic_dist.training.distortion import Distortion
from lic_dist.training.distributed import Ranks
from lic_dist.training.loss import Figures, held_out_figures, psnr
from lic_dist.training.quantiles import train_quantiles
from lic_dist.training.samples import Batch, Samples, training_samples

HELD_OUT_MOST, HELD_OUT_BATCH = 64, 8  # L is measured on the first held-out samples, in batches of this size
QUANTILE_STEPS = 2000
NOT_IDENTITY = {"out", "streams", "workers", "rounds", "keep", "tensorboard"}  # of the section; no weight depends on it


@dataclass(frozen=True)
class Source:
    """What a retraining starts from: a model, and a group of its cache.

    `section` says how the quantizer is calibrated, `name` under which name the result carries it.
    """

    parent: Checkpoint
    cache: LatentCache
    group: str
    name: str
    section: config.Quantizer

    @property
    def record(self) -> QuantizerRecord:
        return QuantizerRecord.from_json(self.cache.record_json(self.group))


def retrain(source: Source, section: config.Finetune, out: Path, here: Ranks) -> Path:
    """Retrain, calibrate, save; returns the checkpoint's path. A job that is finished is left as it is.

    Raises:
        LicError: a cache of another encoder, quantizer or entropy model (each differing field is named); a loss that is
            not finite; a rank that died; a disk that refuses a state.
        UsageError: `out` holds the states of a job with other settings, or the cache lacks what the job needs.
    """
    parent, cache, record = source.parent, source.cache, source.record
    check_cache(cache, parent, source.group)
    check_record(record, source.section, parent, f"{cache.place}/quantized/{source.group}")
    phases = [Trained(trainable(parent.model, one.recipe), one.steps, one.lr) for one in section.course]
    names = {name for phase in phases for name in phase.parameters}
    hyper = any(not name.startswith(PARTS["decoder"]) for name in names)
    control = section.latents != "quantized"
    if (control or hyper) and not cache.header.store_y:
        what = f"latents: {section.latents}" if control else "retraining more than the decoder"
        raise UsageError(f"{what} needs y, which this cache does not keep", hint="build it with cache.store_y: true")

    quantizer = Quantizer(record)
    training = training_samples(cache, source.group, quantizer, control, section)
    identity = {
        **section.model_dump(mode="json", exclude=NOT_IDENTITY),
        **training.identity,
        "group": source.group,
        "record": record.digest,
        "cache": cache.fingerprint,
        "parent": checkpoints.digest(parent.model.state_dict()),
    }
    path = out / f"checkpoint{checkpoints.SUFFIX}"
    if _is_made(path, identity):
        here.wait()
        return path
    model: Any = copy.deepcopy(parent.model).to(here.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    decoding = Decoding(model, record, form_of(section, record, hyper), section.precision == "bf16").to(here.device)
    judged = Decoding(model, record, bf16=section.precision == "bf16").to(here.device)
    distortion = Distortion(section.distortion, cache.array("pixels").shape[-1], here.device)
    held_out = Samples(cache, source.group, quantizer, cache.indices(held_out=True)[:HELD_OUT_MOST], with_y=False)
    parts = np.array_split(np.arange(len(held_out)), -(-len(held_out) // HELD_OUT_BATCH))
    if section.compile:
        model.g_s.compile()

    def decode(numbers: Any) -> tuple[Tensor, Tensor, Tensor]:
        batch = held_out.batch(numbers).to(here.device)
        return to_input(batch.pixels, here.device), *judged(batch)

    def figures() -> Figures:
        return held_out_figures(parts, decode, distortion, parent.spec.lmbda, here)

    def loss(forward: nn.Module, batch: Batch) -> Tensor:
        x = to_input(batch.pixels, here.device)
        x_hat, bits = forward(batch)
        return parent.spec.lmbda * distortion(x_hat, x) + bits / x[:, 0].numel()

    before = figures()
    title = f"finetuning on {section.latents} latents"
    course = Course(title, section.model_copy(update={"out": out}), phases, decoding, model, identity, here)
    course.note_start(before)
    with closing(training.batches(course.first, here)) as batches:
        for _ in course:
            batch = next(batches).to(here.device)
            course.take(batch.split(section.accumulate), loss, lambda: f"samples {batch.sample.tolist()}")  # noqa: B023
            if course.due:
                course.judge(figures)
    if here.first:
        made = Checkpoint(copy.deepcopy(parent.model), parent.spec)  # on the CPU, laid out and compiled as parents are
        made.model.load_state_dict(course.best.weights)
        if any(name.startswith(PARTS["prior"]) for name in names):
            train_quantiles(made.model, QUANTILE_STEPS, with_medians=False)
        _finish(source, made, identity, before, course.best, path)
    here.wait()
    return path


def _is_made(path: Path, identity: dict[str, Any]) -> bool:
    """Whether a checkpoint is this very job's result."""
    if not path.is_file():
        return False
    last = (checkpoints.read(path).get("history") or [{}])[-1]
    return all(last.get(key) == value for key, value in identity.items())


def _finish(
    source: Source, made: Checkpoint, identity: dict[str, Any], before: Figures, best: Best, path: Path
) -> None:
    """Calibrate the quantizer for the new weights, compare with the parent, write the checkpoint."""
    checkpoints.update_tables(made.model)
    cached = source.record
    outcome: dict[str, Any] = {}
    carried = {**source.parent.quantizers, f"{source.name}-cached": cached.to_json()}
    made.quantizers = {
        name: text for name, text in carried.items() if fits(QuantizerRecord.from_json(text), made.model)
    }
    rows = [("cached indices, before", before), ("cached indices, after", best.figures or before)]
    if source.cache.header.store_y:
        record, compared = _calibrated(source, made)
        made.quantizers[source.name] = record.to_json()
        outcome = {name: asdict(one) for name, one in compared.items()}
        rows += [(name.replace("_", ", "), one) for name, one in compared.items()]
    else:
        made.quantizers[source.name] = cached.to_json()
    outcome |= {"held_out_before": asdict(before), "held_out_best": asdict(rows[1][1]), "best_step": best.step}
    made.history = [*source.parent.history, {"what": "finetuning", **identity, **outcome}]
    checkpoints.save(made, path)
    _show(rows, best.step)


def _calibrated(source: Source, made: Checkpoint) -> tuple[QuantizerRecord, dict[str, Figures]]:
    """The quantizer at the new model's own (g, D), and both models on the held-out crops, each with its own record."""
    pilot, held_out = calibration_samples(source.cache, source.section)
    record = calibrate(made, source.section, pilot, held_out, batch=source.cache.header.batch)

    def measured(checkpoint: Checkpoint, one: QuantizerRecord) -> Figures:
        seen = view(checkpoint.model, held_out.y, held_out.z, source.cache.header.batch)
        found: Measured = measure(checkpoint, one, held_out, seen)
        return Figures(float(found.L), float(found.bpp), psnr(float(found.mse)))

    before, after = measured(source.parent, source.record), measured(made, record)
    return record, {"calibrated_before": before, "calibrated_after": after}


def _show(rows: list[tuple[str, Figures]], step: int) -> None:
    table = Table(title=f"held-out crops; best weights at step {step}")
    for column in ("", "bpp", "PSNR dB", "L", "change of L"):
        table.add_column(column, justify="right" if column else "left")
    for (_, before), pair in zip(rows[::2], zip(rows[::2], rows[1::2], strict=True), strict=True):
        for name, one in pair:
            change = "" if one is before else f"{100 * (one.L / before.L - 1):+.2f} %"
            table.add_row(name, f"{one.bpp:.4f}", f"{one.psnr:.3f}", f"{one.L:.4f}", change)
    Console().print(table)
