"""Fixtures of the tests of building."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.families import CHECKERED, SLICED


@pytest.fixture(scope="session")
def checkpoints(trained: Callable[[str], Path]) -> dict[str, Path]:
    """A checkpoint of a few seconds' training of each family of several stages, by the family's name."""
    return {one: trained(one) for one in (CHECKERED, SLICED)}
