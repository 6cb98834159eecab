"""What a model's networks cost: multiply-accumulates a pixel, and parameters."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from lic_dist.models.architectures import adapt

SIDE = 128  # pixels of the picture that is counted, at least; the sides of a family's pictures may need more
T = TypeVar("T")


@dataclass(frozen=True)
class NetCost:
    """Thousands of multiply-accumulates (kMAC) for each pixel of the picture, and parameters, of one network."""

    kmac: float
    parameters: int


def complexity(model: nn.Module) -> dict[str, NetCost]:
    """Return the cost of each network of `CodecModel.nets` by name, of one whole picture without padding.

    Counted are the convolutions and matrix products that the codec runs, those of the entropy model stage by stage as a
    decoder takes them; activations, normalisations, search and entropy coding are not, as is usual in the field.

    Raises:
        UsageError: a variable-rate model of which no gain is chosen.
    """
    from torch.utils.flop_counter import FlopCounterMode  # two seconds: it loads torch's compiler

    codec = adapt(model)
    multiple = codec.strides.multiple
    side = -(-SIDE // multiple) * multiple
    macs: Counter[str] = Counter()

    def counted(name: str, work: Callable[[], T]) -> T:
        with FlopCounterMode(display=False) as counter:
            found = work()
        macs[name] += counter.get_total_flops() // 2
        return found

    def run(name: str, values: Tensor) -> Tensor:
        return counted(name, lambda: codec.run(name, values))

    x = torch.zeros(1, 3, side, side)
    with torch.no_grad():
        y = counted("g_a", lambda: codec.analyse(x))
        sides = counted("h_a", lambda: codec.hyper_analyse(y))
        _, y_hat = codec.drive(sides, lambda stage: stage.means, run)
        counted("g_s", lambda: codec.synthesise(y_hat))
    parameters = {name: sum(one.numel() for one in net.parameters()) for name, net in codec.nets.items()}
    return {name: NetCost(macs[name] / 1000 / side**2, count) for name, count in parameters.items()}
