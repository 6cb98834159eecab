"""Local attention and a context of several scales: `train.architecture: local_attention:Attentive` (docs/options.md)

`block-transform` with attention in windows of 4x4 positions of y, each way, and a checkerboard of y: means and scales
of the second half are moved by what convolutions of 3x3, 5x5 and 7x7 make of the first (after Li et al. 2023).
"""

import torch
from torch import nn

from lic_dist.models.block_transform import BlockTransform
from lic_dist.models.families import hyperprior
from lic_dist.models.families.latent_codecs import checkerboard
from lic_dist.models.protocol import Elements, Stage, one_layout


class WindowAttention(nn.MultiheadAttention):
    def forward(self, x):  # [B, C, h, w], sides multiples of 4; out_proj begins as zero
        windows = x.unflatten(3, (-1, 4)).unflatten(2, (-1, 4)).permute(0, 2, 4, 3, 5, 1)
        rows = windows.reshape(-1, 16, x.shape[1])
        found, _ = super().forward(rows, rows, rows, need_weights=False)
        return x + found.view(windows.shape).permute(0, 5, 1, 3, 2, 4).reshape(x.shape)


class AttentiveCodec(BlockTransform):
    def __init__(self, N, M):
        super().__init__(N, M)
        forth, back = (WindowAttention(M, 4, batch_first=True) for _ in range(2))
        self.g_a.insert(len(self.g_a) - 1, forth)
        self.g_s.insert(1, back)
        self.near = nn.ModuleList(nn.Conv2d(2 * M, 2 * M, k, padding=k // 2, groups=M) for k in (3, 5, 7))
        self.join = nn.Sequential(nn.Conv2d(6 * M, M, 1), nn.GELU(), nn.Conv2d(M, 2 * M, 1))
        for last in (forth.out_proj, back.out_proj, self.join[2]):
            nn.init.zeros_(last.weight)


class Attentive(hyperprior.BlockTransform):
    name, module_class = "attentive", AttentiveCodec
    parts = {**hyperprior.BlockTransform.parts, "context": ("near.", "join.")}
    supports = frozenset({"refinement"})
    fits = classmethod(lambda cls, state: "near.0.weight" in state)
    nets = property(lambda self: {**super().nets, "join": self.module.join, **dict(self.module.near.named_children())})

    def layout(self, height, width):
        return tuple(Elements(positions=one) for one in checkerboard(height, width, odd=False))

    def walk(self, sides_hat, run):
        scales, means = run("h_s", one_layout(sides_hat[0])).chunk(2, 1)
        (first, second), scales = self.layout(*means.shape[2:]), scales.clamp(min=0.11)
        missed, y_hat = (one_layout(torch.zeros_like(means)) for _ in range(2))
        first.put(y_hat, (yield Stage(first.take(means), first.take(scales), first)))
        first.put(missed, (first.take(y_hat) - first.take(means)) / first.take(scales))
        missed = one_layout(torch.stack((missed, missed.abs()), 2).flatten(1, 2))
        told = run("join", one_layout(torch.cat([run(name, missed) for name in "012"], 1))).clamp(-3, 3)
        wider, moved = second.take(told).chunk(2, 1)  # of log scales, and of means in scales
        means, scales = second.take(means), second.take(scales)
        second.put(y_hat, (yield Stage(means + moved * scales, scales * wider.exp(), second)))
        return y_hat
