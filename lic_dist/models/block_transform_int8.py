"""`block-transform` with g_s and h_s in 8 bits (int8.py), made of a trained one: its encoder, floats; its decoder,
integers.
"""

from __future__ import annotations

from torch import nn

from lic_dist.models.block_transform import BLOCK, COLOURS, BlockTransform
from lic_dist.models.int8 import (
    Convolution8,
    DenormalizeGaussians8,
    Gain8,
    LeakyReLU8,
    Residual8,
    Rotation8,
    Transposed8,
)
from lic_dist.models.slim import DEPTH, EXPANSION


class BlockTransformInt8(BlockTransform):
    """The model; the names of its parameters are those of `BlockTransform`."""

    def __init__(self, N: int = 96, M: int = 192, depth: int = DEPTH, expansion: int = EXPANSION) -> None:
        super().__init__(N, M, depth, expansion)
        self.g_s = nn.Sequential(
            Gain8(M),
            *(Residual8(M, expansion) for _ in range(depth)),
            Rotation8(M, 4 * COLOURS),
            nn.PixelShuffle(2),
            *(Residual8(COLOURS, expansion) for _ in range(depth)),
            Rotation8(COLOURS, COLOURS),
            nn.PixelShuffle(BLOCK),
        )
        self.h_s = nn.Sequential(
            Transposed8(N, N, 5, stride=2, padding=2, output_padding=1),
            LeakyReLU8(),
            Transposed8(N, 2 * N, 5, stride=2, padding=2, output_padding=1),
            LeakyReLU8(),
            Convolution8(2 * N, 2 * M, 3, bits=16, padding=1),
            DenormalizeGaussians8(M),
        )
