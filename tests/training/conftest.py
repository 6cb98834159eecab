"""Checkpoints and stores of the families of several stages."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from lic_dist.models import checkpoint
from lic_dist.training import base as base_job
from tests.training.several import TCQ, base_section, held_out, make_store


@pytest.fixture(scope="session")
def store(made: Path) -> Path:
    """The store that finetuning reads. Not to be changed."""
    return made


@pytest.fixture(scope="session")
def trained(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Checkpoints of a short base training, by the name of a family."""
    made: dict[str, Path] = {}

    def get(architecture: str) -> Path:
        if architecture not in made:
            out = tmp_path_factory.mktemp("base")
            made[architecture] = base_job.train(
                base_section(out, architecture, steps=60, quantile_steps=600), held_out(photos)
            )
        return made[architecture]

    return get


@pytest.fixture(scope="session")
def stored(trained: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Stores of these checkpoints, group g."""
    made: dict[str, Path] = {}

    def get(architecture: str) -> Path:
        if architecture not in made:
            made[architecture] = tmp_path_factory.mktemp("store") / "a.zarr"
            make_store(made[architecture], checkpoint.load(str(trained(architecture)), architecture), TCQ)
        return made[architecture]

    return get
