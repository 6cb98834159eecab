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
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lic_dist import config
from lic_dist.building.build import calibration_samples, check_cache
from lic_dist.building.calibrate import calibrate
from lic_dist.cache.reader import LatentCache
from lic_dist.errors import UsageError
from lic_dist.models import checkpoint as checkpoints
from lic_dist.models.checkpoint import Checkpoint
from lic_dist.models.parts import RECIPES, freeze_all_but
from lic_dist.models.stages import Stage, dequantize_z, run_stages, to_input
from lic_dist.progress import Progress
from lic_dist.quantization.quantize import Quantizer
from lic_dist.quantization.record import QuantizerRecord
from lic_dist.training.distributed import Ranks, ranks
from lic_dist.training.loop import Log, learning_rate, load_state, save_state, seed_step, take_step
from lic_dist.training.loss import bits_of, combine, psnr
from lic_dist.training.rate import IndexRate
from lic_dist.training.samples import Batch, Samples

HELD_OUT_MOST = 64  # held-out samples that L is measured on


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
                bits = bits + self.rate(stage.scales, batch.k, batch.quantizer).sum()
            return stage.means + batch.level

        y_hat = run_stages(model, z_hat, serve)
        return model.g_s(y_hat), bits


def _gaussian_bits(model: Any, y_hat: Tensor, means: Tensor, scales: Tensor) -> Tensor:
    gaussian = model.gaussian_conditional
    return bits_of(gaussian.likelihood_lower_bound(gaussian._likelihood(y_hat, scales, means)))


@dataclass(frozen=True)
class Figures:
    """Means over held-out samples, really quantized: L = lmbda 255^2 MSE + bpp of y by the record's tables."""

    L: float
    bpp: float
    psnr: float


@torch.no_grad()
def held_out_figures(decoding: Decoding, samples: Samples, lmbda: float, device: torch.device) -> Figures:
    """L, bpp and PSNR of the first held-out samples, with the cached indices."""
    judge = Decoding(decoding.model, decoding.parent[0], decoding.rate, "quantized").eval()
    count = min(len(samples), HELD_OUT_MOST)
    squared = bits = 0.0
    pixels = 0
    for first in range(0, count, 8):
        batch = _on(samples.batch(_range(first, min(first + 8, count))), device)
        x = to_input(batch.pixels, device)
        x_hat, part = judge(batch)
        squared += float((x_hat.clamp(0, 1) - x).double().square().sum())
        bits += float(part)
        pixels += x[:, 0].numel()
    mse = squared / (3 * pixels)
    return Figures(lmbda * 255**2 * mse + bits / pixels, bits / pixels, psnr(mse))


def finetune(experiment: config.Experiment) -> Path:
    """Finetune a base model on its cache; returns the path of the checkpoint it wrote.

    Raises:
        LicError: no such cache, a cache of another encoder, quantizer or entropy model (each differing field is
            named), a loss that is not finite.
        UsageError: `out` holds the state of a job with other settings, or the cache lacks what the job needs.
    """
    with ranks() as here:
        return _finetune(experiment, here)


def _finetune(experiment: config.Experiment, here: Ranks) -> Path:
    section = config.need(experiment.finetune, "finetune")
    quantizer_section = config.need(experiment.quantizer, "quantizer")
    parent = _parent(config.need(experiment.model, "model"))
    cache = LatentCache.open(config.need(experiment.cache, "cache").path)
    group = quantizer_section.group
    check_cache(cache, parent, group)
    record = QuantizerRecord.from_json(cache.record_json(group))
    noise = section.latents == "noise"
    if noise and not cache.header.store_y:
        raise UsageError("latents: noise needs y, which this cache does not keep", hint="build it with store_y: true")

    quantizer = Quantizer(record)
    training = Samples(cache, group, quantizer, held_out=False, with_y=noise)
    held_out = Samples(cache, group, quantizer, held_out=True, with_y=False)
    identity = {
        **section.model_dump(mode="json", exclude={"out"}),
        "group": group,
        "record": record.digest,
        "cache": cache.fingerprint,
        "parent": checkpoints.digest(parent.model.state_dict()),
    }
    model = parent.model.to(here.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    parent_h_s = copy.deepcopy(model.h_s).requires_grad_(False)
    trained = freeze_all_but(model, RECIPES[section.recipe])
    largest = int(max(abs(training.arrays["k"]).max(), abs(held_out.arrays["k"]).max()))
    form = _form(section, record)
    decoding = Decoding(model, parent_h_s, IndexRate(record, largest).to(here.device), form)
    optimizer = torch.optim.Adam(trained, lr=section.lr)

    state_path = section.out / "state.pth"
    state = load_state(state_path, identity)
    first, best_step = 0, 0
    before = best = held_out_figures(decoding, held_out, parent.spec.lmbda, here.device)
    best_weights = copy.deepcopy(model.state_dict())
    if state is not None:
        first, best_step, best = int(state["step"]), int(state["best_step"]), Figures(*state["best"])
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        best_weights = state["best_weights"]
    log = Log(section.out / "log.jsonl", first) if here.first else None
    wrapped = here.wrap(decoding)
    started = time.monotonic()
    share = here.share(section.batch)
    with Progress(f"finetuning {section.recipe} on {section.latents} latents", section.steps, "step", first) as bar:
        for step in range(first, section.steps):
            rate = learning_rate(step, section.steps, section.lr, section.warmup, 1.0, section.floor)
            for parameter_group in optimizer.param_groups:
                parameter_group["lr"] = rate
            seed_step(section.seed, step, here.rank)
            batch = _on(training.batch(training.numbers(section.seed, step, section.batch, share)), here.device)
            x = to_input(batch.pixels, here.device)
            x_hat, bits = wrapped(batch)
            mse = (x_hat - x).square().mean()
            bpp = bits / x[:, 0].numel()
            loss = combine(parent.spec.lmbda, mse, bpp if section.recipe != "decoder" else bpp.detach())
            take_step(loss, trained, optimizer, section.clip)
            done = step + 1
            if here.first:
                bar.advance(1, L=float(loss.detach()))
            if done % section.evaluate_every and done != section.steps:
                continue
            figures = held_out_figures(decoding, held_out, parent.spec.lmbda, here.device)
            if figures.L < best.L:
                best, best_step, best_weights = figures, done, copy.deepcopy(model.state_dict())
            if log is not None:
                seconds = (time.monotonic() - started) / (done - first)
                log.write(
                    step=done,
                    lr=rate,
                    loss=float(loss.detach()),
                    held_out_L=figures.L,
                    held_out_bpp=figures.bpp,
                    held_out_psnr=figures.psnr,
                    seconds=seconds,
                )
                save_state(
                    state_path,
                    identity,
                    step=done,
                    model=model.state_dict(),
                    optimizer=optimizer.state_dict(),
                    best=[best.L, best.bpp, best.psnr],
                    best_step=best_step,
                    best_weights=best_weights,
                )
            here.wait()
    model.load_state_dict(best_weights)
    path = section.out / f"checkpoint{checkpoints.SUFFIX}"
    if here.first:
        _finish(parent, model.cpu().eval(), record, quantizer_section, section, cache, (before, best, best_step), path)
    here.wait()
    return path


def _finish(
    parent: Checkpoint,
    model: nn.Module,
    record: QuantizerRecord,
    quantizer: config.Quantizer,
    section: config.Finetune,
    cache: LatentCache,
    outcome: tuple[Figures, Figures, int],
    path: Path,
) -> None:
    """Write the checkpoint with its record: the parent's for `decoder`, a new calibration where h_s moved."""
    before, best, best_step = outcome
    made = Checkpoint(model, parent.spec, dict(parent.quantizers))
    if section.recipe != "decoder":
        checkpoints.update_tables(model)
        record = calibrate(made, quantizer, *calibration_samples(cache, quantizer))
    made.quantizers[quantizer.group] = record.to_json()
    made.history = [
        *parent.history,
        {
            "what": "finetuning",
            **section.model_dump(mode="json", exclude={"out"}),
            "cache": cache.fingerprint,
            "group": quantizer.group,
            "parent": parent.source and checkpoints.digest(checkpoints.load(parent.source).model.state_dict()),
            "held_out_before": [before.L, before.bpp, before.psnr],
            "held_out_best": [best.L, best.bpp, best.psnr],
            "best_step": best_step,
        },
    ]
    checkpoints.save(made, path)
    print(
        f"held-out samples: L {before.L:.4f} -> {best.L:.4f}, PSNR {before.psnr:.3f} -> {best.psnr:.3f} dB, "
        f"bpp of y {before.bpp:.4f} -> {best.bpp:.4f} (best at step {best_step})"
    )


def _parent(section: config.Model) -> Checkpoint:
    return checkpoints.load(section.checkpoint, section.architecture, section.lmbda)


def _form(section: config.Finetune, record: QuantizerRecord) -> str:
    if section.latents == "noise":
        return "noise"
    trains_hyper = section.recipe != "decoder"
    return "likelihood" if record.name == "sq" and trains_hyper and section.sq_rate == "likelihood" else "quantized"


def _range(first: int, last: int) -> Any:
    import numpy as np

    return np.arange(first, last)


def _on(batch: Batch, device: torch.device) -> Batch:
    if device.type == "cpu":
        return batch
    moved = {name: getattr(batch, name).to(device, non_blocking=True) for name in batch.__dataclass_fields__}
    return replace(batch, **moved)
