"""What both training jobs share: the learning rate, one guarded step, the state on disk, the log."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lic_dist.errors import LicError, UsageError
from lic_dist.models import checkpoint


def learning_rate(step: int, steps: int, peak: float, warmup: int, anneal: float, floor: float) -> float:
    """Linear warm-up, a cosine from `peak` to `floor * peak` over the first `anneal` of the steps, then flat."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1.0, anneal * steps - warmup))
    return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress)))


def take_step(loss: Tensor, parameters: list[nn.Parameter], optimizer: torch.optim.Optimizer, clip: float) -> float:
    """Backward, clip, step; returns the gradient's norm.

    Raises:
        LicError: a loss or gradient that is not finite; the weights are untouched.
    """
    optimizer.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    norm, value = float(torch.nn.utils.clip_grad_norm_(parameters, clip)), float(loss.detach())
    if not math.isfinite(norm + value):
        raise LicError(
            f"loss {value:.4g} with gradient norm {norm:.4g}: stopped before the step",
            hint="lower the learning rate; the last state on disk is good",
        )
    optimizer.step()
    return norm


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed the noise of one step on one rank: what is drawn is a function of the three alone, so resuming is exact."""
    torch.manual_seed((seed * 1_000_003 + step) * 4099 + rank)


class Log:
    """One JSON object a line, appended; lines beyond the resumed step are cut off."""

    def __init__(self, path: Path, resumed_at: int) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = [row for row in read_log(path) if row["step"] <= resumed_at] if resumed_at else []
        path.write_text("".join(json.dumps(row) + "\n" for row in kept))

    def write(self, **row: Any) -> None:
        """Append one row."""
        with self.path.open("a") as file:
            file.write(json.dumps({**row, "time": round(time.time(), 3)}) + "\n")


def read_log(path: Path) -> list[dict[str, Any]]:
    """All whole rows of a log."""
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]


def save_state(path: Path, identity: dict[str, Any], **parts: Any) -> None:
    """Write the job's state whole or not at all."""
    checkpoint.write({"identity": identity, **parts}, path)


def load_state(path: Path, identity: dict[str, Any]) -> dict[str, Any] | None:
    """The job's last state, or None where there is none.

    Raises:
        UsageError: the state is of a job with other settings; each that differs is named.
    """
    if not path.is_file():
        return None
    state = checkpoint.read(path)
    found = state["identity"]
    differing = [key for key in sorted({*found, *identity}) if found.get(key) != identity.get(key)]
    if differing:
        named = ", ".join(f"{key} ({found.get(key)} there, {identity.get(key)} here)" for key in differing)
        raise UsageError(f"{path} is of another job: {named}", hint="give another 'out', or remove that folder")
    return state
