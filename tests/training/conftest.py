"""Checkpoints and stores of the families of several stages."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from lic_dist.models import checkpoint
from lic_dist.training import base as base_job
from tests.conftest import Once
from tests.training.several import TCQ, base_section, held_out, make_store


@pytest.fixture(scope="session")
def store(made: Path) -> Path:
    """The store that finetuning reads. Not to be changed."""
    return made


@pytest.fixture(scope="session")
def trained(photos: Path, once: Once) -> Callable[[str], Path]:
    """Checkpoints of a short base training, by the name of a family. Not to be changed."""

    def get(architecture: str) -> Path:
        def train(out: Path) -> None:
            base_job.train(base_section(out, architecture, steps=60, quantile_steps=600), held_out(photos))

        return once(f"trained-{architecture.rpartition(':')[2]}", train) / "checkpoint.pth.tar"

    return get


@pytest.fixture(scope="session")
def stored(trained: Callable[[str], Path], once: Once) -> Callable[[str], Path]:
    """Stores of these checkpoints, group g. Not to be changed."""

    def get(architecture: str) -> Path:
        parent = trained(architecture)

        def store(folder: Path) -> None:
            make_store(folder / "a.zarr", checkpoint.load(str(parent), architecture), TCQ)

        return once(f"stored-{architecture.rpartition(':')[2]}", store) / "a.zarr"

    return get
