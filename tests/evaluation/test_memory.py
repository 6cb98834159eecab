"""How much memory work takes, as the system counts it."""

from __future__ import annotations

import mmap
from pathlib import Path

import pytest

from lic_dist.evaluation import memory
from lic_dist.evaluation.memory import Peak


def take(megabytes: int) -> None:
    """Take so much memory and give it back, to the system and not to an allocator."""
    with mmap.mmap(-1, megabytes << 20) as taken:
        for page in range(0, len(taken), mmap.PAGESIZE):
            taken[page] = 1


def test_the_most_that_work_takes_and_not_what_was_before() -> None:
    take(160)
    peak = Peak()
    if peak.bytes is None:
        pytest.skip("this system does not tell")
    for _ in range(2):
        take(80)
    found = peak.bytes
    assert found is not None and 75 < found / 2**20 < 120
    again = Peak().bytes
    assert again is not None and again < 20 * 2**20


def test_elsewhere_nothing_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(memory, "_OF_PROCESS", tmp_path / "proc")
    assert Peak().bytes is None
