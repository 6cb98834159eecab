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

z_hat is the stored one; its bits are CompressAI's likelihood.
"""

from __future__ import annotations

import copy
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from lic_dist.config import Finetune
from lic_dist.models.architectures import adapt
from lic_dist.models.protocol import TRANSFORMS, Stage
from lic_dist.models.stages import bits_of, only_side, only_stage
from lic_dist.quantization.record import QuantizerRecord
from lic_dist.training.rate import IndexRate
from lic_dist.training.samples import Batch

MeansGradient = Literal["likelihood", "search", "pixels"]
Form = Literal["quantized", "likelihood", "noise", "straight-through"]


def form_of(section: Finetune, record: QuantizerRecord, hyper_trains: bool) -> Form:
    """Return the form that a job trains on: the section's, where `sq_rate` decides for unit SQ under a trained h_s."""
    if section.latents != "quantized":
        return section.latents
    by_likelihood = section.means == "likelihood" or (unit_sq(record) and section.sq_rate == "likelihood")
    return "likelihood" if hyper_trains and by_likelihood else "quantized"


def unit_sq(record: QuantizerRecord) -> bool:
    """Return whether a quantizer's cells are those of CompressAI's likelihood."""
    return (record.name, record.step, record.shift) == ("sq", 1, 0)


class Decoding(nn.Module):
    """The forward pass of the module's text. `bf16` runs g_s under autocast; means, scales and bits are always float32.

    The search cost needs y in the batch. It adds to the gradient, not to the value of the bits returned.
    """

    def __init__(
        self,
        model: nn.Module,
        record: QuantizerRecord,
        form: Form = "quantized",
        bf16: bool = False,
        means_gradient: MeansGradient = "pixels",
    ) -> None:
        super().__init__()
        self.model, self.bf16, self.pixels = model, bf16, means_gradient == "pixels"
        self._codec = adapt(model)
        self._side = only_side(self._codec)
        self.rate, self.unit_sq = IndexRate(record), unit_sq(record)
        error_weight = record.lmbda * 255**2 / (3 * record.lambda_scale)  # of a unit of S_c (y - y_hat)^2, in bits
        weights = torch.from_numpy(record.weights * np.float32(error_weight))
        self.register_buffer("weights", weights.reshape(1, -1, 1, 1), persistent=False)
        self.weights: Tensor
        self.parent = nn.ModuleDict()  # the parent's networks of the entropy model
        if form == "likelihood":
            nets = {name: net for name, net in self._codec.nets.items() if name not in TRANSFORMS}
            self.parent = nn.ModuleDict(copy.deepcopy(nets)).requires_grad_(False)
        forms = {
            "quantized": self._quantized,
            "likelihood": self._likelihood,
            "noise": self._noise,
            "straight-through": self._straight_through,
        }
        self.make_y_hat = forms[form]

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return (x_hat float32 [b, 3, s, s], bits of y and z in the batch, float32)."""
        z_hat = self._side.dequantize(batch.z)
        stage = only_stage(self._codec, (z_hat,))
        y_hat, bits_of_y = self.make_y_hat(batch, stage, z_hat)
        bits = bits_of(self._side.likelihood(z_hat)) + bits_of_y
        with torch.autocast(y_hat.device.type, torch.bfloat16, enabled=self.bf16):
            x_hat = self._codec.synthesise(y_hat)
        return x_hat.to(y_hat.dtype), bits

    def _quantized(self, batch: Batch, stage: Stage, z_hat: Tensor) -> tuple[Tensor, Tensor]:
        scales = self._codec.gaussian.lower_bound_scale(stage.scales)  # its gradient lets sigma grow above the bound
        y_hat, bits = stage.means + batch.level, self.rate(scales, batch.k, batch.quantizer).sum()
        if self.pixels:
            return y_hat, bits
        cost = (self.weights * (batch.y - y_hat).square()).sum()
        return y_hat.detach(), bits + cost - cost.detach()

    def _likelihood(self, batch: Batch, stage: Stage, z_hat: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            means = only_stage(self._codec, (z_hat,), lambda name, values: self.parent[name](values)).means
        fixed = means + batch.level
        coded = fixed if self.unit_sq else batch.y.to(fixed.dtype) + batch.noise
        return stage.means + batch.level if self.pixels else fixed, self._gaussian_bits(coded, stage)

    def _noise(self, batch: Batch, stage: Stage, z_hat: Tensor) -> tuple[Tensor, Tensor]:
        y_hat = batch.y.to(stage.means.dtype) + batch.noise
        return y_hat, self._gaussian_bits(y_hat, stage)

    def _straight_through(self, batch: Batch, stage: Stage, z_hat: Tensor) -> tuple[Tensor, Tensor]:
        y, means = batch.y.to(stage.means.dtype), stage.means.detach()
        return torch.round(y - means) + means, self._gaussian_bits(y + batch.noise, stage)

    def _gaussian_bits(self, y_hat: Tensor, stage: Stage) -> Tensor:
        return bits_of(self._codec.likelihood(y_hat, stage))
