"""Refine the quantization of a picture by its decoder's answer: search, decode, move what the search aims at, repeat.

    y = target --search--> k --> y_hat --g_s--> x_hat --> L = lmbda D + bits;  the target of the least L is kept
           ^                                      |
           +-------- G, gradient of D at y_hat ---+

The search prices an error of y by one weight a channel, as if errors of neighbours did not add up in the picture. The
decoder knows better: about y_hat, lmbda D is G v + H v^2 for a further change v, least at v = -G / (2 H). A step moves
the target a part of the way from where it is to that point, and the parts fall, so that fewer and fewer indices change;
where a step raised L of an image, its further ones are half as long.
H is the curvature of each channel of a picture, as the errors of the searches show it: their slope over their size,
where the last search counts half. Each step has real indices and real rates, nothing is relaxed, and a picture never
ends with more L than it had.

Analysis by synthesis, in the terms of speech coding; beside the annealed rounding of Yang, Bamler and Mandt 2020 it
needs few steps and serves a trellis (`lic-dist bench refine`). A step costs a search and a pass of g_s there and back,
in bfloat16 where the device has units for it (`fast_bfloat16`), which costs no gain.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from lic_dist.codec import walk
from lic_dist.models.protocol import CodecModel, Run, Sides, Stage
from lic_dist.models.refine import Refinement, costs_and_gradient, decoded, require_refinement
from lic_dist.models.stages import known_stage
from lic_dist.quantization.quantize import Quantizer
from lic_dist.quantization.record import QuantizerRecord

VERSION = 2  # of what the steps make of y; 1 had the first search's curvature, parts that fell faster, and float32
FIRST, LAST = 0.4, 1.2  # parts of the way: of the first step, and of the last one, LAST / steps^2; geometric between
FLATTEST = 0.1  # of a picture's curvature: the least that a channel has
FURTHEST = 4.0  # steps of the quantizer between target and y_hat
CLEAR = 1e-3  # of L: what a target gains at least; bfloat16 leaves 3e-4 unclear


class Answer(Protocol):
    """What a decoder says of y_hat, float32 [B, M, h, w] as g_s takes it: `Refinement.errors` of its pictures, [B], and
    their gradient in y_hat, where it is asked for, else nothing.
    """

    def __call__(self, y_hat: Tensor, gradient: bool) -> tuple[Tensor, Tensor | None]: ...


def refinement_of(record: QuantizerRecord) -> Refinement:
    """Return the refinement that a record asks for."""
    return Refinement(record.refine, record.lmbda, record.refine_distortion, record.refine_z)


def answer_of(codec: CodecModel, x: Tensor, refinement: Refinement) -> Answer:
    """Return the answer of a decoder for pictures x, float32 [B, 3, H, W] in [0, 1], that it makes at once; x_hat is
    not clamped to [0, 1], where it would have no gradient.
    """

    def errors(y_hat: Tensor) -> Tensor:
        return refinement.errors(decoded(codec, y_hat), x)

    def answer(y_hat: Tensor, gradient: bool) -> tuple[Tensor, Tensor | None]:
        return costs_and_gradient(y_hat, errors) if gradient else (errors(y_hat), None)

    return answer


@torch.no_grad()
def refine(
    codec: CodecModel,
    sides_hat: Sides,
    y: Tensor,
    quantizer: Quantizer,
    answer: Answer,
    refinement: Refinement,
    run: Run | None = None,
    threads: int = 1,
    known: Stage | None = None,
) -> Tensor:
    """Return what a search should aim at in place of y, float16 [B, M, h, w] like y; each image for itself.

    `run` is that of `CodecModel.walk`; the searches of a CPU take `threads`. `known` is the `known_stage`, which is
    asked for where it is not given.

    Raises:
        LicError: the family does not support it, or as `walk.search` does.
    """
    require_refinement(codec)
    known = known or known_stage(codec, sides_hat, y.shape[2:], run)
    target = y.detach().float()
    best, curvature, length = target, None, torch.ones(len(y), 1, 1, 1, device=y.device)
    least = last = torch.full((len(y),), torch.inf, dtype=torch.float64, device=y.device)
    for part in (*_parts(refinement.steps), 0.0):
        coded = walk.search(
            codec, sides_hat, target, quantizer, run, None, threads, errors=False, apart=part > 0, known=known
        )
        errors, slope = answer(coded.y_hat, part > 0)
        bits = torch.from_numpy(walk.channel_bits(codec, quantizer, coded.k, coded.level).sum(axis=1)).to(y.device)
        loss = refinement.error_weight * errors.double() + bits
        best = torch.where(_of_images(loss < least), target, best)
        least = torch.minimum(loss, least) if curvature is not None else loss * (1 - CLEAR)
        if slope is None or coded.apart is None:
            break
        seen = _curvature(slope, coded.apart)
        curvature = seen if curvature is None else (curvature + seen) / 2
        reach = FURTHEST * quantizer.record.step
        aim = (-slope / curvature).nan_to_num(0, 0, 0).clamp(-reach, reach)  # from y_hat
        length, last = torch.where(_of_images(loss > last), length / 2, length), loss
        target = (target + part * length * (aim - coded.apart)).half().float()
    return best.half()


def _of_images(values: Tensor) -> Tensor:
    return values[:, None, None, None]


def _parts(steps: int) -> list[float]:
    return [float(part) for part in np.geomspace(FIRST, LAST / max(steps, 1) ** 2, steps)]


def _curvature(slope: Tensor, apart: Tensor) -> Tensor:
    """Return 2 H of each channel of each image, [B, M, 1, 1], from the gradient at y_hat and the errors y - y_hat
    there: the regression of one on the other. Infinite for an image whose errors cost nothing: it stays what
    it is.
    """
    along, size = -(slope * apart).flatten(2).sum(2), apart.square().flatten(2).sum(2)
    whole = along.sum(1, keepdim=True) / size.sum(1, keepdim=True)
    own = torch.maximum((along / size).nan_to_num(0, 0, 0), FLATTEST * whole)
    return torch.where(whole > 0, own, torch.inf)[..., None, None]
