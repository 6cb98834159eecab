"""Shared fixtures: a tiny untrained-but-sane model, synthetic photos, and the data that may lie beside the checkout."""

from __future__ import annotations

import os

os.environ.setdefault("GOMP_SPINCOUNT", "0")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # Ray reads it once a process, and would set "token" itself

import multiprocessing
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests import stores

torch.set_num_threads(1)
# A process has one fork server, which whatever comes first starts: a loader of a test, or builds to be killed.
multiprocessing.get_context("forkserver").set_forkserver_preload(["tests.preloaded"])
HYPERPRIORS = ("block-transform", "bmshj2018-hyperprior", "mbt2018-mean")  # families of one stage
SHARED = Path(__file__).resolve().parents[2] / "shared"


# The files that take longest come first, so that no process of two is left with one at the end.
HEAVIEST = (
    *("cluster/test_on_a_head", "training/test_finetune", "building/test_kill", "house/test_startup"),
    *("cache/test_remote", "house/test_printed", "training/test_ranks", "benchmarks/test_benchmarks"),
    *("engine/test_on_ray", "building/test_stages", "quantization/test_search", "app/test_study"),
    *("training/test_stages_jobs", "app/test_quickstart", "training/test_base_training", "building/test_walked"),
    *("reporting/test_report", "codec/test_codec", "codec/test_families", "cache/test_stream", "reporting/test_page"),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    ranks = {Path(__file__).parent / f"{name}.py": rank for rank, name in enumerate(HEAVIEST)}
    items.sort(key=lambda item: ranks.get(item.path, len(ranks)))


def dying_at(step: int) -> Callable[..., object]:
    """The training loop's `take_step`, that is interrupted at its step of this number, counted from one."""
    from lic_dist.training.loop import take_step

    steps = 0

    def die(*arguments: object) -> object:
        nonlocal steps
        steps += 1
        if steps == step:
            raise KeyboardInterrupt
        return take_step(*arguments)

    return die


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of data beside the checkout; the test is skipped where it is absent."""
    if not SHARED.is_dir():
        pytest.skip("the shared data is not here")
    return SHARED


def picture(seed: int, height: int, width: int) -> np.ndarray:
    """A smooth random picture with edges, uint8 [height, width, 3]."""
    generator = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width] / 64.0
    channels = []
    for _ in range(3):
        a, b, c, d = generator.uniform(0.5, 3, 4)
        wave = np.sin(a * x + b * y) + np.cos(c * x - d * y) + (x * a > y * b) * 0.7
        channels.append(wave + generator.normal(0, 0.05, wave.shape))
    stacked = np.stack(channels, -1)
    low, high = stacked.min(), stacked.max()
    return ((stacked - low) / (high - low) * 255).astype(np.uint8)


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight small photos in two subfolders; those in `valid` are to be held out."""
    folder = tmp_path_factory.mktemp("photos")
    for part, seeds in (("train", range(6)), ("valid", range(6, 8))):
        (folder / part).mkdir()
        for seed in seeds:
            Image.fromarray(picture(seed, 140 + 8 * seed, 200)).save(folder / part / f"{seed}.png")
    return folder


@pytest.fixture(scope="session")
def base(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a tiny model, trained for a few seconds by the real job."""
    from lic_dist import config
    from lic_dist.training.base import train

    out = tmp_path_factory.mktemp("base")
    section = config.Train(
        N=8, M=12, lmbda=0.05, steps=150, batch=4, crop=64, lr=2e-3, warmup=20, quantile_steps=600, out=out
    )
    return train(section, config.Images(path=photos, held_out="valid"))


@pytest.fixture(scope="session")
def synthetic_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A synthetic store of ten samples in three shards, the sixth sample faulty. Not to be changed: see `built`."""
    path = tmp_path_factory.mktemp("built") / "a.zarr"
    stores.create(path, stores.make_plan())
    stores.build(path, stores.make_plan())
    return path


@pytest.fixture()
def built(synthetic_store: Path, tmp_path: Path) -> Path:
    """A copy of the synthetic store."""
    return Path(shutil.copytree(synthetic_store, tmp_path / "a.zarr"))


@pytest.fixture(scope="session")
def made(base: Path, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of `photos` by `base`: 24 samples in three shards, group tcq8. Not to be changed: see `mine`."""
    from lic_dist.building.build import build

    path = tmp_path_factory.mktemp("made") / "a.zarr"
    build(stores.experiment(base, photos, path, quantizer=stores.FIXED))
    return path


@pytest.fixture()
def mine(made: Path, tmp_path: Path) -> Path:
    """A copy of the store, with the manifest that lies beside it."""
    shutil.copytree(made, tmp_path / "a.zarr")
    shutil.copy(made.parent / "a.manifest.parquet", tmp_path)
    return tmp_path / "a.zarr"
