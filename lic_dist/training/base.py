"""Base training: a CompressAI architecture end to end, and the quantiles of z's prior alone at the end.

    lic-dist train CONFIG
    torchrun --nproc-per-node=8 -m lic_dist train CONFIG

Alone or under torchrun, and resumable: the state on disk and the step's number determine all that follows.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lic_dist.config import Images, Train
from lic_dist.crops import is_held_out
from lic_dist.errors import LicError
from lic_dist.manifest import scan
from lic_dist.models import checkpoint
from lic_dist.models.architectures import ModelSpec, build
from lic_dist.models.checkpoint import Checkpoint
from lic_dist.models.stages import hyper_analyse, to_input
from lic_dist.training import photos as photo_crops
from lic_dist.training.distributed import Ranks, ranks
from lic_dist.training.loop import Course, learning_rate
from lic_dist.training.loss import Figures, bits_of, combine, figures_of

HELD_OUT_MOST, HELD_OUT_CROP = 48, 256  # held-out crops that L is measured on, and their size where photos allow
AUXILIARY_SMALL = 0.02  # per channel of z
QUANTILE_PHASES = 10


class Relaxed(nn.Module):
    """A model's forward with the relaxation of rounding that training uses.

    noise: uniform noise for rate and decoder (Balle et al. 2017). mixed: noise for the rate, straight-through
    rounding for what the decoders see (Minnen and Singh 2020).
    """

    def __init__(self, model: nn.Module, relaxation: str) -> None:
        super().__init__()
        self.model, self.relaxation = model, relaxation

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x float32 [B, 3, H, W] -> (x_hat, bits of the batch)."""
        model: Any = self.model
        if self.relaxation == "noise" or not self.training:
            out = model(x)
            return out["x_hat"], bits_of(out["likelihoods"]["y"]) + bits_of(out["likelihoods"]["z"])
        y = model.g_a(x)
        z = hyper_analyse(model, y)
        _, z_likelihoods = model.entropy_bottleneck(z)
        medians = model.entropy_bottleneck._get_medians().detach().reshape(1, -1, 1, 1)
        parameters = model.h_s(_round(z - medians) + medians)
        if parameters.shape[1] == y.shape[1]:
            scales, means = parameters, torch.zeros_like(y)
        else:
            scales, means = parameters.chunk(2, 1)
        _, y_likelihoods = model.gaussian_conditional(y, scales, means=means)
        return model.g_s(_round(y - means) + means), bits_of(y_likelihoods) + bits_of(z_likelihoods)


def _round(values: Tensor) -> Tensor:
    return values + (torch.round(values) - values).detach()


@torch.no_grad()
def held_out_figures(model: nn.Module, pixels: Tensor, lmbda: float, device: torch.device) -> Figures:
    """L, bpp and PSNR of the mean squared error over uint8 crops [n, 3, s, s]; the model's mode is left as it was."""
    was_training = model.training
    relaxed = Relaxed(model, "noise").eval()
    squared = bits = 0.0
    for part in pixels.split(8):
        x = to_input(part, device)
        x_hat, part_bits = relaxed(x)
        squared += float((x_hat.clamp(0, 1) - x).double().square().sum())
        bits += float(part_bits)
    model.train(was_training)
    mse = squared / pixels.numel()
    bpp = bits / (pixels.shape[0] * pixels.shape[2] * pixels.shape[3])
    return figures_of(lmbda, mse, bpp)


def train_quantiles(model: Any, steps: int, with_medians: bool = True, rate: float = 1e-1) -> float:
    """Train the quantiles of z's prior alone until the auxiliary loss is small; returns it. Uses no data.

    Without medians these stay where they are: a hyper-decoder that was trained on z rounded about them needs them so.

    Runs phases of `steps` steps, each with its own cosine, until the loss is below AUXILIARY_SMALL a channel: priors
    with long tails need quantiles far from where they start.
    """
    quantiles = model.entropy_bottleneck.quantiles
    for parameter in model.parameters():
        parameter.requires_grad_(parameter is quantiles)
    optimizer = torch.optim.Adam([quantiles], lr=rate)
    trained = [0, 1, 2] if with_medians else [0, 2]

    def auxiliary_loss() -> Tensor:
        prior = model.entropy_bottleneck
        logits = prior._logits_cumulative(quantiles, stop_gradient=True)
        return (logits - prior.target).abs()[..., trained].sum()

    for _ in range(QUANTILE_PHASES):
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, steps, rate, 0, 1.0, 1e-3)
            optimizer.zero_grad()
            auxiliary_loss().backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        if (loss := float(auxiliary_loss().detach())) < AUXILIARY_SMALL * quantiles.shape[0]:
            break
    return loss


def train(config: Train, photos: Images) -> Path:
    """Train a base model; returns the path of the checkpoint it wrote.

    Raises:
        LicError: no photos, photos smaller than a crop, a loss that is not finite.
        UsageError: an unknown architecture, or `out` holds the state of a job with other settings.
    """
    with ranks() as here:
        return _train(config, photos, here)


def _train(config: Train, section: Images, here: Ranks) -> Path:
    start = _start(config)
    model: Any = start.model.to(here.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    manifest = scan(section.path)
    usable = [photo for photo in manifest if not photo.fault]
    held_out = [photo for photo in usable if is_held_out(photo, section.held_out)]
    digests = {photo.digest for photo in held_out}
    used = [photo for photo in usable if photo.digest not in digests]
    crops = photo_crops.RandomCrops(section.path, used, config.crop, config.seed)
    judged = photo_crops.centre_crops(section.path, held_out, HELD_OUT_CROP, HELD_OUT_MOST)
    if not len(judged):
        judged = photo_crops.centre_crops(section.path, held_out, config.crop, HELD_OUT_MOST)
    identity = {
        **config.model_dump(mode="json", exclude={"out", "start"}),
        "start": checkpoint.digest(start.model.state_dict()),
        "manifest_sha256": manifest.digest,
        "held_out": section.held_out,
    }
    model.entropy_bottleneck.quantiles.requires_grad_(False)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    course = Course(f"training {config.architecture}", config, config.anneal, model, trained, identity, here)
    relaxed = here.wrap(Relaxed(model, config.relaxation).train())

    def measure() -> Figures | None:
        return held_out_figures(model, judged, config.lmbda, here.device) if len(judged) else None

    batches = iter(photo_crops.batches(crops, course.first, config.steps, config.batch, here.share(config.batch)))
    for _ in course:
        x = to_input(next(batches), here.device)
        x_hat, bits = relaxed(x)
        mse = (x_hat - x).square().mean()
        course.take(combine(config.lmbda, mse, bits / x[:, 0].numel()))
        if course.due:
            course.save(measure())

    auxiliary = train_quantiles(model, config.quantile_steps, with_medians=config.relaxation == "noise")
    final = config.out / f"checkpoint{checkpoint.SUFFIX}"
    if here.first:
        figures = measure()
        entry = {
            "what": "base training",
            **identity,
            "photos": len(used),
            "auxiliary_loss": auxiliary,
            "held_out_figures": asdict(figures) if figures else None,
        }
        checkpoint.save(Checkpoint(model.cpu(), start.spec, history=[*start.history, entry]), final)
    here.wait()
    return final


def _start(config: Train) -> Checkpoint:
    """The model before the first step: fresh, or the checkpoint `train.start`, whose lambda may have been another."""
    spec = ModelSpec(config.architecture, config.N, config.M, config.lmbda)
    if config.start is None:
        torch.manual_seed(config.seed)
        return Checkpoint(build(config.architecture, config.N, config.M), spec)
    start = checkpoint.load(config.start)
    if replace(start.spec, lmbda=spec.lmbda) != spec:
        raise LicError(f"train.start is a {start.spec.architecture} with N={start.spec.N}, M={start.spec.M}")
    return replace(start, spec=spec)
