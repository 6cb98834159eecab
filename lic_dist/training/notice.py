"""Notice that a rank is to leave its job: SIGTERM, or whatever else its launcher hears of.

The loop asks every rank at every step, and when one has notice all of them write a state and stop after the same step
(loop.py). Outside of the loop, SIGTERM ends a process as ever.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Notice:
    """Why this rank is to leave; nothing as a rule."""

    def __init__(self) -> None:
        self._why = ""

    def why(self) -> str:
        """Return why this rank is to leave, "" where it is not; asked at every step."""
        return self._why

    @contextmanager
    def heeding_signals(self) -> Iterator[None]:
        """Take a SIGTERM within the block for notice; a second one ends the process. For the main thread alone."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def heed(*_: Any) -> None:
            self._why = "SIGTERM"
            signal.signal(signal.SIGTERM, before)

        before = signal.signal(signal.SIGTERM, heed)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)
