"""Shared fixtures: a tiny untrained-but-sane model, synthetic photos, and the data that may lie beside the checkout."""

from __future__ import annotations

import os

os.environ.setdefault("GOMP_SPINCOUNT", "0")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_worker_niceness", "0")  # by default 15: beside another process of tests, workers starve
os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # Ray reads it once a process, and would set "token" itself

import multiprocessing
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock
from hypothesis import HealthCheck, settings
from PIL import Image

# Tests start more than a hundred processes: the package is compiled to bytecode once, not in each of them.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False
# What a test writes has to outlive its processes, not the machine. Thousands of calls wait for the disk otherwise.
os.fsync = os.fstat  # type: ignore[assignment]
# A process has one fork server, which whatever comes first starts: a loader of a test, or builds to be killed.
multiprocessing.get_context("forkserver").set_forkserver_preload(["tests.preloaded"])
settings.register_profile("shared", suppress_health_check=[HealthCheck.too_slow])  # others may use the machine
settings.load_profile("shared")
settings.register_profile("nightly", print_blob=True)  # pytest --hypothesis-profile nightly: see docs/contributing.md
HYPERPRIORS = ("block-transform", "bmshj2018-hyperprior", "mbt2018-mean")  # families of one stage
SHARED = Path(__file__).resolve().parents[2] / "shared"


# The files that take longest come first, so that no process of two is left with one at the end, and before them what
# makes `base` and `made`, beside a file that needs neither; those that wait for a Ray beside those that compute;
# test_startup after what compiles the kernels that it copies.
HEAVIEST = (
    *("cluster/test_ray_train", "benchmarks/test_benchmarks", "cluster/test_on_a_head", "training/test_finetune"),
    "cluster/test_elastic",
    *("building/test_kill", "house/test_printed", "app/test_study", "engine/test_on_ray", "training/test_ranks"),
    *("house/test_startup", "building/test_stages", "quantization/test_search", "cache/test_remote"),
    *("app/test_foreign", "app/test_families", "training/test_stages_jobs", "app/test_quickstart"),
    *("training/test_base_training", "building/test_walked", "training/test_families", "training/test_snapshots"),
    *("training/test_course", "training/test_stages", "training/test_variable_rate", "training/test_factorized"),
    "house/test_examples",
    *("house/test_docs", "reporting/test_report", "codec/test_codec", "codec/test_families", "codec/test_slices"),
    *("cache/test_stream", "evaluation/test_resuming", "app/test_cli", "reporting/test_page"),
)


def pytest_configure(config: pytest.Config) -> None:
    if not config.getoption("numprocesses", None):  # what only hands out tests waits for no torch
        import torch

        torch.set_num_threads(1)


def pytest_sessionstart(session: pytest.Session) -> None:
    if os.environ.get("PYTEST_XDIST_WORKER_COUNT") == "2":
        from tests.ahead import compile_half

        compile_half(int(os.environ["PYTEST_XDIST_WORKER"].removeprefix("gw")))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if settings.get_current_profile_name() != "nightly":
        by_night = [item for item in items if item.get_closest_marker("nightly")]
        items[:] = [item for item in items if item not in by_night]
        config.hook.pytest_deselected(items=by_night)
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


@pytest.fixture()
def forked_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers of the local engine come from this process's fork server, where a spawned one takes seconds to import."""
    monkeypatch.setattr("lic_dist.engine.processes.START_METHOD", "forkserver")


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


Once = Callable[[str, Callable[[Path], object]], Path]


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory) -> Once:
    """Fills a folder of a name by a function, once for all processes of the run."""
    own = tmp_path_factory.getbasetemp()
    parent = own.parent if "PYTEST_XDIST_WORKER" in os.environ else own

    def folder_of(name: str, fill: Callable[[Path], object]) -> Path:
        folder, filled = parent / f"once-{name}", parent / f"once-{name}.filled"
        with FileLock(parent / f"once-{name}.lock"):
            if not filled.exists():
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
                fill(folder)
                filled.touch()
        return folder

    return folder_of


@pytest.fixture(scope="session")
def photos(once: Once) -> Path:
    """Eight small photos in two subfolders; those in `valid` are to be held out. Not to be changed."""

    def draw(folder: Path) -> None:
        for part, seeds in (("train", range(6)), ("valid", range(6, 8))):
            (folder / part).mkdir()
            for seed in seeds:
                Image.fromarray(picture(seed, 140 + 8 * seed, 200)).save(folder / part / f"{seed}.png")

    return once("photos", draw)


@pytest.fixture(scope="session")
def base(photos: Path, once: Once) -> Path:
    """A checkpoint of a tiny model, trained for a few seconds by the real job. Not to be changed."""
    from lic_dist import config
    from lic_dist.training.base import train

    def trained(out: Path) -> None:
        section = config.Train(N=8, M=12, lmbda=0.05, steps=150, batch=4, crop=64, lr=2e-3, warmup=20, out=out)
        train(section, config.Images(path=photos, held_out="valid"))

    return once("base", trained) / "checkpoint.pth.tar"


@pytest.fixture(scope="session")
def trained(photos: Path, once: Once) -> Callable[[str], Path]:
    """Checkpoints of a short base training, N=4 and M=6, by the name of a family. Not to be changed."""
    from lic_dist.training.base import train
    from tests.training.several import base_section, held_out

    def get(architecture: str) -> Path:
        def made(out: Path) -> None:
            train(base_section(out, architecture, steps=60), held_out(photos))

        return once(f"trained-{architecture.rpartition(':')[2]}", made) / "checkpoint.pth.tar"

    return get


@pytest.fixture(scope="session")
def synthetic_store(once: Once) -> Path:
    """A synthetic store of ten samples in three shards, the sixth sample faulty. Not to be changed: see `built`."""

    from tests import stores

    def built(folder: Path) -> None:
        stores.create(folder / "a.zarr", stores.make_plan())
        stores.build(folder / "a.zarr", stores.make_plan())

    return once("synthetic", built) / "a.zarr"


@pytest.fixture()
def built(synthetic_store: Path, tmp_path: Path) -> Path:
    """A copy of the synthetic store."""
    return Path(shutil.copytree(synthetic_store, tmp_path / "a.zarr"))


@pytest.fixture(scope="session")
def made(base: Path, photos: Path, once: Once) -> Path:
    """A store of `photos` by `base`: 24 samples in three shards, group tcq8. Not to be changed: see `mine`."""
    from lic_dist.building.build import build
    from tests import stores

    def built(folder: Path) -> None:
        build(stores.experiment(base, photos, folder / "a.zarr", quantizer=stores.FIXED))

    return once("made", built) / "a.zarr"


@pytest.fixture()
def mine(made: Path, tmp_path: Path) -> Path:
    """A copy of the store, with the manifest that lies beside it."""
    shutil.copytree(made, tmp_path / "a.zarr")
    shutil.copy(made.parent / "a.manifest.parquet", tmp_path)
    return tmp_path / "a.zarr"
