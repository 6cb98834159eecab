"""A codec as public repositories have them, which knows nothing of lic_dist: window attention, channel slices, LRP.

Sides of pictures are multiples of 256: the windows of h_a are 8x8 positions, at a 32nd of the sides.
"""

import torch
from compressai.ans import BufferedRansEncoder, RansDecoder
from compressai.entropy_models import EntropyBottleneck, GaussianConditional
from compressai.layers import ResidualBlockUpsample, ResidualBlockWithStride, conv3x3, subpel_conv3x3
from compressai.models import CompressionModel
from compressai.models.utils import update_registered_buffers
from compressai.ops import quantize_ste
from torch import nn

NAMES = ["_quantized_cdf", "_offset", "_cdf_length", "scale_table"]


class WindowBlock(nn.Module):
    """Attention within windows, which lie half a window further where `shifted`, and a pointwise network."""

    def __init__(self, dim, head_dim, window_size, shifted):
        super().__init__()
        self.heads, self.window_size, self.shift = dim // head_dim, window_size, window_size // 2 if shifted else 0
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))
        self.bias = nn.Parameter(0.02 * torch.randn(self.heads, (2 * window_size - 1) ** 2))
        at = torch.cartesian_prod(torch.arange(window_size), torch.arange(window_size))
        apart = at[:, None] - at[None] + window_size - 1
        self.register_buffer("apart", apart[..., 0] * (2 * window_size - 1) + apart[..., 1], persistent=False)

    def cut(self, x):
        """[B, h, w, C] -> [B, windows, positions, C]"""
        size = self.window_size
        x = x.unflatten(2, (-1, size)).unflatten(1, (-1, size))
        return x.transpose(2, 3).flatten(3, 4).flatten(1, 2)

    def mask(self, h, w, device):
        """-inf between positions of a window that the roll has brought together: [windows, 1, positions, positions]"""
        rows, columns = (torch.arange(n, device=device) >= n - self.shift for n in (h, w))
        label = self.cut((2 * rows[:, None] + columns)[None, ..., None])[0, ..., 0]
        return (label[:, None, :] != label[:, :, None])[:, None]

    def attend(self, x):
        _, h, w, dim = x.shape
        if self.shift:
            x = x.roll((-self.shift, -self.shift), (1, 2))
        qkv = self.qkv(self.cut(x)).unflatten(3, (3, self.heads, -1)).permute(3, 0, 1, 4, 2, 5)
        weight = qkv[0] @ qkv[1].transpose(-1, -2) * (dim // self.heads) ** -0.5 + self.bias[:, self.apart]
        if self.shift:
            weight = weight.masked_fill(self.mask(h, w, x.device), float("-inf"))
        out = self.proj((weight.softmax(-1) @ qkv[2]).transpose(2, 3).flatten(3))
        size = self.window_size
        out = out.unflatten(2, (size, size)).unflatten(1, (h // size, w // size)).transpose(2, 3).flatten(3, 4)
        out = out.flatten(1, 2)
        return out.roll((self.shift, self.shift), (1, 2)) if self.shift else out

    def forward(self, x):
        x = x.permute(0, 2, 3, 1)
        x = x + self.attend(self.norm1(x))
        x = x + self.mlp(self.norm2(x))
        return x.permute(0, 3, 1, 2)


class WindowAttention(nn.Module):
    """A pair of blocks between 1x1 convolutions, as a gate of the input."""

    def __init__(self, dim, inner, head_dim, window_size):
        super().__init__()
        self.in_conv, self.out_conv = nn.Conv2d(dim, inner, 1), nn.Conv2d(inner, dim, 1)
        self.blocks = nn.Sequential(*(WindowBlock(inner, head_dim, window_size, shifted) for shifted in (False, True)))

    def forward(self, x):
        inner = self.in_conv(x)
        return x + self.out_conv(inner * torch.sigmoid(self.blocks(inner)))


class WindowCodec(CompressionModel):
    def __init__(self, N=16, M=32, num_slices=4, max_support_slices=2, window_size=8, head_dim=8):
        super().__init__()
        self.num_slices, self.max_support_slices = num_slices, max_support_slices

        def pair():
            return [WindowBlock(N, head_dim, window_size, shifted) for shifted in (False, True)]

        self.g_a = nn.Sequential(
            ResidualBlockWithStride(3, N, 2),
            ResidualBlockWithStride(N, N, 2),
            ResidualBlockWithStride(N, N, 2),
            *pair(),
            conv3x3(N, M, stride=2),
        )
        self.g_s = nn.Sequential(
            ResidualBlockUpsample(M, N, 2),
            *pair(),
            ResidualBlockUpsample(N, N, 2),
            ResidualBlockUpsample(N, N, 2),
            subpel_conv3x3(N, 3, 2),
        )
        self.h_a = nn.Sequential(ResidualBlockWithStride(M, N, 2), *pair(), conv3x3(N, N, stride=2))
        self.h_mean_s = nn.Sequential(ResidualBlockUpsample(N, N, 2), *pair(), subpel_conv3x3(N, M, 2))
        self.h_scale_s = nn.Sequential(ResidualBlockUpsample(N, N, 2), *pair(), subpel_conv3x3(N, M, 2))
        part = M // num_slices
        seen = [M + part * min(i, max_support_slices) for i in range(num_slices)]
        self.atten_mean = nn.ModuleList(WindowAttention(dim, N, head_dim, window_size) for dim in seen)
        self.atten_scale = nn.ModuleList(WindowAttention(dim, N, head_dim, window_size) for dim in seen)
        self.cc_mean_transforms = nn.ModuleList(self.transform(dim, N, part) for dim in seen)
        self.cc_scale_transforms = nn.ModuleList(self.transform(dim, N, part) for dim in seen)
        self.lrp_transforms = nn.ModuleList(self.transform(dim + part, N, part) for dim in seen)
        self.entropy_bottleneck = EntropyBottleneck(N)
        self.gaussian_conditional = GaussianConditional(None)

    @staticmethod
    def transform(dim, inner, out):
        return nn.Sequential(nn.Conv2d(dim, inner, 3, padding=1), nn.GELU(), nn.Conv2d(inner, out, 3, padding=1))

    def parameters_of(self, i, latent_means, latent_scales, y_hat_slices):
        support = y_hat_slices if self.max_support_slices < 0 else y_hat_slices[: self.max_support_slices]
        mean_support = self.atten_mean[i](torch.cat([latent_means, *support], dim=1))
        scale_support = self.atten_scale[i](torch.cat([latent_scales, *support], dim=1))
        return mean_support, self.cc_mean_transforms[i](mean_support), self.cc_scale_transforms[i](scale_support)

    def corrected(self, i, mean_support, y_hat_slice):
        lrp = self.lrp_transforms[i](torch.cat([mean_support, y_hat_slice], dim=1))
        y_hat_slice += 0.5 * torch.tanh(lrp)
        return y_hat_slice

    def forward(self, x):
        y = self.g_a(x)
        z = self.h_a(y)
        _, z_likelihoods = self.entropy_bottleneck(z)
        offset = self.entropy_bottleneck._get_medians()
        z_hat = quantize_ste(z - offset) + offset
        latent_scales, latent_means = self.h_scale_s(z_hat), self.h_mean_s(z_hat)
        y_hat_slices, y_likelihood = [], []
        for i, y_slice in enumerate(y.chunk(self.num_slices, 1)):
            mean_support, mu, scale = self.parameters_of(i, latent_means, latent_scales, y_hat_slices)
            y_likelihood.append(self.gaussian_conditional(y_slice, scale, mu)[1])
            y_hat_slices.append(self.corrected(i, mean_support, quantize_ste(y_slice - mu) + mu))
        x_hat = self.g_s(torch.cat(y_hat_slices, dim=1))
        return {"x_hat": x_hat, "likelihoods": {"y": torch.cat(y_likelihood, dim=1), "z": z_likelihoods}}

    def load_state_dict(self, state_dict):
        update_registered_buffers(self.gaussian_conditional, "gaussian_conditional", NAMES, state_dict)
        super().load_state_dict(state_dict)

    def tables(self):
        conditional = self.gaussian_conditional
        return (
            conditional.quantized_cdf.tolist(),
            conditional.cdf_length.reshape(-1).int().tolist(),
            conditional.offset.reshape(-1).int().tolist(),
        )

    def compress(self, x):
        y = self.g_a(x)
        z = self.h_a(y)
        z_strings = self.entropy_bottleneck.compress(z)
        z_hat = self.entropy_bottleneck.decompress(z_strings, z.size()[-2:])
        latent_scales, latent_means = self.h_scale_s(z_hat), self.h_mean_s(z_hat)
        symbols, indexes, y_hat_slices = [], [], []
        for i, y_slice in enumerate(y.chunk(self.num_slices, 1)):
            mean_support, mu, scale = self.parameters_of(i, latent_means, latent_scales, y_hat_slices)
            y_q_slice = self.gaussian_conditional.quantize(y_slice, "symbols", mu)
            symbols.extend(y_q_slice.reshape(-1).tolist())
            indexes.extend(self.gaussian_conditional.build_indexes(scale).reshape(-1).tolist())
            y_hat_slices.append(self.corrected(i, mean_support, y_q_slice + mu))
        encoder = BufferedRansEncoder()
        encoder.encode_with_indexes(symbols, indexes, *self.tables())
        return {"strings": [[encoder.flush()], z_strings], "shape": z.size()[-2:]}

    def decompress(self, strings, shape):
        z_hat = self.entropy_bottleneck.decompress(strings[1], shape)
        latent_scales, latent_means = self.h_scale_s(z_hat), self.h_mean_s(z_hat)
        decoder = RansDecoder()
        decoder.set_stream(strings[0][0])
        y_hat_slices = []
        for i in range(self.num_slices):
            mean_support, mu, scale = self.parameters_of(i, latent_means, latent_scales, y_hat_slices)
            index = self.gaussian_conditional.build_indexes(scale)
            values = torch.tensor(decoder.decode_stream(index.reshape(-1).tolist(), *self.tables())).reshape(mu.shape)
            y_hat_slices.append(self.corrected(i, mean_support, self.gaussian_conditional.dequantize(values, mu)))
        y_hat = torch.cat(y_hat_slices, dim=1)
        return {"x_hat": self.g_s(y_hat).clamp_(0, 1)}
