"""Finetuning: retrain the decoder side on cached, really quantized latents; the encoder stays as it is.

    lic-dist finetune CONFIG
    torchrun --nproc-per-node=8 -m lic_dist finetune CONFIG

Recipe `decoder` trains g_s on the mean squared error: the bits are the parent's. `decoder+hyper` trains h_s too, on
lmbda * 255^2 * MSE + bpp with k fixed: y_hat = means + level(k) moves with the means (METHOD.md section 3).
`latents: noise` is the control: the same samples, steps and frozen encoder, with y + uniform noise for y_hat. Whatever
it trains on, a job is judged on the really quantized held-out latents.
"""

from __future__ import annotations

import copy
from contextlib import ExitStack, closing
from dataclasses import astuple, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lic_dist import config
from lic_dist.building.calibrate import calibrate
from lic_dist.building.job import check_cache, load_parent, open_cache
from lic_dist.building.pilot import calibration_samples
from lic_dist.errors import UsageError
from lic_dist.models import checkpoint as checkpoints
from lic_dist.models.checkpoint import Checkpoint
from lic_dist.models.parts import RECIPES, freeze_all_but
from lic_dist.models.stages import Stage, dequantize_z, run_stages, to_input
from lic_dist.quantization.quantize import Quantizer
from lic_dist.quantization.record import QuantizerRecord
from lic_dist.training.distributed import Ranks, ranks
from lic_dist.training.loop import Course
from lic_dist.training.loss import Figures, bits_of, combine, figures_of
from lic_dist.training.rate import IndexRate
from lic_dist.training.samples import Batch, Samples, training_samples

HELD_OUT_MOST = 64  # L is measured on the first held-out samples


class Decoding(nn.Module):
    """The trained part's forward: from cached z and latents to the picture and the bits of y.

    form: `quantized` (y_hat = means + level(k), index rate), `likelihood` (SQ while h_s trains: the rate is the
    Gaussian's of the fixed y_hat, METHOD.md section 3), or `noise`.
    """

    def __init__(self, model: nn.Module, parent_h_s: nn.Module, rate: IndexRate, form: str) -> None:
        super().__init__()
        self.model, self.rate, self.form = model, rate, form
        self.parent = [parent_h_s]  # in a list: no part of what trains or synchronizes

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """-> (x_hat float32 [b, 3, s, s], bits of y in the batch)."""
        model: Any = self.model
        device = batch.pixels.device
        z_hat = dequantize_z(model, batch.z)
        bits = torch.zeros((), device=device)

        def serve(stage: Stage) -> Tensor:
            nonlocal bits
            if self.form == "noise":
                y_hat = batch.y.float() + torch.empty_like(stage.means).uniform_(-0.5, 0.5)
                bits = bits + _gaussian_bits(model, y_hat, stage.means, stage.scales)
                return y_hat
            if self.form == "likelihood":
                with torch.no_grad():
                    fixed = self.parent[0](z_hat)
                    old_means = fixed.chunk(2, 1)[1] if fixed.shape[1] > batch.k.shape[1] else stage.means
                bits = bits + _gaussian_bits(model, old_means + batch.level, stage.means, stage.scales)
            else:
                scales = model.gaussian_conditional.lower_bound_scale(stage.scales)  # lets sigma grow out of the bound
                bits = bits + self.rate(scales, batch.k, batch.quantizer).sum()
            return stage.means + batch.level

        y_hat = run_stages(model, z_hat, serve)
        return model.g_s(y_hat), bits


def _gaussian_bits(model: Any, y_hat: Tensor, means: Tensor, scales: Tensor) -> Tensor:
    gaussian = model.gaussian_conditional
    return bits_of(gaussian.likelihood_lower_bound(gaussian._likelihood(y_hat, scales, means)))


@torch.no_grad()
def held_out_figures(decoding: Decoding, samples: Samples, lmbda: float, device: torch.device) -> Figures:
    """L, bpp of y and PSNR of the held-out samples, with the cached indices, whatever the job trains on."""
    judge = Decoding(decoding.model, decoding.parent[0], decoding.rate, "quantized").eval()
    squared = bits = 0.0
    pixels = 0
    for first in range(0, len(samples), 8):
        batch = _on(samples.batch(np.arange(first, min(first + 8, len(samples)))), device)
        x = to_input(batch.pixels, device)
        x_hat, part = judge(batch)
        squared += float((x_hat.clamp(0, 1) - x).double().square().sum())
        bits += float(part)
        pixels += x[:, 0].numel()
    mse = squared / (3 * pixels)
    return figures_of(lmbda, mse, bits / pixels)


def finetune(experiment: config.Experiment) -> Path:
    """Finetune a base model on its cache; returns the path of the checkpoint it wrote.

    Raises:
        LicError: no such cache, a cache of another encoder, quantizer or entropy model (each differing field is
            named), a loss that is not finite.
        UsageError: `out` holds the state of a job with other settings, or the cache lacks what the job needs.
    """
    with ranks() as here, ExitStack() as stack:
        return _finetune(experiment, here, stack)


def _finetune(experiment: config.Experiment, here: Ranks, stack: ExitStack) -> Path:
    section = config.need(experiment.finetune, "finetune")
    quantizer_section = config.need(experiment.quantizer, "quantizer")
    parent = load_parent(experiment)
    cache = open_cache(experiment)
    group = quantizer_section.group
    check_cache(cache, parent, group)
    record = QuantizerRecord.from_json(cache.record_json(group))
    noise = section.latents == "noise"
    if (noise or section.recipe != "decoder") and not cache.header.store_y:
        what = "latents: noise" if noise else f"recipe {section.recipe}"
        raise UsageError(f"{what} needs y, which this cache does not keep", hint="build it with cache.store_y: true")

    quantizer = Quantizer(record)
    training = training_samples(cache, group, quantizer, noise, section)
    held_out = Samples(cache, group, quantizer, cache.indices(held_out=True)[:HELD_OUT_MOST], with_y=False)
    identity = {
        **section.model_dump(mode="json", exclude={"out", "streams", "workers"}),
        **training.identity,
        "group": group,
        "record": record.digest,
        "cache": cache.fingerprint,
        "parent": checkpoints.digest(parent.model.state_dict()),
    }
    model = parent.model.to(here.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    parent_h_s = copy.deepcopy(model.h_s).requires_grad_(False)
    rate = IndexRate(record).to(here.device)
    decoding = Decoding(model, parent_h_s, rate, _form(section, record))
    before = best = held_out_figures(decoding, held_out, parent.spec.lmbda, here.device)
    best_step, best_weights = 0, copy.deepcopy(model.state_dict())
    trained = freeze_all_but(model, RECIPES[section.recipe])
    title = f"finetuning {section.recipe} on {section.latents} latents"
    course = Course(title, section, 1.0, model, trained, identity, here)
    course.note_start(before)
    if course.state is not None:
        best, best_step = Figures(*course.state["best"]), int(course.state["best_step"])
        best_weights = course.state["best_weights"]
    wrapped = here.wrap(decoding)
    batches = stack.enter_context(closing(training.batches(course.first, here)))
    for _ in course:
        batch = _on(next(batches), here.device)
        x = to_input(batch.pixels, here.device)
        x_hat, bits = wrapped(batch)
        mse, bpp = (x_hat - x).square().mean(), bits / x[:, 0].numel()
        course.take(combine(parent.spec.lmbda, mse, bpp if section.recipe != "decoder" else bpp.detach()))
        if course.due:
            figures = held_out_figures(decoding, held_out, parent.spec.lmbda, here.device)
            if figures.L < best.L:
                best, best_step, best_weights = figures, course.done, copy.deepcopy(model.state_dict())
            course.save(figures, best=list(astuple(best)), best_step=best_step, best_weights=best_weights)

    model.load_state_dict(best_weights)
    path = section.out / f"checkpoint{checkpoints.SUFFIX}"
    if here.first:
        made = Checkpoint(model.cpu().eval(), parent.spec, dict(parent.quantizers))
        if section.recipe != "decoder":  # the entropy model moved: its indices want rates and (g, D) of their own
            checkpoints.update_tables(model)
            record = calibrate(made, quantizer_section, *calibration_samples(cache, quantizer_section))
        made.quantizers[group] = record.to_json()
        outcome = {
            "held_out_before": list(astuple(before)),
            "held_out_best": list(astuple(best)),
            "best_step": best_step,
        }
        made.history = [*parent.history, {"what": "finetuning", **identity, **outcome}]
        checkpoints.save(made, path)
        print(
            f"held-out samples: L {before.L:.4f} -> {best.L:.4f}, PSNR {before.psnr:.3f} -> {best.psnr:.3f} dB, "
            f"bpp of y {before.bpp:.4f} -> {best.bpp:.4f} (best at step {best_step} of {section.steps})"
        )
    here.wait()
    return path


def _form(section: config.Finetune, record: QuantizerRecord) -> str:
    if section.latents == "noise":
        return "noise"
    unit_sq = record.name == "sq" and record.step == 1  # the cells of CompressAI's likelihood
    return "likelihood" if unit_sq and section.recipe != "decoder" and section.sq_rate == "likelihood" else "quantized"


def _on(batch: Batch, device: torch.device) -> Batch:
    if device.type == "cpu":
        return batch
    moved = {name: getattr(batch, name).to(device, non_blocking=True) for name in batch.__dataclass_fields__}
    return replace(batch, **moved)
