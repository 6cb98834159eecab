"""The exponential moving average of weights (Polyak averaging), which is evaluated and kept where `ema` is set."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class WeightAverage:
    """Averages of parameters; `update` is called after each step.

    average <- decay' * average + (1 - decay') * weights, decay' = min(decay, (1 + n) / (10 + n)) at update n, so that
    the first steps are forgotten soon. With decay 0 there are no averages, and the weights are used as they are.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], decay: float) -> None:
        self.parameters: list[Tensor] = list(parameters)
        self.decay = decay
        self.averages = [parameter.detach().clone() for parameter in parameters] if decay else []
        self.updates = 0

    @torch.no_grad()
    def update(self) -> None:
        """Average in the present parameters."""
        if self.decay:
            decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
            torch._foreach_lerp_(self.averages, self.parameters, 1 - decay)
            self.updates += 1

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Replace the parameters by their averages within the block."""
        weights = [parameter.detach().clone() for parameter in self.parameters] if self.decay else []
        _set(self.parameters, self.averages)
        try:
            yield
        finally:
            _set(self.parameters, weights)

    def state_dict(self) -> dict[str, object]:
        """Return the state as plain data and tensors."""
        return {"averages": self.averages, "updates": self.updates}

    def load_state_dict(self, state: dict[str, object]) -> None:
        """Load what `state_dict` returned."""
        with torch.no_grad():
            _set(self.averages, state["averages"])  # type: ignore[arg-type]
        self.updates = int(state["updates"])  # type: ignore[call-overload]


@torch.no_grad()
def _set(tensors: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    if values:
        torch._foreach_copy_(list(tensors), list(values))
