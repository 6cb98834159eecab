"""The most memory that a piece of work takes, as Linux counts the resident pages of a process."""

from __future__ import annotations

import re
from pathlib import Path

_OF_PROCESS = Path("/proc/self")


class Peak:
    """By how many bytes this process has grown at most since this object was made.

    What an allocator has kept of earlier work is no growth: of pictures of one size the first tells most.
    """

    def __init__(self) -> None:
        try:
            (_OF_PROCESS / "clear_refs").write_text("5")  # the high-water mark begins anew (proc(5))
            self._before = _resident("VmRSS")
        except OSError:  # another system, or a container that may not
            self._before = None

    @property
    def bytes(self) -> int | None:
        """None where the system does not tell."""
        most = None if self._before is None else _resident("VmHWM")
        return None if most is None or self._before is None else max(0, most - self._before)


def _resident(name: str) -> int | None:
    found = re.search(rf"^{name}:\s+(\d+) kB$", (_OF_PROCESS / "status").read_text(), re.MULTILINE)
    return 1024 * int(found[1]) if found else None
