"""Shrinkage as activation: `train.architecture: shrinkage_activation:Shrinkage` (docs/options.md)

`block-transform` with soft thresholds, one for each channel, in the place of GELU (Kirmemis and Tekalp 2020,
"Shrinkage as activation for learned image compression").
"""

import torch
from torch import nn

from lic_dist.models.block_transform import BlockTransform
from lic_dist.models.families.hyperprior import BlockTransform as Plain
from lic_dist.models.layers import Residual


class SoftThreshold(nn.Module):
    def __init__(self, channels, start):
        super().__init__()
        self.threshold = nn.Parameter(torch.full((channels,), start))

    def forward(self, x):  # [B, C, h, w]
        least = self.threshold.abs()[:, None, None]
        return x.sign() * (x.abs() - least).relu()


class ShrinkageCodec(BlockTransform):
    def __init__(self, N, M, start=0.02):
        super().__init__(N, M)
        for block in (one for one in self.modules() if isinstance(one, Residual)):
            block.body[2] = SoftThreshold(block.body[1].out_channels, start)


class Shrinkage(Plain):
    name = "shrinkage"
    module_class = ShrinkageCodec

    @classmethod
    def fits(cls, state):
        return any(name.endswith(".threshold") for name in state)
