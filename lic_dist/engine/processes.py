"""Run one stage in a pool of processes on this machine.

Processes are spawned, not forked, because threads of numba and zarrs do not survive a fork. A process makes its work
function once, at its first unit. Units are handed out in order, a few at a time, so that a long list costs nothing.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import threading
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from lic_dist.engine.stages import Stage, Work
from lic_dist.errors import LicError

START_METHOD = "spawn"

_make: Callable[[], Work]
_work: Work | None = None


def run_in_processes(stage: Stage, units: Sequence[Any]) -> Generator[tuple[Any, Any], None, None]:
    """Run `engine.run.run` for one stage in `stage.here` processes; see there.

    Raises:
        LicError: a process died; the units that it may have been working on are named.
    """
    workers = min(stage.here, len(units))
    context = multiprocessing.get_context(START_METHOD)
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_process, initargs=(stage.make,))
    left, in_flight = iter(units), dict[Future[Any], Any]()

    def fill() -> None:
        while len(in_flight) <= workers:  # one unit more than workers, so that no worker waits
            for unit in left:
                in_flight[pool.submit(_call, unit)] = unit
                break
            else:
                return

    try:
        fill()
        while in_flight:
            done, _ = wait(in_flight, return_when=FIRST_COMPLETED)
            failed = [future for future in done if future.exception() is not None]
            results = [(in_flight.pop(future), future.result()) for future in done.difference(failed)]
            broken: BrokenProcessPool | None = None
            try:
                if not failed:
                    fill()
            except BrokenProcessPool as error:  # finished results are yielded first
                broken = error
            yield from results
            if broken is not None:
                raise broken
            for future in failed:
                future.result()
    except BrokenProcessPool:
        raise LicError(
            f"a worker of stage '{stage.name}' died, at one of: {', '.join(map(str, in_flight.values()))}",
            hint="out of memory? fewer workers need less; what is finished stays finished",
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _start_process(make: Callable[[], Work]) -> None:
    """Set up a new process: Ctrl-C ends it silently, and it ends with its parent."""
    global _make
    _make = make
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _call(unit: Any) -> Any:
    global _work
    try:
        if _work is None:
            _work = _make()
        return _work(unit)
    except Exception as error:  # raised again, as one that can be pickled
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:  # the pool would report it as a broken pool
            raise LicError(f"{unit}: {type(error).__name__}: {error}") from None
        raise
