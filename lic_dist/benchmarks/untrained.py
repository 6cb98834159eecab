"""Models with random weights, of a family and size of which there is no checkpoint: speed does not ask for more."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lic_dist.errors import UsageError
from lic_dist.models.architectures import ModelSpec, build
from lic_dist.models.checkpoint import Checkpoint, update_tables

LMBDA = 0.013
DEVIATION = 0.3  # of each channel of y: most of it rounds to zero, as in trained models


def untrained(text: str) -> Checkpoint:
    """Return a model with random weights, of NAME:N:M, whose y has mean 0 and `DEVIATION` in each channel on noise.

    Raises:
        UsageError: text of another form, or an architecture that is not served.
    """
    name, *sizes = text.rsplit(":", 2)
    if len(sizes) != 2 or not all(one.isdecimal() for one in sizes):
        raise UsageError(f"'{text}' is not of the form NAME:N:M", hint="such as mbt2018:192:192")
    n, m = map(int, sizes)
    torch.manual_seed(0)
    model = build(name, n, m).eval()
    _normalise(model)
    update_tables(model)
    return Checkpoint(model, ModelSpec(name, n, m, LMBDA))


@torch.no_grad()
def _normalise(model: Any) -> None:
    """Scale and shift what the last convolution of stride 2 in g_a gives."""
    *_, last = (one for one in model.g_a.modules() if isinstance(one, nn.Conv2d) and one.stride == (2, 2))
    seen: list[Tensor] = []
    hook = last.register_forward_hook(lambda *call: seen.append(call[2]))
    model.g_a(torch.rand(1, 3, 256, 256))
    hook.remove()
    deviation, mean = torch.std_mean(seen[0], (0, 2, 3))
    scale = DEVIATION / deviation
    last.weight *= scale[:, None, None, None]
    shift: Any = last.bias
    shift.copy_((shift - mean) * scale)
