"""Which weights a job keeps: of those at which no source of held-out pictures loses, the ones of the greatest gain.

A source loses where its L is more than (1 + tolerance) times what it was at the start. The gain is the mean over
sources of the relative fall of L; where there is one source, L itself decides. The weights of the start are always
among the candidates. Weights at which a source loses are pulled towards those of the start where a phase ends,
theta = start + share (end - start) for a few shares: `end` are the phase's of the greatest gain, or its last where
those harm nobody. What is measured decides between these and the best so far.

With an adversarial or an idempotence term L does not say what is better, only what has been paid: the last weights are
kept, of those at which no source has lost more than the tolerance, and where the last lose more, the largest share of
their change that does not.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from lic_dist.training.loss import HeldOut

SHARES = (0.75, 0.5, 0.25)  # of the way from the start, 0, to weights at which a source loses, 1


@dataclass
class BestWeights:
    """The best weights, their held-out figures, and the step after which they were found; figures is None without a
    held-out part.

    `share` below 1 says that they were pulled: that part of the way from the start's weights to those of the step.
    """

    figures: HeldOut | None
    step: int
    weights: dict[str, Tensor]
    share: float = 1.0


class Choice:
    """The choice of the module's text. `best` is what a job keeps, `least` are the weights of the greatest gain.

    `refused` says of each pull from which step's weights it was, each source's change of L at those in percent, and
    what was the best afterwards. With `latest`, later weights are better ones.
    """

    def __init__(self, start: dict[str, Tensor], latest: bool = False) -> None:
        self.latest = latest
        self.start = self.best = self.least = BestWeights(None, 0, start)
        self.tolerance = math.inf
        self.refused: list[dict[str, Any]] = []

    def begin(self, figures: HeldOut, tolerance: float, resumed: bool) -> None:
        """Take the figures of the start: the best so far, unless a job resumes from a state of the same sources."""
        self.tolerance = tolerance
        self.start = BestWeights(figures, 0, self.start.weights)
        best = self.best.figures
        if not resumed or best is None or best.by_source.keys() != figures.by_source.keys():
            self.best = self.least = self.start

    def offer(self, figures: HeldOut | None, step: int, model: nn.Module) -> bool:
        """Take note of a model's present weights; return whether their gain is greater than any before.

        Figures of None, without a held-out part, are better than any.
        """
        better = self._gains(figures, self.least)
        kept = self._gains(figures, self.best) and not self._losers(figures)
        if better or kept:
            found = BestWeights(figures, step, copy.deepcopy(model.state_dict()))
            self.least = found if better else self.least
            self.best = found if kept else self.best
        return better

    def settle(
        self, figures: HeldOut | None, step: int, model: nn.Module, measure: Callable[[], HeldOut | None]
    ) -> None:
        """End a phase after `offer`, and pull weights at which a source loses. The model is left unchanged."""
        present = copy.deepcopy(model.state_dict())
        end = self.least if self._losers(self.least.figures) else BestWeights(figures, step, present)
        if self._losers(end.figures):
            for share in SHARES:
                model.load_state_dict(interpolated(self.start.weights, end.weights, share))
                pulled = measure()
                if self._gains(pulled, self.best) and not self._losers(pulled):
                    self.best = BestWeights(pulled, end.step, copy.deepcopy(model.state_dict()), share)
                    if self.latest:
                        break
            model.load_state_dict(present)
            changes = {name: 100 * (ratio - 1) for name, ratio in self._ratios(end.figures).items()}
            kept = {"kept_step": self.best.step, "kept_share": self.best.share}
            self.refused.append({"step": end.step, "change_percent": changes, **kept})
        self.least = self.best  # which the next phase begins with

    def state(self) -> dict[str, Any]:
        """Return what `load_state` takes, as plain data and tensors."""
        return {"best": _plain(self.best), "least": _plain(self.least), "refused": self.refused}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from what `state` returned; the states of older versions have no more than `best`."""
        self.best = _weights(state["best"])
        self.least = _weights(state.get("least", state["best"]))
        self.refused = list(state.get("refused", []))

    def _ratios(self, figures: HeldOut | None) -> dict[Any, float]:
        """Return L of each of several sources as a multiple of that of the start."""
        before = self.start.figures
        if figures is None or before is None:
            return {}
        return {source: L / before.by_source[source] for source, L in figures.by_source.items()}

    def _losers(self, figures: HeldOut | None) -> list[Any]:
        """Return the sources that lose more than the tolerance; NaN loses."""
        return [source for source, ratio in self._ratios(figures).items() if not ratio <= 1 + self.tolerance]

    def _gains(self, figures: HeldOut | None, over: BestWeights) -> bool:
        if self.latest or figures is None or over.figures is None:
            return True
        (mean, L), (best, least) = ((self._mean(one), one.L) for one in (figures, over.figures))
        return (mean, L) < (best, least)

    def _mean(self, figures: HeldOut) -> float:
        ratios = self._ratios(figures)
        return sum(ratios.values()) / max(1, len(ratios))


def interpolated(start: dict[str, Tensor], end: dict[str, Tensor], share: float) -> dict[str, Tensor]:
    """Return start + share (end - start) of all floating tensors, those of `end` for the rest."""
    return {name: start[name].lerp(value, share) if value.is_floating_point() else value for name, value in end.items()}


def _plain(one: BestWeights) -> dict[str, Any]:
    return {**vars(one), "figures": one.figures.plain() if one.figures else None}


def _weights(state: dict[str, Any]) -> BestWeights:
    figures = state["figures"]
    return BestWeights(**{**state, "figures": HeldOut(**figures) if figures else None})
