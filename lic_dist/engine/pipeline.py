"""Run several stages in this process, one thread each, so that one unit is read while another is encoded.

    units -> read -> | -> encode -> | -> search and write -> results, in the units' order

A stage hands its result over when the next one takes it, so that no more units are in flight than there are stages. The
work computes outside of Python's lock (torch, numba, codecs of pictures and of arrays), and threads wait for each other
there alone.
"""

from __future__ import annotations

import threading
from collections.abc import Generator, Sequence
from queue import Queue
from typing import Any, NamedTuple

from lic_dist.engine.stages import Stage, Work


class _Item(NamedTuple):
    """A unit on its way, with the result of the last stage, and what was raised on the way."""

    unit: Any
    value: Any
    error: BaseException | None = None
    last: bool = False  # no unit: all have been handed over


class _Handover:
    """Passes items from one thread to the next; `give` returns when the item is taken."""

    def __init__(self) -> None:
        self._queue: Queue[_Item] = Queue(1)

    def give(self, item: _Item) -> None:
        self._queue.put(item)
        self._queue.join()

    def take(self) -> _Item:
        item = self._queue.get()
        self._queue.task_done()
        return item


def run_in_threads(stages: Sequence[Stage], units: Sequence[Any]) -> Generator[tuple[Any, Any], None, None]:
    """Run `engine.run.run` for several stages in this process; see there.

    Units before one whose work raises are finished first. When the caller stops, units that are under way end at the
    stage that they are in.
    """
    stop = threading.Event()
    handovers = [_Handover() for _ in range(len(stages) + 1)]

    def hand_out() -> None:
        try:
            for unit in units:
                if stop.is_set():
                    break
                handovers[0].give(_Item(unit, unit))
        except BaseException as error:  # raised again where the results are taken
            handovers[0].give(_Item(None, None, error))
        handovers[0].give(_Item(None, None, last=True))

    def work_at(number: int) -> None:
        work: Work | None = None
        failed: BaseException | None = None  # after which this stage does no unit
        while not (item := handovers[number].take()).last:
            failed = failed or item.error
            if not stop.is_set() and failed is None and item.value is not None:
                try:
                    work = work or stages[number].make()
                    item = item._replace(value=work(item.value))
                except BaseException as error:  # raised again where the results are taken
                    failed = error
            handovers[number + 1].give(item._replace(error=failed))
        handovers[number + 1].give(item)

    threads = [threading.Thread(target=hand_out, daemon=True)]
    threads += [threading.Thread(target=work_at, args=(number,), daemon=True) for number in range(len(stages))]
    for thread in threads:
        thread.start()
    item = _Item(None, None)
    try:
        while not (item := handovers[-1].take()).last:
            if item.error is not None:
                raise item.error
            yield item.unit, item.value
    finally:
        stop.set()
        while not item.last:
            item = handovers[-1].take()
        for thread in threads:
            thread.join()
