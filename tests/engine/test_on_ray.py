"""On a Ray: every unit once, workers that die or do not start; builds and evaluations give what one process gives."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from lic_dist.building.build import build
from lic_dist.cache.verify import verify
from lic_dist.engine.run import run
from lic_dist.engine.stages import Stage
from lic_dist.errors import LicError
from lic_dist.evaluation.results import read_points
from lic_dist.evaluation.run import evaluate
from tests import stores
from tests.building.conftest import checkpoints  # noqa: F401  (a fixture)
from tests.cache import test_remote as remote
from tests.engine.test_engine import (
    ROOT,
    SlowToLoad,
    Unloadable,
    assert_none_ends_a_unit,
    make_add,
    make_broken,
    make_dies_always,
    make_dies_once,
    make_fail,
    make_log,
    make_narrow,
    make_process_id,
    make_square,
    make_wide,
)
from tests.evaluation.test_resuming import experiment as evaluation
from tests.evaluation.test_resuming import folder, members, timeless  # noqa: F401  (a fixture)
from tests.families import CHECKERED
from tests.stores import FIXED, contents, experiment, make_plan, objects

pytestmark = pytest.mark.slow
s3 = remote.s3


@pytest.fixture(scope="module")
def cluster(s3):
    """A Ray of two logical CPUs, shared by these tests, whose workers know the bucket."""
    from lic_dist.engine.ray_cluster import connected

    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), before]))
    with connected(None, num_cpus=2):
        yield
    os.environ.pop("PYTHONPATH") if before is None else os.environ.update(PYTHONPATH=before)


def test_ray_gives_every_unit_once_from_pools_larger_than_the_machine(cluster):
    stages = [Stage("square", make_square, 1), Stage("pid", make_process_id, 2)]  # three actors on two CPUs
    results = list(run(stages, range(20), engine="ray"))
    assert sorted(unit for unit, _ in results) == list(range(20))
    assert os.getpid() not in {process for _, process in results}


def test_ray_hands_large_results_between_stages(cluster):
    results = dict(run([Stage("wide", make_wide, 1), Stage("narrow", make_narrow, 1)], range(6), engine="ray"))
    assert results == {n: (n, float(n)) for n in range(6)}


def test_ray_bounds_units_in_flight(cluster, tmp_path):
    delays = {"fast": 0.0, "slow": 0.1}
    stages = [Stage(name, partial(make_log, tmp_path, name, seconds)) for name, seconds in delays.items()]
    list(run(stages, range(8), engine="ray"))
    fast, slow = (
        sorted(float(line.split()[1]) for line in (tmp_path / name).read_text().splitlines()) for name in delays
    )
    for n in range(2, 8):  # the unit after the first two enters only when one has left
        assert fast[n] >= slow[n - 2]


def test_ray_replaces_a_dead_worker_and_repeats_its_unit(cluster, tmp_path):
    stages = [Stage("add", partial(make_add, 10)), Stage("dies", partial(make_dies_once, tmp_path, 12))]
    assert sorted(run(stages, range(5), engine="ray")) == [(n, n + 10) for n in range(5)]
    assert (tmp_path / "died").exists()


def test_ray_gives_up_on_workers_that_do_not_start(cluster, monkeypatch):
    monkeypatch.setattr("lic_dist.engine.actors.RETRIES", 1)
    with pytest.raises(LicError, match="workers of stage 'strange' do not start") as caught:
        list(run([Stage("strange", Unloadable(), 1)], [1], engine="ray"))
    assert "installed on every node" in caught.value.hint


@pytest.mark.parametrize("workers", [1, 2])  # with CPUs to spare, and with none: then it shares one, once
def test_ray_waits_for_workers_that_are_slow_to_start(cluster, monkeypatch, workers):
    from lic_dist.engine import actors

    monkeypatch.setattr(actors, "PLACEMENT_SECONDS", 0.3)
    results = list(run([Stage("slow", SlowToLoad(), workers)], range(6), engine="ray"))
    assert sorted(unit for unit, _ in results) == list(range(6))


def test_none_ends_a_unit_before_the_later_stages(cluster):
    assert_none_ends_a_unit("ray")


def test_ray_gives_up_on_a_unit_that_kills_its_workers(cluster, tmp_path, monkeypatch):
    from lic_dist.engine import actors

    assert actors.RETRIES == 3
    monkeypatch.setattr(actors, "RETRIES", 1)
    with pytest.raises(LicError, match="shard 7: its worker in stage 'deadly' died 2 times"):
        list(run([Stage("deadly", partial(make_dies_always, tmp_path))], ["shard 7"], engine="ray"))
    assert (tmp_path / "attempts").read_text() == "xx"


def test_ray_raises_the_works_own_exception(cluster):
    failing = Stage("fails", partial(make_fail, LicError("no such checkpoint", hint="train one")))
    with pytest.raises(LicError) as caught:
        list(run([failing, Stage("add", partial(make_add, 0))], [1, 2], engine="ray"))
    assert type(caught.value) is LicError
    assert str(caught.value) == "no such checkpoint (train one)"


def test_ray_raises_what_make_raises(cluster):
    with pytest.raises(KeyError, match="of make") as caught:
        list(run([Stage("broken", make_broken)], [1], engine="ray"))
    assert type(caught.value) is KeyError


def test_ray_refuses_gpus_that_are_not_there(cluster):
    import ray

    if ray.cluster_resources().get("GPU", 0) >= 64:
        pytest.skip("so many GPUs")
    with pytest.raises(LicError, match="ask for 64 GPUs"):
        list(run([Stage("encode", make_square, 64, gpus=1.0)], [1], engine="ray"))


def test_ray_frees_its_workers_when_the_caller_stops_early(cluster):
    import ray

    results = run([Stage("square", make_square, 1)], range(50), engine="ray")
    next(results)
    results.close()
    deadline = time.monotonic() + 20
    while ray.available_resources().get("CPU") != 2 and time.monotonic() < deadline:
        time.sleep(0.1)
    assert ray.available_resources().get("CPU") == 2


def test_a_build_writes_the_same_bytes(cluster, made: Path, base: Path, photos: Path, tmp_path: Path) -> None:
    path = tmp_path / "ray.zarr"
    workers = {"name": "ray", "readers": 1, "encoders": 1, "searchers": 2}
    assert build(experiment(base, photos, path, quantizer=FIXED, engine=workers)).shards_built == 3
    assert contents(path) == contents(made)


def test_a_build_of_several_stages_writes_the_same_bytes(
    cluster,
    checkpoints: dict[str, Path],  # noqa: F811
    photos: Path,
    tmp_path: Path,
) -> None:
    for name, workers in (("local", {}), ("ray", {"name": "ray", "readers": 1, "encoders": 2})):
        sections = {"model": {"architecture": CHECKERED}, "quantizer": FIXED, "engine": workers}
        build(experiment(checkpoints[CHECKERED], photos, tmp_path / f"{name}.zarr", **sections))
    assert contents(tmp_path / "ray.zarr") == contents(tmp_path / "local.zarr")


def test_shards_in_a_folder_are_the_same_bytes(cluster, tmp_path: Path) -> None:
    planned = make_plan(18)
    local, ray = tmp_path / "local.zarr", tmp_path / "ray.zarr"
    for path in (local, ray):
        stores.create(path, planned)
    stores.build(local, planned)
    assert sorted(stores.build(ray, planned, engine="ray")) == [(0, 4), (1, 4), (2, 4), (3, 4), (4, 2)]
    assert objects(ray) == objects(local) and verify(ray) == []


def test_shards_in_a_bucket_are_the_same_bytes(cluster) -> None:
    local, ray = "s3://photos/local.zarr", "s3://photos/ray.zarr"
    for url, engine in ((local, {}), (ray, {"engine": "ray"})):
        remote.create(url)
        remote.build(url, **engine)
    assert remote.contents(ray) == remote.contents(local)


def test_an_evaluation_gives_the_same_figures(cluster, base: Path, folder: Path) -> None:  # noqa: F811
    found = {}
    for engine in ("local", "ray"):
        kept = {"show": ["sub/b.png"], "bitstreams": True}
        out = evaluate(evaluation(base, folder, f"{engine}.json", engine={"name": engine}, **kept))
        found[engine] = [replace(point, shown={}) for point in timeless(read_points(out))]
    assert found["ray"] == found["local"] and len(found["ray"]) == 2
    packed = {engine: members(folder / f"{engine}.bitstreams.zip") for engine in found}
    assert packed["ray"]["archive.json"] == packed["local"]["archive.json"]  # it has the digests of all
