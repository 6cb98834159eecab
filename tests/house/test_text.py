"""What people read of numbers and of progress."""

from __future__ import annotations

import pytest

from lic_dist.progress import Progress
from lic_dist.text import clock, counted


def test_one_thing_is_one_point_not_one_points() -> None:
    assert [counted(number, "point") for number in (0, 1, 2)] == ["0 points", "1 point", "2 points"]
    assert [clock(seconds) for seconds in (-1, 59.9, 61, 3600)] == ["0:00", "0:59", "1:01", "1:00:00"]


def test_a_progress_bar_never_passes_its_total(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("calibrating", 2, "trial", done=1) as bar:
        for expected in (2, 3, 4):
            bar.advance()
            assert bar.done <= bar.total == expected
    assert "calibrating: 4/4 trials" in capsys.readouterr().err
    with Progress("calibrating", 30, "trial") as bar:
        bar.advance()
        bar.complete()
    assert "calibrating: 1/1 trial," in capsys.readouterr().err
