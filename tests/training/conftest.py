"""Stores that finetuning reads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from lic_dist.models import checkpoint
from tests.conftest import Once
from tests.training.several import TCQ, make_store


@pytest.fixture(scope="session")
def store(made: Path) -> Path:
    """The store that finetuning reads. Not to be changed."""
    return made


@pytest.fixture(scope="session")
def stored(trained: Callable[[str], Path], once: Once) -> Callable[[str], Path]:
    """Stores of these checkpoints, group g. Not to be changed."""

    def get(architecture: str) -> Path:
        parent = trained(architecture)

        def store(folder: Path) -> None:
            make_store(folder / "a.zarr", checkpoint.load(str(parent), architecture), TCQ)

        return once(f"stored-{architecture.rpartition(':')[2]}", store) / "a.zarr"

    return get
