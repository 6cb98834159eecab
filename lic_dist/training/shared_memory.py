"""Check the shared memory through which loader processes hand batches; small containers have 64 kB to 64 MB of it."""

from __future__ import annotations

import shutil
from pathlib import Path

from lic_dist.errors import LicError

SHARED = Path("/dev/shm")
AHEAD = 2  # batches that each process of a torch DataLoader makes ahead


def shortage(batch: int, workers: int) -> tuple[int, int] | None:
    """Return (free, needed) bytes where `workers` processes with batches of this size need more than is free, else
    None.
    """
    if not workers or not SHARED.is_dir():
        return None
    free, needed = shutil.disk_usage(SHARED).free, (AHEAD * workers + 1) * batch
    return (free, needed) if free < needed else None


def require(batch: int, workers: int) -> None:
    """Raise LicError where shared memory is too small: torch's processes would die one by one, and the job would
    hang.
    """
    if short := shortage(batch, workers):
        free, needed = (f"{size / 1e6:.1f} MB" for size in short)
        raise LicError(
            f"{SHARED} has {free} free; {workers} loader processes hand batches through {needed} of it",
            hint="finetune.workers: 0 reads in threads and needs none; a container takes --shm-size=1g",
        )
