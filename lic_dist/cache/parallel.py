"""Read many small objects at once, in threads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

READERS = 16  # objects read at once
TASKS = 8  # tasks for each thread, where there are many objects

T = TypeVar("T")
R = TypeVar("R")


def read_each(read: Callable[[T], R], items: Sequence[T]) -> list[R]:
    """Return what `read` makes of each item, in order; the first error is raised.

    A task takes several items, because handing one over costs as much as reading a small file.
    """
    size = max(1, len(items) // (READERS * TASKS))
    parts = [items[first : first + size] for first in range(0, len(items), size)]
    with ThreadPoolExecutor(READERS) as pool:
        return [found for part in pool.map(lambda part: [read(item) for item in part], parts) for found in part]
