"""The optimizers of training: Adam; or Muon for the matrices and Adam for the rest.

Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/) follows the momentum with all its singular values
brought near one, by a Newton-Schulz iteration. Its steps have the root mean square of Adam's, 0.2 of the learning rate
(Liu et al. 2025, arXiv 2502.16982), so that both parts share one rate and its schedule.

`torch.optim.Muon`, which torch has from 2.9 on, takes matrices of two dimensions alone and one after another, in
bfloat16; here kernels of convolutions are matrices, those of one shape go together, and CPUs compute in float32.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

MOMENTUM = 0.95  # of Muon, with Nesterov's look ahead
COEFFICIENTS = 3.4445, -4.7750, 2.0315  # of the iteration: the steepest at zero, for few rounds (Jordan et al. 2024)
ROUNDS = 5
RMS = 0.2  # of a step, as a part of the learning rate
BETAS = 0.9, 0.98  # of Adam beside Muon, whose learning rate is some ten times that of Adam alone


class Muon(torch.optim.Optimizer):
    """Muon for convolution kernels [A, B, k, k], each a matrix [A, B k^2]."""

    def __init__(self, parameters: Sequence[nn.Parameter], lr: float) -> None:
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Take one step along the gradients."""
        for group in self.param_groups:
            trained = [one for one in group["params"] if one.grad is not None]
            for (rows, columns), alike in groupby(sorted(trained, key=_sides), _sides):
                self._step(list(alike), -group["lr"] * RMS * math.sqrt(max(rows, columns)))

    def _step(self, parameters: list[Tensor], factor: float) -> None:
        """Step with parameters of equal sides, stacked as matrices that are no higher than wide."""
        gradients = torch.stack([_as_wide(parameter.grad) for parameter in parameters])  # type: ignore[arg-type]
        for parameter in parameters:
            if not self.state[parameter]:
                self.state[parameter]["momentum"] = torch.zeros_like(_as_wide(parameter))
        momenta = [self.state[parameter]["momentum"] for parameter in parameters]
        torch._foreach_lerp_(momenta, list(gradients), 1 - MOMENTUM)
        directions = orthogonalized(gradients.lerp(torch.stack(momenta), MOMENTUM))
        for parameter, direction in zip(parameters, directions, strict=True):
            flat = direction if len(parameter) == len(direction) else direction.T
            parameter.add_(flat.reshape(parameter.shape), alpha=factor)


def orthogonalized(matrices: Tensor) -> Tensor:
    """Return float32 matrices [n, rows, columns], rows <= columns, with singular values of about 0.7 to 1.2.

    On a GPU the iteration runs in bfloat16.
    """
    a, b, c = COEFFICIENTS
    x = matrices / (matrices.norm(dim=(1, 2), keepdim=True) + 1e-12)
    if x.is_cuda:
        x = x.bfloat16()
    for _ in range(ROUNDS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.float()


def _sides(parameter: Tensor) -> tuple[int, int]:
    """Return the sides of a parameter as a matrix, the smaller one first."""
    rows, columns = len(parameter), parameter[0].numel()
    return min(rows, columns), max(rows, columns)


def _as_wide(values: Tensor) -> Tensor:
    """Return a kernel, or its gradient, as a matrix that is no higher than wide."""
    matrix = values.flatten(1)
    return matrix if matrix.size(0) <= matrix.size(1) else matrix.T


class Together:
    """Several optimizers that step as one."""

    def __init__(self, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        self.optimizers = tuple(optimizers)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups of all, whose learning rates may be set."""
        return [group for one in self.optimizers for group in one.param_groups]

    def step(self) -> None:
        """Take one step with each."""
        for one in self.optimizers:
            one.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients, or set them to zero."""
        for one in self.optimizers:
            one.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """Return the state of each."""
        return {"optimizers": [one.state_dict() for one in self.optimizers]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load what `state_dict` returned."""
        for one, its in zip(self.optimizers, state["optimizers"], strict=True):
            one.load_state_dict(its)


AnyOptimizer = torch.optim.Optimizer | Together


def make_optimizer(name: str, parameters: Sequence[nn.Parameter], lr: float) -> AnyOptimizer:
    """Return the optimizer of a name of `Steps.optimizer`, adam or muon, for these parameters."""
    if name == "adam":
        return torch.optim.Adam(parameters, lr=lr)
    parts: list[torch.optim.Optimizer] = []
    if matrices := [one for one in parameters if _is_matrix(one)]:
        parts.append(Muon(matrices, lr))
    if others := [one for one in parameters if not _is_matrix(one)]:
        parts.append(torch.optim.Adam(others, lr=lr, betas=BETAS))
    return Together(parts)


def _is_matrix(parameter: Tensor) -> bool:
    """Return whether it is a kernel that mixes channels: none of a depthwise convolution, of a GDN or of a prior."""
    return parameter.dim() == 4 and parameter.size(1) > 1
