"""A light codec of two block transforms, `block-transform`: on a par with bmshj2018-hyperprior at a quarter of its
work.

    x -> 8x8 blocks -> 1x1 -> blocks -> 2x2 of them -> 1x1 -> blocks -> gain -> y     g_a; g_s goes the same way back
    y -> in units of each channel's deviation -> h_a -> z -> h_s -> means, log scales in these units -> means, scales

Residual blocks of depthwise 5x5 convolutions modify what both 1x1 layers make; the shipped weights began with these as
a two-step Karhunen-Loeve transform (klt.py). Under autocast the residual blocks alone compute in less than float32. The
model has the names of a CompressAI mean-scale hyperprior (g_a, h_a, h_s, g_s, entropy_bottleneck,
gaussian_conditional), its strides of 16 and 64, and its `compress` and `decompress`.
"""

from __future__ import annotations

from collections import OrderedDict

from compressai.entropy_models import EntropyBottleneck, GaussianConditional
from compressai.models import MeanScaleHyperprior
from compressai.models.base import CompressionModel
from torch import Tensor, nn

from lic_dist.models.layers import DenormalizeGaussians, FullPrecision, Gain, NormalizeChannels, Residual
from lic_dist.models.slim import DEPTH, EXPANSION, slimness

BLOCK = 8  # pixels a side of what the first layer transforms
COLOURS = 3 * BLOCK**2


class BlockTransform(MeanScaleHyperprior):
    """The model: x float32 [B, 3, H, W] in [0, 1], sides multiples of 64 -> y [B, M, H/16, W/16], z [B, N, H/64, W/64].

    The first transform has 192 channels, as many as a block of 8x8 pixels has values. A slim one has fewer residual
    blocks on each grid, `depth`, and fewer channels within each, `expansion` times those that it modifies.
    """

    def __init__(self, N: int = 96, M: int = 192, depth: int = DEPTH, expansion: int = EXPANSION) -> None:
        CompressionModel.__init__(self)
        self.N, self.M = N, M
        self.entropy_bottleneck = EntropyBottleneck(N)
        self.gaussian_conditional = GaussianConditional(None)
        self.g_a = nn.Sequential(
            nn.PixelUnshuffle(BLOCK),
            FullPrecision(COLOURS, COLOURS, 1),
            *(Residual(COLOURS, expansion) for _ in range(depth)),
            nn.PixelUnshuffle(2),
            FullPrecision(4 * COLOURS, M, 1),
            *(Residual(M, expansion) for _ in range(depth)),
            Gain(M),
        )
        self.g_s = nn.Sequential(
            Gain(M),
            *(Residual(M, expansion) for _ in range(depth)),
            FullPrecision(M, 4 * COLOURS, 1),
            nn.PixelShuffle(2),
            *(Residual(COLOURS, expansion) for _ in range(depth)),
            FullPrecision(COLOURS, COLOURS, 1),
            nn.PixelShuffle(BLOCK),
        )
        self.h_a = nn.Sequential(
            NormalizeChannels(M),
            nn.Conv2d(M, N, 3, padding=1),
            nn.LeakyReLU(),
            nn.Conv2d(N, N, 5, stride=2, padding=2),
            nn.LeakyReLU(),
            nn.Conv2d(N, N, 5, stride=2, padding=2),
        )
        self.h_s = nn.Sequential(
            nn.ConvTranspose2d(N, N, 5, stride=2, padding=2, output_padding=1),
            nn.LeakyReLU(),
            nn.ConvTranspose2d(N, 2 * N, 5, stride=2, padding=2, output_padding=1),
            nn.LeakyReLU(),
            nn.Conv2d(2 * N, 2 * M, 3, padding=1),
            DenormalizeGaussians(M),
        )

    @classmethod
    def from_state_dict(cls, state_dict: OrderedDict[str, Tensor]) -> BlockTransform:
        """Return a model of these tensors, as CompressAI's classes do."""
        model = cls(*state_dict["h_a.1.weight"].shape[:2], **slimness(state_dict))
        model.load_state_dict(state_dict)
        return model
