"""The differentiable rate of fixed indices: a record's -log2 P(k | sigma, Q), interpolated in log sigma between
levels.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lic_dist.quantization.rates import LEVELS, SCALES, bits_table
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
