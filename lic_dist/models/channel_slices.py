"""A codec whose y is coded in slices of channels, `minnen2020-charm`: transforms of CompressAI's `mbt2018-mean`, the
context and the latent residual prediction (LRP) of Minnen and Singh 2020.

It has the names, and the `forward`, `compress` and `decompress`, that public repositories of such models have: see
`families/slices.py`, which adapts both.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from compressai.ans import BufferedRansEncoder, RansDecoder
from compressai.entropy_models import EntropyBottleneck, GaussianConditional
from compressai.layers import GDN, conv3x3
from compressai.models.base import CompressionModel
from compressai.models.utils import conv, deconv
from compressai.ops import quantize_ste
from torch import Tensor, nn

Code = Callable[[int, Tensor, Tensor], Tensor]  # number, means and scales of a slice -> its y_hat before LRP


class ChannelSliceModel(CompressionModel):
    """x float32 [B, 3, H, W] in [0, 1], sides multiples of 64 -> y [B, M, H/16, W/16], z [B, N, H/64, W/64].

    M is a multiple of `num_slices`. A slice sees the first `max_support_slices` before it.
    """

    def __init__(self, N: int = 192, M: int = 320, num_slices: int = 10, max_support_slices: int = 5) -> None:
        super().__init__()
        self.N, self.M, self.num_slices, self.max_support_slices = N, M, num_slices, max_support_slices
        self.entropy_bottleneck, self.gaussian_conditional = EntropyBottleneck(N), GaussianConditional(None)
        self.g_a = nn.Sequential(conv(3, N), GDN(N), conv(N, N), GDN(N), conv(N, N), GDN(N), conv(N, M))
        inverse = [GDN(N, inverse=True) for _ in range(3)]
        self.g_s = nn.Sequential(
            deconv(M, N), inverse[0], deconv(N, N), inverse[1], deconv(N, N), inverse[2], deconv(N, 3)
        )
        self.h_a = _bent(conv3x3(M, N), conv(N, N), conv(N, N))
        self.h_mean_s, self.h_scale_s = (
            _bent(deconv(N, N), deconv(N, N * 3 // 2), conv3x3(N * 3 // 2, M)) for _ in range(2)
        )
        size = M // num_slices
        seen = [M + size * min(number, max_support_slices) for number in range(num_slices)]
        middle = (N + size) // 2

        def networks(inputs: list[int]) -> nn.ModuleList:
            return nn.ModuleList(_bent(conv3x3(c, N), conv3x3(N, middle), conv3x3(middle, size)) for c in inputs)

        self.cc_mean_transforms, self.cc_scale_transforms = networks(seen), networks(seen)
        self.lrp_transforms = networks([channels + size for channels in seen])

    def forward(self, x: Tensor) -> dict[str, Any]:
        """Return x_hat and the likelihoods of y and z; y and z are rounded, with straight-through gradients."""
        y = self.g_a(x)
        z = self.h_a(y)
        medians = self.entropy_bottleneck._get_medians()
        likelihoods: list[Tensor] = []

        def rounded(number: int, means: Tensor, scales: Tensor) -> Tensor:
            part = y.chunk(self.num_slices, 1)[number]
            likelihoods.append(self.gaussian_conditional(part, scales, means)[1])
            return quantize_ste(part - means) + means

        _, of_z = self.entropy_bottleneck(z)
        x_hat = self.g_s(self._slices(quantize_ste(z - medians) + medians, rounded))
        return {"x_hat": x_hat, "likelihoods": {"y": torch.cat(likelihoods, 1), "z": of_z}}

    def compress(self, x: Tensor) -> dict[str, Any]:
        """Return the strings of y and z of a picture, B = 1, and the height and width of z."""
        y = self.g_a(x)
        z = self.h_a(y)
        z_strings = self.entropy_bottleneck.compress(z)
        symbols: list[int] = []
        indexes: list[int] = []

        def rounded(number: int, means: Tensor, scales: Tensor) -> Tensor:
            k = self.gaussian_conditional.quantize(y.chunk(self.num_slices, 1)[number], "symbols", means)
            symbols.extend(k.flatten().tolist())
            indexes.extend(self.gaussian_conditional.build_indexes(scales).flatten().tolist())
            return k + means

        self._slices(self.entropy_bottleneck.decompress(z_strings, z.shape[2:]), rounded)
        encoder = BufferedRansEncoder()
        encoder.encode_with_indexes(symbols, indexes, *self._tables())
        return {"strings": [[encoder.flush()], z_strings], "shape": z.shape[2:]}

    def decompress(self, strings: list[list[bytes]], shape: tuple[int, int]) -> dict[str, Tensor]:
        """Return x_hat of what `compress` returned, within 0..1."""
        decoder, tables = RansDecoder(), self._tables()
        decoder.set_stream(strings[0][0])

        def read(number: int, means: Tensor, scales: Tensor) -> Tensor:
            indexes = self.gaussian_conditional.build_indexes(scales).flatten().tolist()
            return means.new_tensor(decoder.decode_stream(indexes, *tables)).view(means.shape) + means

        y_hat = self._slices(self.entropy_bottleneck.decompress(strings[1], shape), read)
        return {"x_hat": self.g_s(y_hat).clamp(0, 1)}

    def _slices(self, z_hat: Tensor, code: Code) -> Tensor:
        """Return y_hat [B, M, h, w], corrected, of what `code` returns for each slice."""
        latent_means, latent_scales = self.h_mean_s(z_hat), self.h_scale_s(z_hat)
        y_hat: list[Tensor] = []
        for number in range(self.num_slices):
            known = y_hat[: self.max_support_slices]
            support = torch.cat((latent_means, *known), 1)
            means = self.cc_mean_transforms[number](support)
            part = code(number, means, self.cc_scale_transforms[number](torch.cat((latent_scales, *known), 1)))
            y_hat.append(part + 0.5 * torch.tanh(self.lrp_transforms[number](torch.cat((support, part), 1))))
        return torch.cat(y_hat, 1)

    def _tables(self) -> tuple[Any, ...]:
        coder = self.gaussian_conditional
        return coder.quantized_cdf.tolist(), coder.cdf_length.tolist(), coder.offset.tolist()


def _bent(*layers: nn.Module) -> nn.Sequential:
    """Return three layers with leaky ReLUs between them."""
    return nn.Sequential(layers[0], nn.LeakyReLU(), layers[1], nn.LeakyReLU(), layers[2])
