"""Base training: a CompressAI architecture end to end, and at the end the quantiles of z's prior alone.

    lic-dist train CONFIG
    torchrun --nproc-per-node=8 -m lic_dist train CONFIG

It runs alone or under torchrun and resumes exactly: the state on disk and the number of a step determine all later
steps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lic_dist.config import Images, Train
from lic_dist.data.crops import is_held_out, require_held_out
from lic_dist.data.manifest import scan
from lic_dist.data.sources.opening import open_source
from lic_dist.errors import LicError, UsageError
from lic_dist.models import checkpoint
from lic_dist.models.architectures import ModelSpec, adapt, build
from lic_dist.models.checkpoint import Checkpoint
from lic_dist.models.names import SUFFIX
from lic_dist.models.parts import QUANTILES, model_digest, trainable
from lic_dist.models.protocol import CodecModel, Sides, Stage
from lic_dist.models.stages import bits_of, to_input
from lic_dist.training import photos as photo_crops
from lic_dist.training.distortion import Distortion
from lic_dist.training.distributed import Ranks, joined
from lic_dist.training.loop import PhasePlan, TrainingLoop
from lic_dist.training.loss import HeldOut, held_out_figures
from lic_dist.training.quantiles import fit_quantiles
from lic_dist.training.states import is_finished

BLOCK = 16  # channels that oneDNN works on at once
FLOOR_AT = 6.0  # scales from the mean to where the likelihood is CompressAI's bound, 1e-9
HELD_OUT_MOST, HELD_OUT_CROP = 48, 256  # held-out crops that L is measured on, and their size where photos allow


class RelaxedModel(nn.Module):
    """A model's forward with training's relaxation of rounding; in evaluation mode it rounds.

    noise: uniform noise for rate, decoder and the contexts of later stages (Balle et al. 2017). mixed: noise for the
    rate, straight-through rounding for what decoder and contexts see (Minnen and Singh 2020). `bf16` runs g_a and g_s
    under autocast; the entropy model is always float32. `tails` has latents cost in training what `bits_beyond_floor`
    says too, and `compaction` is the weight of `compaction_bits`.
    """

    def __init__(
        self, model: nn.Module, relaxation: str, bf16: bool = False, tails: bool = False, compaction: float = 0.0
    ) -> None:
        super().__init__()
        self.model, self.relaxation, self.bf16, self.tails = model, relaxation, bf16, tails
        self.compaction = compaction
        self._codec = adapt(model)
        self._format = _memory_format(model, next(model.parameters()).device)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return (x_hat, bits of the batch), float32, of x float32 [B, 3, H, W]."""
        autocast = torch.autocast(x.device.type, torch.bfloat16, enabled=self.bf16)
        with autocast:
            y = self._codec.analyse(x.contiguous(memory_format=self._format)).float()
        sides_hat, z_bits = self._sides(y)
        y_hat, y_bits = self._y_hat(y, sides_hat)
        with autocast:
            x_hat = self._codec.synthesise(y_hat)
        bits = torch.stack([*y_bits, *z_bits]).sum()
        if self.compaction and self.training:
            bits = bits + self.compaction * compaction_bits(y)
        return x_hat.float(), bits

    @property
    def _mixed(self) -> bool:
        return self.training and self.relaxation == "mixed"

    def _sides(self, y: Tensor) -> tuple[Sides, list[Tensor]]:
        """Return z_hat and the bits of each side latent."""
        sides_hat, bits = [], []
        for side, z in zip(self._codec.sides, self._codec.hyper_analyse(y), strict=True):
            z_hat, likelihood = side.relaxed(z)
            if self._mixed:
                z_hat = side.dequantize(_round_straight_through(side.centred(z)))
            sides_hat.append(z_hat)
            bits.append(bits_of(likelihood))
        return tuple(sides_hat), bits

    def _y_hat(self, y: Tensor, sides_hat: Sides) -> tuple[Tensor, list[Tensor]]:
        """Return y_hat as g_s takes it, and the bits of y, in parts."""
        noisy = y + torch.empty_like(y).uniform_(-0.5, 0.5) if self.training else y
        if self.training and not self._mixed:
            found = self._codec.given(sides_hat, noisy)
            return found.y_hat, [self._bits(noisy, Stage(found.means, found.scales))]
        bits: list[Tensor] = []

        def rounded(stage: Stage) -> Tensor:
            part = stage.elements.take(y)
            if self._mixed:
                bits.append(self._bits(stage.elements.take(noisy), stage))
                return _round_straight_through(part - stage.means) + stage.means
            value = torch.round(part - stage.means) + stage.means
            bits.append(self._bits(value, stage))
            return value

        return self._codec.follow(sides_hat, rounded).y_hat, bits

    def _bits(self, y: Tensor, stage: Stage) -> Tensor:
        """Return the bits of a stage's elements y, a scalar."""
        bits = bits_of(self._codec.likelihood(y, stage))
        return bits + bits_beyond_floor(self._codec, y, stage) if self.tails and self.training else bits


def bits_beyond_floor(codec: CodecModel, y: Tensor, stage: Stage) -> Tensor:
    """Return what elements y beyond the floor of the likelihood cost in addition, log2(r / 6): a scalar.

    r is how many scales the near end of the element's cell of step 1 is from the mean; at 6 the likelihood comes to its
    floor, 1e-9, below which it has next to no gradient. Here the gradient in the logarithm of a scale is -1.44 bits at
    any distance, and that in a mean falls with the distance.
    """
    scales = codec.gaussian.lower_bound_scale(stage.scales)
    r = ((y - stage.means).abs() - 0.5) / scales
    return (r / FLOOR_AT).clamp(min=1).log2().sum()


def compaction_bits(y: Tensor) -> Tensor:
    """Return less than nothing: the bits that the spread of energy over the channels of y [B, M, h, w] saves, a scalar.

    The coding gain of a transform is the mean of its channels' variances over their geometric mean, and at high rates
    a latent costs half its logarithm less. Cheng et al. 2019 ("Learning image and video compression through
    spatial-temporal energy compaction", arXiv 1906.09683) put it into the loss; here each variance has that of
    rounding's error added, which bounds it.
    """
    variances = y.var((0, 2, 3), correction=0) + 1 / 12
    return 0.5 * y.numel() * (variances.log2().mean() - variances.mean().log2())


def _round_straight_through(values: Tensor) -> Tensor:
    return values + (torch.round(values) - values).detach()


def _memory_format(model: nn.Module, device: torch.device) -> torch.memory_format:
    """Return channels last, except where oneDNN would write beyond its memory in the backward pass: strided 1x1
    convolutions of few channels on a CPU, such as cheng2020's first shortcut has (uxlfoundation/oneDNN issue 6035).
    """
    unsafe = (
        layer.kernel_size == (1, 1) and layer.stride != (1, 1) and layer.in_channels < BLOCK
        for layer in model.modules()
        if isinstance(layer, nn.Conv2d)
    )
    return torch.contiguous_format if device.type == "cpu" and any(unsafe) else torch.channels_last


def train(config: Train, photos: Images) -> Path:
    """Train a base model; return the path of the checkpoint.

    Raises:
        LicError: no photos, photos smaller than a crop, a loss that is not finite.
        UsageError: an unknown architecture, crops that it does not take, or `out` holds the state of a job with other
            settings.
    """
    with joined() as ranks:
        return _train(config, photos, ranks)


def _train(config: Train, section: Images, ranks: Ranks) -> Path:
    start = _initial_checkpoint(config)
    start.codec.require_crop("train.crop", config.crop)
    if config.tails and start.codec.prior is not None:
        raise UsageError(f"train.tails: {start.codec.name} has no scales of y", hint="train.tails: false")
    model: Any = start.model.to(ranks.device, memory_format=_memory_format(start.model, ranks.device))  # type: ignore[call-overload]
    source = open_source(section.path, section.options, section.column)
    manifest = scan(source)
    require_held_out(manifest, section.held_out)
    usable = [photo for photo in manifest if not photo.fault]
    held_out = [photo for photo in usable if is_held_out(photo, section.held_out)]
    digests = {photo.digest for photo in held_out}
    used = [photo for photo in usable if photo.digest not in digests]
    crops = photo_crops.RandomCrops(source, used, config.crop, config.seed, config.halved)
    multiple = start.codec.strides.multiple
    judged = photo_crops.centre_crops(source, held_out, -(-HELD_OUT_CROP // multiple) * multiple, HELD_OUT_MOST)
    if not len(judged):
        judged = photo_crops.centre_crops(source, held_out, config.crop, HELD_OUT_MOST)
    identity = {
        **config.identity({"out", "start", "keep", "tracking"}),
        "start": model_digest(start.model),
        "manifest_sha256": manifest.digest,
        "held_out": section.held_out,
    }
    final = config.out / f"checkpoint{SUFFIX}"
    if is_finished(final, identity, ranks):
        if ranks.first:
            print(f"{final}: done already")
        return final
    if config.initial_crops:
        pixels = torch.stack([crops[number] for number in range(config.initial_crops)])
        if config.start is None:
            start.codec.start(to_input(pixels, ranks.device), config.lmbda)
        else:
            fitted = _initial_checkpoint(config, to_input(pixels, torch.device("cpu")))
            model.load_state_dict(fitted.model.state_dict())
    relaxed = RelaxedModel(
        model, config.relaxation, config.precision == "bf16", config.tails, config.compaction
    ).train()
    distortion = Distortion(config.distortion, config.crop, ranks.device)
    codec, lmbda = start.codec, config.lmbda
    rates, gain = _rates(codec, config.lmbda), codec.gain
    if config.compile:
        for name in ("g_a", "g_s"):
            start.codec.nets[name].compile()

    def loss(forward: nn.Module, pixels: Tensor) -> Tensor:
        x = to_input(pixels, ranks.device)
        x_hat, bits = forward(x)
        return lmbda * distortion(x_hat, x) + bits / x[:, 0].numel()

    def figures() -> HeldOut | None:
        return evaluate_held_out(model, judged, config, ranks) if len(judged) else None

    phases = [PhasePlan(_trained(model, one.recipe), one.steps, one.lr) for one in config.each_phase]
    graph = config.graph and ranks.device.type == "cuda"
    if graph:
        _check_capturable(start.codec, config, ranks)
    loop = TrainingLoop(f"training {config.architecture}", config, phases, relaxed, model, identity, ranks, graph)
    share = ranks.share(config.batch)
    steps = sum(one.steps for one in phases)
    batches = iter(photo_crops.batches(crops, loop.first, steps, config.batch, share))
    for step in loop:
        of_step, lmbda = rates[np.random.default_rng((config.seed, step)).integers(len(rates))]
        codec.take_gain(of_step)
        numbers = range(step * config.batch, (step + 1) * config.batch)[share]
        parts = next(batches).tensor_split(loop.parts)
        loop.train_step(parts, loss, lambda: f"crops of {', '.join(map(crops.source, numbers))}")  # noqa: B023  # called in this step
        codec.take_gain(gain)
        if loop.evaluation_due:
            loop.evaluate(figures)

    auxiliary = fit_quantiles(model, with_medians=config.relaxation == "noise")
    if ranks.first:
        best = loop.best.figures
        entry = {
            "what": "base training",
            **identity,
            "photos": len(used),
            "auxiliary_loss": auxiliary,
            "best_step": loop.best.step,
            "held_out_figures": best.plain() if best else None,
        }
        checkpoint.save(Checkpoint(model.cpu(), start.spec, history=[*start.history, entry]), final)
    ranks.wait()
    return final


def _trained(model: nn.Module, recipe: str | Sequence[str]) -> tuple[str, ...]:
    """Return the names of the parameters that a phase trains: not quantiles, nor what the model itself holds fixed."""
    chosen = None if recipe == "all" else trainable(model, recipe, encoder=True)
    return tuple(
        name
        for name, one in model.named_parameters()
        if one.requires_grad and not name.endswith(QUANTILES) and (chosen is None or name in chosen)
    )


def _check_capturable(codec: CodecModel, config: Train, ranks: Ranks) -> None:
    """Raise UsageError where a step cannot be one CUDA graph."""
    size = config.crop // codec.strides.y
    if ranks.world > 1:
        raise UsageError(f"train.graph is for one GPU, these are {ranks.world}", hint="train.graph: false")
    if any(elements.positions is not None for elements in codec.layout(size, size)):
        raise UsageError(f"train.graph: {codec.name} codes y position by position", hint="train.graph: false")
    if len(_rates(codec, config.lmbda)) > 1:
        raise UsageError(f"train.graph: {codec.name} takes a rate a step", hint="train.graph: false, or options.gain")


def evaluate_held_out(model: nn.Module, pixels: Tensor, config: Train, ranks: Ranks) -> HeldOut:
    """Evaluate SQ of y about the means, stage by stage as a decoder finds them, over uint8 crops [n, 3, s, s].

    For a model of one stage that is CompressAI's own evaluation forward. Of a variable-rate model the figures are means
    over its rates. The model's mode is left unchanged.
    """
    was_training, codec = model.training, adapt(model)
    relaxed = RelaxedModel(model, "noise", config.precision == "bf16").eval()
    distortion = Distortion(config.distortion, pixels.shape[-1], ranks.device)

    def decode(part: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = to_input(part, ranks.device)
        return x, *relaxed(x)

    found, gain = [], codec.gain
    for of_rate, lmbda in _rates(codec, config.lmbda):
        codec.take_gain(of_rate)
        found.append(held_out_figures(pixels.split(8), decode, distortion, lmbda, ranks))
    codec.take_gain(gain)
    model.train(was_training)
    return HeldOut(*np.mean([(one.L, one.bpp, one.psnr) for one in found], axis=0).tolist())


def _rates(codec: CodecModel, lmbda: float) -> list[tuple[float | None, float]]:
    """Return gain and lambda of each rate that a model is trained at: all of a variable-rate model without a gain."""
    rates = codec.rates(codec.module.state_dict()) if codec.gain is None else ()
    return list(rates) or [(codec.gain, lmbda)]


def _initial_checkpoint(config: Train, x: Tensor | None = None) -> Checkpoint:
    """Return the model before the first step: a new one, or the checkpoint `train.start`, whose lambda may differ, or a
    slim one of it, fitted to it on pictures x.
    """
    spec = ModelSpec(config.architecture, config.N, config.M, config.lmbda, config.options)
    if config.start is None:
        torch.manual_seed(config.seed)
        return Checkpoint(build(spec.architecture, spec.N, spec.M, **spec.options), spec)
    start = checkpoint.load(config.start, spec.architecture, spec.lmbda, spec.options, at_gain=False)
    spec = spec if spec.options else replace(spec, options=start.spec.options)
    if replace(start.spec, lmbda=spec.lmbda, options=spec.options) != spec:
        raise LicError(f"train.start is a {start.spec.architecture} with N={start.spec.N}, M={start.spec.M}")
    if config.rescale:
        start.codec.rescale(math.sqrt(spec.lmbda / start.spec.lmbda))
    if start.spec.options == spec.options:
        if x is not None:
            raise UsageError("train.initial_crops: train.start is no larger model", hint="leave it out")
        return replace(start, spec=spec)
    smaller = Checkpoint(build(spec.architecture, spec.N, spec.M, **spec.options), spec, history=start.history)
    smaller.codec.take_from(start.codec, x)
    return smaller
