"""The learning rate: warm-up, then a cosine, a plateau that halves it, or a constant."""

from __future__ import annotations

import math
from dataclasses import dataclass

from lic_dist.config.training import Steps

HALVED = 0.5  # factor of a plateau


def learning_rate(section: Steps, step: int, steps: int, peak: float, halvings: int = 0) -> float:
    """Return the learning rate of step `step` (from 0) in a phase of `steps`.

    A linear warm-up to `peak` takes at most a fifth of a short phase. Then `cosine` falls to `floor * peak` over the
    first `anneal` of the steps and stays there; `plateau` is the peak halved `halvings` times, but not below the floor.
    """
    warmup = min(section.warmup, steps // 5)
    if step < warmup:
        return peak * (step + 1) / warmup
    if section.schedule == "cosine":
        progress = min(1.0, (step - warmup) / max(1.0, section.anneal * steps - warmup))
        return peak * (section.floor + (1 - section.floor) * 0.5 * (1 + math.cos(math.pi * progress)))
    return peak * max(HALVED**halvings, section.floor) if section.schedule == "plateau" else peak


@dataclass
class Patience:
    """Counters over a phase's evaluations: evaluations since the last better L, and halvings by a plateau."""

    worse: int = 0
    since_halving: int = 0
    halvings: int = 0

    def note(self, better: bool, section: Steps) -> None:
        """Count one evaluation."""
        self.worse = 0 if better else self.worse + 1
        self.since_halving = 0 if better else self.since_halving + 1
        if section.schedule == "plateau" and self.since_halving >= section.patience:
            self.halvings, self.since_halving = self.halvings + 1, 0

    def over(self, section: Steps) -> bool:
        """Return whether early stopping ends the phase."""
        return section.stop_after is not None and self.worse >= section.stop_after
