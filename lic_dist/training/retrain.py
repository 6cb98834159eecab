"""Retrain the decoder side of a model once, from a group of its cache, or from several, the rates of one model; the
encoder stays unchanged.

Whatever latents a job trains on, it is evaluated on really quantized held-out samples: the cache's own integers or,
where means and scales are trained, the integers that the same quantizer chooses with them. The checkpoint carries the
quantizer calibrated for the new weights under the name of the group, since arms are compared each at its own strength
and step, and the record that the cache was made with as `<group>-cached`.

No source of held-out photos loses more than `tolerance` of its L (sources.py, choice.py): where the new quantizer makes
one lose, the cache's is kept with the new weights, and where that does too, the old weights are.

What trains is the parent's weights, or what trainee.py puts in their place. What is judged, calibrated and saved is the
model that comes of it; of adapters, the pack that makes it of its parent lies beside the checkpoint.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lic_dist import config
from lic_dist.building.calibrate import is_fixed
from lic_dist.building.latents import inputs_of, refined
from lic_dist.cache.mixture import Mixture
from lic_dist.errors import UsageError
from lic_dist.models.architectures import adapt
from lic_dist.models.checkpoint import Checkpoint
from lic_dist.models.names import SUFFIX
from lic_dist.models.parts import model_digest
from lic_dist.models.stages import to_input
from lic_dist.quantization.quantize import Quantizer
from lic_dist.text import counted
from lic_dist.training.adversary import Adversary
from lic_dist.training.changes import ByPhoto
from lic_dist.training.decoding import Decoding, Turns, form_of
from lic_dist.training.distortion import Distortion
from lic_dist.training.distributed import Ranks
from lic_dist.training.finish import Finished, calibrate_and_save
from lic_dist.training.idempotence import Idempotence
from lic_dist.training.loop import PhasePlan, TrainingLoop
from lic_dist.training.loss import HeldOut, held_out_figures, joined
from lic_dist.training.parent import Group, Records, Source
from lic_dist.training.quantiles import fit_quantiles
from lic_dist.training.samples import Batch, Layout, Samples, make_batch, training_data, turn
from lic_dist.training.sources import HELD_OUT_BATCH, not_held_out, sources_of_all, trained_elsewhere
from lic_dist.training.states import is_finished
from lic_dist.training.trainee import trainee_of

NOT_IDENTITY = {  # of the section; no weight depends on it, or it is named by its digest
    "out", "streams", "workers", "rounds", "keep", "tracking", "snapshot", "cache"
}  # fmt: skip


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
    trainee = trainee_of(source, section)
    phases = [PhasePlan(trainee.parameters(one.recipe), one.steps, one.lr) for one in section.each_phase]
    names = {name for phase in phases for name in phase.parameters}
    decoder, prior = parent.codec.prefixes("decoder"), parent.codec.prefixes("prior")
    hyper = any(not name.startswith(decoder) for name in names)
    if hyper and section.adversarial is not None:
        raise UsageError("an adversarial term is of fixed bits: the decoder alone trains", hint="recipe: decoder")
    if hyper and any(one.record.kind.embedded for one in groups):
        raise UsageError("cut bit planes are of fixed bits: the decoder alone trains", hint="recipe: decoder")
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
    source = trainee.begin(layout, out, ranks)
    parent, model = source.parent, trainee.model.to(memory_format=torch.channels_last)
    bf16, means_gradient = section.precision == "bf16", section.means if hyper else "pixels"
    decodings = [
        Decoding(model, one.record, form_of(section, one.record, hyper), bf16, means_gradient, prior_trains=hyper)
        for one in groups
    ]
    turns = Turns(decodings).to(ranks.device)
    module = trainee.module(turns)
    weight = section.idempotence  # 0, the control, needs no term
    again = [Idempotence(weight, model, one.record, ranks.device) for one in groups] if weight else []
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
        if loop.phase < len(trainee.layers):
            return forward(batch, now, loop.phase)
        x = to_input(batch.pixels, ranks.device)
        x_hat, bits = forward(batch, now)
        error = distortion(x_hat, x) + (adversary.term(x_hat, x) if adversary else 0)
        if again:
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
    loop = TrainingLoop(title, plan, [*trainee.layers, *phases], module, model, identity, ranks, adversary=adversary)
    loop.record_start(before, section.tolerance)
    with closing(training.batches(loop.first, ranks)) as batches:
        for step in loop:
            batch, now = next(batches).to(ranks.device), turn(section.seed, step, len(groups))
            loop.train_step(batch.split(loop.parts), loss, lambda: f"samples {batch.sample.tolist()}")  # noqa: B023  # called in this step
            if loop.evaluation_due:
                loop.evaluate(figures)
    weights, pack = trainee.finish(loop.best.weights)
    if ranks.first:
        made = Checkpoint(copy.deepcopy(parent.model), parent.spec)  # on the CPU, laid out and compiled as parents are
        made.model.load_state_dict(weights)
        if any(name.startswith(prior) for name in names):
            fit_quantiles(made.model, with_medians=False)
        kept = is_fixed(groups[0].section) or section.adversarial is not None
        keep_quantizer = not hyper and kept  # with which a decoder alone changes no bit
        finished = Finished(made, identity | calibrated, before, loop.choice, sources, by_photo, keep_quantizer, pack)
        calibrate_and_save(source, section, finished, path)
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


def _warn_of(cache: Mixture) -> None:
    """Warn of folders whose photos train and of which none is held out, and of photos that train and are held out."""
    if (both := trained_elsewhere(cache)) > 0:
        print(f"warning: {counted(both, 'photo')} that one store holds out train in another", file=sys.stderr)
    if folders := [folder for store in cache.stores for folder in not_held_out(store)]:
        named = f"{', '.join(folders[:5])}{' ...' * (len(folders) > 5)}"
        print(f"warning: no photo of {named} is held out: nobody sees what training does to them", file=sys.stderr)
