"""Fixtures of the tests of building."""

from __future__ import annotations

from pathlib import Path

import pytest

from lic_dist import config
from lic_dist.training import base as base_job
from tests.families import CHECKERED, SLICED


@pytest.fixture(scope="session")
def checkpoints(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A checkpoint of a few seconds' training of each family of several stages, by the family's name."""
    made = {}
    for architecture in (CHECKERED, SLICED):
        out = tmp_path_factory.mktemp("staged")
        section = config.Train(
            architecture=architecture, N=8, M=12, lmbda=0.05, steps=60, batch=4, crop=64, lr=2e-3, warmup=20,
            quantile_steps=600, relaxation="mixed", out=out,
        )  # fmt: skip
        made[architecture] = base_job.train(section, config.Images(path=photos, held_out="valid"))
    return made
