"""Retrain the decoder side of a model once, from a group of its cache, or from several, the rates of one model; the
encoder stays unchanged.

Whatever latents a job trains on, it is evaluated on really quantized held-out samples: the cache's own integers or,
where means and scales are trained, the integers that the same quantizer chooses with them. The checkpoint carries the
quantizer calibrated for the new weights under the name of the group, since arms are compared each at its own strength
and step, and the record that the cache was made with as `<group>-cached`.

No source of held-out photos loses more than `tolerance` of its L (sources.py, choice.py): where the new quantizer makes
one lose, the cache's is kept with the new weights, and where that does too, the old weights are.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
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
from lic_dist.building.latents import Latents, inputs_of, refined
from lic_dist.building.pilot import calibration_samples, check_record, record_location
from lic_dist.building.refined import aimed_inputs
from lic_dist.cache.folder import Folder
from lic_dist.cache.mixture import Mixture
from lic_dist.cache.trials import Trials
from lic_dist.codec.records import fits
from lic_dist.errors import LicError, UsageError
from lic_dist.models import checkpoint as checkpoints
from lic_dist.models.architectures import adapt
from lic_dist.models.checkpoint import Checkpoint
from lic_dist.models.names import SUFFIX
from lic_dist.models.parts import model_digest, trainable
from lic_dist.models.stages import to_input
from lic_dist.quantization.quantize import Quantizer
from lic_dist.quantization.record import QuantizerRecord
from lic_dist.text import counted
from lic_dist.training.adversary import Adversary
from lic_dist.training.changes import ByPhoto, SourceChange, losers, print_changes, source_changes, told, worst
from lic_dist.training.choice import Choice
from lic_dist.training.decoding import Decoding, Turns, form_of
from lic_dist.training.distortion import Distortion
from lic_dist.training.distributed import Ranks
from lic_dist.training.idempotence import Idempotence
from lic_dist.training.loop import PhasePlan, TrainingLoop
from lic_dist.training.loss import HeldOut, held_out_figures, joined
from lic_dist.training.quantiles import fit_quantiles
from lic_dist.training.samples import Batch, Layout, Samples, make_batch, training_data, turn
from lic_dist.training.sources import HELD_OUT_BATCH, Sources, not_held_out, sources_of_all, trained_elsewhere
from lic_dist.training.states import is_finished

NOT_IDENTITY = {  # of the section; no weight depends on it, or it is named by its digest
    "out", "streams", "workers", "rounds", "keep", "tracking", "snapshot", "cache"
}  # fmt: skip

Records = Mapping[str, QuantizerRecord]  # of each group, by the name under which the result carries it


@dataclass(frozen=True)
class Group:
    """A group of the cache and its record. `section` says how the quantizer is calibrated, and names the group under
    which the result carries it.
    """

    name: str
    record: QuantizerRecord
    section: config.Quantizer


@dataclass(frozen=True)
class Source:
    """What retraining starts from: a model, and groups of its cache, or of several as one."""

    parent: Checkpoint
    cache: Mixture
    groups: tuple[Group, ...]

    @property
    def records(self) -> Records:
        return {one.section.group: one.record for one in self.groups}

    @property
    def identity(self) -> dict[str, Any]:
        """What weights depend on in the stores and their groups."""
        headers = [one.header for one in self.cache.stores]
        found: dict[str, Any] = {"cache": headers[0].digest}
        if len(headers) > 1:
            weighted = zip(self.cache.weights, headers, strict=True)
            found = {"cache": [f"{weight:.15g} of {header.digest[:16]}" for weight, header in weighted]}
        elif headers[0].snapshot:
            found["snapshot"] = headers[0].snapshot
        if len(self.groups) > 1:
            return {**found, "groups": {one.name: one.record.digest for one in self.groups}}
        return {**found, "group": self.groups[0].name, "record": self.groups[0].record.digest}

    def check(self) -> None:
        """Refuse a store of another encoder, and a group of another quantizer or entropy model, or that not all stores
        have alike. Raises LicError, which names the store, and each differing field.
        """
        first = self.cache.stores[0].storage
        for one in self.groups:
            for store in self.cache.stores:
                where = f"{store.storage}/quantized/{one.name}"
                check_cache(store, self.parent, one.name)
                record = QuantizerRecord.from_json(store.record_json(one.name))
                check_record(record, one.section, self.parent, where)
                if record.digest != one.record.digest:
                    around, key = record_location(store.storage, one.name)
                    raise LicError(
                        f"{where} is another quantizer than that of {first}",
                        hint=f"build it with that record: copy {first}/quantized/{one.name}/record.json to "
                        f"{around}/{key} before `lic-dist cache build`",
                    )


def retrain(source: Source, section: config.Finetune, out: Path, ranks: Ranks) -> Path:
    """Retrain, calibrate, save; return the checkpoint's path. A finished job is left as it is.

    Raises:
        LicError: a cache of another encoder, quantizer or entropy model (each differing field is named); a loss that is
            not finite; a rank that died; a disk that refuses a state.
        UsageError: `out` holds the states of a job with other settings, or the cache lacks what the job needs.
    """
    ranks.share(section.batch)  # refuses what does not divide, before anything is read
    parent, cache, groups = source.parent, source.cache, source.groups
    source.check()
    phases = [PhasePlan(trainable(parent.model, one.recipe), one.steps, one.lr) for one in section.each_phase]
    names = {name for phase in phases for name in phase.parameters}
    decoder, prior = parent.codec.prefixes("decoder"), parent.codec.prefixes("prior")
    hyper = any(not name.startswith(decoder) for name in names)
    if hyper and section.adversarial is not None:
        raise UsageError("an adversarial term is of fixed bits: the decoder alone trains", hint="recipe: decoder")
    control = section.latents != "quantized"
    if (control or hyper) and not cache.store_y:
        what = f"latents: {section.latents}" if control else "retraining more than the decoder"
        raise UsageError(f"{what} needs y, which this cache does not keep", hint="build it with cache.store_y: true")

    quantizers = {one.name: Quantizer(one.record) for one in groups}
    size = cache.array(f"quantized/{groups[0].name}/k").shape[2:]
    layout = parent.codec.layout(size[0], size[1])
    training = training_data(cache, quantizers, control or hyper, section, layout)
    identity = {
        **section.identity(NOT_IDENTITY),
        **training.identity,
        **source.identity,
        "parent": model_digest(parent.model),
    }
    path = out / f"checkpoint{SUFFIX}"
    calibrated = {"quantizer": groups[0].section.identity(set())}  # after the training, whose states do not mind
    if is_finished(path, identity | calibrated, ranks):
        if ranks.first:
            print(f"{path}: done already")
        return path
    model: Any = copy.deepcopy(parent.model).to(ranks.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    bf16, means_gradient = section.precision == "bf16", section.means if hyper else "pixels"
    decodings = [
        Decoding(model, one.record, form_of(section, one.record, hyper), bf16, means_gradient, prior_trains=hyper)
        for one in groups
    ]
    turns = Turns(decodings).to(ranks.device)
    again = [Idempotence(section.idempotence or 0, model, one.record, ranks.device) for one in groups]
    distortion = Distortion(section.distortion, cache.array("pixels").shape[-1], ranks.device)
    sources = sources_of_all(cache, groups[0].section.group)
    if ranks.first:
        _warn_of(cache)
    if section.compile:
        adapt(model).nets["g_s"].compile()

    def judge(one: Group) -> Callable[[Any], tuple[Tensor, Tensor, Tensor]]:
        """Return what decodes held-out samples of a group, by their numbers: x, x_hat and bits."""
        decoding = Decoding(model, one.record, bf16=bf16, prior_trains=hyper).to(ranks.device)
        held_out = Samples(cache, {one.name: quantizers[one.name]}, sources.samples, hyper, layout)

        def decode(numbers: Any) -> tuple[Tensor, Tensor, Tensor]:
            batch = held_out.batch(numbers)
            if hyper:
                batch = _requantized(batch, model, quantizers[one.name], layout)
            batch = batch.to(ranks.device)
            return to_input(batch.pixels, ranks.device), *decoding(batch)

        return decode

    judges = [(one.section.group, one.record.lmbda, judge(one)) for one in groups]

    def figures() -> HeldOut:
        parts, names = sources.batches()
        return joined(
            {group: held_out_figures(parts, decode, distortion, lmbda, ranks, names) for group, lmbda, decode in judges}
        )

    def by_photo(checkpoint: Checkpoint, _: Records) -> dict[str, ByPhoto]:
        model.load_state_dict(checkpoint.model.state_dict())
        parts, keys = sources.photo_batches()
        alone = Ranks(0, 1, ranks.device)
        return {
            group: held_out_figures(parts, decode, distortion, lmbda, alone, keys).by_source
            for group, lmbda, decode in judges
        }

    def loss(forward: nn.Module, batch: Batch) -> Tensor:
        x = to_input(batch.pixels, ranks.device)
        x_hat, bits = forward(batch, now)
        error = distortion(x_hat, x) + (adversary.term(x_hat, x) if adversary else 0)
        if section.idempotence:
            error = error + again[now](x_hat, decodings[now].y_hat)
        return groups[now].record.lmbda * error + bits / x[:, 0].numel()

    ranks.wait()  # the first may have read more, or from farther
    before = figures()
    title = f"finetuning on {section.latents} latents"
    adversary = None
    if section.adversarial:  # a weight of 0, the control, needs none
        fastest = max(phase.lr for phase in phases)
        adversary = Adversary(section.adversarial, fastest, section.seed, ranks.device)
    plan = section.model_copy(update={"out": out})
    loop = TrainingLoop(title, plan, phases, turns, model, identity, ranks, adversary=adversary)
    loop.record_start(before, section.tolerance)
    with closing(training.batches(loop.first, ranks)) as batches:
        for step in loop:
            batch, now = next(batches).to(ranks.device), turn(section.seed, step, len(groups))
            loop.train_step(batch.split(loop.parts), loss, lambda: f"samples {batch.sample.tolist()}")  # noqa: B023  # called in this step
            if loop.evaluation_due:
                loop.evaluate(figures)
    if ranks.first:
        made = Checkpoint(copy.deepcopy(parent.model), parent.spec)  # on the CPU, laid out and compiled as parents are
        made.model.load_state_dict(loop.best.weights)
        if any(name.startswith(prior) for name in names):
            fit_quantiles(made.model, with_medians=False)
        kept = is_fixed(groups[0].section) or section.adversarial is not None
        keep_quantizer = not hyper and kept  # with which a decoder alone changes no bit
        finished = Finished(made, identity | calibrated, before, loop.choice, sources, by_photo, keep_quantizer)
        _calibrate_and_save(source, section, finished, path)
    ranks.wait()
    return path


def _requantized(batch: Batch, model: nn.Module, quantizer: Quantizer, layout: Layout) -> Batch:
    """Return the batch with the indices that a quantizer chooses under a model's present means and scales, and refines
    under its present decoder.
    """
    z = batch.z.numpy()
    y = refined(model, batch.pixels.numpy(), batch.y.numpy(), z, quantizer, HELD_OUT_BATCH)
    k = inputs_of(model, y, z, HELD_OUT_BATCH).quantize(quantizer).k
    rows = {"sample": batch.sample, "pixels": batch.pixels, "z": batch.z, "k": torch.from_numpy(k), "y": batch.y}
    names = ("pixels", "z", "k", "y")
    return make_batch(quantizer, names, {name: rows[name].numpy() for name in rows}, (0, 0), layout)


@dataclass(frozen=True)
class Finished:
    """A trained model whose quantizer is not calibrated yet, the job's identity, and what was measured on which
    samples.

    `by_photo` measures weights with the cache's integers; `keep_quantizer`: they stay.
    """

    made: Checkpoint
    identity: dict[str, Any]
    before: HeldOut
    choice: Choice
    sources: Sources
    by_photo: Callable[[Checkpoint, Records], Mapping[str, ByPhoto]]
    keep_quantizer: bool


def _calibrate_and_save(source: Source, section: config.Finetune, finished: Finished, path: Path) -> None:
    """Calibrate the quantizer for the new weights, compare with the parent, and save what harms no source."""
    made, best, sources = finished.made, finished.choice.best, finished.sources
    checkpoints.update_tables(made.model)
    cached, trials_files = source.records, []
    by_photo, pairs = finished.by_photo, {"before": (source.parent, cached)}
    if all(fits(one, made.model) for one in cached.values()):
        pairs["after, the cache's quantizer"] = made, cached
    if source.cache.store_y:
        pilot, held_out = calibration_samples(source.cache, source.groups[0].section)
        header = source.cache.stores[0].header
        batch, crop = header.batch, header.geometry.crop
        if not finished.keep_quantizer:
            anew = {}
            for one in source.groups:
                name = "calibration" if len(source.groups) == 1 else f"calibration-{one.section.group}"
                trials_files.append(Trials(Folder(path.parent), f"{name}.trials"))
                model = checkpoints.at_lambda(made, one.record.lmbda)
                anew[one.section.group] = calibrate(
                    model, one.section, pilot, held_out, batch, warm_start=one.record, trials_file=trials_files[-1]
                )
            pairs["after, calibrated anew"] = made, anew
        distortion = Distortion(section.distortion, crop, torch.device("cpu"))
        parts = _held_out_batches(len(held_out))

        def evaluated(
            checkpoint: Checkpoint, records: Records, samples: Latents, parts: Any, keys: Sequence[Hashable] = ()
        ) -> dict[str, HeldOut]:
            return {
                group: _evaluate_calibrated(checkpoint, record, samples, batch, distortion, parts, keys)
                for group, record in records.items()
            }

        by_group = {name: evaluated(*pair, held_out, parts) for name, pair in pairs.items()}
        rows = {name: joined(found) for name, found in by_group.items()}
        judged = Latents(*source.cache.load(("pixels", "latents/y", "latents/z"), sources.samples).values())

        def quantized(checkpoint: Checkpoint, records: Records) -> dict[str, ByPhoto]:
            found = evaluated(checkpoint, records, judged, *sources.photo_batches())
            return {group: one.by_source for group, one in found.items()}

        by_photo = quantized
    else:
        rows = dict(zip(pairs, (finished.before, best.figures or finished.before), strict=True))
    kept, changes, given_up = _harmless(pairs, by_photo, sources, section.tolerance)
    chosen, records = pairs[kept]
    step, share = (0, 1.0) if kept == "before" else (best.step, best.share)
    outcome = {
        "held_out_before": finished.before.plain(),
        "held_out_best": (best.figures or finished.before).plain(),
        "best_step": step,
        "share": share,
        "refused": finished.choice.refused,
        "given_up": given_up,
        "sources": [asdict(one) for one in changes],
    }
    if source.cache.store_y:
        outcome |= {"calibrated_before": rows["before"].plain(), "calibrated_after": rows[kept].plain()}
    if len(source.groups) > 1 and source.cache.store_y:
        outcome["by_group"] = {
            group: {"before": by_group["before"][group].plain(), "after": by_group[kept][group].plain()}
            for group in cached
        }
    entry = {"what": "finetuning", **finished.identity, **outcome}
    carried = {f"{group}-cached": one.to_json() for group, one in cached.items() if fits(one, chosen.model)}
    carried |= {group: one.to_json() for group, one in records.items()}
    checkpoints.save(Checkpoint(chosen.model, chosen.spec, carried, [*source.parent.history, entry]), path)
    for trials_file in trials_files:
        trials_file.delete()
    _print_figures(rows, step)
    print_changes(changes)
    for refused in finished.choice.refused:
        print(told(refused, section.tolerance))
    for name, lost in given_up.items():
        print(f"'{name}': {worst(lost, section.tolerance)}: kept is '{kept}'.")


def _harmless(
    pairs: dict[str, tuple[Checkpoint, Records]],
    by_photo: Callable[[Checkpoint, Records], Mapping[str, ByPhoto]],
    sources: Sources,
    tolerance: float,
) -> tuple[str, list[SourceChange], dict[str, dict[str, float]]]:
    """Return the last of some models by which no source loses, and its changes; of those passed over, their changes of
    L in percent. By the first, the parent, nothing is lost.
    """
    before, given_up = by_photo(*pairs["before"]), {}
    for name in reversed(pairs):
        after = by_photo(*pairs[name])
        changes = [
            replace(one, source=f"{group} {one.source}") if len(before) > 1 else one
            for group in before
            for one in source_changes(sources, before[group], after[group])
        ]
        if not losers(changes, tolerance):
            break
        given_up[name] = {one.source: one.change.mean for one in changes}
    return name, changes, given_up


def _evaluate_calibrated(
    checkpoint: Checkpoint,
    record: QuantizerRecord,
    samples: Latents,
    batch: int,
    distortion: Distortion,
    parts: Sequence[NDArray[np.int64]],
    sources: Sequence[Hashable] = (),
) -> HeldOut:
    """Quantize samples, refined where the record says so, count bits by the integer tables and decode; return what a
    model and its quantizer cost.
    """
    found = aimed_inputs(checkpoint, record, samples, batch).quantize(Quantizer(record))
    y_hat, bits = torch.from_numpy(found.y_hat), found.bits.sum(axis=1) + z_bits(record, samples.z)

    def decode(numbers: NDArray[np.int64]) -> tuple[Tensor, Tensor, Tensor]:
        x = to_input(torch.from_numpy(samples.pixels[numbers]), torch.device("cpu"))
        return x, checkpoint.codec.synthesise(y_hat[numbers]), torch.tensor(bits[numbers].sum())

    alone = Ranks(0, 1, torch.device("cpu"))
    return held_out_figures(parts, decode, distortion, record.lmbda, alone, sources)


def _held_out_batches(count: int) -> list[NDArray[np.int64]]:
    """Return the numbers of held-out samples in batches."""
    return np.array_split(np.arange(count), -(-count // HELD_OUT_BATCH))


def _warn_of(cache: Mixture) -> None:
    """Warn of folders whose photos train and of which none is held out, and of photos that train and are held out."""
    if (both := trained_elsewhere(cache)) > 0:
        print(f"warning: {counted(both, 'photo')} that one store holds out train in another", file=sys.stderr)
    if folders := [folder for store in cache.stores for folder in not_held_out(store)]:
        named = f"{', '.join(folders[:5])}{' ...' * (len(folders) > 5)}"
        print(f"warning: no photo of {named} is held out: nobody sees what training does to them", file=sys.stderr)


def _print_figures(rows: dict[str, HeldOut], step: int) -> None:
    """Print a table of figures, all over the same held-out crops."""
    table = Table(title=f"held-out crops; best weights at step {step}")
    for column in ("", "bpp", "PSNR dB", "L", "change of L"):
        table.add_column(column, justify="right" if column else "left")
    before = rows["before"]
    for name, one in rows.items():
        change = "" if one is before else f"{100 * (one.L / before.L - 1):+.2f} %"
        table.add_row(name, f"{one.bpp:.4f}", f"{one.psnr:.3f}", f"{one.L:.4f}", change)
    Console().print(table)
