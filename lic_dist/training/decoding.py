"""The forward pass of the trained part: from cached z and latents to the picture and the bits, in one of four forms.

    quantized           y_hat = means + level(k): k is fixed, y_hat moves with the means; bits of k by the record's
    tables.
                        By the envelope theorem the gradient of the minimized search cost is its partial gradient at
                        fixed k, so the means follow bits + lmbda 255^2 / (3 g) * sum S_c (y - y_hat)^2. With `pixels`
                        they follow the picture's error instead, which the next search does not minimize and undoes
    likelihood          y_hat stays what the parent's means gave; bits are CompressAI's likelihood. For SQ it is that of
                        y_hat, since SQ's k minimize no cost that contains their bits (with `pixels` g_s sees k about
                        the moving means). For the others, with `means: likelihood`, it is that of y + uniform noise:
                        h_s learns the distribution of y, as in base training, and g_s what the quantizer makes of it
    noise               the first control: y + uniform noise for y_hat, and its likelihood
    straight-through    the second control: SQ of y about the means for y_hat, without a gradient through the rounding
                        to the means; the likelihood of y + uniform noise (Minnen and Singh 2020)

Where y has several stages, later means and scales depend on the y_hat of each form: those that `quantized` rebuilds
one after another from k, those that the parent's networks rebuild (`likelihood`), y + noise (`noise`), or SQ's. A model
that corrects y_hat after its stages does so with its present networks, and g_s sees the result.

z_hat is the stored one; its bits are CompressAI's likelihood.

A factorized prior of y trains where the recipe has it: in the first form by the cells of k under it, which is what the
search chose, in the others by the likelihood that they name. Its medians are the means, and stay.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from lic_dist.config import Finetune
from lic_dist.models.architectures import adapt
from lic_dist.models.protocol import TRANSFORMS, Given, Run, Sides, Stage
from lic_dist.models.stages import bits_of
from lic_dist.quantization.embedded import Embedded
from lic_dist.quantization.rates import level_index
from lic_dist.quantization.record import QuantizerRecord
from lic_dist.training.rate import CellRate, ChannelRate, EmbeddedRate, IndexRate
from lic_dist.training.samples import Batch

MeansGradient = Literal["likelihood", "search", "pixels"]
Form = Literal["quantized", "likelihood", "noise", "straight-through"]


def form_of(section: Finetune, record: QuantizerRecord, hyper_trains: bool) -> Form:
    """Return the form that a job trains on: the section's, where `sq_rate` decides for unit SQ under a trained h_s."""
    if section.latents != "quantized":
        return section.latents
    by_likelihood = section.means == "likelihood" or (record.is_unit_sq and section.sq_rate == "likelihood")
    return "likelihood" if hyper_trains and by_likelihood else "quantized"


class Decoding(nn.Module):
    """The forward pass of the module's text. `bf16` runs g_s under autocast; means, scales and bits are always float32.

    The search cost needs y in the batch. It adds to the gradient, not to the value of the bits returned. `prior_trains`
    says that indices are charged by the prior of y, where y has one, and not by the record's tables.
    """

    def __init__(
        self,
        model: nn.Module,
        record: QuantizerRecord,
        form: Form = "quantized",
        bf16: bool = False,
        means_gradient: MeansGradient = "pixels",
        prior_trains: bool = False,
    ) -> None:
        super().__init__()
        self.model, self.bf16, self.pixels = model, bf16, means_gradient == "pixels"
        self.codec = adapt(model)
        self.embedded = Embedded(record) if record.kind.embedded else None
        self.rate, self.unit_sq = self._rate_of(record, prior_trains), record.is_unit_sq
        error_weight = record.lmbda * 255**2 / (3 * record.lambda_scale)  # of a unit of S_c (y - y_hat)^2, in bits
        weights = torch.from_numpy(record.weights * np.float32(error_weight))
        self.register_buffer("weights", weights.reshape(1, -1, 1, 1), persistent=False)
        self.weights: Tensor
        nets = {name: net for name, net in self.codec.nets.items() if name not in TRANSFORMS}
        kept = copy.deepcopy(nets) if form == "likelihood" else {}
        self.parent = nn.ModuleList(kept.values()).requires_grad_(False)  # the parent's networks of the entropy model
        self._parent_nets = kept
        forms = {
            "quantized": self._quantized,
            "likelihood": self._likelihood,
            "noise": self._noise,
            "straight-through": self._straight_through,
        }
        self.make_y_hat = forms[form]
        spread = torch.from_numpy((record.shifts - np.float32(record.shift)) * np.float32(record.step))
        self.register_buffer("spread", spread if record.follows_scales else None, persistent=False)
        self.spread: Tensor | None
        self.level_rule = record.level_rule
        self.y_hat = torch.empty(0)  # what the last x_hat was made of

    def _rate_of(self, record: QuantizerRecord, prior_trains: bool) -> nn.Module:
        if self.embedded is not None:
            return EmbeddedRate(self.embedded)
        if (prior := self.codec.prior) is None:
            return IndexRate(record)
        return CellRate(record, prior) if prior_trains else ChannelRate(record)

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return (x_hat float32 [b, 3, s, s], bits of y and z in the batch, float32)."""
        sides, sides_hat = self.codec.sides, self._sides_hat(batch)
        y_hat, bits = self.make_y_hat(batch, sides_hat)
        self.y_hat = y_hat.detach()
        for side, z_hat in zip(sides, sides_hat, strict=True):
            bits = bits_of(side.likelihood(z_hat)) + bits
        with torch.autocast(y_hat.device.type, torch.bfloat16, enabled=self.bf16):
            x_hat = self.codec.synthesise(y_hat)
        return x_hat.to(y_hat.dtype), bits

    @torch.no_grad()
    def latents(self, batch: Batch) -> tuple[Sides, Tensor]:
        """Return z_hat of each side, and the y_hat float32 [b, M, h, w] that a decoder rebuilds from k."""
        sides_hat = self._sides_hat(batch)
        return sides_hat, self._rebuilt(batch, sides_hat)[0].y_hat

    def _sides_hat(self, batch: Batch) -> Sides:
        return tuple(side.dequantize(z) for side, z in zip(self.codec.sides, (batch.z,), strict=True))

    def _rebuilt(self, batch: Batch, sides_hat: Sides, run: Run | None = None) -> tuple[Given, Tensor]:
        """Return what a decoder finds, stage by stage from k, and y_hat before corrections, means + level."""
        sent: list[Tensor] = []

        def known(stage: Stage) -> Tensor:
            sent.append(stage.means + self._spread(stage.elements.take(batch.level), stage.scales))
            return sent[-1]

        found = self.codec.follow(sides_hat, known, run)
        return found, sent[0] if found.y_hat is sent[0] else found.means + self._spread(batch.level, found.scales)

    def _spread(self, level: Tensor, scales: Tensor | None) -> Tensor:
        """Return levels of reconstruction as the record has them under these scales."""
        if self.spread is None or scales is None:
            return level
        if self.embedded is not None:
            return self.embedded.values(level, level_index(scales, self.level_rule))
        return level + torch.sign(level) * self.spread[level_index(scales, self.level_rule).long()]

    def _quantized(self, batch: Batch, sides_hat: Sides) -> tuple[Tensor, Tensor]:
        found, sent = self._rebuilt(batch, sides_hat)
        bits = self._index_bits(batch, found)
        if self.pixels:
            return found.y_hat, bits
        cost = (self.weights * (batch.y - sent).square()).sum()
        bits = bits + cost - cost.detach()
        if found.y_hat is sent:
            return sent.detach(), bits
        return self.codec.given(sides_hat, sent.detach()).y_hat, bits  # the picture trains corrections alone

    def _likelihood(self, batch: Batch, sides_hat: Sides) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            _, fixed = self._rebuilt(batch, sides_hat, lambda name, values: self._parent_nets[name](values))
        found = self.codec.given(sides_hat, fixed)
        bits = self._likelihood_bits(fixed if self.unit_sq else self._noisy(batch), found)
        if self.pixels:
            level = self._spread(batch.level, found.scales)
            return found.means + level + (found.y_hat - fixed), bits  # with the correction, if there is one
        return found.y_hat, bits

    def _noise(self, batch: Batch, sides_hat: Sides) -> tuple[Tensor, Tensor]:
        noisy = self._noisy(batch)
        found = self.codec.given(sides_hat, noisy)
        return found.y_hat, self._likelihood_bits(noisy, found)

    def _straight_through(self, batch: Batch, sides_hat: Sides) -> tuple[Tensor, Tensor]:
        y = batch.y.to(self.weights.dtype)

        def rounded(stage: Stage) -> Tensor:
            means = stage.means.detach()
            return torch.round(stage.elements.take(y) - means) + means

        found = self.codec.follow(sides_hat, rounded)
        return found.y_hat, self._likelihood_bits(self._noisy(batch), found)

    def _index_bits(self, batch: Batch, found: Given) -> Tensor:
        if found.scales is None:
            bits: Tensor = self.rate(batch.k, batch.quantizer).sum().float()
            return bits
        scales = self.codec.gaussian.lower_bound_scale(found.scales)  # its gradient lets sigma grow above the bound
        bits = self.rate(scales, batch.k, batch.quantizer).sum()
        return bits

    def _noisy(self, batch: Batch) -> Tensor:
        return batch.y.to(self.weights.dtype) + batch.noise

    def _likelihood_bits(self, y: Tensor, found: Given) -> Tensor:
        return bits_of(self.codec.likelihood(y, Stage(found.means, found.scales)))


class Turns(nn.Module):
    """The forward passes of several quantizers with one model; a batch says by number whose turn it is."""

    def __init__(self, decodings: Sequence[Decoding]) -> None:
        super().__init__()
        self.decodings = nn.ModuleList(decodings)

    def forward(self, batch: Batch, turn: int) -> tuple[Tensor, Tensor]:
        """Return what the decoding whose turn it is returns."""
        found: tuple[Tensor, Tensor] = self.decodings[turn](batch)
        return found
