"""The loop of a training job: phases of guarded steps, evaluated on held-out pictures, resumable at any evaluation.

    loop = TrainingLoop(title, section, phases, module, model, identity, ranks)
    for step in loop:                                    # the learning rate is set, the step's noise seeded
        loop.train_step(parts, loss, batch_name)         # gradients of the global batch, clipped; a step
        if loop.evaluation_due:                          # every `evaluate_every` steps, and at a phase's last
            loop.evaluate(measure)                       # held-out figures, best weights, a state on disk, a log row
    loop.best                                            # the weights that the model is left with

When a rank has notice to leave (notice.py), the step is finished, a state written, and `Stopped` raised on every rank.
Each phase trains its own parameters, with a new optimizer and schedule, from the best weights so far. Where there is a
moving average of the weights, it is evaluated and kept. The state on disk and the number of a step determine all later
steps: on CPUs, a job that is killed and restarted ends with the same bits.
"""

from __future__ import annotations

import contextlib
import copy
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor, nn

from lic_dist.config.training import Steps
from lic_dist.errors import SharedError, Stopped
from lic_dist.models.parts import freeze_all_but
from lic_dist.models.protocol import mask_weights
from lic_dist.progress import Progress
from lic_dist.training.adversary import Adversary
from lic_dist.training.average import WeightAverage
from lic_dist.training.capture import Replay
from lic_dist.training.choice import BestWeights, Choice
from lic_dist.training.distributed import Ranks
from lic_dist.training.log import Log
from lic_dist.training.loss import HeldOut
from lic_dist.training.optimizers import AnyOptimizer, make_optimizer
from lic_dist.training.schedule import Patience, learning_rate
from lic_dist.training.states import ResumeStates

P = TypeVar("P")


@dataclass(frozen=True)
class PhasePlan:
    """A phase: the names of the parameters that it trains, its number of steps, and its peak learning rate."""

    parameters: tuple[str, ...]
    steps: int
    lr: float


def take_step(
    loss: float, parameters: Sequence[nn.Parameter], optimizer: AnyOptimizer, clip: float
) -> tuple[float, bool]:
    """Clip the gradients and step, unless loss or gradient norm are not finite; return the norm, and whether it
    stepped.
    """
    norm = float(torch.nn.utils.clip_grad_norm_(parameters, clip))
    finite = math.isfinite(norm + loss)
    if finite:
        optimizer.step()
    return norm, finite


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed a step's random numbers on one rank from the three arguments alone, so that resuming is exact."""
    torch.manual_seed((seed * 1_000_003 + step) * 4099 + rank)


class TrainingLoop:
    """The loop of the module's text. `module` contains `model` and is wrapped for the ranks; `identity` names the job.

    With `graph`, for one rank on a GPU whose parts are tensors, loss and gradients of a part are one CUDA graph. With
    an `adversary`, whose term is in the loss, each step is its step too.

    Raises:
        UsageError: `section.out` holds states of a job with other settings, or the batch does not divide.
        LicError: another job writes there, or a rank does not find the state that the first rank found.
    """

    def __init__(
        self,
        title: str,
        section: Steps,
        phases: Sequence[PhasePlan],
        module: nn.Module,
        model: nn.Module,
        identity: dict[str, Any],
        ranks: Ranks,
        graph: bool = False,
        adversary: Adversary | None = None,
    ) -> None:
        self.graph, self.adversary = graph, adversary
        self.replay: Any = None  # a Replay after the first step of a phase, where steps are graphs
        self.title, self.section, self.phases, self.ranks = title, section, tuple(phases), ranks
        self.module, self.model = module, model
        self.parts = ranks.parts(section.batch, section.accumulate)
        self.states = ResumeStates(section.out / "states", identity, section.keep)
        self.choice = Choice(copy.deepcopy(model.state_dict()), latest=section.trades)
        self.extra: dict[str, float] = {}  # figures of the last step beside its loss
        self.phase = self.taken = self.done = 0  # the phase, the steps taken in it, and those taken in all
        self.leaving = False  # whether a rank has notice
        with contextlib.ExitStack() as stack:  # until the loop is over, or fails to begin
            if ranks.first:
                stack.enter_context(self.states.lock())
            state = self._load_state()
            self.open = stack.pop_all()
        if state is not None:
            self.phase, self.taken, self.done = state["phase"], state["taken"], state["done"]
            self.choice.load_state(state)
            model.load_state_dict(state["model"])
            if adversary is not None:
                adversary.load_state_dict(state["adversary"])
        self._begin_phase(state)
        self.first = self.done
        self.log = Log(section.out, self.first, section.tracking, identity) if ranks.first else None
        if self.log is not None:
            self.open.callback(self.log.close)

    @property
    def best(self) -> BestWeights:
        """The weights that the job keeps, if it ends now."""
        return self.choice.best

    @property
    def evaluation_due(self) -> bool:
        """Whether an evaluation follows the step just taken."""
        return self.taken % self.section.evaluate_every == 0 or self.taken == self.phases[self.phase].steps

    def __iter__(self) -> Iterator[int]:
        self.started = time.monotonic(), time.process_time()
        total = sum(phase.steps for phase in self.phases)
        heeding = self.ranks.notice.heeding_signals()
        with self.open, heeding, Progress(self.title, total, "step", done=self.done) as self.bar:
            while True:
                phase = self.phases[self.phase]
                while not self._phase_is_over:
                    self.rate = learning_rate(self.section, self.taken, phase.steps, phase.lr, self.patience.halvings)
                    for group in self.optimizer.param_groups:
                        group["lr"] = self.rate
                    seed_step(self.section.seed, self.done, self.ranks.rank)
                    yield self.done
                    if self.leaving:
                        self._leave()
                if self.phase + 1 == len(self.phases):
                    break
                self.model.load_state_dict(self.best.weights)
                self.phase, self.taken = self.phase + 1, 0
                self._begin_phase(None)
        self.model.load_state_dict(self.best.weights)

    def train_step(
        self, parts: Sequence[P], loss: Callable[[nn.Module, P], Tensor], batch_name: Callable[[], str]
    ) -> None:
        """Take one step on this rank's share of a global batch, in `self.parts` parts of equal size.

        `loss` is the mean over a part's samples; `batch_name` describes the batch in an error.

        Raises:
            LicError: a loss or gradient that is not finite, on any rank; the weights are those before the step.
        """
        self.optimizer.zero_grad(set_to_none=not self.graph)
        total = torch.zeros((), device=self.ranks.device)
        for number, part in enumerate(parts, start=1):
            last = number == len(parts)
            with contextlib.nullcontext() if last or self.ranks.world == 1 else self.wrapped.no_sync():  # type: ignore[operator]
                total += self._add_gradients(part, len(parts), loss)
        mean, self.leaving = self.ranks.mean(total)
        against = self.adversary.gradients(self.ranks) if self.adversary else 0.0
        norm, finite = take_step(mean + against, self.trained, self.optimizer, self.section.clip)
        if not finite:
            self._stop_not_finite(float(total) + against, norm, batch_name())
        if self.adversary:
            self.adversary.step()
            self.extra = {"discriminator": against}
        mask_weights(self.model)
        self.average.update()
        self.taken, self.done, self.loss = self.taken + 1, self.done + 1, mean
        self.bar.advance(1, loss=mean)

    def _add_gradients(self, part: P, parts: int, loss: Callable[[nn.Module, P], Tensor]) -> Tensor:
        """Add the gradients of one of so many parts of a step's loss; return that part of the loss."""

        def add(part: P) -> Tensor:
            value = loss(self.wrapped, part) / parts
            value.backward()
            return value.detach()

        if not self.graph:
            return add(part)
        if self.replay is None:
            self.replay = Replay(add, self.ranks.device)
        return self.replay(part, lambda: self.optimizer.zero_grad(set_to_none=False))

    def evaluate(self, measure: Callable[[], HeldOut | None]) -> None:
        """Measure, and keep the weights if they are the best; the first rank writes the log's row and the state.

        A phase's last evaluation pulls weights that harm a source (training/choice.py), which measures some more.

        Raises:
            LicError: figures or weights that are not finite, or a disk that refuses the state; the last state stays.
        """
        with self.average.applied():
            figures = measure()
            norms = sum(float(parameter.detach().norm()) for parameter in self.trained)
            if not math.isfinite(norms + (figures.L if figures else 0.0)):
                self._fail(f"step {self.done}: held-out L is {figures and figures.L}, the weights' norm {norms:.4g}")
            self.patience.note(self.choice.offer(figures, self.done, self.model), self.section)
            if self._phase_is_over:
                self.choice.settle(figures, self.done, self.model, measure)
        if figures:
            self.bar.advance(0, L=figures.L, bpp=figures.bpp, psnr=figures.psnr)
        if self.log is not None:
            wall, cpu = time.monotonic() - self.started[0], time.process_time() - self.started[1]
            more = {"steps_per_second": (self.done - self.first) / wall, "cpu_seconds": cpu}
            self.log.write(self.done, lr=self.rate, loss=self.loss, **self.extra, **_row(figures), **more)
            self.states.write(self.done, self._state())

    def record_start(self, figures: HeldOut, tolerance: float) -> None:
        """Take the figures measured before the first step: no source may lose more than `tolerance` of its L."""
        self.choice.begin(figures, tolerance, resumed=self.first > 0)
        if self.first == 0 and self.log is not None:
            self.log.write(0, **_row(figures))

    @property
    def _phase_is_over(self) -> bool:
        return self.taken >= self.phases[self.phase].steps or self.patience.over(self.section)

    def _begin_phase(self, state: dict[str, Any] | None) -> None:
        phase = self.phases[self.phase]
        self.trained = freeze_all_but(self.model, phase.parameters)
        self.optimizer = make_optimizer(self.section.optimizer, self.trained, phase.lr)
        self.average = WeightAverage(self.trained, self.section.ema)
        self.patience = Patience()
        if state is not None:
            self.optimizer.load_state_dict(state["optimizer"])
            self.average.load_state_dict(state["average"])
            self.patience = Patience(**state["watch"])
        self.wrapped = self.ranks.wrap(self.module)
        self.replay = None

    def _leave(self) -> NoReturn:
        """Write the state, if the last one is older, and stop, on every rank."""
        why = next(filter(None, self.ranks.gather(self.ranks.notice.why())), "")
        if self.ranks.first and not self.evaluation_due:
            self.states.write(self.done, self._state())
        self.ranks.wait()  # a launcher may end the others as soon as one has ended
        raise Stopped(
            f"{why}: stopped after step {self.done}, whose state is on disk", hint="started again, it goes on"
        )

    def _state(self) -> dict[str, Any]:
        return {
            "phase": self.phase,
            "taken": self.taken,
            "done": self.done,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "average": self.average.state_dict(),
            "watch": asdict(self.patience),
            **({"adversary": self.adversary.state_dict()} if self.adversary else {}),
            **self.choice.state(),
        }

    def _load_state(self) -> dict[str, Any] | None:
        """Return, on every rank, the state that the first rank finds."""
        state = self.states.latest() if self.ranks.first else None
        step = self.ranks.gather(state["done"] if state else None)[0]
        return self.states.wait_for(step) if step is not None and not self.ranks.first else state

    def _stop_not_finite(self, loss: float, norm: float, batch: str) -> None:
        """Stop on a loss or gradient that is not finite, naming the batch of each rank that had one."""
        told = self.ranks.gather((loss, batch))
        blamed = [one for one in told if not math.isfinite(one[0])] or told
        named = "; ".join(f"loss {value:.4g} of {batch}" for value, batch in blamed)
        self._fail(f"step {self.done + 1}: {named}; gradient norm {norm:.4g}: stopped before the step")

    def _fail(self, message: str) -> NoReturn:
        """Raise the same error on every rank; the first rank prints it."""
        raise SharedError(message, hint="the last state on disk is good; take a lower lr, with another 'out'")


def _row(figures: HeldOut | None) -> dict[str, float]:
    if figures is None:
        return {}
    by_source = {f"held_out_L {source}": L for source, L in figures.by_source.items()}
    return {"held_out_L": figures.L, "held_out_bpp": figures.bpp, "held_out_psnr": figures.psnr, **by_source}
