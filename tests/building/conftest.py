"""Fixtures of the tests of building."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest

from lic_dist import config
from lic_dist.training import base as base_job
from tests.conftest import Once
from tests.families import CHECKERED, SLICED


@pytest.fixture(scope="session")
def checkpoints(photos: Path, once: Once) -> dict[str, Path]:
    """A checkpoint of a few seconds' training of each family of several stages, by the family's name."""

    def trained(architecture: str, out: Path) -> None:
        section = config.Train(
            architecture=architecture, N=8, M=12, lmbda=0.05, steps=60, batch=4, crop=64, lr=2e-3, warmup=20,
            quantile_steps=600, relaxation="mixed", out=out,
        )  # fmt: skip
        base_job.train(section, config.Images(path=photos, held_out="valid"))

    return {
        one: once(f"staged-{one.rpartition(':')[2]}", partial(trained, one)) / "checkpoint.pth.tar"
        for one in (CHECKERED, SLICED)
    }
