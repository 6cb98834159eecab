"""The actors of one stage on Ray: asked for, placed, at work, free, and let go."""

from __future__ import annotations

import sys
import time
from collections import deque
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError

from lic_dist.engine.stages import Stage, Work
from lic_dist.errors import LicError

RETRIES = 3  # of one unit after its worker was lost, and of each worker that does not start
SAME_VERSION_HINT = "is the same lic_dist installed on every node?"
PLACEMENT_SECONDS = 60.0  # seconds that a stage without workers waits for a CPU of its own
NODE = "ray.io/node-id"  # the label that every node has
RECENT = 16  # calls that a stage's seconds are the median of


class _Worker:
    """What runs in an actor. `make` is called at the first call, so that its errors appear as errors of the work."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self.work: Work | None = None

    def placed(self) -> str:
        """Return the id of the node, as soon as the actor runs."""
        return str(ray.get_runtime_context().get_node_id())

    def call(self, value: Any) -> tuple[bool, Any]:
        """Return a token that tells the driver whether there is a result, and the result, which the driver does not
        fetch.
        """
        if self.work is None:
            self.work = self.stage.make()
        result = self.work(value)
        return result is not None, result


@dataclass(frozen=True)
class _Asked:
    """An actor that has not answered yet, the CPUs it asks for, and since when."""

    actor: Any
    cpus: float
    since: float


class Pool:
    """The actors of one stage, and the units that wait for one.

    `resize` says how many there shall be. `begin` and `end` are called around each call: an actor that is to go, as
    one whose node drains, ends its call and gets no other.
    """

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self.asked: dict[Any, _Asked] = {}  # by their tokens
        self.nodes: dict[Any, str] = {}  # of each actor that was placed, the node
        self.free: deque[Any] = deque()
        self.sharing: set[Any] = set()  # those placed without a CPU of their own
        self.going: set[Any] = set()  # those at work for the last time
        self.waiting: deque[tuple[int, Any]] = deque()  # (position of the unit, argument or reference to it)
        self.avoided: frozenset[str] = frozenset()  # nodes that are gone, of which Ray does not know yet
        self.failed_starts = 0  # actors that died before they ran, since the last that did or the last change of nodes
        self._staying: set[str] = set()
        self._begun: dict[Any, float] = {}  # when an actor's call began, after its first, in which it makes its work
        self._warm: set[Any] = set()
        self._recent: deque[float] = deque(maxlen=RECENT)

    @property
    def size(self) -> int:
        """The actors that were placed and stay."""
        return len(self.nodes) - len(self.going)

    @property
    def seconds(self) -> float | None:
        """What a unit takes here, from its hand-over to its answer; None before any was measured."""
        return sorted(self._recent)[len(self._recent) // 2] if self._recent else None

    def resize(self, count: int, asked: int, cpus: float) -> None:
        """Keep at most `count` actors that were placed, and have `asked` in all, those included that wait for room.

        New ones ask for `cpus`. With 0, those that wait for a CPU are asked for again without.
        """
        if not cpus:
            for token in [token for token, one in self.asked.items() if one.cpus]:
                self._drop(token)
        while self.asked and self.size + len(self.asked) > asked:
            self._drop(next(reversed(self.asked)))
        staying = [actor for actor in self.nodes if actor not in self.going]
        staying.sort(key=self.free.__contains__)  # those at work are kept rather
        for actor in staying[count:]:
            self.let_go(actor)
        while self.size + len(self.asked) < asked:
            self._ask(cpus)

    def avoid(self, nodes: frozenset[str]) -> None:
        """Ask for no actor on these nodes, which are gone; those that were asked for before are asked for again."""
        if nodes - self.avoided:
            for token in list(self.asked):
                self._drop(token)
        self.avoided = nodes

    def leave(self, staying: dict[str, Any]) -> None:
        """Let go the actors on other nodes than those that stay."""
        if staying.keys() != self._staying:  # those that were to start there have died, too
            self._staying, self.failed_starts = set(staying), 0
        for actor in [actor for actor, node in self.nodes.items() if node not in staying]:
            self.let_go(actor)

    def settle(self, token: Any) -> bool:
        """Register an actor that has answered, or forget one that died before it could; return which.

        Raises:
            LicError: it happened too often.
        """
        asked = self.asked.pop(token)
        try:
            node = ray.get(token)
        except RayError as error:
            ray.kill(asked.actor, no_restart=True)
            self.failed_starts += 1
            if self.failed_starts > RETRIES * self.stage.limit:
                why = " ".join(str(error).split())[:300]
                raise LicError(
                    f"the workers of stage '{self.stage.name}' do not start: {why}", hint=SAME_VERSION_HINT
                ) from error
            return False
        self.failed_starts = 0
        self.nodes[asked.actor] = node
        self.free.append(asked.actor)
        if not asked.cpus:
            self.sharing.add(asked.actor)
        return True

    def begin(self, argument: Any) -> tuple[Any, Any, Any]:
        """Give a free actor a call; return it, the call's token and its result's reference."""
        actor = self.free.popleft()
        token, result = actor.call.options(num_returns=2).remote(argument)
        if actor in self._warm:
            self._begun[actor] = time.monotonic()
        return actor, token, result

    def end(self, actor: Any) -> None:
        """Have an actor back from its call."""
        if (begun := self._begun.pop(actor, None)) is not None:
            self._recent.append(time.monotonic() - begun)
        self._warm.add(actor)
        if actor in self.going:
            self.lose(actor)
        else:
            self.free.append(actor)

    def let_go(self, actor: Any) -> None:
        """End an actor, after its call if it is at work."""
        if actor in self.free:
            self.free.remove(actor)
            self.lose(actor)
        else:
            self.going.add(actor)

    def lose(self, actor: Any) -> None:
        """End an actor that has no call for good, if it still lives."""
        ray.kill(actor, no_restart=True)
        self.nodes.pop(actor, None)
        self._begun.pop(actor, None)
        self.going.discard(actor)
        self.sharing.discard(actor)
        self._warm.discard(actor)

    def share_cpu(self, cpus: float) -> None:
        """If no actor could be placed for long, because others use the CPUs, ask for one that reserves none."""
        waiting = [(one.since, token) for token, one in self.asked.items() if one.cpus]
        if self.nodes or not waiting or ray.available_resources().get("CPU", 0) >= cpus:
            return
        since, token = min(waiting, key=lambda item: item[0])
        if time.monotonic() - since < PLACEMENT_SECONDS:
            return
        if self.stage.gpus:
            print(f"stage '{self.stage.name}' waits for a GPU", file=sys.stderr, flush=True)
            self.asked[token] = _Asked(self.asked[token].actor, self.asked[token].cpus, time.monotonic())
            return
        print(f"stage '{self.stage.name}' has no CPU of its own left: it shares one", file=sys.stderr, flush=True)
        self._drop(token)
        self._ask(0.0)

    def close(self) -> None:
        for actor in [*self.nodes, *(one.actor for one in self.asked.values())]:
            ray.kill(actor, no_restart=True)

    def _ask(self, cpus: float) -> None:
        options: dict[str, Any] = {"num_cpus": cpus, "num_gpus": self.stage.gpus, "max_restarts": 0}
        if self.avoided:  # with a byte of memory asked for, the driver's own node does the placing, and not any node
            options |= {"label_selector": {NODE: f"!in({','.join(sorted(self.avoided))})"}, "memory": 1}
        asked: Any = ray.remote(**options)
        actor: Any = asked(_Worker).remote(self.stage)
        self.asked[actor.placed.remote()] = _Asked(actor, cpus, time.monotonic())

    def _drop(self, token: Any) -> None:
        ray.kill(self.asked.pop(token).actor, no_restart=True)
