"""Base training: a CompressAI architecture end to end, and the quantiles of z's prior alone at the end.

    lic-dist train CONFIG
    torchrun --nproc-per-node=8 -m lic_dist train CONFIG

Alone or under torchrun, and resumable: the state on disk and the step's number determine all that follows.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lic_dist import images
from lic_dist.config import Images, Train
from lic_dist.errors import LicError
from lic_dist.models import checkpoint
from lic_dist.models.architectures import ModelSpec, build
from lic_dist.models.checkpoint import Checkpoint
from lic_dist.models.stages import to_input
from lic_dist.progress import Progress
from lic_dist.training import photos as crops_of
from lic_dist.training.distributed import Ranks, ranks
from lic_dist.training.loop import Log, learning_rate, load_state, save_state, seed_step, take_step
from lic_dist.training.loss import bits_of, combine, psnr

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
        z = model.h_a(torch.abs(y) if type(model).__name__ == "ScaleHyperprior" else y)
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


@dataclass(frozen=True)
class Figures:
    """Means over held-out crops, rounded latents, continuous likelihood."""

    L: float
    bpp: float
    psnr: float


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
    return Figures(lmbda * 255**2 * mse + bpp, bpp, psnr(mse))


def train_quantiles(model: Any, steps: int, rate: float = 1e-1) -> float:
    """Train the quantiles of z's prior alone until the auxiliary loss is small; returns it. Uses no data.

    Runs phases of `steps` steps, each with its own cosine, until the loss is below AUXILIARY_SMALL a channel: priors
    with long tails need quantiles far from where they start.
    """
    quantiles = model.entropy_bottleneck.quantiles
    for parameter in model.parameters():
        parameter.requires_grad_(parameter is quantiles)
    optimizer = torch.optim.Adam([quantiles], lr=rate)
    for _ in range(QUANTILE_PHASES):
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, steps, rate, 0, 1.0, 1e-3)
            optimizer.zero_grad()
            loss = model.aux_loss()
            loss.backward()
            optimizer.step()
        loss = float(model.aux_loss().detach())
        if loss < AUXILIARY_SMALL * quantiles.shape[0]:
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
    identity = {
        **config.model_dump(mode="json", exclude={"out"}),
        "images": str(section.path),
        "held_out": section.held_out,
    }
    final = config.out / f"checkpoint{checkpoint.SUFFIX}"
    state_path = config.out / "state.pth"
    spec = ModelSpec(config.architecture, config.N, config.M, config.lmbda)
    model = _initial(config).to(here.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    manifest = [photo for photo in images.scan(section.path) if not photo.fault]
    held = [photo for photo in manifest if images.is_held_out(photo, section.held_out)]
    used = [photo for photo in manifest if photo not in held]
    crops = crops_of.RandomCrops(section.path, used, config.crop, config.seed)
    pixels = crops_of.centre_crops(section.path, held, HELD_OUT_CROP, HELD_OUT_MOST)
    if not len(pixels):
        pixels = crops_of.centre_crops(section.path, held, config.crop, HELD_OUT_MOST)
    model.entropy_bottleneck.quantiles.requires_grad_(False)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=config.lr)
    state = load_state(state_path, identity)
    first = 0
    if state is not None:
        first = int(state["step"])
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    log = Log(config.out / "log.jsonl", first) if here.first else None
    relaxed = here.wrap(Relaxed(model, config.relaxation).train())
    loader = crops_of.batches(crops, first, config.steps, config.batch, here.share(config.batch))
    started, first_step = time.monotonic(), first
    with Progress(f"training {config.architecture}", config.steps, "step", done=first) as bar:
        for step, batch in enumerate(loader, start=first):
            rate = learning_rate(step, config.steps, config.lr, config.warmup, config.anneal, config.floor)
            for group in optimizer.param_groups:
                group["lr"] = rate
            seed_step(config.seed, step, here.rank)
            x = to_input(batch, here.device)
            x_hat, bits = relaxed(x)
            mse = (x_hat - x).square().mean()
            loss = combine(config.lmbda, mse, bits / (x.shape[0] * x.shape[2] * x.shape[3]))
            take_step(loss, parameters, optimizer, config.clip)
            done = step + 1
            if here.first:
                bar.advance(1, L=float(loss.detach()))
            if done % config.evaluate_every == 0 or done == config.steps:
                if log is not None:
                    row: dict[str, Any] = {"step": done, "lr": rate, "loss": float(loss.detach())}
                    if len(pixels):
                        figures = held_out_figures(model, pixels, config.lmbda, here.device)
                        row |= {"held_out_L": figures.L, "held_out_bpp": figures.bpp, "held_out_psnr": figures.psnr}
                    log.write(**row, seconds=(time.monotonic() - started) / (done - first_step))
                    save_state(
                        state_path, identity, step=done, model=model.state_dict(), optimizer=optimizer.state_dict()
                    )
                here.wait()
    auxiliary = train_quantiles(model, config.quantile_steps)
    if here.first:
        history = {
            "what": "base training",
            **{key: value for key, value in identity.items() if key not in ("images", "start")},
            "photos": len(used),
            "manifest_sha256": images.manifest_digest(manifest),
            "auxiliary_loss": auxiliary,
        }
        if len(pixels):
            figures = held_out_figures(model.eval(), pixels, config.lmbda, here.device)
            history["held_out_figures"] = {"L": figures.L, "bpp": figures.bpp, "psnr": figures.psnr}
        checkpoint.save(Checkpoint(model.cpu(), spec, history=[history]), final)
    here.wait()
    return final


def _initial(config: Train) -> Any:
    if config.start is None:
        torch.manual_seed(config.seed)
        return build(config.architecture, config.N, config.M)
    start = checkpoint.load(config.start)
    if (start.spec.architecture, start.spec.N, start.spec.M) != (config.architecture, config.N, config.M):
        raise LicError(f"train.start is a {start.spec.architecture} with N={start.spec.N}, M={start.spec.M}")
    return start.model.train()
