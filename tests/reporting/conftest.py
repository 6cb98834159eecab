"""Fixtures of the tests of reports."""

from __future__ import annotations

import pytest


@pytest.fixture()
def no_chart_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reports without their charts as files, which take most of a report's time: `test_report.py` looks at them."""
    monkeypatch.setattr("lic_dist.reporting.report.write_chart", lambda chart, folder: None)
