"""The exponential moving average of weights (Polyak averaging): what is judged and kept where `ema` is set."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class WeightAverage:
    """Averages of parameters, of which `update` is called after each step.

    average <- decay' * average + (1 - decay') * weights, decay' = min(decay, (1 + n) / (10 + n)) at update n: the
    first steps are forgotten soon. With decay 0 there is none, and the weights stand for it.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], decay: float) -> None:
        self.parameters: list[Tensor] = list(parameters)
        self.decay = decay
        self.averages = [parameter.detach().clone() for parameter in parameters] if decay else []
        self.updates = 0

    @torch.no_grad()
    def update(self) -> None:
        """Take in the parameters as they are now."""
        if self.decay:
            decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
            torch._foreach_lerp_(self.averages, self.parameters, 1 - decay)
            self.updates += 1

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within the block the parameters are the averages; after it what they were."""
        weights = [parameter.detach().clone() for parameter in self.parameters] if self.decay else []
        _set(self.parameters, self.averages)
        try:
            yield
        finally:
            _set(self.parameters, weights)

    def state_dict(self) -> dict[str, object]:
        """Plain data and tensors."""
        return {"averages": self.averages, "updates": self.updates}

    def load_state_dict(self, state: dict[str, object]) -> None:
        """What `state_dict` gave."""
        with torch.no_grad():
            _set(self.averages, state["averages"])  # type: ignore[arg-type]
        self.updates = int(state["updates"])  # type: ignore[call-overload]


@torch.no_grad()
def _set(tensors: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    if values:
        torch._foreach_copy_(list(tensors), list(values))
