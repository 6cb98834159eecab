"""Gradients as one CUDA graph: a step of a light model is thousands of small kernels, and waits for their launches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

WARM_UP = 3  # calls before the capture, in which libraries choose their kernels and gradients get their memory


class Replay:
    """Calls of `function(part)`, which adds to the gradients of parameters and returns a scalar, as one CUDA graph.

    The first call captures it; the parts of all calls are tensors of one shape and type. The graph reads the weights
    that there are, adds to the gradients that there are (they are to be zeroed in place), and draws random numbers as
    the function itself would, from the device's generator as it was seeded last. The next call overwrites the scalar.
    """

    def __init__(self, function: Callable[[Any], Tensor], device: torch.device) -> None:
        self.function, self.device = function, device
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, part: Any, zero: Callable[[], None]) -> Tensor:
        """Run the function on a part; `zero` sets all gradients to zero in place, after the capture."""
        if self.graph is None:
            self.graph = self._captured(part)
            zero()
        self.part.copy_(part)
        self.graph.replay()
        return self.result

    def _captured(self, part: Any) -> torch.cuda.CUDAGraph:
        self.part = part.to(self.device, copy=True)
        drawn = torch.cuda.get_rng_state(self.device)
        aside, present = torch.cuda.Stream(self.device), torch.cuda.current_stream(self.device)
        aside.wait_stream(present)
        with torch.cuda.stream(aside):
            for _ in range(WARM_UP):
                self.function(self.part)
        present.wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.result = self.function(self.part)
        torch.cuda.set_rng_state(drawn, self.device)
        return graph
