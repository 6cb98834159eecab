"""The loss L = lmbda * D + bpp (Balle et al. 2018; D of training/distortion.py), and held-out figures."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from statistics import fmean
from typing import Any, TypeVar

import torch
from torch import Tensor

from lic_dist.training.distributed import Ranks

P = TypeVar("P")


def psnr(mse: float) -> float:
    """Return the PSNR in dB for a mean squared error of pixels in [0, 1]."""
    return -10 * math.log10(max(mse, 1e-12))


@dataclass(frozen=True)
class HeldOut:
    """Means over held-out pictures: L, bits per pixel, and the PSNR in dB of the mean squared error.

    `by_source` is L of the pictures of each source, where they are told apart (training/sources.py).
    """

    L: float
    bpp: float
    psnr: float
    by_source: dict[Any, float] = field(default_factory=dict)

    def plain(self) -> dict[str, Any]:
        """Return the figures as plain data, `by_source` where there is one."""
        return {name: value for name, value in asdict(self).items() if value != {}}


def joined(figures: Mapping[str, HeldOut]) -> HeldOut:
    """Return the means over groups by name, and L of each group's sources; of one group its own figures."""
    if len(figures) == 1:
        return next(iter(figures.values()))
    L, bpp, psnr = (fmean(getattr(one, name) for one in figures.values()) for name in ("L", "bpp", "psnr"))
    sources = {group: one.by_source or {"": one.L} for group, one in figures.items()}
    by_source = {f"{group} {name}".strip(): L for group, some in sources.items() for name, L in some.items()}
    return HeldOut(L, bpp, psnr, by_source)


@torch.no_grad()
def held_out_figures(
    parts: Sequence[P],
    decode: Callable[[P], tuple[Tensor, Tensor, Tensor]],
    distortion: Callable[[Tensor, Tensor], Tensor],
    lmbda: float,
    ranks: Ranks,
    sources: Sequence[Hashable] = (),
) -> HeldOut:
    """Compute figures over parts of the held-out pictures, which are divided among the ranks.

    `decode` gives x, x_hat (clamped here), float32 [B, 3, s, s], and the bits of a part; `sources` the source of each
    part. Sums are taken in the order of the parts, so that the figures are equal on every rank and for any number of
    ranks.
    """
    mine = []
    for part in parts[ranks.rank :: ranks.world]:
        x, x_hat, bits = decode(part)
        x_hat = x_hat.clamp(0, 1)
        squared = float((x_hat - x).double().square().sum())
        mine.append((len(x) * float(distortion(x_hat, x)), squared, float(bits), len(x), x.numel()))
    gathered = ranks.gather(mine)
    rows = [gathered[number % ranks.world][number // ranks.world] for number in range(len(parts))]

    def figures(rows: Sequence[tuple[float, ...]]) -> HeldOut:
        error, squared, bits, pictures, values = (sum(column) for column in zip(*rows, strict=True))
        bpp = bits / (values / 3)
        return HeldOut(lmbda * error / pictures + bpp, bpp, psnr(squared / values))

    by_source: dict[Hashable, list[tuple[float, ...]]] = {}
    for source, row in zip(sources, rows, strict=False):  # no sources: one, and it has no name
        by_source.setdefault(source, []).append(row)
    return replace(figures(rows), by_source={source: figures(some).L for source, some in by_source.items()})
