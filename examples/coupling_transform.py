"""A transform that is approximately invertible: `train.architecture: coupling_transform:Coupling` (docs/options.md)

`block-transform` with coupling layers in the place of its residual blocks. Each adds to one half of the channels what a
network makes of the other, so that g_s takes it back with the same network. What g_s has of its own takes off the error
of quantization first (Gao et al. 2025, "Approximately invertible neural network for learned image compression").
The networks that both share are the encoder's: the recipe `decoder` retrains the rest of g_s.
"""

from torch import cat, nn

from lic_dist.models.block_transform import BlockTransform
from lic_dist.models.families.hyperprior import BlockTransform as Plain
from lic_dist.models.layers import Residual


class Couple(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.first, self.second = (Residual(channels // 2).body for _ in range(2))

    def forward(self, x):  # [B, C, h, w]
        one, other = x.chunk(2, 1)
        one = one + self.first(other)
        return cat((one, other + self.second(one)), 1)


class Uncouple(nn.Module):
    def __init__(self, forth):
        super().__init__()
        self.shared = (forth,)  # in a tuple: its parameters stay those of g_a alone

    def forward(self, x):
        (forth,), (one, other) = self.shared, x.chunk(2, 1)
        other = other - forth.second(one)
        return cat((one - forth.first(other), other), 1)


class CouplingCodec(BlockTransform):
    def __init__(self, N, M):
        super().__init__(N, M)
        blocks, denoise = [*self.g_s], Residual(M)
        for at, layer in enumerate(self.g_a):
            if isinstance(layer, Residual):
                self.g_a[at] = Couple(layer.body[0].in_channels)
                blocks[len(blocks) - 1 - at] = Uncouple(self.g_a[at])
        self.g_s = nn.Sequential(blocks[0], denoise, *blocks[1:])


class Coupling(Plain):
    name = "coupling"
    module_class = CouplingCodec
    supports = frozenset({"deterministic", "refinement"})

    @classmethod
    def fits(cls, state):
        return "g_a.2.first.0.weight" in state
