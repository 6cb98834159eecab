"""How much memory work takes, as the system counts it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from lic_dist.evaluation import memory
from lic_dist.evaluation.memory import Peak


def test_the_most_that_work_takes_and_not_what_was_before() -> None:
    before = np.ones(20_000_000)  # 160 MB
    del before
    peak = Peak()
    if peak.bytes is None:
        pytest.skip("this system does not tell")
    for _ in range(2):
        del_me = np.ones(10_000_000)
        del del_me
    found = peak.bytes
    assert found is not None and 70e6 < found < 120e6
    again = Peak().bytes
    assert again is not None and again < 20e6


def test_elsewhere_nothing_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(memory, "_OF_PROCESS", tmp_path / "proc")
    assert Peak().bytes is None
