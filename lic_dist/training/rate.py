"""The rate of fixed indices, in four forms.

IndexRate     a record's -log2 P(k | sigma, Q), interpolated in log sigma between levels: differentiable in sigma
EmbeddedRate  a cut of bit planes, whose symbols the scales choose: no gradient
ChannelRate   a record's -log2 P(k | channel, Q), where y has a factorized prior that does not train
CellRate      that of the cell of k under the prior itself: differentiable in the prior, which a record's tables,
              once they are made, do not follow
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from lic_dist.models.protocol import Side
from lic_dist.quantization.distributions import upper_edges
from lic_dist.quantization.embedded import Embedded, TableBits
from lic_dist.quantization.rates import LEVELS, SCALES, bits_table, level_index
from lic_dist.quantization.record import QuantizerRecord

LARGEST = 1 << 15  # |k| of an int16: the table is 17 MB for TCQ, and no slower to look up than a short one


class IndexRate(nn.Module):
    """Bits of indices k under scales; equal to the coder's tables where sigma is one of the 64 levels.

    k is fixed, so by the envelope theorem the gradient is that of the search cost. It flows to the scales only.
    """

    def __init__(self, record: QuantizerRecord, largest: int = LARGEST) -> None:
        super().__init__()
        table = torch.from_numpy(bits_table(record.y_tables, largest))  # [Q, 64, largest+1]
        self.register_buffer("table", table.flatten(), persistent=False)
        self.largest = largest
        logs = torch.from_numpy(SCALES).double().log()
        self.first, self.spacing = float(logs[0]), float((logs[-1] - logs[0]) / (LEVELS - 1))
        self.table: Tensor

    def forward(self, scales: Tensor, k: Tensor, quantizer: Tensor) -> Tensor:
        """Return the bits of each element, float32, from scales float32, k int16 and quantizer uint8 of equal
        shapes.
        """
        position = (scales.clamp_min(1e-6).log() - self.first) / self.spacing
        position = position.clamp(-1e-3, LEVELS - 1)  # at its bound a sigma may lie an ulp below
        below = position.detach().floor().clamp(0, LEVELS - 2)
        part = position - below
        magnitude = k.long().abs().clamp(max=self.largest)
        index = (quantizer.long() * LEVELS + below.long()) * (self.largest + 1) + magnitude
        return torch.lerp(self.table[index], self.table[index + self.largest + 1], part)


class EmbeddedRate(nn.Module):
    """Bits of the symbols that a cut of bit planes holds; no gradient, since scales decide which these are."""

    def __init__(self, embedded: Embedded) -> None:
        super().__init__()
        self.embedded = embedded

    def forward(self, scales: Tensor, k: Tensor, quantizer: Tensor) -> Tensor:
        """Return the bits of each element, float64, from scales float32 and k int16 [B, M, h, w]."""
        return self.embedded.bits(k, level_index(scales, "nearest"))


class ChannelRate(nn.Module):
    """Bits of indices k by a record's tables by channel, as the coder charges them, escapes included."""

    def __init__(self, record: QuantizerRecord) -> None:
        super().__init__()
        self.table_bits, self.channels = TableBits(record.y_tables), record.levels

    def forward(self, k: Tensor, quantizer: Tensor) -> Tensor:
        """Return the bits of each element, float64 [B, M, h, w], from k int16 and quantizer uint8 of this shape."""
        channel = torch.arange(self.channels, device=k.device).view(-1, 1, 1)
        bits: Tensor = self.table_bits(k, quantizer.long() * self.channels + channel)
        return bits


class CellRate(nn.Module):
    """Bits of indices k by what the prior of y gives their cells; SQ's of step 1 are those of CompressAI's likelihood.

    The cells are those that a record's analytic tables are integrated over (quantization/distributions.py).
    """

    def __init__(self, record: QuantizerRecord, prior: Side) -> None:
        super().__init__()
        self.prior = prior
        upper = np.stack(upper_edges(record.step, record.trellis, record.rounding))  # [Q, K+1], of |k|
        edges = torch.from_numpy(np.hstack((-upper[:, :1], upper))).float()
        self.register_buffer("edges", edges.flatten(), persistent=False)
        self.largest = upper.shape[1] - 1
        self.edges: Tensor

    def forward(self, k: Tensor, quantizer: Tensor) -> Tensor:
        """Return the bits of each element, float32 [B, M, h, w], from k int16 and quantizer uint8 of this shape."""
        index = quantizer.long() * (self.largest + 2) + k.long().abs().clamp(max=self.largest)
        low, high = self.edges[index], self.edges[index + 1]
        low, high = torch.where(k < 0, -high, low), torch.where(k < 0, -low, high)
        medians = self.prior.medians()
        return -torch.log2(self.prior.probability(low + medians, high + medians))
