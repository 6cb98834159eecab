"""Cached latents quantized anew under the present weights of a model, stage by stage, in batches of a fixed size."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from lic_dist.codec import walk
from lic_dist.codec.walk import Coded
from lic_dist.models.protocol import CodecModel
from lic_dist.quantization.quantize import Quantizer


@torch.no_grad()
def search(codec: CodecModel, y: NDArray[np.float16], z: NDArray[np.int16], quantizer: Quantizer, batch: int) -> Coded:
    """Quantize latents y [n, M, h, w] and z [n, Nz, hz, wz] on the model's device; what is returned lies on the CPU.

    The last batch is padded with zeros, so that means and scales have the bits of a build of the same batch.
    """
    device, parts = next(codec.module.parameters()).device, []
    for first in range(0, len(y), batch):
        count = len(y[first : first + batch])
        part_y, part_z = (np.zeros((batch, *one.shape[1:]), one.dtype) for one in (y, z))
        part_y[:count], part_z[:count] = y[first : first + batch], z[first : first + batch]
        z_tensor = torch.from_numpy(part_z).to(device)
        sides_hat = tuple(side.dequantize(one) for side, one in zip(codec.sides, (z_tensor,), strict=True))
        coded = walk.search(codec, sides_hat, torch.from_numpy(part_y).float().to(device), quantizer)
        parts.append(Coded(*(one[:count].cpu() for one in coded)))
    return Coded(*map(torch.cat, zip(*parts, strict=True)))
