"""What both training jobs share: the course of steps with its learning rate, guarded steps, state on disk, and log."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lic_dist.config import Finetune, Train
from lic_dist.errors import LicError, UsageError
from lic_dist.models import checkpoint
from lic_dist.progress import Progress
from lic_dist.training.distributed import Ranks
from lic_dist.training.loss import Figures


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


class Course:
    """The steps of a job, resumable: state on disk and the step's number determine all that follows.

        course = Course(...)
        for step in course:                     # learning rate set, noise seeded
            course.take(loss of the step)       # guarded; counts on the progress bar
            if course.due:                      # every `evaluate_every` steps, and at the last
                course.save(figures, **more)    # one row of the log, the state on disk, ranks in step

    `section` is the job's part of the experiment file; `state` what `save` was last given as `more`, or None.
    """

    def __init__(
        self,
        title: str,
        section: Train | Finetune,
        anneal: float,
        model: nn.Module,
        trained: list[nn.Parameter],
        identity: dict[str, Any],
        here: Ranks,
    ) -> None:
        self.title, self.section, self.anneal, self.here = title, section, anneal, here
        self.model, self.trained, self.identity = model, trained, identity
        self.optimizer = torch.optim.Adam(trained, lr=section.lr)
        self.path = section.out / "state.pth"
        self.state = load_state(self.path, identity)
        self.first = self.done = 0
        if self.state is not None:
            self.first = self.done = int(self.state["step"])
            model.load_state_dict(self.state["model"])
            self.optimizer.load_state_dict(self.state["optimizer"])
        self.log = Log(section.out / "log.jsonl", self.first) if here.first else None

    @property
    def due(self) -> bool:
        """Whether the step just taken is one to measure and save after."""
        return self.done % self.section.evaluate_every == 0 or self.done == self.section.steps

    def __iter__(self) -> Iterator[int]:
        section = self.section
        self.started = time.monotonic()
        with Progress(self.title, section.steps, "step", done=self.first) as self.bar:
            for step in range(self.first, section.steps):
                self.rate = learning_rate(step, section.steps, section.lr, section.warmup, self.anneal, section.floor)
                for group in self.optimizer.param_groups:
                    group["lr"] = self.rate
                seed_step(section.seed, step, self.here.rank)
                yield step

    def take(self, loss: Tensor) -> None:
        """Take the step of this loss; see `take_step`."""
        take_step(loss, self.trained, self.optimizer, self.section.clip)
        self.done += 1
        self.loss = float(loss.detach())
        self.bar.advance(1, L=self.loss)

    def save(self, figures: Figures | None, **more: Any) -> None:
        """Write a row of the log and the state, whole or not at all, on the first rank; the others wait."""
        if self.log is not None:
            seconds = (time.monotonic() - self.started) / (self.done - self.first)
            self.log.write(step=self.done, lr=self.rate, loss=self.loss, **_row(figures), seconds=seconds)
            state = {"step": self.done, "model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
            checkpoint.write({"identity": self.identity, **state, **more}, self.path)
        self.here.wait()

    def note_start(self, figures: Figures) -> None:
        """Log what was measured before the first step."""
        if self.log is not None and self.first == 0:
            self.log.write(step=0, **_row(figures))


def _row(figures: Figures | None) -> dict[str, float]:
    if figures is None:
        return {}
    return {"held_out_L": figures.L, "held_out_bpp": figures.bpp, "held_out_psnr": figures.psnr}
