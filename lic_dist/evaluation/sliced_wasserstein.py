"""The sliced Wasserstein distance of Laplacian patches: how far a picture's textures are from the original's.

It is the measure of Karras et al. 2018 (Progressive growing of GANs, arXiv 1710.10196, section 5), of one picture and
its original: on each level of a Laplacian pyramid (Burt and Adelson 1983), patches of 7x7 pixels are 147 numbers each,
normalized by mean and deviation of each channel; a distance is the mean, over random directions, of the Wasserstein-1
distance of the two sets projected. Where a patch lies does not count, so that a texture may differ in every pixel.

Two things are not Karras's. Both sets are normalized by the original's mean and deviation, as a decoder that blurs
takes away deviation, which must show; and the positions of patches are the same in both, so that equal pictures have a
distance of 0.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import conv2d, pad

LEVELS = 5  # at most; the smallest level has LEAST pixels a side or more
LEAST = 16
SIDE = 7  # pixels of a patch
PATCHES = 4096  # of a level, at most
DIRECTIONS = 128
FLOOR = 1.0  # grey levels: the least deviation of a channel, of flat pictures
SEED = 2018


def swd(a: NDArray[np.uint8], b: NDArray[np.uint8]) -> float:
    """Return the mean over the levels of the distance of b from the original a, uint8 [H, W, 3] of LEAST a side at
    least: in deviations of the original's, 0 for equal pictures.
    """
    with torch.inference_mode():
        pictures = torch.from_numpy(np.stack([a, b]).transpose(0, 3, 1, 2).astype(np.float32))
        distances = [_distance(level) for level in laplacian_pyramid(pictures, levels(*a.shape[:2]))]
    return sum(distances) / len(distances)


def levels(height: int, width: int) -> int:
    """Return the number of levels of a picture of these sides."""
    count = 1
    while count < LEVELS and min(height, width) >= LEAST << count:
        count += 1
    return count


def laplacian_pyramid(pictures: Tensor, levels: int) -> list[Tensor]:
    """Return the levels of pictures [B, C, H, W], the finest first and the low-pass rest last; each has half the sides
    of the one before, rounded up, and they sum up to the pictures.
    """
    found = []
    for _ in range(levels - 1):
        smaller = _smoothed(pictures)[..., ::2, ::2]
        spread = torch.zeros_like(pictures)
        spread[..., ::2, ::2] = smaller
        found.append(pictures - 4 * _smoothed(spread))
        pictures = smaller
    return [*found, pictures]


def _smoothed(pictures: Tensor) -> Tensor:
    """Return pictures under the binomial window of 5x5, continued by their mirror images."""
    window = torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0]) / 16
    planes = pad(pictures, (2, 2, 2, 2), mode="reflect").flatten(0, 1)[:, None]
    return conv2d(conv2d(planes, window.view(1, 1, 5, 1)), window.view(1, 1, 1, 5)).view_as(pictures)


def _distance(level: Tensor) -> float:
    """Return the distance of a level of two pictures [2, 3, h, w]."""
    patches = level.unfold(2, SIDE, 1).unfold(3, SIDE, 1)  # [2, 3, rows, columns, 7, 7]
    rows, columns = _positions(*patches.shape[2:4])
    chosen = patches[:, :, rows, columns]  # [2, 3, n, 7, 7]
    deviation, mean = torch.std_mean(chosen[0], (1, 2, 3), correction=0)
    normal = (chosen - mean.view(3, 1, 1, 1)) / deviation.clamp(min=FLOOR).view(3, 1, 1, 1)
    projected = _directions() @ normal.permute(0, 1, 3, 4, 2).flatten(1, 3)  # [2, DIRECTIONS, n]
    ordered = projected.sort(2).values
    return float((ordered[0] - ordered[1]).abs().mean(dtype=torch.float64))


@cache
def _positions(rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Return row and column of each patch that is taken of so many, by chance, so that blocks' grids do not matter."""
    count = rows * columns
    chosen = np.random.default_rng(SEED).permutation(count)[:PATCHES]
    return torch.from_numpy(chosen // columns), torch.from_numpy(chosen % columns)


@cache
def _directions() -> Tensor:
    """Return unit vectors [DIRECTIONS, 147]."""
    drawn = np.random.default_rng(SEED).standard_normal((DIRECTIONS, 3 * SIDE**2))
    return torch.from_numpy((drawn / np.linalg.norm(drawn, axis=1, keepdims=True)).astype(np.float32))
