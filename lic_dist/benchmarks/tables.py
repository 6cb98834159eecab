"""Tables that benchmarks print, and the machine that they ran on."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table


def machine() -> dict[str, Any]:
    """Return the hardware and the packages that figures were measured with."""
    from importlib.metadata import version

    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        lines = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        model = lines[0].split(":", 1)[1].strip() if lines else model
    return {"cpu": model, "cores": os.cpu_count(), **{name: version(name) for name in ("numpy", "numba", "torch")}}


def table(title: str, names: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """Return a table with the first column to the left and figures to the right."""
    made = Table(title=title)
    for index, name in enumerate(names):
        made.add_column(name, justify="right" if index else "left")
    for row in rows:
        made.add_row(*row)
    return made
