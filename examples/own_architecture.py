"""A codec that lic_dist does not know, and its family: `train.architecture: own_architecture:Linear` (docs/families.md)

Learned linear transforms of 8x8 pixels: y has an eighth of the picture's sides, z a 32nd.
"""

from compressai.entropy_models import EntropyBottleneck, GaussianConditional
from compressai.models.base import CompressionModel
from torch import nn

from lic_dist.models.protocol import CodecModel, Side, Stage, Strides, one_layout


class LinearCodec(CompressionModel):
    def __init__(self, N, M, slope=0.01):
        super().__init__()
        self.M = M
        self.forth = nn.Sequential(nn.PixelUnshuffle(8), nn.Conv2d(192, M, 1))
        self.back = nn.Sequential(nn.Conv2d(M, 192, 1), nn.PixelShuffle(8))
        down, up = {"stride": 2, "padding": 2}, {"stride": 2, "padding": 2, "output_padding": 1}
        self.ask = nn.Sequential(nn.Conv2d(M, N, 5, **down), nn.LeakyReLU(slope), nn.Conv2d(N, N, 5, **down))
        bend = nn.LeakyReLU(slope)
        self.tell = nn.Sequential(nn.ConvTranspose2d(N, N, 5, **up), bend, nn.ConvTranspose2d(N, 2 * M, 5, **up))
        self.prior, self.gaussian_conditional = EntropyBottleneck(N), GaussianConditional(None)


class Linear(CodecModel):
    name = "linear"
    module_class = LinearCodec
    strides = Strides(y=8, sides=(32,), multiple=32)  # pixels a position; pictures are padded to multiples of 32
    parts = {"encoder": ("forth.", "ask."), "decoder": ("back.",), "hyper": ("tell.",), "prior": ("prior.",)}
    supports = frozenset({"deterministic", "tiles", "refinement"})

    @classmethod
    def fits(cls, state):
        return "forth.1.weight" in state

    @classmethod
    def sizes(cls, state):
        return {"N": state["ask.0.weight"].shape[0], "M": state["ask.0.weight"].shape[1]}

    @property
    def sides(self):
        return (Side("z", self.module.prior),)

    @property
    def nets(self):
        module = self.module
        return {"g_a": module.forth, "h_a": module.ask, "g_s": module.back, "h_s": module.tell}

    def walk(self, sides_hat, run):
        means, scales = run("h_s", one_layout(sides_hat[0])).chunk(2, 1)
        y_hat = yield Stage(means, scales)  # of all of y
        return y_hat
