"""Retrain the decoder side of a model once, from one group of its cache; the encoder stays unchanged.

Whatever latents a job trains on, it is evaluated on really quantized held-out samples: the cache's own integers or,
where means and scales are trained, the integers that the same quantizer chooses with them. The checkpoint carries the
quantizer calibrated for the new weights under the name of the group, since arms are compared each at its own strength
and step, and the record that the cache was made with as `<group>-cached`.
"""

from __future__ import annotations

import copy
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from lic_dist import config
from lic_dist.building.calibrate import calibrate, is_fixed, z_bits
from lic_dist.building.job import check_cache
from lic_dist.building.latents import Latents, inputs_of
from lic_dist.building.pilot import calibration_samples, check_record
from lic_dist.cache.folder import Folder
from lic_dist.cache.reader import LatentCache
from lic_dist.cache.trials import Trials
from lic_dist.codec.records import fits
from lic_dist.errors import UsageError
from lic_dist.models import checkpoint as checkpoints
from lic_dist.models.architectures import adapt
from lic_dist.models.checkpoint import Checkpoint
from lic_dist.models.names import SUFFIX
from lic_dist.models.parts import model_digest, trainable
from lic_dist.models.stages import to_input
from lic_dist.quantization.quantize import Quantizer
from lic_dist.quantization.record import QuantizerRecord
from lic_dist.training.decoding import Decoding, form_of
from lic_dist.training.distortion import Distortion
from lic_dist.training.distributed import Ranks
from lic_dist.training.loop import BestWeights, PhasePlan, TrainingLoop
from lic_dist.training.loss import HeldOut, held_out_figures
from lic_dist.training.quantiles import train_quantiles
from lic_dist.training.samples import Batch, Layout, Samples, make_batch, training_data
from lic_dist.training.states import is_finished

HELD_OUT_MOST, HELD_OUT_BATCH = 64, 8  # L is measured on the first held-out samples, in batches of this size
QUANTILE_STEPS = 2000
NOT_IDENTITY = {"out", "streams", "workers", "rounds", "keep", "tensorboard"}  # of the section; no weight depends on it


@dataclass(frozen=True)
class Source:
    """What retraining starts from: a model, and a group of its cache.

    `section` says how the quantizer is calibrated, and names the group under which the result carries it.
    """

    parent: Checkpoint
    cache: LatentCache
    group: str
    section: config.Quantizer

    @property
    def record(self) -> QuantizerRecord:
        return QuantizerRecord.from_json(self.cache.record_json(self.group))


def retrain(source: Source, section: config.Finetune, out: Path, ranks: Ranks) -> Path:
    """Retrain, calibrate, save; return the checkpoint's path. A finished job is left as it is.

    Raises:
        LicError: a cache of another encoder, quantizer or entropy model (each differing field is named); a loss that is
            not finite; a rank that died; a disk that refuses a state.
        UsageError: `out` holds the states of a job with other settings, or the cache lacks what the job needs.
    """
    ranks.share(section.batch)  # refuses what does not divide, before anything is read
    parent, cache, record = source.parent, source.cache, source.record
    check_cache(cache, parent, source.group)
    check_record(record, source.section, parent, f"{cache.storage}/quantized/{source.group}")
    phases = [PhasePlan(trainable(parent.model, one.recipe), one.steps, one.lr) for one in section.each_phase]
    names = {name for phase in phases for name in phase.parameters}
    hyper = any(not name.startswith(parent.codec.prefixes("decoder")) for name in names)
    control = section.latents != "quantized"
    if (control or hyper) and not cache.header.store_y:
        what = f"latents: {section.latents}" if control else "retraining more than the decoder"
        raise UsageError(f"{what} needs y, which this cache does not keep", hint="build it with cache.store_y: true")

    quantizer = Quantizer(record)
    size = cache.array(f"quantized/{source.group}/k").shape[2:]
    layout = parent.codec.layout(size[0], size[1])
    training = training_data(cache, source.group, quantizer, control or hyper, section, layout)
    identity = {
        **section.identity(NOT_IDENTITY),
        **training.identity,
        "group": source.group,
        "record": record.digest,
        "cache": cache.fingerprint,
        "parent": model_digest(parent.model),
    }
    path = out / f"checkpoint{SUFFIX}"
    calibrated = {"quantizer": source.section.identity(set())}  # after the training, whose states do not mind
    if is_finished(path, identity | calibrated, ranks):
        if ranks.first:
            print(f"{path}: done already")
        return path
    model: Any = copy.deepcopy(parent.model).to(ranks.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    bf16, means_gradient = section.precision == "bf16", section.means if hyper else "pixels"
    form = form_of(section, record, hyper)
    decoding = Decoding(model, record, form, bf16, means_gradient, prior_trains=hyper).to(ranks.device)
    judged = Decoding(model, record, bf16=bf16, prior_trains=hyper).to(ranks.device)
    distortion = Distortion(section.distortion, cache.array("pixels").shape[-1], ranks.device)
    chosen = cache.indices(held_out=True)[:HELD_OUT_MOST]
    held_out = Samples(cache, source.group, quantizer, chosen, hyper, layout)
    parts = _held_out_batches(len(held_out))
    if section.compile:
        adapt(model).nets["g_s"].compile()

    def decode(numbers: Any) -> tuple[Tensor, Tensor, Tensor]:
        batch = held_out.batch(numbers)
        if hyper:
            batch = _requantized(batch, model, quantizer, layout)
        batch = batch.to(ranks.device)
        return to_input(batch.pixels, ranks.device), *judged(batch)

    def figures() -> HeldOut:
        return held_out_figures(parts, decode, distortion, parent.spec.lmbda, ranks)

    def loss(forward: nn.Module, batch: Batch) -> Tensor:
        x = to_input(batch.pixels, ranks.device)
        x_hat, bits = forward(batch)
        return parent.spec.lmbda * distortion(x_hat, x) + bits / x[:, 0].numel()

    ranks.wait()  # the first may have read more, or from farther
    before = figures()
    title = f"finetuning on {section.latents} latents"
    loop = TrainingLoop(title, section.model_copy(update={"out": out}), phases, decoding, model, identity, ranks)
    loop.record_start(before)
    with closing(training.batches(loop.first, ranks)) as batches:
        for _ in loop:
            batch = next(batches).to(ranks.device)
            loop.train_step(batch.split(section.accumulate), loss, lambda: f"samples {batch.sample.tolist()}")  # noqa: B023
            if loop.evaluation_due:
                loop.evaluate(figures)
    if ranks.first:
        made = Checkpoint(copy.deepcopy(parent.model), parent.spec)  # on the CPU, laid out and compiled as parents are
        made.model.load_state_dict(loop.best.weights)
        if any(name.startswith(parent.codec.prefixes("prior")) for name in names):
            train_quantiles(made.model, QUANTILE_STEPS, with_medians=False)
        keep_quantizer = not hyper and is_fixed(source.section)  # of a fixed quantizer a decoder alone changes no bit
        _calibrate_and_save(
            source, made, identity | calibrated, before, loop.best, section.distortion, path, keep_quantizer
        )
    ranks.wait()
    return path


def _requantized(batch: Batch, model: nn.Module, quantizer: Quantizer, layout: Layout) -> Batch:
    """Return the batch with the indices that a quantizer chooses under a model's present means and scales."""
    k = inputs_of(model, batch.y.numpy(), batch.z.numpy(), HELD_OUT_BATCH).quantize(quantizer).k
    rows = {"sample": batch.sample, "pixels": batch.pixels, "z": batch.z, "k": torch.from_numpy(k), "y": batch.y}
    names = ("pixels", "z", "k", "y")
    return make_batch(quantizer, names, {name: rows[name].numpy() for name in rows}, (0, 0), layout)


def _calibrate_and_save(
    source: Source,
    made: Checkpoint,
    identity: dict[str, Any],
    before: HeldOut,
    best: BestWeights,
    weights: Any,
    path: Path,
    keep_quantizer: bool,
) -> None:
    """Calibrate the quantizer for the new weights (unless `keep_quantizer`), compare with the parent, and save."""
    checkpoints.update_tables(made.model)
    cached = source.record
    outcome: dict[str, Any] = {"held_out_before": asdict(before), "held_out_best": asdict(best.figures or before)}
    if fits(cached, made.model):
        made.quantizers[f"{source.section.group}-cached"] = cached.to_json()
    rows = [("before", before), ("after, the cache's quantizer", best.figures or before)]
    record, kept = cached, Trials(Folder(path.parent), "calibration.trials")
    if source.cache.header.store_y:
        pilot, held_out = calibration_samples(source.cache, source.section)
        batch = source.cache.header.batch
        if not keep_quantizer:
            record = calibrate(made, source.section, pilot, held_out, batch, warm_start=cached, trials_file=kept)
        pairs = {"before": (source.parent, cached), "after, the cache's quantizer": (made, cached)}
        if not fits(cached, made.model):
            del pairs["after, the cache's quantizer"]
        if not keep_quantizer:
            pairs["after, calibrated anew"] = made, record
        distortion = Distortion(weights, source.cache.array("pixels").shape[-1], torch.device("cpu"))
        rows = [(name, _evaluate_calibrated(*pair, held_out, batch, distortion)) for name, pair in pairs.items()]
        outcome |= {"calibrated_before": asdict(rows[0][1]), "calibrated_after": asdict(rows[-1][1])}
    made.quantizers[source.section.group] = record.to_json()
    made.history = [*source.parent.history, {"what": "finetuning", **identity, **outcome, "best_step": best.step}]
    checkpoints.save(made, path)
    kept.delete()
    _print_figures(rows, best.step)


def _evaluate_calibrated(
    checkpoint: Checkpoint, record: QuantizerRecord, samples: Latents, batch: int, distortion: Distortion
) -> HeldOut:
    """Quantize samples, count bits by the integer tables and decode; return what a model and its quantizer cost."""
    found = inputs_of(checkpoint.model, samples.y, samples.z, batch).quantize(Quantizer(record))
    y_hat, bits = torch.from_numpy(found.y_hat), found.bits.sum(axis=1) + z_bits(record, samples.z)

    def decode(numbers: NDArray[np.int64]) -> tuple[Tensor, Tensor, Tensor]:
        x = to_input(torch.from_numpy(samples.pixels[numbers]), torch.device("cpu"))
        return x, checkpoint.codec.synthesise(y_hat[numbers]), torch.tensor(bits[numbers].sum())

    parts = _held_out_batches(len(samples))
    return held_out_figures(parts, decode, distortion, checkpoint.spec.lmbda, Ranks(0, 1, torch.device("cpu")))


def _held_out_batches(count: int) -> list[NDArray[np.int64]]:
    """Return the numbers of held-out samples in batches."""
    return np.array_split(np.arange(count), -(-count // HELD_OUT_BATCH))


def _print_figures(rows: list[tuple[str, HeldOut]], step: int) -> None:
    """Print a table of figures, all over the same held-out crops."""
    table = Table(title=f"held-out crops; best weights at step {step}")
    for column in ("", "bpp", "PSNR dB", "L", "change of L"):
        table.add_column(column, justify="right" if column else "left")
    before = rows[0][1]
    for name, one in rows:
        change = "" if one is before else f"{100 * (one.L / before.L - 1):+.2f} %"
        table.add_row(name, f"{one.bpp:.4f}", f"{one.psnr:.3f}", f"{one.L:.4f}", change)
    Console().print(table)
