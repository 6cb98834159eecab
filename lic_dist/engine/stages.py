"""Stages of work over units, for any engine: this process, processes of this machine, or Ray.

A unit (a shard number, say) passes through all stages; the result of one stage is the argument of the next:

    unit -> read -> encode -> search and write -> result

A stage that has nothing to do for a unit returns None: that is then the unit's result, and later stages are skipped.
The engine does not know what the work is. Work must be idempotent, because a unit whose worker died starts again at its
first stage.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Work = Callable[[Any], Any]


@dataclass(frozen=True)
class Stage:
    """One step of the work, and the number of its workers, which may grow up to `most` where there is room.

    `make` is called once in each worker, before its first unit, and returns the function that does the work. It must
    pickle (a module-level function, or a functools.partial of one). `gpus` is what one worker holds.
    """

    name: str
    make: Callable[[], Work]
    workers: int = 1
    most: int = 0  # 0: as many as `workers`
    gpus: float = 0.0

    def __post_init__(self) -> None:
        if self.workers < 1 or self.gpus < 0:
            raise ValueError(f"stage {self.name}: {self.workers} workers with {self.gpus} GPUs each")

    @property
    def limit(self) -> int:
        """The greatest number of workers."""
        return max(self.workers, self.most)

    @property
    def here(self) -> int:
        """The number of workers on this machine alone."""
        return max(self.workers, min(self.limit, os.cpu_count() or 1))
